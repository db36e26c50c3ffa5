"""Removable regions: what is found in networks of each kind, what is left alone, and that every region can go."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.analysis.regions import Region, RegionAnalysis, find_regions, removed_nodes
from foldcut.compiler.export.exporter import to_exported
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.cost import node_macs, program_cost
from foldcut.compiler.ir.edit import bypass, signature
from foldcut.compiler.ir.program import Program, data_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F


def operation(program: Program, name: str) -> str:
    """The kind of a node without its number."""
    return re.sub(r"_\d+$", "", name)


def shape(program: Program, region: Region) -> tuple[str, str, str]:
    return operation(program, region.entry), operation(program, region.exit), region.kind


def of(nets: SimpleNamespace, *parts: nn.Module, channels: int = 8) -> tuple[Program, RegionAnalysis]:
    program = capture(nets.image_net(*parts, channels=channels).eval(), nets.images())
    return program, find_regions(program)


def test_post_activation_blocks(residual: Program) -> None:
    analysis = find_regions(residual)
    blocks = [(r.entry, r.exit, r.kind, r.path) for r in analysis.blocks]
    assert blocks == [
        ("relu", "relu_2", "residual", "blocks.0"),
        ("relu_2", "relu_4", "residual", "blocks.1"),
        ("relu_4", "relu_6", "residual", "blocks.2"),
    ]
    assert analysis.outermost == analysis.blocks
    assert not analysis.rejects
    assert {r.parent for r in analysis.regions if r.kind == "plain"} == {r.name for r in analysis.blocks}


def test_the_activation_behind_the_addition_belongs_to_its_block(residual: Program) -> None:
    first = find_regions(residual).blocks[0]
    assert {"conv2d_1", "getitem_3", "relu_1", "conv2d_2", "getitem_6", "relu_2"} <= first.nodes
    assert not {"relu", "conv2d_3"} & first.nodes
    assert first.cost.macs == 2 * 8 * 64 * 8 * 9
    assert first.cost.parameters == 2 * (8 * 8 * 9 + 16)


def test_pre_activation_blocks(nets: SimpleNamespace) -> None:
    program, analysis = of(nets, nets.PreActivation(), nets.PreActivation())
    assert [shape(program, r) for r in analysis.blocks] == [("conv2d", "add", "residual"), ("add", "add", "residual")]
    assert analysis.outermost == analysis.blocks


def test_inverted_residual_blocks(inverted: Program) -> None:
    analysis = find_regions(inverted)
    assert [shape(inverted, r) for r in analysis.blocks] == [("conv2d", "add", "residual"), ("add", "add", "residual")]
    assert [r.path for r in analysis.blocks] == ["1.branch", "2.branch"]
    depthwise = [r for r in analysis.regions if r.kind == "plain"]
    assert [r.path for r in depthwise] == ["1.branch.1.0", "2.branch.1.0"]
    assert [r.parent for r in depthwise] == [r.name for r in analysis.blocks]


def test_a_transformer_block_has_two_branches(transformer: Program) -> None:
    blocks = find_regions(transformer).blocks
    assert [(r.path, r.kind) for r in blocks] == [
        ("blocks.0", "residual"),
        ("blocks.0", "residual"),
        ("blocks.1", "residual"),
        ("blocks.1", "residual"),
    ]
    assert all(second.entry == first.exit for first, second in itertools.pairwise(blocks))
    assert any("attention" in name for name in blocks[0].nodes)
    assert any("gelu" in name for name in blocks[1].nodes)


def test_a_plain_chain_of_convolutions(nets: SimpleNamespace) -> None:
    program, analysis = of(
        nets, nets.conv_bn(8, 8), nets.conv_bn(8, 8), nn.MaxPool2d(2), nets.conv_bn(8, 16), channels=16
    )
    assert [r.kind for r in analysis.regions] == ["plain", "plain"]
    assert analysis.blocks == analysis.regions
    assert [r.path for r in analysis.regions] == ["1.0", "2.0"]
    assert not analysis.regions[0].overlaps(analysis.regions[1])
    assert program_cost(program).macs > sum(r.cost.macs for r in analysis.regions) > 0


def test_layers_of_a_dense_block(nets: SimpleNamespace) -> None:
    program = capture(nets.DenseNet().eval(), nets.images())
    analysis = find_regions(program)
    assert [(r.kind, r.path) for r in analysis.regions] == [("concat", "layers.1.1"), ("concat", "layers.2.1")]
    assert analysis.blocks == analysis.regions
    # an earlier layer of the same width stands in for a later one
    assert [(r.entry, r.exit) for r in analysis.regions] == [("conv2d_1", "conv2d_2"), ("conv2d_2", "conv2d_3")]


def test_a_squeeze_and_excite_gate_is_no_block(nets: SimpleNamespace) -> None:
    program, analysis = of(nets, nets.Gated())
    (gate,) = (r for r in analysis.regions if r.kind == "gate")
    (block,) = analysis.blocks
    assert block.kind == "residual"
    assert gate.parent == block.name
    assert shape(program, gate) == ("relu", "mul", "gate")
    assert gate.cost.macs == 2 * 4 * 8


def test_nested_additions_are_alternatives(nets: SimpleNamespace) -> None:
    _, analysis = of(nets, nets.Nested())
    inner, outer = sorted((r for r in analysis.regions if r.kind == "residual"), key=lambda r: len(r.nodes))
    assert inner.nodes < outer.nodes
    assert inner.overlaps(outer)
    assert inner.parent == outer.name
    assert outer.parent is None
    assert analysis.blocks == (inner,)
    assert outer in analysis.outermost
    assert outer.cost.macs == 3 * inner.cost.macs


def test_a_downsampling_block_is_left_alone_with_a_reason(nets: SimpleNamespace) -> None:
    program, analysis = of(nets, nets.Downsample(), channels=16)
    (reject,) = analysis.rejects
    assert "the shape changes" in reject.reason
    assert "'8', '8', '8'" in reject.reason
    assert "'16', '4', '4'" in reject.reason
    assert operation(program, reject.node) == "add"
    assert str(reject) == f"{reject.node}: {reject.reason}"
    assert not analysis.regions


def test_a_value_that_is_read_outside_keeps_its_block(nets: SimpleNamespace) -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            inside = self.conv1(x).relu()
            return x + self.conv2(inside), inside.mean((2, 3))

    analysis = find_regions(capture(Leaky().eval(), nets.images()))
    assert not [r for r in analysis.regions if r.kind == "residual"]
    assert [r.reason for r in analysis.rejects] == ["a value inside is also used outside"]


def test_branches_with_a_side_input(nets: SimpleNamespace) -> None:
    mask = torch.randn(2, 1, 5, 5)
    program = capture(nets.Transformer(2).eval(), (nets.tokens(), mask))
    analysis = find_regions(program)
    assert len(analysis.blocks) == 4
    assert {r.kind for r in analysis.blocks} == {"residual"}
    shorter = bypass(program, analysis.blocks[0].entry, analysis.blocks[0].exit)
    assert shorter((nets.tokens(3), torch.zeros(3, 1, 5, 5))).shape == (3, 4)


def test_a_side_input_does_not_change_what_is_found(nets: SimpleNamespace) -> None:
    """The stream's own input, too, has to pass through a region's entry: no region may cut it off."""
    program = capture(nets.Transformer(2).eval(), (nets.tokens(), torch.randn(2, 1, 5, 5)))
    without = capture(nets.Transformer(2).eval(), nets.tokens())
    found = [(r.kind, r.path, r.cost.macs, len(r.nodes)) for r in find_regions(program).regions]
    assert found == [(r.kind, r.path, r.cost.macs, len(r.nodes)) for r in find_regions(without).regions]


def test_two_inputs_joined_by_an_addition_are_rejected() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 6), nn.Linear(5, 6)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.left(a) + self.right(b)

    analysis = find_regions(capture(Siamese().eval(), (torch.randn(2, 4), torch.randn(2, 5))))
    assert not analysis.regions
    assert [r.reason for r in analysis.rejects] == ["its operands come from different inputs"]


def test_no_region_cuts_an_input_off() -> None:
    """Where two inputs meet, the region from one of them to the join would throw the other away."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.middle, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.head(self.left(a) + self.middle(b))

    program = capture(Joined().eval(), (torch.randn(2, 4), torch.randn(2, 6)))
    for region in find_regions(program).regions:
        shorter = bypass(program, region.entry, region.exit)
        assert all(shorter.nodes[spec.name].users for spec in program.inputs), region.name


