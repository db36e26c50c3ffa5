"""Numbers and decisions of a report in words, with units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..support.errors import plural
from ..support.memory import bytes_in_words

TIMES = "\u00d7"
ARROW = "\u2192"

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BACKENDS = {
    "onnxruntime": "ONNX Runtime",
    "onnxruntime-cuda": "ONNX Runtime (CUDA)",
    "onnxruntime-tensorrt": "ONNX Runtime (TensorRT)",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "torch": "torch",
}
_CLOCKS = {"thread_cpu": "CPU time of the thread", "wall": "elapsed time", "cuda": "time on the device"}
_REGIMES = {"hot": "hot: runs follow each other", "cold": "cold: caches are emptied before each run"}
_STAGES = {
    "unsolved": "rewritten, nothing solved yet",
    "rewritten": "rewritten, each rewrite with its own solve",
    "re-solved": "re-solved",
    "mimicked": "mimicked",
    "unchanged": "as it was",
    "test": "in the end, on the test samples",
}


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, without exponent where it has few zeros. None is what report.json has for
    one that is not finite."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if 1e-5 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{decimals}f}"
    return f"{value:.{digits - 1}e}"


def scaled(count: float) -> str:
    """``2.36 M`` of 2,359,296."""
    for size, prefix in _PREFIXES:
        if abs(count) >= size:
            return f"{number(count / size)} {prefix}"
    return f"{count:g}"


def memory_words(memory: Mapping[str, Any]) -> tuple[str, str]:
    """(``612 MiB``, ``of the process; limit 1.00 GiB``) of the memory in a report."""
    limit = memory.get("limit_bytes")
    allowed = "" if limit is None else f"; limit {bytes_in_words(limit)}"
    return bytes_in_words(memory["peak_bytes"]), f"of the process{allowed}"


def metric_row(metric: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """(name, before, after, note) of the user's metric: ``loses 0.5 (95 %: at most 1.2) on 200 samples; 4 calls, 3.1
    s``."""
    before, after = (_value(metric[key]) for key in ("before", "after"))
    calls = f"{plural(metric['calls'], 'call')}, {number(metric['seconds'], 2)} s"
    if metric["loss"] is None:
        return str(metric["name"]), before, after, f"it could not be read; {calls}"
    gains = metric["loss"] <= 0
    change = f"{'gains' if gains else 'loses'} {number(abs(metric['loss']))}"
    if metric["samples"]:
        change += f" (95 %: loses at most {number(metric['most'])}) on {plural(metric['samples'], 'sample')}"
    return str(metric["name"]), before, after, f"{change}; {calls}"


def _value(value: float | None) -> str:
    return "unknown" if value is None else number(value, 4)


def milliseconds(value_ms: float) -> str:
    """``0.423 ms``."""
    return f"{number(value_ms)} ms"


def percent(share: float) -> str:
    """``41 %``; a decimal below ten."""
    value = 100 * share
    return f"{value:.1f} %" if 0 < abs(value) < 10 else f"{value:.0f} %"


def signed(value: float | None) -> str:
    """``+0.0123``: what is added to a figure."""
    return number(value) if value is None or not value > 0 else f"+{number(value)}"


def saving_words(share: float | None) -> str:
    """What a change was predicted to save of the latency: ``27 % less latency``."""
    if share is None or not math.isfinite(share):
        return "latency not predicted"
    return f"{percent(abs(share))} {'less' if share >= 0 else 'more'} latency"


def goal_words(report: Mapping[str, Any]) -> str:
    """The goal as a sentence; earlier versions had its figures only."""
    figures = ", ".join(f"{key} {value}" for key, value in report["goal"].items() if key != "kind")
    return str(report.get("goal_words") or f"{report['goal'].get('kind')} {figures}")


def goal_ratio(report: Mapping[str, Any]) -> float | None:
    """The latency ratio that the goal asks for, where it asks for one; earlier versions had the goal's figures only."""
    if report.get("goal_share") is not None:
        return float(report["goal_share"])
    goal = report["goal"]
    if goal.get("kind") != "latency":
        return None
    ratio = goal.get("ratio")
    return float(ratio) if ratio is not None else float(goal["ms"]) / float(report["latency"]["before_ms"])


def error_words(report: Mapping[str, Any]) -> str:
    """The output error, its interval and the samples that it is of: ``0.0212 (95 %: 0.0180 to 0.0250) on 50 test
    samples``."""
    test = report.get("test") or {}
    low, high = test.get("low"), test.get("high")
    interval = "" if low is None or high is None else f" (95 %: {number(low)} to {number(high)})"
    return f"{number(report['output_error'])}{interval} on {_error_samples(report)}"


