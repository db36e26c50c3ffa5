"""What cuts save of what is counted: groups that meet in a layer shrink it together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ...compiler.analysis.provenance import Provenance
from ...compiler.analysis.unit_groups import UnitGroup
from ...compiler.plan.proposals import Claims, Item, Mix, Proposal
from ...compiler.rewrite.budget import Budget
from .channel_budget import ChannelLimits, CutModel, allocate, lattice_counts
from .channel_latency import touched_layers
from .decision import PruneChannels, UnitCount

#: Counts of a group that a search looks at; the plan that stands is then put right unit by unit.
MOST_COUNTS = 16


class CountedCuts:
    """The groups of a network that may be cut, with what they cost and lose (`Savings` of a budget)."""

    def __init__(
        self,
        units: Provenance,
        groups: Sequence[UnitGroup],
        budget: Budget,
        limits: ChannelLimits,
        curves: Mapping[str, torch.Tensor],
    ) -> None:
        self.units, self.limits, self.curves = units, limits, curves
        self.unit, self.whole = budget.unit, budget.whole
        self.model = CutModel.of(self.unit, units, groups)
        self.places = {group.name: place for place, group in enumerate(groups)}
        self._uncut = self.model([len(group) for group in groups])

    def saved(self, mix: Mix) -> float:
        """The share that the groups of a plan save together."""
        return (self._uncut - self.model(self._counts(mix))) / self.whole

    def added(self, mix: Mix) -> Callable[[Item, Proposal | None], float]:
        """About what another count of a group adds, by the slope at the plan."""
        slopes: list[float] = (self.model.slopes(self._counts(mix)) / self.whole).tolist()

        def added(item: Item, proposal: Proposal | None) -> float:
            place = self.places[item.name]
            whole = len(self.model.groups[place])
            before = _count(mix[item]) if item in mix else whole
            return slopes[place] * ((_count(proposal) if proposal else whole) - before)

        return added

    def finer(self, item: Item, taken: Proposal) -> tuple[Item, Proposal]:
        """The item with every count from the one taken on."""
        group = self.model.groups[self.places[item.name]]
        counts = lattice_counts(group, self.limits, self.limits.multiple_of or 1)
        finer = self.item(group, [count for count in counts if count >= _count(taken)])
        return finer, next(p for p in finer.proposals if _count(p) == _count(taken))

    def item(self, group: UnitGroup, counts: Sequence[int] | None = None) -> Item:
        """A group at so many units, by default about `MOST_COUNTS` of those that it may keep."""
        if counts is None:
            counts = _spread(lattice_counts(group, self.limits, self.limits.multiple_of or 1))
        sizes = [len(g) for g in self.model.groups]
        place, curve = self.places[group.name], self.curves[group.name]
        savings = [self._uncut - self.model([*sizes[:place], count, *sizes[place + 1 :]]) for count in counts]
        proposals = tuple(
            unit_proposal(group, count, float(curve[count]), saving / self.whole)
            for count, saving in zip(counts, savings, strict=True)
            if saving > 0
        )
        return group_item(self.units, group, proposals)

    def allocated(self, items: Sequence[Item], groups: Sequence[UnitGroup], ratio: float, limits: ChannelLimits) -> Mix:
        """The plan that cuts only these groups, where what it saves costs the least; empty where they do not
        suffice."""
        if not groups:
            return {}
        model = CutModel.of(self.unit, self.units, groups)
        counts, met = allocate(model, self.curves, ratio * self.whole, limits)
        if not met:
            return {}
        by_name = {item.name: item for item in items}
        cut = [g for g in groups if counts[g.name] < len(g) and g.name in by_name]
        return {by_name[g.name]: _nearest(by_name[g.name], counts[g.name]) for g in cut}

    def _counts(self, mix: Mix) -> list[int]:
        left = {item.name: _count(taken) for item, taken in mix.items()}
        return [left.get(group.name, len(group)) for group in self.model.groups]


def group_item(units: Provenance, group: UnitGroup, proposals: Sequence[Proposal]) -> Item:
    """A group as an item. It changes the weights of the layers that make and read its units, along a dimension of its
    own; without a layer that makes them there is nothing left to cut."""
    touched, makers = (frozenset(touched_layers(units, group, *roles)) for roles in ((), ("out",)))
    claims = Claims(resizes=touched, needs=makers or touched)
    return Item(kind=PruneChannels.kind, name=group.name, claims=claims, proposals=tuple(proposals))


def unit_proposal(group: UnitGroup, count: int, error: float, saving: float) -> Proposal:
    """So many units of a group."""
    decision = UnitCount(group=group.name, count=count, total=len(group), error=error)
    return Proposal(error=error, saving=saving, decision=decision)


def _count(proposal: Proposal) -> int:
    decision = proposal.decision
    assert isinstance(decision, UnitCount)
    return decision.count


def _nearest(item: Item, count: int) -> Proposal:
    """The proposal of a group that leaves about so many units."""
    return min(item.proposals, key=lambda proposal: abs(_count(proposal) - count))


def _spread(counts: list[int]) -> list[int]:
    """About `MOST_COUNTS` of the counts, evenly, the first and the last among them."""
    if len(counts) <= MOST_COUNTS:
        return counts
    return [counts[round(place * (len(counts) - 1) / (MOST_COUNTS - 1))] for place in range(MOST_COUNTS)]
