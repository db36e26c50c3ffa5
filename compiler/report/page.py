"""report.html: everything of a report on one self-contained page, made of report.json alone."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..data.data_distance import whose_statistics
from ..support.errors import first_line, plural
from ..support.strict_json import finite
from .cards import block_cards, labelled, run_name, runs_of_blocks, shared_path
from .pareto import pareto_plot
from .words import (
    ARROW,
    backend_words,
    clock_words,
    decision_rows,
    error_note,
    error_words,
    goal_ratio,
    goal_words,
    kind_words,
    lines,
    memory_words,
    metric_row,
    milliseconds,
    number,
    percent,
    regime_words,
    rewrite_words,
    saving_words,
    scaled,
    signed,
    stage_words,
    synthetic_words,
    time_words,
    verdict,
)

TEMPLATE = "report.html.j2"
#: More bars than these are put together.
MOST_BARS = 40
#: With more of them the bars stand beside the plot and the errors, else beside the plot alone.
TALL = 32


def report_page(report: Mapping[str, Any]) -> str:
    """The page of a report as plain data (`Report.to_dict`, or report.json). Everything is drawn as it stands there;
    scripts only show details next to the pointer."""
    # earlier versions wrote Infinity and NaN, which Python reads
    return _environment().get_template(TEMPLATE).render(_content(finite(report)))


def page_or_reason(report: Mapping[str, Any]) -> str:
    """The page, or one that says what is wrong with it, with a warning: a compile is not lost over its picture."""
    try:
        return report_page(report)
    except Exception as cause:  # whatever it is, report.json has the figures
        reason = f"the page of the report could not be made: {first_line(cause)}"
        warnings.warn(reason, stacklevel=3)
        return f"<!doctype html><title>foldcut report</title><p>{escape(reason)}. report.json has all figures.</p>\n"


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": number,
        "scaled": scaled,
        "percent": percent,
        "ms": milliseconds,
        "stage": stage_words,
        "breakable": _breakable,
        "px": lambda value: f"{value:.1f}".removesuffix(".0"),
    }
    return made


def _breakable(name: str) -> Markup:
    """A name that may break behind its separators before it breaks anywhere. Escaped here: the filter makes a tag."""
    return Markup("<wbr>").join(re.split("(?<=[./_])", name))


def _content(report: Mapping[str, Any]) -> dict[str, Any]:
    graph, times = report.get("graph", {}), report.get("block_latency", {})
    bars = _bars(graph, times)
    return {
        "report": report,
        "model": report.get("model") or "Unnamed network",
        "shared": shared_path(graph.get("blocks", ())).rstrip("./"),
        "goal": goal_words(report),
        "verdict": verdict(report["latency"]),
        "backend": backend_words(str(report["backend"])),
        "clock": clock_words(str(report["latency"]["clock"])),
        "setting": _setting(report),
        "ruler": _ruler(report),
        "tiles": _tiles(report),
        "plot": pareto_plot(report),
        "legend": _legend(report),
        "bars": bars,
        "bar_unit": "ms" if bars and bars[0]["in_ms"] else "\u00b5s",
        "tall": len(bars) > TALL,
        "no_bars": times.get("missing", "not recorded"),
        "stages": _stages(report),
        "error": error_words(report),
        "changes": _changes(report),
        "in_turn": any("error_added" in change for change in report.get("changes", ())),
        "cards": block_cards(graph, times) if graph.get("blocks") else [],
        "shown": {layer["change"] for block in graph.get("blocks", ()) for layer in block["layers"]},
        "no_graph": graph.get("missing", "not recorded"),
        "decisions": decision_rows(report),
        "groups": [g for g in report.get("groups", ()) if g["kept"] < g["total"] or not g.get("locked")],
        "locked": [g for g in report.get("groups", ()) if g.get("locked")],
        "facts": _facts(report),
        "synthetic": synthetic_words(report),
        "seconds": report["seconds"],
        "total_s": sum(stage["wall"] for stage in report["seconds"].values()),
    }


def _setting(report: Mapping[str, Any]) -> str:
    """Where it was measured, in a line."""
    threads = report["environment"].get("threads")
    parts = [backend_words(str(report["backend"])), f"batch {report['batch']}"]
    parts += [plural(int(threads), "thread")] if threads is not None else []
    parts += [str(report["environment"]["cpu"])] if report["environment"].get("cpu") else []
    return ", ".join(parts)


def _ruler(report: Mapping[str, Any]) -> dict[str, Any]:
    """The measured interval and the goal on a line from 0 to the original's latency, or to what is slower, in %."""
    latency, goal = report["latency"], goal_ratio(report)
    most = max(1.0, float(latency["high"]), goal or 0.0)
    share = {key: 100 * float(latency[key]) / most for key in ("ratio", "low", "high")}
    one, place = 100 / most, None if goal is None else 100 * goal / most
    sides = {"one_side": _side(one), "goal_side": _side(place or 0.0)}
    return {**share, **sides, "one": one, "goal": place, "goal_ratio": goal}


