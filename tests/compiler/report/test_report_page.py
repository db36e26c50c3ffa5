"""report.html: what it says, that it needs nothing but itself, and how it looks in a real browser."""

import copy
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.driver.report_parts import _kind, model_name, report_origin
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.report.cards import MOST_CARDS, MOST_VERTICES, _detail, block_cards, labelled, shared_path
from foldcut.compiler.report.graph import describe_graph
from foldcut.compiler.report.page import page_or_reason, report_page
from foldcut.compiler.report.pareto import nice_ticks, pareto_plot
from foldcut.compiler.report.words import number, scaled, verdict
from foldcut.passes.prune.decision import PruneChannels
from PIL import Image
from torch import nn

pytestmark = pytest.mark.usefixtures("quick_measurement")

HOSTILE = "<script>alert('&\"</title>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")


@pytest.fixture(scope="module")
def compiled(residual_net: nn.Module, nets: SimpleNamespace) -> foldcut.Compiled:
    return foldcut.compile(residual_net, nets.images(60), goal=foldcut.Blocks(1), mimic=None, progress=False)


@pytest.fixture(scope="module")
def report(compiled: foldcut.Compiled) -> dict[str, Any]:
    """A compile's own report, with set times, a latency goal and plans that were tried on the way to it.

    The times are set, not measured: what a busy machine measures of a network this small can reach past 1.
    """
    data = json.loads(json.dumps(compiled.report.to_dict()))
    ratio = 0.7251
    data["latency"] |= {"ratio": ratio, "low": 0.7013, "high": 0.7494}
    goal = foldcut.Latency(round(ratio + 0.02, 4))
    data["goal"], data["goal_words"] = goal.to_dict(), goal.words()
    data["kinds"] = {rewrite.name: _kind(rewrite) for rewrite in (foldcut.Drop(), foldcut.Prune(), foldcut.Factorize())}
    error = data["output_error"] or 0.01
    data["tried"] = [
        {"ratio": ratio + 0.01, "error": 2 * error, "counts": {"drop_blocks": 1}, "chosen": True},
        {"ratio": ratio - 0.05, "error": 4 * error, "counts": {"prune_channels": 3}, "chosen": False},
        {"ratio": ratio + 0.08, "error": 3 * error, "counts": {"factorize": 2}, "chosen": False},
        {"ratio": ratio, "error": 5 * error, "counts": {"drop_blocks": 1, "factorize": 1}, "chosen": False},
    ]
    return data


class Reader(HTMLParser):
    """Every tag with its attributes, the text outside of style and script, and whether tags close in order."""

    VOID = frozenset(("meta", "link", "br", "wbr", "path", "rect", "circle", "line"))

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"style", "script"}:
            self.text += data


def test_the_folder_has_the_page(compiled: foldcut.Compiled, tmp_path: Path) -> None:
    out = compiled.save(tmp_path / "out")
    written = (out / "report.html").read_text()
    assert written == report_page(json.loads((out / "report.json").read_text()))
    (out / "report.html").unlink()  # folders of older versions have none
    assert foldcut.load(out).report["version"] == 1


def test_it_is_one_valid_page(report: dict[str, Any]) -> None:
    page = report_page(report)
    assert page.startswith("<!doctype html>")
    read = Reader(page)
    assert read.open == []
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"pareto", "errors", "latency", "graph", "changes", "facts"} <= set(ids)


def test_it_says_what_was_measured(report: dict[str, Any]) -> None:
    text = " ".join(Reader(report_page(report)).text.split())
    latency = report["latency"]
    for value in (latency["ratio"], latency["low"], latency["high"]):
        assert f"\u00d7{value:.3f}" in text
    wanted = [number(latency["before_ms"]), number(latency["after_ms"]), f"{latency['pairs']} pairs"]
    wanted += [scaled(report[key][side]) for key in ("macs", "parameters") for side in ("before", "after")]
    wanted += [number(error) for error in report["output_errors"].values()]
    wanted += [number(error) for error in report["errors_by_output"].values()]
    wanted += [number(change["error_alone"]) for change in report["changes"]]
    wanted += [str(report["calibration"][key]) for key in ("samples", "fingerprint")]
    wanted += [str(value) for value in report["environment"].values()]
    wanted += [block["name"] for block in report["graph"]["blocks"]]
    wanted += ["Goal met", "ONNX Runtime", "blocks.1", "dropped"]
    assert [words for words in wanted if words not in text] == []
    assert report["errors_by_output"] == {"output": pytest.approx(report["output_error"])}
    assert len(report["block_latency"]["before_ms"]) == len(report["graph"]["blocks"])


