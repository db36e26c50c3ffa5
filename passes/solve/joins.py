"""Layers that are solved together: those of one branch, up to the addition that it feeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...compiler.ir.execute import descendants
from ...compiler.ir.program import Program, data_inputs, is_call
from .targets import Target

aten = torch.ops.aten


def group_targets(program: Program, targets: Sequence[Target]) -> list[list[Target]]:
    """Targets in topological order as consecutive groups.

    A group ends at a residual addition: its last layers have it as their anchor, the layers before them lie inside
    the branch (all that they compute goes through the addition, and its other operand does not depend on them).
    Layers outside any branch are groups of one; those without a counterpart in the teacher (the first factors of a
    factorised layer) go with the next layer that has one.
    """
    groups: list[list[Target]] = []
    ends = [_end(program, targets, index) for index in range(len(targets))]
    for index in range(len(targets) - 2, -1, -1):
        if not targets[index].counterparts and ends[index] is None:
            ends[index] = ends[index + 1] = ends[index + 1] or targets[index + 1].anchor
    for index, target in enumerate(targets):
        if index > 0 and ends[index] is not None and ends[index] == ends[index - 1]:
            groups[-1].append(target)
        else:
            groups.append([target])
    return groups


def is_join(program: Program, name: str) -> bool:
    """Whether the node adds two activations."""
    node = program.nodes[name]
    return is_call(node, aten.add) and len(data_inputs(node)) == 2


def _end(program: Program, targets: Sequence[Target], index: int) -> str | None:
    """The addition that ends the target's branch."""
    target = targets[index]
    if is_join(program, target.anchor):
        return target.anchor
    below = descendants(program, [target.layer.node])
    for later in targets[index + 1 :]:
        if is_join(program, later.anchor) and later.layer.node in below:
            return later.anchor if _inside(program, later.anchor, below | {target.layer.node}) else None
    return None


def _inside(program: Program, join: str, below: set[str]) -> bool:
    """One operand of the join depends on the layer, the other does not, and nothing but the join lets its effect
    out."""
    depends = [operand.name in below for operand in data_inputs(program.nodes[join])]
    if sum(depends) != 1:
        return False
    after = descendants(program, [join]) | {join}
    readers = [user for name in below - after for user in program.nodes[name].users]
    return all(user.name in below and user.op != "output" for user in readers)
