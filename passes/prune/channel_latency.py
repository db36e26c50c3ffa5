"""What removing channels would save on a backend, group by group, from the times of single segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import networkx as nx
import numpy as np
import torch

from ...compiler.analysis.provenance import Provenance
from ...compiler.analysis.unit_groups import UnitGroup, surplus_units
from ...compiler.ir.program import Program
from ...compiler.ir.segments import Segment, find_segments
from ...compiler.support.progress import Progress, silent
from ...runtime.predict.latency_table import LatencyTable
from ..cut.prune_channels import prune_channels


def touched_layers(provenance: Provenance, group: UnitGroup, *roles: str) -> set[str]:
    """The nodes whose weights hold channels of a group; with `roles`, as outputs (``out``) or as inputs (``in``)."""
    program = provenance.program
    return {
        slot.node
        for slot in provenance.slots
        if program.tensor(slot.parameter).dim() > 1
        and (not roles or slot.role in roles)
        and bool(torch.isin(slot.labels, group.units).any())
    }


def group_savings(
    provenance: Provenance,
    groups: Sequence[UnitGroup],
    counts: Mapping[str, Sequence[int]],
    table: LatencyTable,
    *,
    progress: Progress = silent,
) -> dict[str, list[float]]:
    """Share of the network's latency that each group saves at each of its counts, cut alone.

    Every second count is timed, the smallest among them; the others lie on straight lines between those and the whole
    group, which saves nothing. Groups that run through different segments are cut together, which costs one export for
    all of them; each is then credited with what its own segments save. Segments of equal shapes are timed once. Raises
    BackendError and ExportError.
    """
    timed = {group.name: sorted(counts[group.name])[::2] for group in groups}
    found = _timed_savings(provenance, groups, timed, table, progress)
    return {g.name: np.interp(counts[g.name], [*timed[g.name], len(g)], [*found[g.name], 0.0]).tolist() for g in groups}


def _timed_savings(
    provenance: Provenance,
    groups: Sequence[UnitGroup],
    counts: Mapping[str, Sequence[int]],
    table: LatencyTable,
    progress: Progress,
) -> dict[str, list[float]]:
    program = provenance.program
    before = table.predict(program, progress=progress)
    segments = find_segments(program)
    times = {segment.nodes: time.units for segment, time in zip(segments, before.segments, strict=True)}
    changed = {g.name: _changed_segments(provenance, g, segments) for g in groups}
    found: dict[str, list[float]] = {g.name: [] for g in groups}
    rounds = [
        (batch, place)
        for batch in _apart(groups, changed)
        for place in range(max(len(counts[group.name]) for group in batch))
    ]
    for done, (batch, place) in enumerate(rounds, 1):
        cut = [group for group in batch if place < len(counts[group.name])]
        left = {group.name: counts[group.name][place] for group in cut}
        for part, smaller in _variants(provenance, cut, left, segments):
            after = _node_times(smaller, table, progress)
            for group in part:
                nodes = {node for segment in changed[group.name] for node in segment.nodes}
                old = sum(times[segment.nodes] for segment in changed[group.name])
                new = sum(time for inside, time in after.items() if nodes & inside)
                found[group.name].append((old - new) / before.units)
        progress("predict cuts", done, len(rounds))
    return found


def _changed_segments(provenance: Provenance, group: UnitGroup, segments: Sequence[Segment]) -> list[Segment]:
    """The segments whose calls see other shapes once units of the group are gone."""
    removed = provenance.removal(group.units[len(group) // 2 :])
    program = provenance.program
    changed = {
        node.name
        for node in program.graph.nodes
        if node.op == "call_function" and any(k is not None for k in provenance.node_kept(node, removed))
    } | touched_layers(provenance, group)
    return [segment for segment in segments if changed.intersection((*segment.nodes, *segment.entries))]


def _apart(groups: Sequence[UnitGroup], changed: Mapping[str, Sequence[Segment]]) -> list[list[UnitGroup]]:
    """The groups in as few batches as a greedy colouring finds, no two of a batch in one segment."""
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(group.name for group in groups)
    nodes = {name: {segment.nodes for segment in found} for name, found in changed.items()}
    graph.add_edges_from((a, b) for a, b in combinations(nodes, 2) if nodes[a] & nodes[b])
    colours: dict[str, int] = nx.greedy_color(graph, strategy="largest_first")
    return [[g for g in groups if colours[g.name] == colour] for colour in sorted(set(colours.values()))]


def _variants(
    provenance: Provenance, groups: Sequence[UnitGroup], left: Mapping[str, int], segments: Sequence[Segment]
) -> list[tuple[list[UnitGroup], Program]]:
    """The program with all of the groups cut, where that leaves the cuts between segments where they were; else one for
    each group, so that no segment is shared."""
    smaller = prune_channels(provenance, surplus_units(groups, left)).program
    if len(groups) == 1 or {s.nodes for s in find_segments(smaller)} == {s.nodes for s in segments}:
        return [(list(groups), smaller)]
    return [([g], prune_channels(provenance, surplus_units([g], left)).program) for g in groups]


def _node_times(program: Program, table: LatencyTable, progress: Progress) -> dict[frozenset[str], float]:
    segments = find_segments(program)
    timed = table.time_segments(program, segments, progress=progress)
    return {frozenset(segment.nodes): time.units for segment, time in zip(segments, timed, strict=True)}
