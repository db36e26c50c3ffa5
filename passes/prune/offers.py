"""What removing channels can do towards a budget: every group at some of its counts, with what it loses and saves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ...compiler.analysis.provenance import Provenance
from ...compiler.analysis.unit_groups import UnitGroup
from ...compiler.rewrite.budget import Budget
from ...compiler.rewrite.context import Context
from ...compiler.rewrite.rewrite import Offer
from .channel_budget import ChannelLimits, lattice_counts
from .channel_latency import group_savings, touched_layers
from .counted_cuts import CountedCuts, group_item, unit_proposal
from .error_curves import error_curves, greedy_orders
from .stored import keep_orders

#: Shares of a group's units that a plan may keep.
KEEPS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
#: Proposals that save less of the latency than this are left out: they are lost in noise.
LEAST_SAVING = 0.0005
#: Multiples that channel counts go to in the plans that a search starts from, where the user names none.
MULTIPLES = (8, 4, 2, 1)


def measured_offer(
    ctx: Context, budget: Budget, units: Provenance, groups: Sequence[UnitGroup], limits: ChannelLimits
) -> Offer:
    """Each unit group at some counts on the lattice, with the height of its error curve and the latency of the segments
    that it changes."""
    latency = budget.latency
    assert latency is not None
    counts = {group.name: _counts(group, limits, ctx.multiple_of(touched_layers(units, group))) for group in groups}
    groups = [group for group in groups if counts[group.name]]
    if not groups:
        return Offer()
    curves = _curves(ctx, units, groups)
    savings: Mapping[str, list[float]] = latency.kept(
        "cuts",
        [[g.name for g in groups], counts],
        lambda: group_savings(units, groups, counts, latency.probe.table(), progress=ctx.progress),
    )
    items = []
    for group in groups:
        figures = zip(counts[group.name], savings[group.name], strict=True)
        curve = curves[group.name]
        proposals = [unit_proposal(group, count, float(curve[count]), saving) for count, saving in figures]
        items.append(group_item(units, group, [p for p in proposals if p.saving >= LEAST_SAVING]))
    return Offer(items=tuple(item for item in items if item.proposals))


def counted_offer(
    ctx: Context, budget: Budget, units: Provenance, groups: Sequence[UnitGroup], limits: ChannelLimits
) -> Offer:
    """Every unit group at some of its counts. Plans to start from cut all groups, or only those that a single layer
    reads (what runs along a residual stream hangs on every layer of it), to coarse counts and to fine ones."""
    groups = [group for group in groups if lattice_counts(group, limits, limits.multiple_of or 1)]
    if not groups:
        return Offer()
    curves = _curves(ctx, units, groups)
    cuts = CountedCuts(units, groups, budget, limits, curves)
    items = [item for item in map(cuts.item, groups) if item.proposals]
    starts = []
    shapes = [groups, [group for group in groups if len(group.consumers) == 1]]
    for multiple in MULTIPLES if limits.multiple_of is None else (limits.multiple_of,):
        for shape in shapes:
            start = cuts.allocated(items, shape, budget.aim, replace(limits, multiple_of=multiple))
            if start and start not in starts:
                starts.append(start)
    return Offer(items=tuple(items), starts=tuple(starts), savings=cuts)


def _curves(ctx: Context, units: Provenance, groups: Sequence[UnitGroup]) -> dict[str, torch.Tensor]:
    """The groups' error curves; the orders that they go by serve the trials of plans too."""
    selections = greedy_orders(units, ctx.solve, groups, progress=ctx.progress, store=ctx.store)
    keep_orders(ctx, selections)
    return error_curves(units, ctx.solve, groups, selections=selections, progress=ctx.progress, store=ctx.store)


def _counts(group: UnitGroup, limits: ChannelLimits, multiple: int) -> list[int]:
    """The counts that a group may be cut to: where it is wide enough, those that its layers are best at."""
    for step in (math.lcm(limits.multiple, multiple), limits.multiple):
        found = dict.fromkeys(group.count_for(keep, step) for keep in KEEPS)
        counts = [count for count in found if limits.least * len(group) <= count < len(group)]
        if counts:
            return counts
    return []
