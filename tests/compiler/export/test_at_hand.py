"""The exported program made of the graph at hand is the one that torch.export makes by tracing it once more."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.export import exporter
from foldcut.compiler.export.edit_at_hand import exported_at_hand
from foldcut.compiler.export.exporter import to_exported, to_onnx, to_pt2
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit import bypass
from foldcut.compiler.ir.edit_folds import fold_batch_norms
from foldcut.compiler.ir.graph_copy import copied
from foldcut.compiler.ir.program import Program, as_arguments
from foldcut.passes.quantize.grids import choose_grids
from foldcut.passes.quantize.quantize import Rounding, quantize
from foldcut.passes.quantize.ranges import GridKind
from foldcut.passes.quantize.values import quantizable
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree


class Tied(nn.Module):
    """One weight under two names, a buffer that is not saved, a constant, the weight itself as an output, None."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("Shift", torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.second(self.first(x).relu()) + self.Shift + torch.tensor(2.0)
        return {"y": y, "again": y, "x": x, "weight": self.first.weight, "nothing": None}


class Nested(nn.Module):
    """Inputs in a dict and a list, a flag, sizes in the graph, results of which one is read."""

    def forward(self, a: dict[str, torch.Tensor], b: list[torch.Tensor], flag: bool) -> tuple[torch.Tensor, ...]:
        joined = a["p"] * (2 if flag else 1) + b[0] * b[1].shape[0]
        return joined.flatten(), b[1].max(1)[0], joined.chunk(2, 1)[1].reshape(joined.shape[0], 2, 1)


class Mixed(nn.Module):
    """Types that meet, and casts, which assert what they cast."""

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x * i + i // 2, x.half().float(), x.to(torch.float64).sum(1), x > 0, i / 3 + 1


class Shapes(nn.Module):
    """What the exporter has to decompose."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n, channels, height, width = x.shape
        mixed = x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)
        larger = F.interpolate(F.pad(mixed, (1, 1, 1, 1)), scale_factor=2, mode="bilinear")
        return larger.flatten(0, 1), F.adaptive_avg_pool2d(x, (3, 3)), torch.std(x, (2, 3)), F.hardswish(x)


def in_int8(program: Program, x: torch.Tensor) -> Program:
    folded, _ = fold_batch_norms(program)
    layers, samples = list(quantizable(folded)), CalibrationSet.of(x)
    grids = choose_grids(folded, layers, samples, GridKind(), "best")
    return quantize(folded, layers, grids, samples, Rounding(limit=127))


def shortened(program: Program) -> Program:
    region = find_regions(program).regions[0]
    return bypass(program, region.entry, region.exit)


def of(net: nn.Module, batch: Any) -> tuple[Program, Any]:
    return capture(net.eval(), batch), batch


def _networks() -> dict[str, Callable[[SimpleNamespace], tuple[Program, Any]]]:
    """Each from the networks of all tests: (program, batch of two samples)."""
    floats = {
        name: lambda nets, name=name: of(nets.seeded(getattr(nets, name)), nets.images(2))
        for name in ("ResNet", "DenseNet")
    }
    blocks = {
        name: lambda nets, name=name: of(nets.seeded(lambda: nets.image_net(getattr(nets, name)())), nets.images(2))
        for name in ("Inverted", "Gated", "PreActivation")
    }
    mask = torch.randn(2, 1, 5, 5)
    two = torch.randn(2, 4)
    words = {"ids": torch.zeros(2, 5, dtype=torch.long), "mask": torch.zeros(2, 5, dtype=torch.bool)}
    mixed = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.long)
    return {
        **floats,
        **blocks,
        "int8": lambda nets: (in_int8(floats["ResNet"](nets)[0], nets.images(24)), nets.images(2)),
        "bypassed": lambda nets: (shortened(floats["ResNet"](nets)[0]), nets.images(2)),
        "transformer": lambda nets: of(nets.seeded(nets.Transformer), nets.tokens(2)[:, :5]),
        "masked": lambda nets: of(nets.seeded(nets.Transformer), (nets.tokens(2)[:, :5], mask)),
        "encoder": lambda nets: of(nets.seeded(Encoder), words),
        "tied": lambda nets: of(nets.seeded(Tied), two),
        "nested": lambda nets: of(Nested(), ({"p": two}, [two + 1, two * 2], True)),
        "mixed": lambda nets: of(Mixed(), mixed),
        "shapes": lambda nets: of(Shapes(), torch.randn(2, 4, 6, 6)),
        "recurrent": lambda nets: of(nets.seeded(lambda: nn.GRU(4, 5, batch_first=True)), torch.randn(2, 3, 4)),
        "fixed": lambda nets: of(Fixed(), two),
        "imported": lambda nets: (imported(nets), nets.images(2)),
    }


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layers(self.table(ids), src_key_padding_mask=mask)


class Fixed(nn.Module):
    """Takes batches of two only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1).sum(1) * x.new_ones(2)