def error_note(report: Mapping[str, Any]) -> str:
    """What stands below the output error: its interval and the samples that it is of."""
    return error_words(report).removeprefix(number(report["output_error"])).strip()


def _error_samples(report: Mapping[str, Any]) -> str:
    """Reports of earlier versions know held-out samples only, which plans were chosen by too."""
    test = report.get("test")
    if test and report["calibration"].get("synthetic"):
        return plural(test["samples"], "synthetic test sample")
    return plural(test["samples"], "test sample") if test else "held-out samples"


def synthetic_words(report: Mapping[str, Any]) -> dict[str, str]:
    """What is to be said of samples that were made without data, in sentences, and their picture; nothing where there
    are data. Only what is a picture is shown as one."""
    made = report["calibration"].get("synthetic")
    if not made:
        return {}
    how = f"{plural(made.get('count', 0), 'sample was', 'samples were')} made from the network alone: {made.get('how')}"
    distance = made.get("distance") or {}
    if "after" in distance:
        how += (
            f"; their mean distance from the statistics of the batch norms fell from {number(distance['before'])} to "
            f"{number(distance['after'])} (0: the same means and deviations)"
        )
    disagreed = made.get("disagreement") or {}
    if "after" in disagreed:
        how += f"; another network's disagreement rose from {number(disagreed['before'])} to "
        how += f"{number(disagreed['after'])} (1: as much as there can be)"
    weak = str(made.get("weak") or "")
    picture = str(made.get("picture") or "")
    return {
        "how": how,
        "weak": weak[:1].upper() + weak[1:] + "." if weak else "",
        "picture": picture if picture.startswith("data:image/png;base64,") else "",
    }


def backend_words(name: str) -> str:
    """The backend's own name."""
    return _BACKENDS.get(name, name)


def regime_words(regime: str) -> str:
    """What the caches hold."""
    return _REGIMES.get(regime, regime)


def clock_words(clock: str) -> str:
    """What the clock shows."""
    return _CLOCKS.get(clock, clock)


def stage_words(stage: str) -> str:
    """What has been done to the network when an error was taken."""
    return _STAGES.get(stage, stage)


def rewrite_words(report: Mapping[str, Any]) -> str:
    """The rewrites that were allowed."""
    kinds = report.get("kinds", {})
    return ", ".join(kinds[name]["verb"] if name in kinds else name for name in report["rewrites"])


def time_words(made: str) -> str:
    """``2026-01-31 12:00:00 UTC`` of ``2026-01-31T12:00:00Z``."""
    return made.replace("T", " ").replace("Z", " UTC")


def verdict(latency: Mapping[str, Any]) -> str:
    """What the measurement lets one claim; the bounds are those of `Measurement`."""
    ratio, low, high = (float(latency[key]) for key in ("ratio", "low", "high"))
    if high < 1 and ratio <= 0.98:
        return f"{number(1 / ratio)} times as fast as the original"
    if low > 1 and ratio >= 1.02:
        return f"slower: it takes {number(ratio)} times as long as the original"
    return "no difference in latency that can be claimed"


def kind_words(report: Mapping[str, Any], kind: str) -> tuple[str, str, str]:
    """(one, several, mark) of a kind of decision; earlier versions only had its name."""
    known = report.get("kinds", {}).get(kind, {})
    name = kind.replace("_", " ")
    return known.get("one", name), known.get("many", name), known.get("mark", "mix")


def decision_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, float | None]]:
    """(mark, what, how, predicted error) of each decision."""
    words = report.get("words") or [{"what": d["kind"], "how": ""} for d in report["decisions"]]
    return [
        (kind_words(report, decision["kind"])[2], said["what"], said["how"], decision.get("error"))
        for decision, said in zip(report["decisions"], words, strict=True)
    ]


def rank_words(layer: Mapping[str, Any]) -> str:
    """``rank 8 of 24``."""
    ranks, full = (f" {TIMES} ".join(map(str, layer[key])) for key in ("ranks", "full"))
    return f"rank {ranks} of {full}"


def plan_words(report: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """What a plan does: ``2 blocks dropped, 5 layers factorised``."""
    parts = [plural(count, *kind_words(report, kind)[:2]) for kind, count in counts.items() if count]
    return ", ".join(parts) or "nothing changed"


def plan_mark(report: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """How a plan is drawn: by its only kind, or as a mix."""
    used = [kind for kind, count in counts.items() if count]
    return kind_words(report, used[0])[2] if len(used) == 1 else "mix"


def lines(parts: Sequence[str]) -> str:
    """Lines of a tooltip, empty ones left out."""
    return "\n".join(part for part in parts if part)