def test_an_unmet_goal_says_so(report: dict[str, Any]) -> None:
    text = Reader(report_page({**report, "met": False})).text
    assert "Goal not met" in text
    assert "Goal met" not in text


def test_it_loads_nothing(report: dict[str, Any]) -> None:
    page = report_page(report)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r"^\s*// .*$", "", page, flags=re.M))
    loads = [(tag, a) for tag, a in Reader(page).tags if {"src", "href"} & set(a)]
    assert loads == [("link", {"rel": "icon", "href": "data:,"})]


def test_names_are_escaped(report: dict[str, Any]) -> None:
    """Node names, paths, outputs and messages come from a file that somebody else made."""
    hostile = copy.deepcopy(report)
    for block in hostile["graph"]["blocks"]:
        block["name"] += HOSTILE
        for layer in block["layers"]:
            layer["path"] += HOSTILE
            layer["operation"] = HOSTILE
        for join in block["joins"]:
            join["operation"] = HOSTILE
    for decision in hostile["decisions"]:
        decision["path"] = HOSTILE
    hostile |= {"rejects": [HOSTILE], "warnings": [HOSTILE], "errors_by_output": {HOSTILE: 0.1}, "backend": HOSTILE}
    hostile["environment"] = {HOSTILE: HOSTILE}
    hostile |= {"model": HOSTILE, "fingerprint": HOSTILE, "made": HOSTILE, "rewrites": [HOSTILE]}
    hostile["versions"] = {"foldcut": HOSTILE, "<b>": HOSTILE}
    hostile["block_latency"] = {"missing": HOSTILE}
    page = report_page(hostile)
    assert "<script>alert" not in page
    plain, read = Reader(report_page(report)), Reader(page)
    assert [t for t, _ in read.tags].count("script") == 1
    assert read.open == []
    assert HOSTILE in read.text
    # warnings are shown open, where there are some; nothing else may come in
    assert {k for _, a in read.tags for k in a} - {"open"} == {k for _, a in plain.tags for k in a} - {"open"}


def test_parts_that_are_missing_give_their_reason(report: dict[str, Any]) -> None:
    bare = {**report, "graph": {"missing": "no layout"}, "block_latency": {"missing": "no clock"}, "tried": []}
    text = Reader(report_page(bare)).text
    assert "No picture: no layout." in text
    assert "Not profiled: no clock." in text
    older = {k: v for k, v in report.items() if k not in {"graph", "block_latency", "tried", "changes"}}
    assert Reader(report_page({**older, "errors_by_output": {}})).open == []


def test_it_says_which_network_it_is_of_and_what_made_it(compiled: foldcut.Compiled, report: dict[str, Any]) -> None:
    assert (report["model"], report["fingerprint"]) == ("ResNet", compiled.plan.fingerprint)
    age = datetime.now(UTC) - datetime.fromisoformat(report["made"])
    assert timedelta(seconds=-1) < age < timedelta(hours=1)
    assert report["versions"] == {"foldcut": foldcut.__version__, "torch": torch.__version__}
    assert (report["rewrites"], report["mimicked"]) == (["drop_blocks"], False)
    page = report_page({**report, "rewrites": ["drop_blocks", "factorize"], "mimicked": True})
    ratio = f"{report['latency']['ratio']:.3f}"
    assert f"<title>ResNet: {ratio} of the latency (foldcut report)</title>" in page
    assert "<h1>ResNet</h1>" in page
    facts = " ".join(Reader(page).text.split("What the figures rest on")[1].split())
    made = report["made"].replace("T", " ").replace("Z", " UTC")
    wanted = [*report["versions"].values(), report["fingerprint"], made, "drop blocks, factorise layers", "mimickedyes"]
    assert [words for words in wanted if words not in facts] == []
    assert "mimickedno" in Reader(report_page(report)).text


