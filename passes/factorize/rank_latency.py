"""What each low-rank option of a layer would take on a backend: measured, each kind of layer once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...compiler.ir.segments import Segment
from ...compiler.support.progress import Progress, silent
from ...runtime.probe.latency_probe import LatencyProbe
from .factorize import chain_nodes, factorize_for_timing
from .select_ranks import Candidate, Option, RankAnalysis

#: Options of each scheme that are timed for a layer: enough to see where latency steps.
MOST_OPTIONS = 4


@dataclass(frozen=True, kw_only=True)
class OptionLatencies:
    """Latencies in one unit: of each layer whole, of its options in their order, and of the whole network."""

    whole: Mapping[str, float]
    options: Mapping[str, Sequence[float]]
    network: float


def thinned(candidate: Candidate) -> list[Option]:
    """Some of a layer's options of each scheme, about evenly spread over their multiply-accumulates, the cheapest and
    the most expensive among them. What another scheme dominates by multiply-accumulates may yet be faster."""
    found = []
    for scheme in dict.fromkeys(option.scheme for option in candidate.every):
        options = [option for option in candidate.every if option.scheme == scheme]
        macs = np.array([option.macs for option in options], float)
        marks = np.linspace(macs[0], macs[-1], MOST_OPTIONS)
        found += [options[place] for place in np.unique(np.abs(macs - marks[:, None]).argmin(1))]
    return found


def option_latencies(
    analysis: RankAnalysis,
    options: Mapping[str, Sequence[Option]],
    probe: LatencyProbe,
    *,
    progress: Progress = silent,
) -> OptionLatencies:
    """Time every layer and every option, on the probe's backend, batch and threads.

    Weights are made up, for they do not change latency. Layers of one kind are timed once, and what was timed before on
    this machine is read from the cache. Raises BackendError and ExportError.
    """
    table = probe.table()
    program, names = analysis.program, list(options)
    whole = table.time_segments(program, [_segment([n], analysis, n) for n in names], progress=progress)
    found: dict[str, list[float]] = {name: [] for name in names}
    for place in range(max(map(len, options.values()), default=0)):
        there = [name for name in names if place < len(options[name])]
        decisions = [analysis.decision(name, options[name][place]) for name in there]
        variant = factorize_for_timing(program, decisions)
        segments = [_segment(chain_nodes(variant, analysis.candidates[name].layer), analysis, name) for name in there]
        for name, time in zip(there, table.time_segments(variant, segments, progress=progress), strict=True):
            found[name].append(time.units)
    return OptionLatencies(
        whole={name: time.units for name, time in zip(names, whole, strict=True)},
        options=found,
        network=table.measure_network(probe.model, probe.inputs),
    )


def _segment(nodes: Sequence[str], analysis: RankAnalysis, name: str) -> Segment:
    """The calls of one layer, whole or factorised, as a segment of their own."""
    layer = analysis.candidates[name].layer
    return Segment(nodes=tuple(nodes), entries=(layer.input,), exits=(layer.node,), macs=0)