def imported(nets: SimpleNamespace) -> Program:
    return capture(onnx.load_from_string(to_onnx(capture(nets.seeded(nets.ResNet), nets.images(2)))), nets.images(2))


NETWORKS = _networks()


@dataclass(frozen=True)
class Case:
    program: Program
    batch: Any
    made: torch.export.ExportedProgram
    traced: torch.export.ExportedProgram


@pytest.fixture(scope="module", params=NETWORKS)
def case(request: pytest.FixtureRequest, nets: SimpleNamespace) -> Case:
    """A network, and its exported program made in both ways."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of them fixes its batch size
        program, batch = NETWORKS[request.param](nets)
    args, kwargs, dynamic = exporter._example(program)
    made = exported_at_hand(program, args, kwargs)
    assert made is not None
    return Case(program, batch, made, exporter._traced(program, args, kwargs, dynamic))


def batches(program: Program, batch: Any) -> list[Any]:
    """The batch, and others of one and of five samples where the program takes them."""
    counts = (1, 5) if program.batch_symbols else ()
    return [
        batch,
        *(pytree.tree_map_only(torch.Tensor, lambda leaf, n=n: torch.cat([leaf] * 3)[:n], batch) for n in counts),
    ]


def tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def test_it_says_what_tracing_says(case: Case) -> None:
    """Inputs with names and what they are, outputs, structures, weights, bounds, the modules that weights lie in."""
    made, traced = case.made, case.traced
    inputs = [
        [(s.kind, type(s.arg), s.arg.name, s.target, s.persistent) for s in e.graph_signature.input_specs]
        for e in (made, traced)
    ]
    assert inputs[0] == inputs[1]
    outputs = [[(s.kind, type(s.arg), s.target) for s in e.graph_signature.output_specs] for e in (made, traced)]
    assert outputs[0] == outputs[1]
    assert made.call_spec == traced.call_spec
    assert {name: id(value) for name, value in made.state_dict.items()} == {
        name: id(value) for name, value in traced.state_dict.items()
    }
    assert sorted(map(str, made.range_constraints.values())) == sorted(map(str, traced.range_constraints.values()))
    top = [e.module_call_graph[0].signature.forward_arg_names for e in (made, traced)]
    assert top[0] == top[1]
    assert {entry.fqn for entry in made.module_call_graph} == {entry.fqn for entry in traced.module_call_graph}
    calls = [Counter(str(n.target) for n in e.graph.nodes if n.users) for e in (made, traced)]
    assert calls[0] == calls[1]


def test_it_runs_is_saved_and_is_read_back(case: Case) -> None:
    program, batch, made = case.program, case.batch, case.made
    loaded = torch.export.load(BytesIO(to_pt2(made)))
    for some in batches(program, batch):
        args, kwargs = as_arguments(some)
        wanted = tensors(program(some))
        with torch.no_grad():
            for found in (made.module()(*args, **kwargs), loaded.module()(*args, **kwargs)):
                assert all(torch.equal(one, two) for one, two in zip(wanted, tensors(found), strict=True))
    again, traced = capture(loaded), capture(case.traced)
    assert (again.inputs, again.outputs) == (traced.inputs, traced.outputs)
    torch.export.unflatten(made)


def test_onnx_is_the_same(case: Case) -> None:
    """Operators, inputs and outputs with their dims, and each output bit for bit."""
    program, batch = case.program, case.batch
    models = [onnx.load_from_string(to_onnx(program, exported=exported)) for exported in (case.made, case.traced)]
    made, traced = ([(n.domain, n.op_type) for n in model.graph.node] for model in models)
    assert Counter(made) == Counter(traced)
    assert list(models[0].graph.input) == list(models[1].graph.input)
    assert list(models[0].graph.output) == list(models[1].graph.output)
    for some in batches(program, batch):
        results = [run(model, tensors(as_arguments(some))) for model in models]
        assert all(np.array_equal(one, two) for one, two in zip(*results, strict=True))


def run(model: onnx.ModelProto, leaves: list[torch.Tensor]) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return list(session.run(None, {name: leaf.numpy() for name, leaf in zip(names, leaves, strict=True)}))


def test_nothing_is_traced_and_nodes_keep_their_names(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "export", lambda *_args, **_options: pytest.fail("traced"))
    found = [n.name for n in to_exported(case.program).graph.nodes if n.op == "call_function"]
    wanted = [n.name for n in case.program.graph.nodes if n.op == "call_function"]
    assert found == wanted


def test_the_program_stays_as_it_is(residual: Program) -> None:
    """What torch.onnx finds out about sizes is not the program's: shapes are stated anew."""
    before = {name: node.meta.get("val") for name, node in residual.nodes.items()}
    environment = residual.nodes["x"].meta["val"].fake_mode.shape_env
    guards, frozen = len(environment.guards), environment.frozen
    made = to_exported(residual)
    to_onnx(residual, exported=made)
    assert {name: node.meta.get("val") for name, node in residual.nodes.items()} == before
    assert (len(environment.guards), environment.frozen) == (guards, frozen)
    new = next(n for n in made.graph.nodes if n.name == "x").meta["val"]
    assert new.fake_mode.shape_env is not environment
    assert str(new.shape) == str(before["x"].shape)
    assert not any("from_node" in node.meta for node in made.graph.nodes)


