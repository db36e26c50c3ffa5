"""The channel rewrite: smaller tensors, the same function where what goes is zero, the batch still dynamic."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from foldcut.compiler.analysis.provenance import Provenance, find_units
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit import set_tensors
from foldcut.compiler.ir.execute import bind, run_until
from foldcut.compiler.ir.program import Program, is_tensor
from foldcut.compiler.support.errors import RewriteError
from foldcut.passes.cut.cuttable import cuttable_groups
from foldcut.passes.cut.prune_channels import prune_channels
from torch import nn
from torch.nn import functional as F


class Shuffled(nn.Module):
    """Grouped convolutions with a channel shuffle between them, a split, and a padded shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.one, self.two = nn.Conv2d(12, 12, 1, groups=6), nn.Conv2d(12, 12, 3, padding=1, groups=6)
        self.side, self.wide = nn.Conv2d(6, 6, 1), nn.Conv2d(12, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.one(F.relu(self.stem(x))))
        n, c, h, w = x.shape
        x = F.relu(self.two(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)))
        a, b = x.chunk(2, 1)
        x = torch.cat([a, F.relu(self.side(b))], 1)
        return self.head(F.relu(F.pad(x, (0, 0, 0, 0, 1, 3)) + self.wide(x)).mean((2, 3)))