def test_find_by_name(residual: Program) -> None:
    analysis = find_regions(residual)
    assert analysis.find("relu>relu_2") is analysis.blocks[0]
    assert analysis.find("relu>relu_1") is None


def test_the_removed_nodes_are_those_that_a_bypass_removes(residual: Program) -> None:
    for region in find_regions(residual).regions:
        gone = set(residual.nodes) - set(bypass(residual, region.entry, region.exit).nodes)
        calls = {name for name in gone if residual.nodes[name].op == "call_function"}
        assert calls == region.nodes == removed_nodes(residual, region.entry, region.exit)


PARTS = ("Residual", "PreActivation", "Inverted", "Gated", "Nested", "conv")


@given(
    parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=3),
    seed=st.integers(0, 3),
    pick=st.integers(0, 1000),
)
@settings(max_examples=5)
def test_every_region_can_go(nets: SimpleNamespace, parts: list[str], seed: int, pick: int) -> None:
    """The network without it runs, has the region's MACs less, and exports again with a dynamic batch."""
    modules = [nets.conv_bn(8, 8) if part == "conv" else getattr(nets, part)() for part in parts]
    program = capture(nets.seeded(lambda: nets.image_net(*modules), seed), nets.images())
    analysis = find_regions(program)
    macs, x = program_cost(program).macs, nets.images(3)
    assert len(analysis.blocks) >= sum(part != "conv" for part in parts) >= 0
    assert analysis.regions
    for region in analysis.regions:
        entry, exit_ = program.nodes[region.entry], program.nodes[region.exit]
        assert signature(entry) == signature(exit_)
        assert any(node_macs(program, program.nodes[n]) for n in region.nodes)
        shorter = bypass(program, region.entry, region.exit)
        assert program_cost(shorter).macs == macs - region.cost.macs < macs
        result = shorter(x)
        assert result.shape == (3, 4)
        assert result.isfinite().all()
    region = analysis.regions[pick % len(analysis.regions)]
    shorter = bypass(program, region.entry, region.exit)
    torch.testing.assert_close(to_exported(shorter).module()(nets.images(5)), shorter(nets.images(5)))


def test_regions_of_a_bypassed_network_are_found_again(residual: Program) -> None:
    shorter = bypass(residual, "relu", "relu_2")
    assert [(r.entry, r.exit) for r in find_regions(shorter).blocks] == [("relu", "relu_4"), ("relu_4", "relu_6")]


def test_only_the_entry_feeds_a_region_from_above(residual: Program, inverted: Program) -> None:
    for program in (residual, inverted):
        for region in find_regions(program).regions:
            outside = {
                o.name for name in region.nodes for o in data_inputs(program.nodes[name]) if o.name not in region.nodes
            }
            assert outside == {region.entry}


def test_a_network_without_layers_of_one_shape_has_no_region(nets: SimpleNamespace) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    analysis = find_regions(capture(net.eval(), nets.images()))
    assert analysis.regions == analysis.blocks == ()


@pytest.mark.parametrize("activation", [F.relu, F.gelu, torch.tanh])
def test_a_same_width_linear_layer_is_a_plain_region(activation: object) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(activation(self.second(activation(self.first(x)))))

    (region,) = find_regions(capture(Chain().eval(), torch.randn(2, 4))).regions
    assert (region.kind, region.path, region.cost.macs) == ("plain", "second", 36)