def test_the_name_of_a_network(nets: SimpleNamespace) -> None:
    assert model_name(Path("some/folder/net.onnx")) == model_name("net.onnx") == "net.onnx"
    assert model_name(nets.ResNet()) == "ResNet"
    model_name("net-\udcff.onnx").encode()  # a byte that is no text would end the writing of the page


def test_what_was_allowed_and_whether_it_mimicked() -> None:
    plan = SimpleNamespace(fingerprint="abc", decisions=())
    used = (foldcut.Drop(), foldcut.Factorize())
    outcome: Any = SimpleNamespace(plan=plan, rewrites=used, output_errors={"re-solved": 0.2})
    found = report_origin(outcome, "net.pt2")
    assert (found["model"], found["rewrites"], found["mimicked"]) == ("net.pt2", ["drop_blocks", "factorize"], False)
    outcome.output_errors["mimicked"] = 0.1
    assert report_origin(outcome, "net.pt2")["mimicked"]


def test_a_report_of_an_earlier_version_has_no_name(report: dict[str, Any]) -> None:
    new = {"model", "fingerprint", "made", "versions", "rewrites", "mimicked"}
    read = Reader(report_page({key: value for key, value in report.items() if key not in new}))
    assert read.open == [] and "Unnamed network" in read.text


def not_finite(report: foldcut.Report) -> foldcut.Report:
    """As of a network whose outputs overflow."""
    return replace(
        report,
        output_error=math.inf,
        output_errors={"dropped": 0.5, "re-solved": math.nan, "mimicked": math.inf},
        errors_by_output={"far": math.inf, "near": 0.125},
        onnx_difference=math.nan,
        changes=[{"kind": "drop_blocks", "count": 1, "error_alone": math.inf}],
        tried=[
            {"ratio": 0.8, "error": math.inf, "counts": {"drop_blocks": 1}, "chosen": True},
            {"ratio": math.nan, "error": 0.1, "counts": {"factorize": 1}, "chosen": False},
            {"ratio": 0.9, "error": 0.2, "counts": {"prune_channels": 1}, "chosen": False},
        ],
    )


def test_figures_that_are_not_finite_are_null(compiled: foldcut.Compiled) -> None:
    """JSON has no Infinity, and the page says the same of both."""
    broken = replace(compiled, compiled_report=not_finite(compiled.report))
    data = json.loads(broken.files["report.json"], parse_constant=pytest.fail)
    assert data["output_error"] is None
    assert data["output_errors"] == {"dropped": 0.5, "re-solved": None, "mimicked": None}
    assert [plan["error"] for plan in data["tried"]] == [None, 0.1, 0.2]
    page = broken.files["report.html"].decode()
    assert Reader(page).text.count("not finite") >= 5
    assert "could not be made" not in page and len(pareto_plot(data)["points"]) == 1
    # what earlier versions wrote, as Python reads it
    earlier = {**data, "output_error": math.inf, "errors_by_output": {"far": math.inf, "near": 0.125}}
    assert report_page(earlier) == page


def test_a_page_that_cannot_be_made_is_no_error(report: dict[str, Any]) -> None:
    broken = {key: value for key, value in report.items() if key != "latency"}
    with pytest.warns(UserWarning, match="could not be made"):
        page = page_or_reason(broken)
    assert "report.json has all figures" in Reader(page).text


