"""What each layer saves in int8: the times of its segment, beside others in int8 and in floating point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...compiler.ir.cost import node_macs
from ...compiler.ir.program import Program
from ...compiler.ir.segments import Segment, find_segments
from ...compiler.plan.proposals import Item, Mix
from ...compiler.support.progress import Progress, silent
from ...runtime.predict.latency_table import LatencyTable, SegmentTime

#: So many segments are timed before it is asked whether anything can still come of the rest.
AT_ONCE = 8
#: Layers that are predicted to save less of the latency than this are put into int8 with all others or not at all: by
#: themselves they are lost in noise, and one in floating point between others costs two more changes of precision.
LEAST_SAVING = 0.0005
#: Plans that are tried first leave out these shares of the layers, those that lose the most for what they save.
LEFT_OUT = (0.0, 0.1, 0.25)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a layer saves of the network's latency in floating point, and what it takes of it there."""

    saving: float
    time: float

    @property
    def share(self) -> float:
        """What it saves of its own time, from 0 to 1."""
        return min(max(self.saving / max(self.time, 1e-12), 0.0), 1.0)


Times = list[tuple[frozenset[str], float]]


def integer_savings(
    table: LatencyTable,
    folded: Program,
    whole: Program,
    standing: Mapping[str, Sequence[str]],
    measured: float,
    *,
    progress: Progress = silent,
) -> dict[str, Saved]:
    """What each of some layers saves where all of them are in int8: the difference of its segment, by its share of the
    multiply-accumulates there.

    `folded` is the network in floating point, `whole` the same with all layers in int8; `standing` has the names there
    of what stands for each layer. `measured` is what `whole` saves, measured as a network. Savings are brought to that
    sum, each layer by its share of the time: segments in floating point and in int8 are timed in different minutes, and
    what slows a machine does not slow both alike. Where `whole` was not faster, neither by `LEAST_SAVING`, segments
    have the word: the slowest are timed first, and no more once those that are left could not make up for what these
    lose if they took no time at all. Then there is nothing to save, {}.
    """
    segments = find_segments(folded)
    before = _times(segments, table.predict(folded, progress=progress).segments)
    total = sum(time for _, time in before)
    macs = {name: node_macs(folded, node) for name, node in folded.nodes.items()}
    inside = {name for names in standing.values() for name in names}
    own = {name: time / _macs(nodes, macs) * macs[name] for nodes, time in before for name in nodes & inside}
    open_ = _by_time(find_segments(whole), own)
    pays = measured >= LEAST_SAVING
    saved: dict[str, float] = {}
    while open_:
        timed, open_ = open_[:AT_ONCE], open_[AT_ONCE:]
        for nodes, time in _times(timed, table.time_segments(whole, timed, progress=progress)):
            there = nodes & inside
            saved |= {name: own[name] - time / _macs(nodes, macs) * macs[name] for name in there}
        left = sum(time for name, time in own.items() if name not in saved)
        if not pays and sum(saved.values()) + left < LEAST_SAVING * total:
            return {}
    missing = (measured * total - sum(saved.values())) / max(sum(own.values()), 1e-12) if pays else 0.0
    shares = {name: sum(own[layer] for layer in names) for name, names in standing.items()}
    less = {name: sum(saved[layer] for layer in names) + missing * shares[name] for name, names in standing.items()}
    return {name: Saved(saving=less[name] / total, time=shares[name] / total) for name in standing}


def _by_time(segments: Sequence[Segment], own: Mapping[str, float]) -> list[Segment]:
    """Those that hold layers, what takes the longest in floating point first."""
    times = {segment: sum(own.get(name, 0.0) for name in segment.nodes) for segment in segments}
    holding = [segment for segment in segments if not own.keys().isdisjoint(segment.nodes)]
    return sorted(holding, key=lambda segment: -times[segment])


def _times(segments: Sequence[Segment], times: Sequence[SegmentTime]) -> Times:
    return [(frozenset(segment.nodes), time.units) for segment, time in zip(segments, times, strict=True)]


def _macs(nodes: frozenset[str], macs: Mapping[str, int]) -> int:
    return max(1, sum(macs.get(name, 0) for name in nodes))


def starts_of(items: Sequence[Item]) -> tuple[Mix, ...]:
    """All layers, and those that are faster but for the ones that lose the most for what they save."""
    faster = [item for item in items if item.proposals[0].saving >= LEAST_SAVING]
    worst = sorted(faster, key=lambda item: item.proposals[0].error / item.proposals[0].saving)
    counts = dict.fromkeys(round(len(worst) * (1 - share)) for share in LEFT_OUT)
    taken = [list(items), *(worst[:count] for count in counts)]
    return tuple({item: item.proposals[0] for item in mix} for mix in taken if mix)
