"""Latency per block before and after, from a runtime's profile of single nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .program import Program, output_nodes
from .report_graph import block_of_calls

#: Where less of the time is known by name, the profile says nothing about blocks.
LEAST_PLACED = 0.5


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
    profiles: tuple[Sequence[TimedNode], Sequence[TimedNode]],
    measured_ms: tuple[float, float],
) -> dict[str, Any] | None:
    """Milliseconds of each block of `before`, in order, in the original and in the result.

    Timing nodes one by one costs time, so each profile is scaled to what the whole network was measured to take:
    `blocks` add up to `measured_ms`. `placed` is the share of the time whose nodes are known by name; the rest (a
    change of memory layout) goes with the node that runs next. None where too little is known.
    """
    home = block_of_calls(before, after)
    count = 1 + max(home.values(), default=-1)
    sides = [
        _by_block(nodes, home | _outputs(program, home), count)
        for program, nodes in zip((before, after), profiles, strict=True)
    ]
    if any(side is None or side[1] < LEAST_PLACED for side in sides):
        return None
    blocks: list[list[float]] = []
    for side, total_ms in zip(sides, measured_ms, strict=True):
        assert side is not None
        times, _ = side
        blocks.append([round(ms / sum(times) * total_ms, 6) for ms in times])
    return {
        "before_ms": blocks[0],
        "after_ms": blocks[1],
        "placed": round(min(side[1] for side in sides if side is not None), 4),
    }


def _outputs(program: Program, home: Mapping[str, int]) -> dict[str, int]:
    """The blocks of the outputs: an exported model calls these values by the names of the signature."""
    ends = zip(program.outputs, output_nodes(program.graph), strict=True)
    return {spec.name: home[node.name] for spec, node in ends if node.name in home}


def _by_block(nodes: Sequence[TimedNode], home: Mapping[str, int], count: int) -> tuple[list[float], float] | None:
    """(time of each block, share of the time that is known by name)."""
    times, known, waiting, last = [0.0] * count, 0.0, 0.0, 0
    for node in nodes:
        place = next((home[name] for name in node.names if name in home), None)
        if place is None:
            waiting += node.ms
            continue
        times[place] += node.ms + waiting
        known, waiting, last = known + node.ms, 0.0, place
    if count:
        times[last] += waiting
    total = sum(times)
    return (times, known / total) if total > 0 else None