@pytest.mark.parametrize(
    "goal",
    [
        foldcut.Latency(ms=2.5),
        foldcut.Blocks(1),
        foldcut.Channels(0.5),
        foldcut.Macs(0.4),
        foldcut.Parameters(0.5),
        foldcut.MaxError(0.02),
        foldcut.Ranks(energy=0.99),
    ],
    ids=str,
)
def test_every_goal(goal: Any, report: dict[str, Any]) -> None:
    asked = {**report, "goal": goal.to_dict(), "goal_words": goal.words(), "goal_share": None}
    plot = pareto_plot(asked)
    assert (plot["goal"] is not None) == isinstance(goal, foldcut.Latency)
    figures = [v for v in goal.to_dict().values() if not isinstance(v, str)]
    text = Reader(report_page(asked)).text
    said = text[text.index("Goal: ") :].split(". It cost")[0]
    assert any(form in said for v in figures for form in (f"{v:g}", number(v), f"{100 * v:.0f} %"))


def test_points_stand_where_their_figures_say(report: dict[str, Any]) -> None:
    plot = pareto_plot(report)
    by_ratio = sorted(zip(report["tried"], plot["points"], strict=True), key=lambda pair: pair[0]["ratio"])
    assert [p["x"] for _, p in by_ratio] == sorted(p["x"] for _, p in by_ratio)
    by_error = sorted(zip(report["tried"], plot["points"], strict=True), key=lambda pair: -pair[0]["error"])
    assert [p["y"] for _, p in by_error] == sorted(p["y"] for _, p in by_error)
    assert [p["kind"] for p in plot["points"]] == ["drops", "channels", "ranks", "mix"]
    assert [p["chosen"] for p in plot["points"]] == [True, False, False, False]
    places = [*plot["points"], plot["result"], plot["original"]]
    assert all(plot["left"] <= p["x"] <= plot["right"] and plot["top"] <= p["y"] <= plot["bottom"] for p in places)
    assert plot["result"]["low"] <= plot["result"]["x"] <= plot["result"]["high"] < plot["original"]["x"]
    assert plot["result"]["x"] < plot["goal"]["x"]


def test_errors_far_apart_are_on_a_logarithmic_scale(report: dict[str, Any]) -> None:
    tried = [{**t, "error": 10.0 ** (i - 3)} for i, t in enumerate(report["tried"])]
    plot = pareto_plot({**report, "tried": tried, "output_error": 1e-4})
    assert plot["broken"]
    ys = [p["y"] for p in plot["points"]]
    assert [a - b for a, b in pairwise(ys)] == pytest.approx([ys[0] - ys[1]] * 3)
    assert plot["original"]["y"] > plot["result"]["y"] > ys[0]
    assert plot["y_ticks"][0]["text"] == "0"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.56, 1.02), (0.0, 0.0037), (-3.0, 250.0)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low <= tick <= high and len(f"{tick:g}") <= 6 for tick in ticks)


def test_numbers_in_words() -> None:
    assert [number(v) for v in (0, 0.0123456, 0.00001, 12.345, 1234.5)] == ["0", "0.0123", "0.0000100", "12.3", "1234"]
    assert [number(v) for v in (1e-9, 3e9, float("inf"))] == ["1.00e-09", "3.00e+09", "not finite"]
    assert [scaled(v) for v in (12, 2_359_296, 7.1e9)] == ["12", "2.36 M", "7.10 G"]
    assert "1.25 times as fast" in verdict({"ratio": 0.8, "low": 0.79, "high": 0.81})
    assert verdict({"ratio": 0.99, "low": 0.97, "high": 0.999}).startswith("no difference")
    assert verdict({"ratio": 1.1, "low": 1.05, "high": 1.2}).startswith("slower")


def test_one_of_them_is_not_several(compiled: foldcut.Compiled, report: dict[str, Any]) -> None:
    """In the page and in the table."""
    few = copy.deepcopy(report)
    few["test"]["samples"] = 1
    page = report_page(few)
    assert "on 1 test sample<" in page and "1 test samples" not in page
    few["calibration"]["synthetic"] = {"count": 1, "how": "noise"}
    page = report_page(few)
    assert "1 synthetic test sample<" in page and "1 sample was made from the network alone: noise" in page
    for test in ({"low": None, "high": None, "samples": 1}, {"low": 0.1, "high": 0.2, "samples": 1}):
        rows = replace(compiled.report, test=test).rows()
        note = next(row[3] for row in rows if row[0] == "output error")
        assert note == ("1 test sample" if test["low"] is None else "95 %: 0.1 to 0.2, 1 test sample")