def _side(place: float) -> str:
    """Where the label of a place on the ruler, in %, begins: one in the middle would stick out at an end."""
    return "from-left" if place < 15 else "from-right" if place > 85 else "centred"


def _tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures below the headline: (what, before, after, change)."""
    latency, macs, parameters = report["latency"], report["macs"], report["parameters"]

    def tile(label: str, before: str, after: str, note: str) -> dict[str, str]:
        return {"label": label, "before": before, "after": after, "note": note}

    def ratio(pair: Mapping[str, int]) -> str:
        return f"{percent(pair['after'] / pair['before'])} left" if pair["before"] else ""

    return [
        tile("Latency", number(latency["before_ms"]), milliseconds(latency["after_ms"]), "median of one inference"),
        tile("Multiply-accumulates", scaled(macs["before"]), scaled(macs["after"]), ratio(macs)),
        tile("Parameters", scaled(parameters["before"]), scaled(parameters["after"]), ratio(parameters)),
        *([tile("ONNX file", *_file_words(report["file_bytes"]))] if report.get("file_bytes") else []),
        *(tile(f["label"], f["before"], f["after"], f["note"]) for f in report.get("figures", ())),
        *([tile(*metric_row(report["metric"]))] if report.get("metric") else []),
        tile("Output error", "0", number(report["output_error"]), f"relative mean square {error_note(report)}"),
    ]


def _file_words(sizes: Mapping[str, int]) -> tuple[str, str, str]:
    left = f"{percent(sizes['after'] / sizes['before'])} left" if sizes["before"] else ""
    return f"{scaled(sizes['before'])}B", f"{scaled(sizes['after'])}B", left


def _bars(graph: Mapping[str, Any], times: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A pair of bars for each block, as shares of the longest; neighbours together where there are very many."""
    blocks, before, after = graph.get("blocks", ()), times.get("before_ms", ()), times.get("after_ms", ())
    if not blocks or len(blocks) != len(before) or len(blocks) != len(after):
        return []
    timed = [
        {"name": b["name"], "label": b["label"], "before": x, "after": y}
        for b, x, y in zip(labelled(blocks), before, after, strict=True)
    ]
    rows: list[dict[str, Any]] = []
    for run in runs_of_blocks(timed, MOST_BARS):
        names = {key: run_name(run, key) for key in ("name", "label")}
        rows.append(
            {
                **names,
                "several": len(run) > 1,
                **{side: sum(block[side] for block in run) for side in ("before", "after")},
            }
        )
    most = max(max(row["before"], row["after"]) for row in rows) or 1.0
    in_ms = most >= 0.1
    decimals = max(0, 2 - math.floor(math.log10(most if in_ms else 1000 * most)))
    for row in rows:
        scale = 1 if in_ms else 1000
        row["value"] = f"{scale * row['before']:.{decimals}f} {ARROW} {scale * row['after']:.{decimals}f}"
        row["in_ms"] = in_ms
        row["before_share"], row["after_share"] = 100 * row["before"] / most, 100 * row["after"] / most
        saved = 1 - row["after"] / row["before"] if row["before"] else 0.0
        row["tip"] = lines(
            [
                row["name"],
                f"before {milliseconds(row['before'])}",
                f"after {milliseconds(row['after'])}",
                f"{percent(abs(saved))} {'less' if saved >= 0 else 'more'}",
            ]
        )
    return rows


