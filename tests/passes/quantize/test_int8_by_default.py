"""int8 under every goal in latency: where it pays, where it cannot, and what the report says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import foldcut
import onnx
import pytest
import torch
from foldcut.compiler.driver.builtin import chosen_rewrites
from foldcut.compiler.ir.edit_folds import fold_batch_norms
from foldcut.compiler.ir.segments import find_segments, is_dequantized
from foldcut.compiler.report.page import report_page
from foldcut.passes.quantize.edit_quantize import quantize_program
from foldcut.passes.quantize.quantize import Rounding, plain_integers
from foldcut.passes.quantize.ranges import GridKind
from foldcut.passes.quantize.savings import AT_ONCE, integer_savings
from foldcut.passes.quantize.values import quantizable, unquantizable, usual_grids, values_of
from foldcut.runtime.predict.integer_kernels import IntegerKernels, probe_integers
from foldcut.runtime.predict.latency_table import SegmentTime
from torch import nn

KERNELS = IntegerKernels(values="uint8", symmetric=False, weight_limit=63, refused="with weights up to 127: overflow")
OPTIONS: dict[str, Any] = {"mimic": False, "progress": False, "cache": False}


@pytest.fixture(scope="module")
def fast(counting_backend: Any) -> Any:
    """Convolutions in int8 take a quarter of the time."""

    class Integers(type(counting_backend)):  # type: ignore[misc]
        name = "fast integers"

        def load(self, engine: Any, inputs: Any, *, threads: int = 1) -> Any:
            runner = super().load(engine, inputs, threads=threads)
            graph = onnx.load_model_from_string(engine).graph
            made = {output: node for node in graph.node for output in node.output}
            convs = [node for node in graph.node if node.op_type == "Conv"]
            integer = [c for c in convs if made.get(c.input[1], c).op_type == "DequantizeLinear"]
            runner.time_ms = 1 + 4.0 * (len(convs) - len(integer)) + len(integer)
            return runner

    return Integers()


@pytest.fixture(scope="module")
def exact(quick_measurement: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foldcut.runtime.probe.latency_probe.probe_integers", lambda *_args, **_options: KERNELS)
        yield


@pytest.fixture(scope="module")
def mixed(nets: SimpleNamespace, fast: Any, exact: None) -> foldcut.Compiled:
    """A goal that neither drops nor int8 reach alone."""
    net = nets.seeded(lambda: nets.ResNet(2, 8))
    rewrites = ("drop_blocks", "quantize")
    return foldcut.compile(net, nets.images(60), goal=foldcut.Latency(0.25), rewrites=rewrites, backend=fast, **OPTIONS)


def shaped(program: foldcut.Program) -> tuple[foldcut.Program, foldcut.Program, dict[str, list[str]]]:
    """The network with norms folded, the same with all layers in int8, and the layers."""
    folded, _ = fold_batch_norms(program)
    names = list(quantizable(folded))
    grids = usual_grids(folded, values_of(folded, names), GridKind())
    whole = quantize_program(folded, grids, plain_integers(folded, names, grids, Rounding(limit=63)), note="int8")
    return folded, whole, {name: [name] for name in names}


def test_goals_in_latency_use_it() -> None:
    def used(goal: foldcut.Goal) -> list[str]:
        return [rewrite.name for rewrite in chosen_rewrites(goal, None, foldcut.PipelineSettings())]

    for goal in (foldcut.Latency(0.5), foldcut.Latency(ms=2, regime="cold"), foldcut.MaxError(0.1)):
        assert used(goal) == ["drop_blocks", "prune_channels", "factorize", "quantize"]
    others = [foldcut.Macs(0.5), foldcut.Parameters(0.5), foldcut.Blocks(1), foldcut.Channels(0.5)]
    assert all("quantize" not in used(goal) for goal in (*others, foldcut.Ranks(keep=0.5)))


def test_layers_to_be_left_alone_are(nets: SimpleNamespace, fast: Any, exact: None) -> None:
    settings = foldcut.PipelineSettings(ranks=foldcut.RankSettings(ignore=("blocks.0*", "stem*")))
    net = nets.seeded(lambda: nets.ResNet(2, 8))
    goal = foldcut.Latency(0.8)
    for rewrites in (("quantize",), ("drop_blocks", "quantize")):
        made = foldcut.compile(
            net, nets.images(60), goal=goal, rewrites=rewrites, backend=fast, settings=settings, **OPTIONS
        )
        rounded = [d.path for d in made.plan.decisions if isinstance(d, foldcut.QuantizeLayer)]
        assert not [path for path in rounded if path.startswith(("blocks.0", "stem"))]
        assert rounded or rewrites != ("quantize",)


@pytest.mark.parametrize("failure", [foldcut.BackendError("no such operator"), RuntimeError("no such operator")])
def test_a_backend_without_integers_loses_nothing(
    failure: Exception,
    nets: SimpleNamespace,
    counting_backend: Any,
    quick_measurement: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Floats(type(counting_backend)):  # type: ignore[misc]
        name = f"floats {type(failure).__name__}"

        def build(self, model: bytes, inputs: Any = None) -> bytes:
            if any(node.op_type == "QuantizeLinear" for node in onnx.load_model_from_string(model).graph.node):
                raise failure
            return model

    net = nets.seeded(lambda: nets.ResNet(2, 8))
    rewrites = ("drop_blocks", "quantize")
    monkeypatch.setattr("foldcut.runtime.probe.latency_probe.probe_integers", probe_integers)
    made = foldcut.compile(
        net, nets.images(60), goal=foldcut.Latency(0.9), rewrites=rewrites, backend=Floats(), **OPTIONS
    )
    assert {decision.kind for decision in made.plan.decisions} == {"drop_blocks"}
    (reason,) = [reject for reject in made.report.rejects if reject.startswith("quantize")]
    assert "does not compute int8 layers as ONNX defines them" in reason and "no such operator" in reason
    with pytest.raises(foldcut.BackendError, match="no such operator"):
        probe_integers(Floats())


class Table:
    """Segments take a unit each, those in int8 as many as told."""

    def __init__(self, units: float) -> None:
        self.units, self.timed = units, 0

    def predict(self, program: foldcut.Program, **_options: Any) -> Any:
        return SimpleNamespace(segments=[self._time(segment, 1.0) for segment in find_segments(program)])

    def time_segments(self, program: foldcut.Program, segments: Sequence[Any], **_options: Any) -> list[SegmentTime]:
        self.timed += len(segments)
        return [self._time(segment, self.units) for segment in segments]

    def _time(self, segment: Any, units: float) -> SegmentTime:
        return SegmentTime(name=segment.name, units=units, half_width=0.0)


def test_no_more_is_timed_than_may_pay(nets: SimpleNamespace) -> None:
    layers = [part for _ in range(3 * AT_ONCE) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    program = foldcut.capture(nets.seeded(lambda: nets.image_net(*layers)), nets.images(2))
    folded, whole, standing = shaped(program)
    slow, fair, quick = Table(4.0), Table(1.0), Table(0.5)
    assert integer_savings(slow, folded, whole, standing, 0.0) == {}  # type: ignore[arg-type]
    assert slow.timed == AT_ONCE
    assert integer_savings(fair, folded, whole, standing, 0.0) == {}  # type: ignore[arg-type]
    assert fair.timed > AT_ONCE
    savings = integer_savings(quick, folded, whole, standing, 0.0)  # type: ignore[arg-type]
    assert savings.keys() == standing.keys() and sum(s.saving for s in savings.values()) == pytest.approx(0.5, abs=0.05)
    assert all(s.share == pytest.approx(0.5, abs=0.05) for s in savings.values())


@pytest.mark.parametrize("units", [0.2, 0.5, 1.5])
def test_savings_add_up_to_what_the_network_was_measured_to_save(units: float, nets: SimpleNamespace) -> None:
    program = foldcut.capture(nets.seeded(lambda: nets.ResNet(2, 8)), nets.images(2))
    folded, whole, standing = shaped(program)
    savings = integer_savings(Table(units), folded, whole, standing, 0.3)  # type: ignore[arg-type]
    assert savings.keys() == standing.keys() and sum(s.saving for s in savings.values()) == pytest.approx(0.3)


def test_what_stays_in_floating_point_says_why(nets: SimpleNamespace) -> None:
    double = foldcut.capture(nets.seeded(lambda: nets.ResNet(1, 8)).double(), nets.images(2).double())
    assert not quantizable(double)
    assert {reason for _, reason in unquantizable(double)} == {"it computes in float64, not in float32"}
    up = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2, 2)).eval()
    program = foldcut.capture(up, nets.images(2))
    assert list(quantizable(program)) == ["conv2d"]
    ((_, reason),) = unquantizable(program)
    assert reason == "it is no convolution or linear layer with a weight of its own"


def test_what_is_in_integers_already_stays(nets: SimpleNamespace, fast: Any, exact: None) -> None:
    """A network that a tool has quantised in part: the rest may follow."""
    net = nets.seeded(lambda: nets.image_net(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]))
    images = nets.images(60)
    program = foldcut.capture(net, images[:2])
    first = list(quantizable(program))[1]
    (source,) = [node.name for node in program.nodes[first].all_input_nodes if node.op != "get_attr"]
    decision = foldcut.QuantizeLayer(layer=first, weight_limit=63, grids=((source, 0.02, 128), (first, 0.02, 128)))
    given = foldcut.Quantize().plain(program, [decision])
    reasons = dict(unquantizable(given))
    assert reasons.pop(first) == "it is in integers already"
    assert list(reasons.values()) == 2 * ["it stands beside what is in integers already"]
    made = foldcut.compile(
        given.module, images, goal=foldcut.Latency(0.9), rewrites=("quantize",), backend=fast, **OPTIONS
    )
    before = {name: value for name, value in given.module.state_dict().items() if name.endswith("_int8")}
    after = made.program.module.state_dict()
    assert before
    stored = [value for value in after.values() if value.dtype == torch.int8]
    for value in before.values():
        assert any(torch.equal(value, other) for other in stored)
    assert made.plan.decisions and first not in {decision.subject for decision in made.plan.decisions}
    assert any("in integers already" in reject for reject in made.report.rejects)


def test_the_report_has_the_precision_of_each_layer(mixed: foldcut.Compiled) -> None:
    report = mixed.report.to_dict()
    chosen = {d.layer for d in mixed.plan.decisions if isinstance(d, foldcut.QuantizeLayer)}
    layers = {layer["name"]: layer for block in report["graph"]["blocks"] for layer in block["layers"]}
    dropped = {name for name, layer in layers.items() if layer["change"] == "dropped"}
    assert chosen and dropped and chosen.isdisjoint(dropped)
    for name, layer in layers.items():
        if name in dropped:
            assert "precision" not in layer and layer["macs"]["after"] == 0
        elif name in chosen:
            assert (layer["precision"], layer["change"], layer["bits"]) == ("int8", "quantised", 8)
            assert layer["macs"]["after"] == layer["macs"]["before"]
        else:
            assert (layer["precision"], layer["change"]) == ("float32", "kept")
    page = report_page(report)
    assert "in int8" in page and "computed in int8" in page and "computed in float32" in page


def test_plans_name_the_bits(mixed: foldcut.Compiled) -> None:
    rounded = [d for d in mixed.plan.to_dict()["decisions"] if d["kind"] == "quantize"]
    assert rounded and {d["bits"] for d in rounded} == {8} and {d["weight_limit"] for d in rounded} == {63}


def test_the_report_says_how_much_is_in_int8_and_why_weights_are_coarse(mixed: foldcut.Compiled) -> None:
    words = "weights of 7 bits, because this machine's 8-bit kernels overflow"
    details = mixed.report.details["quantize"]
    assert details["weights"] == words
    rows = {row[0]: row[1:] for row in mixed.report.rows()}
    assert rows["MACs in int8"] == ("0 %", f"{100 * details['share_of_macs']:.0f} %", words)
    page = report_page(mixed.report.to_dict())
    assert "MACs in int8" in page and "weights of 7 bits" in page
    sizes = mixed.report.file_bytes
    assert sizes["after"] == len(mixed.onnx) and rows["ONNX file"][1] == f"{sizes['after'] / 1e3:.2f} kB"
    integers = [n for n in mixed.program.graph.nodes if is_dequantized(n)]
    assert integers and 0 < details["share_of_macs"] <= 1


def test_what_each_rewrite_gave(mixed: foldcut.Compiled, nets: SimpleNamespace) -> None:
    changes = {change["kind"]: change for change in mixed.report.changes}
    assert list(changes) == ["drop_blocks", "quantize"]
    assert all(change["saving"] > 0 for change in changes.values())
    # of 21 ms a dropped block saves 8; a convolution in int8 three
    rounded = changes["quantize"]["count"]
    assert changes["drop_blocks"]["saving"] == pytest.approx(8 * changes["drop_blocks"]["count"] / 21, abs=0.06)
    assert changes["quantize"]["saving"] == pytest.approx(3 * rounded / 21, abs=0.06)
    (chosen,) = [plan for plan in mixed.report.tried if plan["chosen"]]
    assert sum(change["error_added"] for change in changes.values()) == pytest.approx(chosen["error"])
    assert "in turn" in report_page(mixed.report.to_dict())


def test_reasons_are_one_line_for_the_network(nets: SimpleNamespace, contexts: Any) -> None:
    program = foldcut.capture(nets.seeded(lambda: nets.ResNet(2, 8)), nets.images(2))
    ctx = contexts(program, foldcut.CalibrationSet.of(nets.images(24)))
    refused = replace(foldcut.Quantize(), refused="kernels overflow")
    offer = refused.offer(ctx, None)  # type: ignore[arg-type]
    assert [str(reject) for reject in offer.rejects] == ["quantize: kernels overflow"] and not offer.items