def named(*names: str) -> list[dict[str, Any]]:
    return [{"name": name} for name in names]


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (("model.backbone.stem", "model.backbone.layer1.0", "model.backbone.layer1.1"), "model.backbone."),
        (("model.layers.0", "model.layers.1"), "model."),  # a mere number says too little
        (("model.a", "model.a.b"), "model."),
        (("model.a", "other.b"), ""),
        (("/net/a/Conv", "/net/b/Conv ... /net/b/Add", "Relu"), "/net/"),
        (("/a/Conv", "/b/Conv"), ""),
        (("model.backbone.stem",), ""),
        ((), ""),
    ],
)
def test_the_path_of_all_blocks(names: tuple[str, ...], shared: str) -> None:
    assert shared_path(named(*names)) == shared
    for block in labelled(named(*names)):
        assert block["label"] and not block["label"][0].isdigit()
        assert block["label"] == " ... ".join(end.removeprefix(shared) for end in block["name"].split(" ... "))


def test_a_path_that_comes_again_is_left_out_once() -> None:
    blocks = labelled(named("net.net.a", "net.b.net.c"))
    assert [block["label"] for block in blocks] == ["net.a", "b.net.c"]


def test_labels_leave_the_path_out_and_tips_do_not(report: dict[str, Any]) -> None:
    blocks = [{**block, "name": f"model.backbone.{block['name']}"} for block in report["graph"]["blocks"]]
    cards = block_cards({"blocks": blocks}, {})
    assert [card["label"] for card in cards] == [block["name"] for block in report["graph"]["blocks"]]
    assert [card["tip"].split("\n")[0] for card in cards] == [block["name"] for block in blocks]
    page = report_page({**report, "graph": {"blocks": blocks}})
    assert page.count("The names of blocks are those below <b>model.backbone</b>.") == 2
    assert "those below" not in report_page(report)


def boxes_overlap(a: dict[str, Any], b: dict[str, Any]) -> bool:
    across = a["x"] < b["x"] + b["w"] and b["x"] < a["x"] + a["w"]
    return across and bool(a["y"] < b["y"] + b["h"] and b["y"] < a["y"] + a["h"])


def wide_block(layers: int) -> dict[str, Any]:
    """A block of parallel chains of three layers that meet in one addition."""
    named = [{"name": f"n{i}", "path": f"branch{i // 3}.conv{i % 3}"} for i in range(layers)]
    made = {"operation": "convolution", "macs": {"before": 10, "after": 10}, "change": "kept"}
    starts, ends = [n["name"] for n in named[::3]], [n["name"] for n in named[2::3]]
    edges = (
        [["<in>", name] for name in starts] + [[name, "join"] for name in ends] + [["join", "<out>"], ["<in>", "join"]]
    )
    edges += [[f"n{i}", f"n{i + 1}"] for i in range(layers) if i % 3 != 2]
    return {
        "name": "wide",
        "layers": [{**n, **made} for n in named],
        "joins": [{"name": "join", "operation": "+"}],
        "edges": edges,
        "macs": {"before": 10 * layers, "after": 10 * layers},
    }


@pytest.mark.parametrize("layers", [3, 9, 24, 90])
def test_layers_of_a_card_do_not_overlap(layers: int) -> None:
    (card,) = block_cards({"blocks": [wide_block(layers)]}, {})
    chips = card["drawing"]["chips"]
    assert len(chips) + len(card["drawing"]["joins"]) <= MOST_VERTICES
    assert not any(boxes_overlap(a, b) for i, a in enumerate(chips) for b in chips[i + 1 :])
    assert all(c["x"] >= 0 and c["x"] + c["w"] <= card["drawing"]["width"] for c in chips)
    assert all(c["y"] >= 0 and c["y"] + c["h"] <= card["drawing"]["height"] for c in chips)


