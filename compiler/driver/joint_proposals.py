"""What each analysis offers towards a latency goal, in one currency: predicted output error, share of the latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...passes.drop.choose_drops import Choice
from ...passes.factorize.rank_choice import Menu
from ...passes.factorize.select_ranks import RankAnalysis
from ...passes.prune.channel_budget import ChannelLimits, free_groups
from ...passes.prune.channel_latency import group_savings, touched_layers
from ...passes.prune.cuttable import cuttable_groups
from ..analysis.provenance import Provenance, find_units
from ..analysis.unit_groups import UnitGroup
from ..data.calibration_set import CalibrationSet
from ..plan.proposals import Item, Proposal
from ..store.analysis_store import NOTHING_KEPT, AnalysisStore
from ..support.errors import GoalError, Reject
from ..support.progress import Progress, silent
from .channel_pipeline import error_curves, group_rejects
from .stored_latency import StoredLatency

#: Shares of a group's units that a plan may keep.
KEEPS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
#: Proposals that save less of the latency than this are left out: they cannot be told from none.
LEAST_SAVING = 0.0005


@dataclass(frozen=True, kw_only=True)
class Offered:
    """Items of one kind, what was left alone and why, and the unit groups where they were looked at."""

    items: tuple[Item, ...]
    rejects: tuple[Reject, ...] = ()
    provenance: Provenance | None = None


def offered_drops(choice: Choice) -> Offered:
    """The regions in the order in which they would be dropped; each adds what the choice predicted at its turn."""
    items = []
    before = 0.0
    for region, decision in zip(choice.regions, choice.decisions, strict=True):
        error = decision.error or 0.0
        proposal = Proposal(error=max(error - before, 0.0), saving=decision.saving or 0.0, change=decision)
        items.append(Item(kind="drop_blocks", name=region.name, nodes=region.nodes, proposals=(proposal,)))
        before = max(before, error)
    return Offered(items=tuple(items))


def offered_cuts(
    latency: StoredLatency,
    calibration: CalibrationSet,
    limits: ChannelLimits,
    *,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> Offered:
    """Each unit group at some counts on the lattice, with the height of its error curve and the latency of the segments
    that it changes. Nothing is offered where no group can be cut."""
    program = latency.probe.program
    provenance = find_units(program)
    try:
        groups, stuck = cuttable_groups(provenance, free_groups(provenance, limits))
    except GoalError as cause:
        return Offered(items=(), rejects=(Reject(reason=cause.message, node=""),), provenance=provenance)
    counts = {group.name: _counts(group, limits) for group in groups}
    groups = [group for group in groups if counts[group.name]]
    rejects = (*group_rejects(provenance), *(Reject(reason=str(cause.message), node=g.name) for g, cause in stuck))
    if not groups:
        return Offered(items=(), rejects=rejects, provenance=provenance)
    curves = error_curves(provenance, calibration, groups, progress=progress, store=store)
    savings: Mapping[str, list[float]] = latency.kept(
        "cuts",
        [[g.name for g in groups], counts],
        lambda: group_savings(provenance, groups, counts, latency.probe.table(), progress=progress),
    )
    items = []
    for group in groups:
        proposals = tuple(
            Proposal(error=float(curves[group.name][count]), saving=saving, change=count)
            for count, saving in zip(counts[group.name], savings[group.name], strict=True)
            if saving >= LEAST_SAVING
        )
        if proposals:
            nodes, producers = (frozenset(touched_layers(provenance, group, *roles)) for roles in ((), ("out",)))
            kind = "prune_channels"
            items.append(Item(kind=kind, name=group.name, nodes=nodes, proposals=proposals, producers=producers))
    return Offered(items=tuple(items), rejects=rejects, provenance=provenance)


def _counts(group: UnitGroup, limits: ChannelLimits) -> list[int]:
    found = dict.fromkeys(group.count_for(keep, limits.multiple) for keep in KEEPS)
    return [count for count in found if limits.least * len(group) <= count < len(group)]


def offered_ranks(analysis: RankAnalysis, menu: Menu, weights: Mapping[str, float], network: float) -> Offered:
    """The options of a menu with its measured latencies, over the latency of the network in the same unit."""
    items = []
    for name, options in menu.options.items():
        proposals = tuple(
            Proposal(
                error=weights[name] * option.error,
                saving=(menu.whole[name] - cost) / network,
                change=analysis.decision(name, option),
            )
            for option, cost in zip(options, menu.costs[name], strict=True)
        )
        kept = tuple(p for p in proposals if p.saving >= LEAST_SAVING)
        if kept:
            items.append(Item(kind="factorize", name=name, nodes=frozenset([name]), proposals=kept))
    return Offered(items=tuple(items), rejects=tuple(analysis.rejects))