class Flat(nn.Module):
    """Flattened into a linear layer, batch norm over vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm2 = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.hidden, self.norm1, self.head = nn.Linear(96, 10), nn.BatchNorm1d(10), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm2(self.conv(x)))
        return self.head(F.relu(self.norm1(self.hidden(x.flatten(1)))))


NETWORKS = (
    "residual",
    "inverted",
    "dense",
    "gated",
    "downsample",
    "preactivation",
    "shuffled",
    "flat",
    "transformer",
)


@pytest.fixture(scope="module")
def programs(nets: SimpleNamespace, residual: Program, inverted: Program, transformer: Program) -> dict[str, Program]:
    image_nets: dict[str, Callable[[], nn.Module]] = {
        "dense": nets.DenseNet,
        "gated": lambda: nets.image_net(nn.ReLU(), nets.Gated(), nn.ReLU()),
        "downsample": lambda: nets.image_net(nn.ReLU(), nets.Downsample(), channels=16),
        "preactivation": lambda: nets.image_net(nets.PreActivation(), nets.PreActivation()),
        "shuffled": Shuffled,
        "flat": Flat,
    }
    found = {name: capture(nets.seeded(make, seed=4), nets.images()) for name, make in image_nets.items()}
    return {**found, "residual": residual, "inverted": inverted, "transformer": transformer}


def batch_for(name: str, nets: SimpleNamespace, count: int) -> torch.Tensor:
    return nets.tokens(count, seed=count) if name == "transformer" else nets.images(count, seed=count)


def every_other(provenance: Provenance) -> list[int]:
    """Every second unit of each prunable group, but never all."""
    return [unit for group in provenance.prunable for unit in group.units[1::2].tolist()]


def shape_of(program: Program, name: str) -> list[int]:
    return list(program.module.get_parameter(name).shape)


def relative(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


def test_tensors_get_smaller(residual: Program) -> None:
    provenance = find_units(residual)
    groups = {g.name: g for g in provenance.prunable}
    units = [*groups["stem.0"].units[:3].tolist(), *groups["blocks.1.conv1"].units[[1, 6]].tolist()]
    smaller = prune_channels(provenance, units).program
    assert shape_of(smaller, "stem.0.weight") == [5, 3, 3, 3]
    assert shape_of(smaller, "stem.1.weight") == [5]
    assert list(smaller.module.get_buffer("stem.1.running_var").shape) == [5]
    assert shape_of(smaller, "blocks.0.conv1.weight") == [8, 5, 3, 3]
    assert shape_of(smaller, "blocks.1.conv1.weight") == [6, 5, 3, 3]
    assert shape_of(smaller, "blocks.1.conv2.weight") == [5, 6, 3, 3]
    assert shape_of(smaller, "blocks.1.bn1.bias") == [6]
    assert shape_of(smaller, "head.weight") == [4, 5]
    assert shape_of(smaller, "head.bias") == [4]
    assert smaller.parameter_count() < residual.parameter_count()


def test_what_stays_is_what_was(residual: Program) -> None:
    provenance = find_units(residual)
    group = next(g for g in provenance.prunable if g.name == "blocks.1.conv1")
    smaller = prune_channels(provenance, group.units[[0, 3]]).program
    stay = [1, 2, 4, 5, 6, 7]
    for name, dim in (("blocks.1.conv1.weight", 0), ("blocks.1.conv2.weight", 1), ("blocks.1.bn1.weight", 0)):
        old = residual.module.get_parameter(name)
        assert torch.equal(smaller.module.get_parameter(name), old.index_select(dim, torch.tensor(stay)))
    assert smaller.module.get_parameter("stem.0.weight") is residual.module.get_parameter("stem.0.weight")


def test_the_original_is_not_touched(residual: Program, nets: SimpleNamespace) -> None:
    before, text = residual(nets.images(2)), residual.text()
    provenance = find_units(residual)
    prune_channels(provenance, every_other(provenance))
    assert torch.equal(residual(nets.images(2)), before)
    assert residual.text() == text
    assert shape_of(residual, "stem.0.weight") == [8, 3, 3, 3]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_batch_stays_dynamic(programs: dict[str, Program], nets: SimpleNamespace, name: str) -> None:
    program = programs[name]
    provenance = find_units(program)
    smaller = prune_channels(provenance, every_other(provenance)).program
    for graph in (program, smaller):
        for node in graph.graph.nodes:
            if node.op in {"placeholder", "call_function"} and is_tensor(node):
                assert graph.shape(node, 1) != graph.shape(node, 5), node.name
    for count in (1, 3):
        result = smaller(batch_for(name, nets, count))
        assert result.shape == (count, 4)
        assert bool(result.isfinite().all())
    assert smaller.inputs == program.inputs
    assert smaller.outputs == program.outputs
    # samples do not see each other
    x = batch_for(name, nets, 3)
    torch.testing.assert_close(smaller(x)[1:2], smaller(x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_in_the_graph_are_those_of_the_values(
    programs: dict[str, Program], nets: SimpleNamespace, name: str
) -> None:
    provenance = find_units(programs[name])
    smaller = prune_channels(provenance, every_other(provenance)).program
    names = [n for n, node in smaller.nodes.items() if node.op == "call_function" and is_tensor(node)]
    values = run_until(smaller, names, bind(smaller, batch_for(name, nets, 3)))
    assert {n: tuple(v.shape) for n, v in values.items()} == {n: smaller.shape(smaller.nodes[n], 3) for n in names}


@pytest.mark.parametrize("name", NETWORKS)
def test_node_names_stay(programs: dict[str, Program], name: str) -> None:
    program = programs[name]
    provenance = find_units(program)
    smaller = prune_channels(provenance, every_other(provenance)).program
    assert {n for n in smaller.nodes if smaller.nodes[n].op == "call_function"} <= set(program.nodes)
    assert len(smaller.history) == len(program.history) + 1


@pytest.mark.parametrize("name", NETWORKS)
def test_removing_nothing_changes_nothing(programs: dict[str, Program], nets: SimpleNamespace, name: str) -> None:
    program = programs[name]
    found = prune_channels(find_units(program), [])
    assert found.program is program
    assert found.kept == {}
    x = batch_for(name, nets, 2)
    assert torch.equal(found.program(x), program(x))


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "transformer"])
def test_channels_of_zeros_go_without_a_trace(programs: dict[str, Program], nets: SimpleNamespace, name: str) -> None:
    provenance = find_units(programs[name])
    units = every_other(provenance)
    silent = nets.zeroed(provenance, units)
    pruned = prune_channels(find_units(silent), units)
    x = nets.images(3, seed=7)
    assert relative(silent(x), programs[name](x)) > 1e-3
    torch.testing.assert_close(pruned.program(x), silent(x), rtol=1e-5, atol=1e-6)


def test_heads_that_say_nothing_go_without_a_trace(transformer: Program, nets: SimpleNamespace) -> None:
    """Their values and the columns that read them are what counts; a stream under a layer norm is left alone."""
    provenance = find_units(transformer)
    inner = [g for g in provenance.prunable if g.name != "embed"]
    units = [unit for g in inner for unit in g.units[1::2].tolist()]
    silent = nets.zeroed(provenance, units)
    pruned = prune_channels(find_units(silent), units).program
    x = nets.tokens(3, seed=7)
    assert relative(silent(x), transformer(x)) > 1e-3
    torch.testing.assert_close(pruned(x), silent(x), rtol=1e-5, atol=1e-6)
    assert shape_of(pruned, "blocks.0.qkv.weight") == [12, 8]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_kept_part_of_a_value_has_the_shape_that_it_has_now(
    programs: dict[str, Program], nets: SimpleNamespace, name: str
) -> None:
    program = programs[name]
    provenance = find_units(program)
    pruned = prune_channels(provenance, every_other(provenance))
    names = [n for n, node in pruned.program.nodes.items() if node.op == "call_function" and is_tensor(node)]
    x = batch_for(name, nets, 2)
    old = run_until(program, names, bind(program, x))
    new = run_until(pruned.program, names, bind(pruned.program, x))
    assert {n: pruned.select(n, old[n]).shape for n in names} == {n: new[n].shape for n in names}
    assert any(pruned.select(n, old[n]).shape != old[n].shape for n in names)


def test_new_tensors_go_in_with_the_cut(residual: Program, nets: SimpleNamespace) -> None:
    provenance = find_units(residual)
    units = every_other(provenance)
    bias = torch.arange(4.0)
    weight = 2 * residual.module.get_parameter("stem.0.weight").detach()
    changed = set_tensors(residual, {"head.bias": bias, "stem.0.weight": weight}, note="new")
    wanted = prune_channels(find_units(changed), units).program
    found = prune_channels(provenance, units, {"head.bias": bias, "stem.0.weight": weight}).program
    x = nets.images(2)
    assert torch.equal(found(x), wanted(x))
    alone = prune_channels(provenance, [], {"head.bias": bias}).program
    torch.testing.assert_close(alone(x) - residual(x), (bias - residual.module.get_parameter("head.bias")).expand(2, 4))


def test_pruning_twice_is_pruning_once(residual: Program, nets: SimpleNamespace) -> None:
    provenance = find_units(residual)
    group = next(g for g in provenance.prunable if g.name == "stem.0")
    first = prune_channels(provenance, group.units[[2]]).program
    again = find_units(first)
    left = next(g for g in again.prunable if g.name == "stem.0")
    assert len(left) == 7
    twice = prune_channels(again, left.units[[4]]).program
    once = prune_channels(provenance, group.units[[2, 5]]).program
    x = nets.images(2)
    assert torch.equal(twice(x), once(x))
    assert twice.text() == once.text()


def test_locked_units_are_refused(residual: Program) -> None:
    provenance = find_units(residual)
    locked = next(g for g in provenance.groups if g.reason)
    with pytest.raises(RewriteError, match="locked"):
        prune_channels(provenance, locked.units[:1])


def test_units_of_the_input_are_refused(residual: Program) -> None:
    with pytest.raises(RewriteError, match="locked or not units"):
        prune_channels(find_units(residual), [0])


def test_shared_weights_stay_shared(nets: SimpleNamespace) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.same, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.stem(x))
            return self.head(F.relu(self.same(F.relu(self.same(x)))).mean((2, 3)))

    provenance = find_units(capture(nets.seeded(Twice), nets.images()))
    units = provenance.prunable[0].units[:2].tolist()
    silent = nets.zeroed(provenance, units)
    smaller = prune_channels(find_units(silent), units).program
    assert shape_of(smaller, "same.weight") == [4, 4, 3, 3]
    assert smaller.parameter_count() == sum(p.numel() for p in smaller.module.parameters())
    torch.testing.assert_close(smaller(nets.images(3)), silent(nets.images(3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["residual", "inverted", "shuffled", "flat", "transformer"])
def test_onnx_computes_what_the_pruned_program_computes(
    programs: dict[str, Program], nets: SimpleNamespace, name: str
) -> None:
    provenance = find_units(programs[name])
    smaller = prune_channels(provenance, every_other(provenance)).program
    model = to_onnx(smaller)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x = batch_for(name, nets, count)
        wanted = smaller(x).numpy()
        found = session.run(None, {smaller.inputs[0].name: x.numpy()})[0]
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    stored = {i.name: list(i.dims) for i in onnx.load_model_from_string(model).graph.initializer}
    whole = programs[name].parameter_count()
    assert sum(int(np.prod(d)) for d in stored.values()) < whole


class SharedWithBatch(nn.Module):
    """Heads in the batch dimension, sliced and reshaped there, as relative-position logits are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, 4, 2).permute(2, 0, 3, 1, 4).reshape(3, n * 4, length, 2).unbind(0)
        scores = (q @ k.transpose(1, 2))[:, :length].softmax(-1)
        mixed = F.pad(scores, (0, 1))[:, :, :length] @ v
        return self.out(mixed.reshape(n, 4, -1, 2).transpose(1, 2).reshape(n, length, 8))


def test_heads_that_share_a_dimension_with_the_batch() -> None:
    torch.manual_seed(0)
    program = capture(SharedWithBatch().eval(), torch.randn(2, 5, 8))
    found = find_units(program)
    (heads,) = found.prunable
    assert len(heads) == 4
    pruned = prune_channels(found, heads.units[[1, 2]])
    x = torch.randn(3, 5, 8)
    whole = pruned.program(x)
    assert whole.shape == (3, 5, 3)
    for index in range(3):
        assert torch.allclose(pruned.program(x[index : index + 1]), whole[index : index + 1], atol=1e-5)


class Diagonal(nn.Module):
    """Each channel is read at a position of its own: what is left of the channels would be read elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).mean(3).diagonal(dim1=1, dim2=2)).relu())


def test_what_the_rewriter_cannot_prove_is_left_alone() -> None:
    found = find_units(capture(Diagonal().eval(), torch.randn(2, 3, 8, 8)))
    good, bad = cuttable_groups(found, found.prunable)
    assert [g.name for g in good] == ["b"]
    assert [(g.name, str(e.message)) for g, e in bad] == [
        ("a", "moving the remaining channels gives another order than before")
    ]