def test_long_networks_are_put_together(report: dict[str, Any]) -> None:
    """Several hundred blocks: runs of them by module path, nothing lost, and a page that is still a page."""
    block = report["graph"]["blocks"][2]
    blocks = [{**copy.deepcopy(block), "name": f"stage{i // 50}.{i % 50}"} for i in range(300)]
    cards = block_cards({"blocks": blocks}, {"before_ms": [1.0] * 300, "after_ms": [0.5] * 300})
    assert len(cards) <= MOST_CARDS
    assert [card["name"] for card in cards][:2] == ["stage0.0 \u2026 stage0.49", "stage1.0 \u2026 stage1.49"]
    assert sum(card["ms"]["before_ms"] for card in cards) == pytest.approx(300)
    assert sum(card["macs"]["before"] for card in cards) == 300 * block["macs"]["before"]
    unnamed = block_cards({"blocks": [{**b, "name": f"b{i}"} for i, b in enumerate(blocks)]}, {})
    assert len(unnamed) <= MOST_CARDS
    times = {"before_ms": [1.0] * 300, "after_ms": [0.5] * 300, "placed": 1.0}
    page = report_page({**report, "graph": {"blocks": blocks}, "block_latency": times})
    assert len(page) < 200_000


def test_pruned_layers_show_their_counts(residual_net: nn.Module, nets: SimpleNamespace) -> None:
    program = capture(residual_net, nets.images())
    group = next(g for g in foldcut.find_units(program).prunable if g.name.startswith("blocks.0"))
    cut = PruneChannels(group=group.name, kept=(0, 1), total=len(group))
    plan = foldcut.Plan(decisions=(cut,), goal=foldcut.Channels(0.5), fingerprint=program.fingerprint, predicted={})
    cards = block_cards(describe_graph(program, foldcut.apply_plan(program, plan), [cut]), {})
    chips = {chip["tip"].split("\n")[0]: chip for card in cards for chip in card["drawing"]["chips"]}
    assert (chips["blocks.0.conv1"]["detail"], chips["blocks.0.conv2"]["detail"]) == ("2/8", "in 2/8")
    assert "output channels: 2 of 8 kept" in chips["blocks.0.conv1"]["tip"]
    assert chips["blocks.0.conv1"]["fill"] == pytest.approx(chips["blocks.0.conv1"]["w"] / 4, abs=0.1)
    assert chips["stem.0"]["fill"] == chips["stem.0"]["w"]
    assert [card["state"] for card in cards] == ["kept", "changed", "kept", "kept", "kept"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        arguments = [f"--{flag}" for flag in ("no-sandbox", "disable-gpu", "disable-quic", *QUIET)]
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report_page(report))
    return path.as_uri()


@pytest.fixture(scope="module")
def shown(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """The page in a window of (width, colour scheme), with what it complained about and asked for."""
    width, scheme = getattr(request, "param", (1200, "light"))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda sent: asked.append(sent.url))
    page.goto(address)
    yield SimpleNamespace(page=page, said=said, asked=asked, width=width)
    context.close()


