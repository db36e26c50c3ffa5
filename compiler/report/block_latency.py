"""Latency per block before and after, from a runtime's profile of single nodes.

An export numbers nodes anew, so names of nodes say nothing; names of weights stay. In a model's node order every block
begins with a node that reads one of its weights, and what follows without weights of its own belongs to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..ir.program import Program
from ..onnx.model_file import OnnxModel, structure_of
from .graph import block_of_calls

if TYPE_CHECKING:
    import onnx

#: Where less of the time is known by name, the profile says nothing about blocks.
LEAST_PLACED = 0.5
#: Operators whose weight may have lost its name (a transpose folded into it): they may begin a block unnoticed.
_CONTRACTIONS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"))


class TimedNode(Protocol):
    """A node that a runtime ran: the names that the model may know it by, the most telling first, and its time."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of values that it makes, or its own."""
        ...

    @property
    def ms(self) -> float:
        """Milliseconds for one run."""
        ...


def block_latency(
    before: Program,
    after: Program,
    models: tuple[OnnxModel, OnnxModel],
    profiles: tuple[Sequence[TimedNode], Sequence[TimedNode]],
    measured_ms: tuple[float, float],
) -> dict[str, Any] | None:
    """Milliseconds of each block of `before`, in order, in the original and in the result, from the profiles of their
    ONNX models.

    Timing nodes one by one costs time, so each profile is scaled to what the whole network was measured to take:
    the blocks add up to `measured_ms`. `placed` is the share of the time whose nodes are known; the rest (a change of
    memory layout) goes with the node that runs next. None where too little is known.
    """
    home = block_of_calls(before, after)
    count = 1 + max(home.values(), default=-1)
    found: dict[str, Any] = {}
    placed = 1.0
    for side, program, model, nodes, total_ms in zip(
        ("before_ms", "after_ms"), (before, after), models, profiles, measured_ms, strict=True
    ):
        times, known = _by_block(nodes, blocks_of_values(model, program, home), count)
        if sum(times) <= 0 or known < LEAST_PLACED:
            return None
        found[side] = [round(ms / sum(times) * total_ms, 6) for ms in times]
        placed = min(placed, known)
    return {**found, "placed": round(placed, 4)}


def blocks_of_values(model: OnnxModel, program: Program, home: Mapping[str, int]) -> dict[str, int]:
    """The block of each node of an ONNX model that was exported from `program`, by the names of the values that it
    makes and by its own. Nodes that may begin a block but read no weight that is known are left out."""
    graph = structure_of(model).graph
    weights = _blocks_of_weights(program, home)
    stored = {tensor.name for tensor in graph.initializer}
    at = [_block_read(node, weights) for node in graph.node]
    readers: dict[str, list[int]] = {}
    for place, node in enumerate(graph.node):
        for value in node.input:
            readers.setdefault(value, []).append(place)
    found: dict[str, int] = {}
    current = next((block for block in at if block is not None), 0)
    for node, read in zip(graph.node, at, strict=True):
        block = read
        if block is None and node.op_type in _CONTRACTIONS and any(value in stored for value in node.input):
            # its weight has no name; the bias that is added to it alone may have one
            after = [at[place] for value in node.output for place in readers.get(value, [])]
            block = after[0] if len(after) == 1 else None
            if block is None:
                continue
        current = current if block is None else block
        found |= dict.fromkeys((*node.output, *([node.name] if node.name else [])), current)
    return found


def _blocks_of_weights(program: Program, home: Mapping[str, int]) -> dict[str, int]:
    """The block of each parameter and constant that one block alone reads."""
    found: dict[str, set[int]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            found.setdefault(str(node.target), set()).update(home[u.name] for u in node.users if u.name in home)
    return {name: blocks.pop() for name, blocks in found.items() if len(blocks) == 1}


def _block_read(node: onnx.NodeProto, weights: Mapping[str, int]) -> int | None:
    """The block whose weights a node reads: under their own name, or under one made from it (a folded bias)."""
    for value in node.input:
        name = value
        while name:
            if name in weights:
                return weights[name]
            name = name.rpartition("_")[0]
    return None


def _by_block(nodes: Sequence[TimedNode], home: Mapping[str, int], count: int) -> tuple[list[float], float]:
    """(time of each block, share of the time whose nodes are known)."""
    times, known, waiting, last = [0.0] * max(1, count), 0.0, 0.0, 0
    for node in nodes:
        place = next((home[name] for name in node.names if name in home), None)
        if place is None:
            waiting += node.ms
            continue
        times[place] += node.ms + waiting
        known, waiting, last = known + node.ms, 0.0, place
    times[last] += waiting
    total = sum(times)
    return times, known / total if total > 0 else 0.0