def _stages(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The judged errors one after the other, then that of the test."""
    errors: dict[str, float | None] = dict(report["output_errors"])
    if report.get("test"):
        errors["test"] = report["output_error"]
    most = max([e for e in errors.values() if e is not None], default=0.0) or 1.0
    return [
        {"stage": stage, "error": error, "share": 100.0 if error is None else 100 * error / most}
        for stage, error in errors.items()
    ]


def _changes(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each class of change: how many, what it costs by itself, and the best plan of this class alone that was tried."""
    made = {change["kind"]: change for change in report.get("changes", ())}
    rows = []
    for kind in dict.fromkeys((*report.get("kinds", ()), *made)):
        plans = [t for t in report.get("tried", ()) if [k for k, n in t["counts"].items() if n] == [kind]]
        if kind not in made and not plans:
            continue
        _, words, colour = kind_words(report, kind)
        change = made.get(kind, {"count": 0})
        alone = number(change["error_alone"]) if "error_alone" in change else ""
        rows.append(
            {
                "words": words,
                "colour": colour,
                "count": change["count"],
                "alone": "not apart" if change.get("missing") else alone,
                "added": signed(change["error_added"]) if "error_added" in change else "",
                "saved": saving_words(change["saving"]) if "saving" in change else "",
                "plan": min(plans, key=lambda t: math.inf if t["error"] is None else t["error"], default=None),
            }
        )
    return rows


def _legend(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(mark, words) of the kinds of plans that may be in the plot."""
    return [*((kind["mark"], kind["many"]) for kind in report.get("kinds", {}).values()), ("mix", "a mix")]


def _divided(calibration: Mapping[str, Any], labelled: bool) -> list[tuple[str, str]]:
    """What the samples were used for; of `labelled` ones those that test are what the metric was read on."""
    if "test" not in calibration:
        return [("held out", percent(calibration["held_out"]) + " of them, at most 64, at least one")]
    rows = [
        ("to fit", f"{calibration['fit']} with views"),
        ("to judge", f"{calibration['judge']}, by which plans and stages were compared"),
        ("to test", f"{calibration['test']}, by which nothing was chosen{' but what the metric chose' * labelled}"),
    ]
    if calibration.get("ignored"):
        rows.append(("left out", "fields that are no inputs: " + ", ".join(calibration["ignored"])))
    if calibration["shared"]:
        rows.append(("too few", "some samples are in more than one of these parts"))
    return rows


def _distance(calibration: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How far the samples are from the data of the network; nothing of reports that do not say."""
    if "distance" not in calibration:
        return []
    found = calibration["distance"]
    if found is None:
        return [("unlike its data", "not known: the network has no batch norms, and no reference was given")]
    whose = whose_statistics(found["known_from"])
    figures = f"{found['median']:.2f} standard deviations (median over layers; {found['largest']:.2f} at most)"
    return [("unlike its data", f"{figures} from what {whose}")]


def _facts(report: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the figures rest on: (heading, [(name, value)])."""
    latency, calibration = report["latency"], report["calibration"]
    measured = [
        ("backend", backend_words(str(report["backend"]))),
        ("batch", str(report["batch"])),
        ("clock", clock_words(str(latency["clock"]))),
        ("pairs", f"{latency['pairs']} (original and result in turns)"),
        ("ratio", f"{latency['ratio']:.4f} (95 %: {latency['low']:.4f} to {latency['high']:.4f})"),
        *_regime_rows(report),
        ("median", f"{number(latency['before_ms'])} {ARROW} {milliseconds(latency['after_ms'])}"),
        ("machine", "shared with other work meanwhile" if latency.get("contended") else "quiet"),
        ("ONNX against torch", f"largest difference {number(report['onnx_difference'])} of the largest output"),
    ]
    data = [
        ("samples", str(calibration["samples"]) + (", made without data" if calibration.get("synthetic") else "")),
        *_divided(calibration, bool(report.get("metric", {}).get("on_test"))),
        *_distance(calibration),
        ("fingerprint", str(calibration["fingerprint"])),
        ("seed", str(report["seed"])),
    ]
    rows = {**_origin(report), **report["environment"], **_memory(report)}
    machine = [(str(key).replace("_", " "), str(value)) for key, value in rows.items()]
    return [("Measurement", measured), ("Calibration", data), ("Environment", machine)]


def _memory(report: Mapping[str, Any]) -> dict[str, str]:
    """The memory that the process took, as far as the report says: earlier versions did not."""
    memory = report.get("memory", {})
    return {"peak memory": ", ".join(memory_words(memory))} if memory.get("peak_bytes") else {}


def _regime_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The regime that the figures are of, and the ratio in the other; earlier versions knew none."""
    own = report["latency"].get("regime")
    if own is None:
        return []
    rows = [("caches", regime_words(own))]
    for name, found in report.get("regimes", {}).items():
        if name == own:
            continue
        words = found.get("missing") or f"{found['ratio']:.4f} (95 %: {found['low']:.4f} to {found['high']:.4f})"
        rows.append((f"ratio, {name}", words))
    control = report["latency"].get("control")
    loads = len(report["latency"].get("loads") or ())
    return rows + ([("original beside itself", f"{control:.4f}, {plural(loads, 'fresh load')}")] if control else [])


def _origin(report: Mapping[str, Any]) -> dict[str, str]:
    """Which network it was and what made the report of it, as far as the report says: earlier versions did not."""
    if not report.get("model"):
        return {}
    return {
        "network": report["model"],
        "network fingerprint": report["fingerprint"],
        "made": time_words(report["made"]),
        "rewrites allowed": rewrite_words(report),
        "mimicked": "yes" if report["mimicked"] else ": ".join(filter(None, ("no", report.get("unmimicked")))),
        **report["versions"],
    }
