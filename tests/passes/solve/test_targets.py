"""What a layer must reproduce: the way to its anchor and back, and which teacher value the anchor is compared with."""

import math
from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.execute import bind, run_until
from foldcut.compiler.ir.program import Program, data_inputs
from foldcut.passes.drop.drop_blocks import changes_of_drops, drop_blocks
from foldcut.passes.solve.layers import find_layers
from foldcut.passes.solve.targets import counterparts, residual_at, trace_target
from hypothesis import given
from hypothesis import strategies as st
from torch import nn


class Chains(nn.Module):
    """Layers with all kinds of affine things behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_conv, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.scale = nn.Parameter(torch.linspace(-2, 2, 6))
        self.offset = nn.Parameter(torch.randn(6))
        self.tokens = nn.Linear(6, 6, bias=False)
        self.flat_linear, self.flat_norm = nn.Linear(6 * 4 * 4, 10), nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.norm_conv(x)).relu()
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.down(nn.functional.gelu(self.up(y)))
        x = x + (y * self.scale + self.offset).permute(0, 3, 1, 2)
        rows = x.flatten(2).transpose(1, 2)
        mixed = torch.roll(self.tokens(rows).view(-1, 4, 4, 6), (1, -1), (1, 2)).reshape(-1, 16, 6)
        rows = rows + (1 - 2 * mixed)
        return self.head(self.flat_norm(self.flat_linear(rows.flatten(1))).relu())


@pytest.fixture(scope="module")
def chains(nets: SimpleNamespace) -> Program:
    return capture(nets.seeded(Chains, seed=1), nets.images(2, 4))


def programs(*values: Program) -> list[tuple[Program, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(p, torch.randn(p.shape(p.nodes[p.inputs[0].name], 3), generator=generator)) for p in values]


def test_a_change_at_the_layer_comes_back_from_the_anchor(
    chains: Program, residual: Program, inverted: Program, transformer: Program
) -> None:
    """pull_back undoes the chain: what a change of the layer's output does to the anchor leads back to that change."""
    moved = 0
    for program, x in programs(chains, residual, inverted, transformer):
        values = run_until(program, [], bind(program, x), free=False)
        for name, layer in find_layers(program)[0].items():
            target = trace_target(program, layer, {})
            with torch.no_grad():
                known = run_until(program, [name, target.anchor], values, free=False)
                change = torch.randn(known[name].shape, generator=torch.Generator().manual_seed(1))
                base = {key: value for key, value in known.items() if program.order[key] < program.order[name]}
                after = run_until(program, [target.anchor], {**base, name: known[name] + change})[target.anchor]
            back = target.pull_back((after - known[target.anchor]).double())
            silent = torch.zeros_like(change)
            if layer.weight == "blocks.1.conv2.weight" and program is residual:
                # this norm's scale is zero: nothing at the layer shows at the anchor
                torch.testing.assert_close(back, silent.double())
                continue
            torch.testing.assert_close(back, change.double(), rtol=1e-3, atol=1e-4, msg=f"{name} in {program.inputs}")
            moved += target.anchor != name
    assert moved >= 12


def test_the_shift_is_a_change_of_the_layers_output(
    chains: Program, residual: Program, inverted: Program, transformer: Program
) -> None:
    """Adding b to the bias, or scale * b to the norm's bias, moves the anchor as adding b to the output would."""
    through_norm = 0
    for program, x in programs(chains, residual, inverted, transformer):
        start = bind(program, x)
        for name, layer in find_layers(program)[0].items():
            target = trace_target(program, layer, {})
            if target.shift is None:
                continue
            through_norm += target.shift_scale is not None
            with torch.no_grad():
                known = run_until(program, [name], start, free=False)
                old = program.module.get_parameter(target.shift).detach()
                bias = torch.randn(old.shape, generator=torch.Generator().manual_seed(2))
                scaled = bias if target.shift_scale is None else bias * target.shift_scale.float()
                tensors = {target.shift: old + scaled}
                shifted = run_until(program, [target.anchor], start, tensors)[target.anchor]
                moved = known[name] + (bias if layer.window is None else bias.view(-1, 1, 1))
                base = {key: value for key, value in known.items() if program.order[key] < program.order[name]}
                wanted = run_until(program, [target.anchor], {**base, name: moved})[target.anchor]
            torch.testing.assert_close(shifted, wanted, rtol=1e-4, atol=1e-4, msg=name)
    assert through_norm >= 8


def anchor_of(program: Program, weight: str) -> str:
    layer = next(layer for layer in find_layers(program)[0].values() if layer.weight == weight)
    return trace_target(program, layer, {}).anchor


