"""The picture of a compile as plain data: blocks, layers, joins, and what became of each; latency per block."""

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import foldcut
import onnx
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.cost import node_macs, program_cost
from foldcut.compiler.ir.program import Program
from foldcut.compiler.report.block_latency import block_latency, blocks_of_values
from foldcut.compiler.report.graph import ENTRY, EXIT, block_of_calls, describe_graph
from foldcut.compiler.report.layer_words import layer_words
from foldcut.compiler.report.words import TIMES
from foldcut.passes.factorize.decision import FactorizeLayer
from foldcut.passes.factorize.select_ranks import RankAnalysis, RankSettings
from foldcut.passes.prune.decision import PruneChannels
from foldcut.runtime.onnxruntime.backend import OnnxRuntimeBackend
from torch import nn


@pytest.fixture(scope="module")
def plan(residual: Program, nets: SimpleNamespace) -> foldcut.Plan:
    """One change of each kind: the second block dropped, the first pruned, the last layer of the third factorised."""
    region = foldcut.find_regions(residual).blocks[1]
    group = next(g for g in foldcut.find_units(residual).prunable if g.name.startswith("blocks.0"))
    analysis = RankAnalysis(residual, CalibrationSet.of(nets.images(24)), settings=RankSettings(multiple_of=2))
    last = next(name for name in reversed(analysis.candidates) if "conv" in name)
    decisions = (
        foldcut.DropBlock(entry=region.entry, exit=region.exit, path=region.path, error=0.25, saving=0.125),
        PruneChannels(group=group.name, kept=(0, 1, 2), total=len(group)),
        analysis.decision(last, analysis.candidates[last].trial()),
    )
    return foldcut.Plan(decisions=decisions, goal=foldcut.Latency(0.5), fingerprint=residual.fingerprint, predicted={})


@pytest.fixture(scope="module")
def student(residual: Program, plan: foldcut.Plan) -> Program:
    return foldcut.apply_plan(residual, plan)


@pytest.fixture(scope="module")
def graph(residual: Program, student: Program, plan: foldcut.Plan) -> dict[str, Any]:
    return json.loads(json.dumps(describe_graph(residual, student, plan.decisions)))


def layers(graph: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {layer["path"]: layer for block in graph["blocks"] for layer in block["layers"]}


def test_blocks_are_those_of_the_network(graph: dict[str, Any]) -> None:
    assert [b["name"] for b in graph["blocks"]] == ["stem.0", "blocks.0", "blocks.1", "blocks.2", "head"]
    block = graph["blocks"][1]
    first, second = (layer["name"] for layer in block["layers"])
    (join,) = block["joins"]
    assert join["operation"] == "+"
    assert sorted(block["edges"]) == sorted(
        [[ENTRY, first], [first, second], [ENTRY, join["name"]], [second, join["name"]], [join["name"], EXIT]]
    )


def test_what_became_of_each_layer(graph: dict[str, Any], plan: foldcut.Plan) -> None:
    found = layers(graph)
    assert {path: layer["change"] for path, layer in found.items()} == {
        "stem.0": "kept",
        "blocks.0.conv1": "pruned",
        "blocks.0.conv2": "pruned",
        "blocks.1.conv1": "dropped",
        "blocks.1.conv2": "dropped",
        "blocks.2.conv1": "kept",
        "blocks.2.conv2": "factorised",
        "head": "kept",
    }
    assert found["blocks.0.conv1"]["outputs"] == {"kept": 3, "total": 8}
    assert found["blocks.0.conv1"]["inputs"] == {"kept": 8, "total": 8}
    assert found["blocks.0.conv2"]["inputs"] == {"kept": 3, "total": 8}
    ranked = plan.decisions[2]
    assert isinstance(ranked, FactorizeLayer)
    assert found["blocks.2.conv2"]["ranks"] == list(ranked.ranks)
    assert found["blocks.2.conv2"]["full"] == list(ranked.full)
    assert found["blocks.2.conv2"]["inputs"] == found["blocks.2.conv2"]["outputs"] == {"kept": 8, "total": 8}
    assert graph["blocks"][2]["drop"] == {"region": plan.decisions[0].region, "error": 0.25, "saving": 0.125}
    assert "drop" not in graph["blocks"][1]


def test_the_multiply_accumulates_add_up(graph: dict[str, Any], residual: Program, student: Program) -> None:
    for side, program in (("before", residual), ("after", student)):
        total = program_cost(program).macs
        assert sum(block["macs"][side] for block in graph["blocks"]) == total
        assert sum(layer["macs"][side] for layer in layers(graph).values()) == total
    assert graph["blocks"][2]["macs"]["after"] == 0


def test_a_call_that_is_new_belongs_where_its_result_goes(residual: Program, student: Program) -> None:
    home = block_of_calls(residual, student)
    new = [n.name for n in student.graph.nodes if n.name not in residual.nodes and node_macs(student, n)]
    assert new
    assert {home[name] for name in new} == {3}


ARCHITECTURES = ("transformer", "dense", "gate and downsampling", "inverted and nested", "perceptron", "no layer")


def networks(nets: SimpleNamespace) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    made = (
        (nets.Transformer(2), nets.tokens()),
        (nets.DenseNet(), nets.images()),
        (nets.image_net(nets.Gated(), nets.Downsample(), channels=16), nets.images()),
        (nets.image_net(nets.Inverted(), nets.Nested()), nets.images()),
        (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), nets.tokens()),
        (nn.ReLU(), nets.images()),
    )
    return dict(zip(ARCHITECTURES, made, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture(name: str, nets: SimpleNamespace) -> None:
    """Every contraction is in one block, edges go forward, and every layer can be reached from the block's entry."""
    net, x = networks(nets)[name]
    program = capture(net.eval(), x)
    blocks = describe_graph(program, program)["blocks"]
    named = [layer["name"] for block in blocks for layer in block["layers"]]
    assert named == [n.name for n in program.graph.nodes if node_macs(program, n)]
    assert len({block["name"] for block in blocks}) == len(blocks)
    for block in blocks:
        order = {ENTRY: -1, EXIT: 10**9} | program.order
        assert all(order[a] < order[b] for a, b in block["edges"])
        reached = {ENTRY}
        for a, b in sorted(block["edges"], key=lambda edge: order[edge[0]]):
            if a in reached:
                reached.add(b)
        assert {EXIT, *(layer["name"] for layer in block["layers"])} <= reached
        assert {layer["change"] for layer in block["layers"]} <= {"kept"}


def test_layers_in_words() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 8, (3, 1), stride=2),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.Linear(8, 5),
    )
    program = capture(net.eval(), torch.zeros(2, 4, 24, 11))
    words = [layer_words(program, n) for n in program.graph.nodes if node_macs(program, n)]
    assert [text.replace(TIMES, "x") for text in words] == [
        "3 x 1 convolution, stride 2",
        "3 x 3 depthwise convolution",
        "1 x 1 convolution, 2 groups",
        "2 x 2 transposed convolution, stride 2",
        "linear",
    ]
    found = describe_graph(program, program)["blocks"]
    widths = [(la["inputs"]["total"], la["outputs"]["total"]) for block in found for la in block["layers"]]
    assert widths == [(4, 8), (8, 8), (8, 8), (8, 6), (8, 5)]