class Even(nn.Module):
    """Traced for even heights only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]


class Picked(nn.Module):
    """Data decide how many rows there are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x.sum(1) > 0].sum(0, keepdim=True)


class Branched(nn.Module):
    """A graph within the graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))


def bounded() -> torch.export.ExportedProgram:
    return torch.export.export(
        nn.Linear(4, 3).eval(), (torch.randn(2, 4),), dynamic_shapes=({0: torch.export.Dim("n", max=32)},)
    )


def even() -> torch.export.ExportedProgram:
    dims = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    return torch.export.export(Even(), (torch.randn(2, 6),), dynamic_shapes=dims)


@pytest.mark.parametrize("make", [bounded, even], ids=lambda make: make.__name__)
def test_what_is_bounded_or_conditional_is_traced(make: Any) -> None:
    program = capture(make())
    args, kwargs, _ = exporter._example(program)
    assert exported_at_hand(program, args, kwargs) is None
    x = torch.randn(4, program.shape(program.nodes["x" if "x" in program.nodes else "input_1"])[1])
    assert torch.equal(to_exported(program).module()(x), program(x))


def test_sizes_from_data_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(Picked().eval(), torch.ones(2, 3))
    traced: list[bool] = []
    trace = exporter._traced
    monkeypatch.setattr(exporter, "_traced", lambda *args: traced.append(True) or trace(*args))
    made = to_exported(program)
    assert traced
    for x in (torch.ones(3, 3), -torch.ones(1, 3)):
        assert torch.equal(made.module()(x), program(x))


def test_graphs_within_the_graph_are_traced() -> None:
    program = capture(Branched().eval(), torch.ones(2, 3))
    args, kwargs, _ = exporter._example(program)
    assert exported_at_hand(program, args, kwargs) is None


def test_a_call_with_a_tensor_in_it_is_traced(residual: Program) -> None:
    """A tensor as an argument is no input: it would be missing in the saved file."""
    graph = copied(residual.graph)
    node = next(n for n in graph.nodes if n.target == torch.ops.aten.relu.default)
    node.target, node.args = torch.ops.aten.maximum.default, (node.args[0], torch.zeros(()))
    module = torch.fx.GraphModule(residual.module, graph)
    program = Program(module=module, inputs=residual.inputs, outputs=residual.outputs)
    args, kwargs, _ = exporter._example(program)
    assert exported_at_hand(program, args, kwargs) is None
