"""What mimicking compares: which values of the teacher with which of the student, and what there is to train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ...compiler.ir.edit import signature
from ...compiler.ir.execute import required
from ...compiler.ir.program import Program, is_tensor
from ..solve.features import compared_outputs, head_features


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One pair of values that the loss compares: node names in teacher and student, and the weight."""

    teacher: str
    student: str
    weight: float
    output: bool = False


def compared_pairs(
    teacher: Program, student: Program, *, outputs_weight: float, hints_weight: float
) -> tuple[list[Compared], int]:
    """What is compared: features and outputs, which also judge the result, then hints; and how many judge.

    A feature that went with a dropped region, or that the student cannot change, is left out; without features the
    outputs are trained on.
    """
    own = {name: name for name in student.nodes} | _stand_ins(teacher, student)
    outputs = [node.name for node in compared_outputs(teacher) if node.name in own]
    features = [name for name in head_features(teacher) if name in own and name not in outputs]
    weight = outputs_weight if features else max(1.0, outputs_weight)
    pairs = [Compared(teacher=name, student=own[name], weight=1.0) for name in features]
    pairs += [Compared(teacher=name, student=own[name], weight=weight, output=True) for name in outputs]
    judges = len(pairs)
    taken = {pair.teacher for pair in pairs}
    hints = [n for n in stage_ends(student) if n in teacher.nodes and n not in taken]
    pairs += [Compared(teacher=n, student=n, weight=hints_weight) for n in hints]
    return pairs, judges


def _stand_ins(teacher: Program, student: Program) -> dict[str, str]:
    """Teacher nodes that are gone and the student nodes that their readers, or the outputs, read in their place."""
    found: dict[str, str] = {}
    for name, node in student.nodes.items():
        other = teacher.nodes.get(name)
        if other is None or len(other.all_input_nodes) != len(node.all_input_nodes):
            continue
        for theirs, ours in zip(other.all_input_nodes, node.all_input_nodes, strict=True):
            if theirs.name != ours.name and theirs.name not in student.nodes and signature(theirs) == signature(ours):
                found[theirs.name] = ours.name
    return found


def batch_first(program: Program, node: fx.Node) -> bool:
    """Whether dim 0 of the value is the batch, so that samples can be picked from it."""
    shape = node.meta["val"].shape
    return len(shape) > 0 and str(shape[0]) in program.batch_symbols


def stage_ends(program: Program) -> tuple[str, ...]:
    """The last activation of each shape that is read more than once (a stream with a shortcut): where a stage ends."""
    last: dict[str, str] = {}
    for name, node in program.nodes.items():
        read_twice = is_tensor(node) and node.op == "call_function" and len(node.users) > 1
        if read_twice and node.meta["val"].is_floating_point() and batch_first(program, node):
            last[signature(node)] = name
    return tuple(last.values())


def read_parameters(program: Program, names: Iterable[str]) -> set[str]:
    """Parameters that the values of some nodes depend on."""
    nodes = [program.nodes[name] for name in required(program, names, set())]
    return {str(n.target) for node in nodes for n in node.all_input_nodes if n.op == "get_attr"}


def same_as_teacher(teacher: Program, student: Program) -> set[str]:
    """Parameters that only nodes with the teacher's own value read: in front of the first change there is nothing to
    mend."""
    theirs, ours = (dict(p.module.named_parameters()) for p in (teacher, student))
    same: set[str] = set()
    for name, node in student.nodes.items():
        other = teacher.nodes.get(name)
        if other is None or other.target != node.target or len(other.all_input_nodes) != len(node.all_input_nodes):
            continue
        pairs = zip(node.all_input_nodes, other.all_input_nodes, strict=True)
        if node.op == "get_attr":
            target = str(node.target)
            if target in ours and not (target in theirs and torch.equal(ours[target], theirs[target])):
                continue
        elif not all(a.name == b.name and a.name in same for a, b in pairs):
            continue
        same.add(name)
    attributes = [n for n in student.graph.nodes if n.op == "get_attr"]
    return {str(n.target) for n in attributes if n.name in same and all(user.name in same for user in n.users)}