def test_anchors(chains: Program, residual: Program) -> None:
    def operation(weight: str) -> str:
        return str(chains.nodes[anchor_of(chains, weight)].target).split(".")[1]

    assert anchor_of(chains, "norm_conv.weight") == "getitem"
    assert operation("up.weight") == "linear"
    assert operation("down.weight") == "add"
    assert operation("head.weight") == "linear"
    joins = [n.name for n in residual.graph.nodes if n.name.startswith("add")]
    assert anchor_of(residual, "blocks.0.conv2.weight") == joins[0]
    # layer scale, its constant and the permutation lie on the way; the addition is the residual join
    assert len(data_inputs(chains.nodes[anchor_of(chains, "down.weight")])) == 2


def test_a_layer_read_twice_is_its_own_anchor(residual: Program, inverted: Program) -> None:
    assert anchor_of(inverted, "0.weight") == "conv2d"
    assert anchor_of(residual, "head.weight") == "linear"


@pytest.mark.parametrize(
    ("activation", "zone"),
    [
        (nn.ReLU(), (0.0, math.inf)),
        (nn.ReLU6(), (0.0, 6.0)),
        (nn.Hardtanh(-2.0, 3.0), (-2.0, 3.0)),
        (nn.Hardtanh(), (-1.0, 1.0)),
        (lambda x: x.clamp(-1, 2), (-1.0, 2.0)),
        (lambda x: x.clamp(min=0), (0.0, math.inf)),
        (lambda x: x.clamp(max=2), (-math.inf, 2.0)),
        (nn.GELU(), None),
        (nn.Sigmoid(), None),
        (nn.LeakyReLU(), None),
    ],
    ids=[
        "relu",
        "relu6",
        "hardtanh",
        "hardtanh default",
        "clamp",
        "clamp min",
        "clamp max",
        "gelu",
        "sigmoid",
        "leaky",
    ],
)
def test_the_flat_zone_of_the_activation_behind(activation: object, zone: tuple[float, float] | None) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(activation(self.first(x)))

    program = capture(Net().eval(), torch.randn(2, 3))
    layers, _ = find_layers(program)
    assert trace_target(program, layers["linear"], {}).zone == zone


VALUES = st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4).map(torch.tensor)


@given(
    teacher=VALUES,
    student=VALUES,
    zone=st.sampled_from([(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, 2.0)]),
)
def test_the_least_change_that_the_activation_can_see(
    teacher: torch.Tensor, student: torch.Tensor, zone: tuple[float, float]
) -> None:
    residual = residual_at(teacher, student, zone)
    torch.testing.assert_close((student + residual).clamp(*zone), teacher.clamp(*zone), rtol=1e-5, atol=1e-5)
    assert (residual.abs() <= (teacher - student).abs() + 1e-5).all()
    agree = student.clamp(*zone) == teacher.clamp(*zone)
    assert (residual[agree].abs() <= 1e-5).all()


def test_without_a_zone_the_residual_is_the_difference() -> None:
    a, b = torch.randn(5), torch.randn(5)
    assert torch.equal(residual_at(a, b, None), a - b)


def test_the_entry_of_a_dropped_block_plays_its_exit(residual: Program) -> None:
    blocks = find_regions(residual).blocks
    student = drop_blocks(residual, [blocks[0]])
    joins = [n.name for n in residual.graph.nodes if n.name.startswith("add")]
    assert counterparts(student, residual, changes_of_drops([blocks[0]]).dropped) == {
        "relu": "relu_2",
        "getitem": joins[0],
    }


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_chain_of_dropped_blocks_plays_the_last_exit(residual: Program, order: tuple[int, int]) -> None:
    blocks = find_regions(residual).blocks
    chosen = [blocks[i] for i in order]
    student = drop_blocks(residual, chosen)
    joins = [n.name for n in residual.graph.nodes if n.name.startswith("add")]
    assert counterparts(student, residual, changes_of_drops(chosen).dropped) == {"relu": "relu_4", "getitem": joins[1]}


def test_a_join_in_front_of_a_dropped_block_plays_the_join_behind(residual: Program) -> None:
    blocks = find_regions(residual).blocks
    student = drop_blocks(residual, [blocks[1]])
    joins = [n.name for n in residual.graph.nodes if n.name.startswith("add")]
    roles = counterparts(student, residual, changes_of_drops([blocks[1]]).dropped)
    assert roles == {"relu_2": "relu_4", joins[0]: joins[1]}
    layer = next(x for x in find_layers(student)[0].values() if x.weight == "blocks.0.conv2.weight")
    target = trace_target(student, layer, roles)
    assert target.counterparts == (joins[0], joins[1])
    a, b = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(target.teacher_value({joins[0]: a, joins[1]: b}), (a + b) / 2)
    assert trace_target(student, layer, {}).teacher_value({joins[0]: a}) is a


def test_nothing_dropped_no_counterparts(residual: Program) -> None:
    assert counterparts(residual, residual, []) == {}
