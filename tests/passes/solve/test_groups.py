"""Layers that are solved together."""

from types import SimpleNamespace

from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from foldcut.passes.solve.joins import group_targets, is_join
from foldcut.passes.solve.layers import find_layers
from foldcut.passes.solve.targets import trace_target


def groups(program: Program) -> list[list[str]]:
    targets = [trace_target(program, layer, {}) for layer in find_layers(program)[0].values()]
    return [[t.layer.weight.removesuffix(".weight") for t in group] for group in group_targets(program, targets)]


def test_a_branch_is_a_group(residual: Program) -> None:
    assert groups(residual) == [
        ["stem.0"],
        *([f"blocks.{i}.conv1", f"blocks.{i}.conv2"] for i in range(3)),
        ["head"],
    ]


def test_attention_and_mlp_are_groups_of_their_own(transformer: Program) -> None:
    blocks = [[f"blocks.{i}.{a}", f"blocks.{i}.{b}"] for i in range(2) for a, b in (("qkv", "proj"), ("up", "down"))]
    assert groups(transformer) == [["embed"], *blocks, ["head"]]


def test_groups_cover_all_targets_in_order(inverted: Program, nets: SimpleNamespace) -> None:
    nested = capture(nets.image_net(nets.Nested(), nets.Gated()).eval(), nets.images())
    for program in (inverted, nested):
        wanted = [layer.weight.removesuffix(".weight") for layer in find_layers(program)[0].values()]
        assert [name for group in groups(program) for name in group] == wanted


def test_only_an_addition_of_activations_is_a_join(residual: Program) -> None:
    joins = [name for name in residual.nodes if is_join(residual, name)]
    assert len(joins) == 3
    assert all(name.startswith("add") for name in joins)