@dataclass(frozen=True)
class Timed:
    names: tuple[str, ...]
    ms: float


@pytest.fixture(scope="module")
def models(residual: Program, student: Program) -> tuple[bytes, bytes]:
    return to_onnx(residual), to_onnx(student)


def timed(model: bytes, ms: dict[str, float]) -> list[Timed]:
    """A profile of an ONNX model with these times for operators, known by the values that they make."""
    nodes = onnx.load_model_from_string(model).graph.node
    return [Timed(("fused", node.output[0]), ms.get(node.op_type, 0.0)) for node in nodes]


def test_bars_add_up_to_what_was_measured(residual: Program, student: Program, models: tuple[bytes, bytes]) -> None:
    """Profiles are scaled to the measured latency; a node that nobody knows goes with the one that runs next."""
    before = [Timed(("reorder",), 1.0), *timed(models[0], {"Conv": 2.0, "Gemm": 2.0})]
    after = timed(models[1], {"Conv": 1.0, "Gemm": 2.0})
    found = block_latency(residual, student, models, (before, after), (34.0, 8.0))
    assert found is not None
    assert found["before_ms"] == pytest.approx([6.0, 8.0, 8.0, 8.0, 4.0])
    # stem, two convolutions, nothing, one and two factors, the head
    assert found["after_ms"] == pytest.approx([1.0, 2.0, 0.0, 3.0, 2.0])
    assert found["placed"] == pytest.approx(16 / 17, abs=1e-4)


def test_an_unknown_profile_says_nothing(residual: Program, models: tuple[bytes, bytes]) -> None:
    twice, strange = (models[0], models[0]), [Timed(("a",), 1.0), Timed(("output",), 0.1)]
    assert block_latency(residual, residual, twice, (strange, strange), (1.0, 1.0)) is None
    assert block_latency(residual, residual, twice, ((), ()), (1.0, 1.0)) is None


def test_what_follows_a_weight_belongs_to_its_block(residual: Program, models: tuple[bytes, bytes]) -> None:
    home = block_of_calls(residual, residual)
    found = blocks_of_values(models[0], residual, home)
    kinds = {node.output[0]: node.op_type for node in onnx.load_model_from_string(models[0]).graph.node}
    per_block = [[kinds[value] for value, block in found.items() if value in kinds and block == b] for b in range(5)]
    assert per_block[0] == ["Conv", "Relu"]
    assert per_block[1] == per_block[2] == ["Conv", "Relu", "Conv", "Add", "Relu"]
    assert per_block[3][:5] == per_block[1]
    assert per_block[4] == ["Gemm"]


def test_weights_that_lost_their_names(transformer: Program) -> None:
    """A linear layer over tokens becomes a product with a transposed weight of another name: its bias still tells."""
    model = to_onnx(transformer)
    found = blocks_of_values(model, transformer, block_of_calls(transformer, transformer))
    products = [n for n in onnx.load_model_from_string(model).graph.node if n.op_type in {"MatMul", "Gemm"}]
    placed = [found[n.output[0]] for n in products if n.output[0] in found]
    assert len(placed) == len(products)
    assert placed == sorted(placed)
    assert set(placed) == set(range(6))


def test_a_dropped_block_takes_no_time(
    residual: Program, student: Program, models: tuple[bytes, bytes], nets: SimpleNamespace
) -> None:
    """With ONNX Runtime's own profile, whatever this machine is doing meanwhile."""
    before, after = (OnnxRuntimeBackend().profile(model, {"x": nets.images(1).numpy()}) for model in models)
    found = block_latency(residual, student, models, (before, after), (8.0, 4.0))
    assert found is not None
    assert sum(found["before_ms"]) == pytest.approx(8.0, abs=1e-4)
    assert sum(found["after_ms"]) == pytest.approx(4.0, abs=1e-4)
    assert found["placed"] > 0.5
    assert all(ms > 0 for ms in found["before_ms"])
    assert [ms > 0 for ms in found["after_ms"]] == [True, True, False, True, True]
