"""Segments: a program cut where a single activation passes, so that its parts can be timed apart and their times added.

A cut may lie behind any node after which one activation alone is still needed, unless that activation is for a moment
much larger than at the cut before: what an inverted bottleneck widens stays inside. Parts without a contraction go with
the part before them (a pooling belongs to the layer that it pools), so that runtimes fuse inside a segment what they
would fuse in the network. Values that cost no contraction (a mask worked out from an input) do not stand in the way of
a cut: every segment that needs one takes it as a further input.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .cost import node_macs
from .program import Program, data_inputs, dtype_name, is_size, is_tensor, output_nodes

#: A cut may pass on so many times the elements of the cut before, unless the next ones do as well: an inverted
#: bottleneck goes back after two layers, a new stage does not.
MOST_WIDER = 2


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a program: `nodes` in topological order, the activations that come in and those that go out."""

    nodes: tuple[str, ...]
    entries: tuple[str, ...]
    exits: tuple[str, ...]
    macs: int = field(compare=False)

    @property
    def name(self) -> str:
        """Identity within the program: ``entry>exit``."""
        return f"{self.entries[0] if self.entries else ''}>{self.exits[-1]}"


def find_segments(program: Program) -> tuple[Segment, ...]:
    """The segments of a program in topological order; every call of the graph lies in just one. Never mutates.

    A program without such cuts is one segment.
    """
    macs = {name: node_macs(program, node) for name, node in program.nodes.items()}
    parts = [_Part(nodes=[])]
    for node, passed in _cuts(program, _without_contraction(program, macs)):
        parts[-1].nodes.append(node)
        if passed is not None:
            parts[-1].size = math.prod(program.shape(passed))
            parts.append(_Part(nodes=[]))
    parts = _without_wide_cuts(_with_contractions(_with_reads([part for part in parts if part.nodes], macs), macs))
    outputs = {node.name for node in output_nodes(program.graph)}
    return tuple(_segment(part.nodes, outputs, macs) for part in parts)


@dataclass
class _Part:
    """Calls in topological order, and the elements at batch 1 of the activation that they pass on."""

    nodes: list[fx.Node]
    size: int = 0

    def __add__(self, behind: _Part) -> _Part:
        return _Part(nodes=[*self.nodes, *behind.nodes], size=behind.size)


def _without_contraction(program: Program, macs: dict[str, int]) -> set[str]:
    """Inputs and what follows from them and from constants without a multiply-accumulate."""
    free: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if not macs[node.name] and all(operand.name in free for operand in data_inputs(node)):
            free.add(node.name)
    return free


def _cuts(program: Program, free: set[str]) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """Every call, with the activation that alone is needed behind it, where it is one."""
    waiting: dict[fx.Node, int] = {}
    outputs = set(output_nodes(program.graph))
    for node in program.graph.nodes:
        if node.op != "call_function" or is_size(node):
            continue
        for operand in set(data_inputs(node)):
            if operand in waiting:
                waiting[operand] -= 1
                if not waiting[operand]:
                    del waiting[operand]
        readers = sum(user.op != "output" and not is_size(user) for user in node.users) + (node in outputs)
        if readers and node.name not in free:
            waiting[node] = readers
        alone = next(iter(waiting)) if len(waiting) == 1 else None
        yield node, alone if alone is not None and is_tensor(alone) else None


def _with_contractions(parts: Iterable[_Part], macs: dict[str, int]) -> list[_Part]:
    """Parts of which each has a contraction: those without one join the part before, or the first one behind."""
    merged: list[_Part] = []
    for part in parts:
        if merged and not (_contracts(part, macs) and _contracts(merged[-1], macs)):
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _with_reads(parts: Iterable[_Part], macs: dict[str, int]) -> Iterator[_Part]:
    """Parts of which those that read integers back go with the contraction behind them, as runtimes join them.

    With more than that between, a pooling, they do so only where that contraction computes in integers: else the
    pooling is the last that does, and is no part of what is behind it.
    """
    read: _Part | None = None
    for part in parts:
        contracts = _contracts(part, macs)
        if read is None:
            begins = not contracts and is_dequantized(part.nodes[0])
        elif contracts and not (all(map(is_dequantized, read.nodes)) or _dequantizes_weights(read + part)):
            yield read
            begins = False
        else:
            part = read + part
            begins = not contracts and not is_quantized(part.nodes[-1])
        read = part if begins else None
        if not begins:
            yield part
    if read is not None:
        yield read


def is_dequantized(value: object) -> bool:
    """Whether a value, or a weight, is read back from integers."""
    return isinstance(value, fx.Node) and str(value.target).startswith("quantized_decomposed.dequantize")


def is_quantized(node: fx.Node) -> bool:
    """Whether a value is rounded to integers."""
    return str(node.target).startswith("quantized_decomposed.quantize")


def _dequantizes_weights(part: _Part) -> bool:
    """Whether a part that begins by reading integers back does so once more: its weights."""
    return any(map(is_dequantized, part.nodes[1:]))


def _contracts(part: _Part, macs: dict[str, int]) -> bool:
    return any(macs[node.name] for node in part.nodes)


def _without_wide_cuts(parts: Sequence[_Part]) -> list[_Part]:
    """Parts that do not end where the activation is only for a moment much wider than at the cut before."""
    sizes = [part.size for part in parts]
    merged: list[_Part] = []
    before, join = 0, False
    for place, part in enumerate(parts):
        if join:
            merged[-1] += part
        else:
            merged.append(part)
        usual = MOST_WIDER * before
        join = 0 < usual < sizes[place] and any(size <= usual for size in sizes[place + 1 : place + 3])
        before = before if join else part.size
    return merged


def _segment(part: Sequence[fx.Node], outputs: set[str], macs: dict[str, int]) -> Segment:
    inside = set(part)
    entries = dict.fromkeys(o.name for node in part for o in data_inputs(node) if o not in inside)
    exits = [
        node.name
        for node in part
        if node.name in outputs or any(u not in inside and u.op != "output" and not is_size(u) for u in node.users)
    ]
    return Segment(
        nodes=tuple(node.name for node in part),
        entries=tuple(entries),
        exits=tuple(exits),
        macs=sum(macs[node.name] for node in part),
    )


def segment_key(program: Program, segment: Segment, batch: int) -> str:
    """Equal for segments of equal operations, settings, shapes and dtypes at that batch size, whatever their names and
    weights: such segments take equal time."""
    place = {name: f"%{index}" for index, name in enumerate((*segment.entries, *segment.nodes))}

    def text(value: Any) -> str:
        if not isinstance(value, fx.Node):
            return str(value)
        if value.name in place:
            return place[value.name]
        if is_size(value):
            return str(program.scalar(value, batch))
        return _tensor_text(program.constant(value)) if value.op == "get_attr" else str(value.target)

    lines = [f"in {_tensor_text(program.nodes[name].meta['val'], program, batch)}" for name in segment.entries]
    for name in segment.nodes:
        node = program.nodes[name]
        leaves, structure = pytree.tree_flatten((node.args, dict(node.kwargs)))
        lines.append(f"{node.target}({', '.join(map(text, leaves))}) {structure}")
    lines.append(f"out {[place[name] for name in segment.exits]}")
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _tensor_text(value: torch.Tensor, program: Program | None = None, batch: int = 1) -> str:
    shape = [program.dim(d, batch) if program else d for d in value.shape]
    return f"{dtype_name(value.dtype)}{shape}"
