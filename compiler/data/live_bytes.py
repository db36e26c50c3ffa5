"""What the values of a network take in memory while one sample goes through it, read off its graph."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..ir.program import Program


@dataclass(frozen=True, kw_only=True)
class LiveBytes:
    """Bytes for one sample: `most` that are there at once, when each value goes with its last reader and an operator
    may lay out anew what it reads and writes; `largest` of a single value; `whole` of all values together."""

    most: int
    largest: int
    whole: int


def live_bytes(program: Program) -> LiveBytes:
    """What the values of a program take. Those of its inputs do not count: they are the caller's."""
    return program.derived(_live_bytes)


def _live_bytes(program: Program) -> LiveBytes:
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    size = {node: value_bytes(program, node) for node in calls}
    last = {operand: node for node in program.graph.nodes for operand in node.all_input_nodes if operand in size}
    ending: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in last.items():
        ending.setdefault(reader, []).append(value)
    held = most = 0
    for node in calls:
        held += size[node]
        again = size[node] + sum(size[operand] for operand in node.all_input_nodes if operand in size)
        most = max(most, held + again)
        held -= sum(size[value] for value in ending.get(node, ()))
    return LiveBytes(most=most, largest=max(size.values(), default=0), whole=sum(size.values()))


def value_bytes(program: Program, node: fx.Node) -> int:
    """Bytes of the tensors that a node computes for one sample."""
    values = [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, torch.Tensor)]
    return sum(value.dtype.itemsize * math.prod(map(program.dim, value.shape)) for value in values)