VIEWS = pytest.mark.parametrize(
    "shown", [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")], indirect=True, ids=str
)


@VIEWS
def test_it_is_silent_and_alone(shown: SimpleNamespace, address: str) -> None:
    assert shown.said == []
    assert [url for url in shown.asked if not url.startswith("data:")] == [address]


@VIEWS
def test_it_is_laid_out(shown: SimpleNamespace) -> None:
    """No scrolling sideways, no panel over another, nothing outside the window, nothing cut off in the cards."""
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= shown.width
    panels = [panel.bounding_box() for panel in shown.page.locator(".panel").all()]
    assert len(panels) == 7
    boxes = [{"x": b["x"], "y": b["y"], "w": b["width"], "h": b["height"]} for b in panels]
    assert not any(boxes_overlap(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert all(b["x"] >= 0 and b["x"] + b["w"] <= shown.width and b["h"] > 60 for b in boxes)
    cards = [card.bounding_box() for card in shown.page.locator(".block").all()]
    assert len(cards) == 5
    beside = [{"x": b["x"], "y": b["y"], "w": b["width"], "h": b["height"]} for b in cards]
    assert not any(boxes_overlap(a, b) for i, a in enumerate(beside) for b in beside[i + 1 :])
    cut_off = """[...document.querySelectorAll('h1, .ratio, h2, .tiles dd, .bar .value, .claim, .sub, .block .scroll')]
        .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"""
    assert shown.page.evaluate(cut_off) == []


@VIEWS
def test_plot_and_graph_are_drawn(shown: SimpleNamespace) -> None:
    """Points, bars and layers have a size and stand inside the plot and the cards, and pixels show them."""
    plot = shown.page.locator("#pareto > svg").bounding_box()
    assert plot["width"] > 250
    assert plot["height"] > 180
    for mark in shown.page.locator("#pareto svg .tip-at").all():
        box = mark.bounding_box()
        middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        assert plot["x"] <= middle[0] <= plot["x"] + plot["width"]
        assert plot["y"] <= middle[1] <= plot["y"] + plot["height"]
    assert shown.page.locator("#pareto .point").count() == 4
    assert shown.page.locator("#latency .bar").count() == 5
    assert all(bar.bounding_box()["width"] >= 1 for bar in shown.page.locator("#latency .was").all())
    assert shown.page.locator("#graph .chip").count() == 8
    assert shown.page.locator("#graph .chip.dropped").count() == 2
    assert shown.page.locator("#graph .shortcut").count() == 3


@contextmanager
def window(browser: Any, text: str, folder: Path, width: int) -> Iterator[Any]:
    path = folder / "invented.html"
    path.write_text(text)
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(path.as_uri())
    yield page
    page.close()


@pytest.mark.parametrize("width", [390, 1100])
def test_long_names_keep_their_ends(browser: Any, report: dict[str, Any], width: int, tmp_path: Path) -> None:
    """What tells two names apart is at their ends; a name is cut off at the front, and no figure is pushed out."""
    blocks = [
        {**block, "name": f"{'a_teacher_network.feature_extractor' if i < 3 else 'student.decoder'}.{block['name']}"}
        for i, block in enumerate(report["graph"]["blocks"])
    ]
    outputs = {"model.decoder.classification_head.logits": 0.0123, "x" * 90: 0.0456}
    long = {**report, "graph": {"blocks": blocks}, "errors_by_output": outputs, "model": "resnet_" * 20 + ".onnx"}
    with window(browser, report_page(long), tmp_path, width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        overhang = page.evaluate(
            """[...document.querySelectorAll('#latency bdi, .block .title bdi')].map(e => {
                const [a, b] = [e, e.parentElement].map(f => f.getBoundingClientRect());
                return [b.left - a.left, a.right - b.right]; })"""
        )
        assert len(overhang) == 10
        assert max(left for left, _ in overhang) > 20
        assert max(right for _, right in overhang) <= 1
        outside = """[...document.querySelectorAll('#errors .table, h1')]
            .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"""
        assert page.evaluate(outside) == []
        figures = [cell.bounding_box() for cell in page.locator("#errors td.figure").all()]
        assert all(box["x"] + box["width"] <= width and box["height"] > 10 for box in figures)


@pytest.mark.parametrize("width", [390, 1100])
@pytest.mark.parametrize("goal", [0.03, 0.5, 0.97])
def test_the_goal_is_named_inside(
    browser: Any, report: dict[str, Any], goal: float, width: int, tmp_path: Path
) -> None:
    """On the ruler and in the plot, also where it stands near an end."""
    near = {**report, "goal": {"kind": "latency", "ratio": goal}, "tried": []}
    with window(browser, report_page(near), tmp_path, width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for outer, inner in ((".ruler", ".ruler .mark, .ruler .one"), ("#pareto > svg", "#pareto text.name")):
            around = page.locator(outer).first.bounding_box()
            for mark in page.locator(inner).all():
                box = mark.bounding_box()
                assert box["x"] >= around["x"] - 1, mark.inner_text()
                assert box["x"] + box["width"] <= around["x"] + around["width"] + 1


def test_a_result_that_is_far_slower_keeps_its_ruler(browser: Any, report: dict[str, Any], tmp_path: Path) -> None:
    slow = {**report, "latency": {**report["latency"], "ratio": 9.0, "low": 8.9, "high": 9.1}}
    with window(browser, report_page(slow), tmp_path, 390) as page:
        ruler, one = (page.locator(name).bounding_box() for name in (".ruler", ".ruler .one"))
        assert ruler["x"] <= one["x"] and one["x"] + one["width"] <= ruler["x"] + ruler["width"]


def colours(page: Any, selector: str, folder: Path) -> dict[tuple[int, ...], int]:
    path = folder / "shot.png"
    page.locator(selector).first.screenshot(path=path)
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(1 << 24) or []
    return {colour: count for count, colour in found}


@pytest.mark.parametrize("selector", [".hero", "#pareto", "#latency", "#graph"])
@pytest.mark.parametrize("shown", [(1200, "light"), (390, "dark")], indirect=True, ids=str)
def test_no_part_is_blank(shown: SimpleNamespace, selector: str, tmp_path: Path) -> None:
    """A screenshot of each part has many colours, one of which is the background, and the accent among them."""
    found = colours(shown.page, selector, tmp_path)
    total, most = sum(found.values()), max(found.values())
    assert len(found) > 30
    assert 0.4 < most / total < 0.99
    accent = {".hero": "--after", "#pareto": "--after", "#latency": "--after", "#graph": "--drops"}[selector]
    wanted = shown.page.evaluate(
        f"""(() => {{ const e = document.createElement('i'); e.style.color = 'var({accent})';
            document.body.append(e); const c = getComputedStyle(e).color; e.remove(); return c; }})()"""
    )
    assert tuple(map(int, re.findall(r"\d+", wanted)[:3])) in found


def test_light_and_dark_differ(browser: Any, address: str) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(address)
        read = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        seen[scheme] = [sum(map(int, re.findall(r"\d+", c)[:3])) for c in page.evaluate(read)]
        page.close()
    (light_back, light_ink), (dark_back, dark_ink) = seen["light"], seen["dark"]
    assert light_back > light_ink + 400
    assert dark_ink > dark_back + 400


def test_details_on_hover_and_focus(shown: SimpleNamespace) -> None:
    page, tip = shown.page, shown.page.locator("#tip")
    assert not tip.is_visible()
    page.locator("#graph .chip.dropped").first.hover()
    assert tip.is_visible()
    assert tip.inner_text().startswith("blocks.1.conv1\n3 \u00d7 3 convolution\ndropped")
    page.locator("#graph .block.dropped header").hover()
    assert "2 layers, 2 dropped" in tip.inner_text()
    page.locator("#result").hover()
    assert "95 %" in tip.inner_text()
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= shown.width
    page.locator("#pareto .point").nth(1).focus()
    assert "3 groups pruned" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.locator("#latency .bar").nth(2).hover()
    assert re.search(r"before [\d.]+ ms\nafter 0 ms", tip.inner_text())
    page.mouse.move(2, 2)
    assert not tip.is_visible()


def test_without_scripts_everything_is_there(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator("#graph .chip").count() == 8
    assert page.locator("#graph .chip > title").count() == 8
    assert page.locator("#result").bounding_box()["width"] > 0
    context.close()


def test_a_layer_with_several_ranks_says_them_in_the_room_it_has() -> None:
    """Beside the name there is room for one pair; what they are of is in the tip."""
    layer = {"change": "factorized", "ranks": [48], "full": [144]}
    assert _detail(layer) == "rank 48/144"
    assert _detail({**layer, "ranks": [16, 32], "full": [48, 48]}) == "rank 16\u00d732"
