"""A plan brought within a budget that can be counted: by steps down to it, then up again as far as there is room."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from .proposals import Item, Mix, Proposal, Scale, excluded_pairs

#: What rounding may add to a share.
ROUNDING = 1e-12

#: What the share grows by when an item takes another proposal, or none.
Added = Callable[[Item, Proposal | None], float]


class ShareModel(Protocol):
    """What a plan leaves of the cost of a network, without building the smaller one."""

    def share(self, mix: Mix) -> float:
        """The share that a plan leaves."""

    def added(self, mix: Mix) -> Added:
        """About what single changes of a plan add to it: exact to first order."""


def brought_within(mix: Mix, budget: float, scales: Mapping[Item, Scale], model: ShareModel) -> Mix:
    """The plan at most at the share `budget`, if that is possible, and as near to it as single steps come.

    `scales` are those of the items that may be changed.
    """
    return _filled(_lowered(mix, budget, scales, model), budget, scales, model)


def _lowered(mix: Mix, budget: float, scales: Mapping[Item, Scale], model: ShareModel) -> Mix:
    """Below the budget by the steps that lose the least error for what they save."""
    clashes = _clashes(list(scales))
    while model.share(mix) > budget + ROUNDING:
        added = model.added(mix)
        steps = [
            (scales[item].error * (p.error - _error(mix, item)) / -added(item, p), item, p)
            for item in scales
            if item in mix or not clashes[item] & mix.keys()
            for p in item.proposals
            if added(item, p) < -ROUNDING
        ]
        if not steps:
            break
        _, item, taken = min(steps, key=lambda step: step[0])
        mix = {**mix, item: taken}
    return mix


def _filled(mix: Mix, budget: float, scales: Mapping[Item, Scale], model: ShareModel) -> Mix:
    """Up to the budget by the steps that win the most error for what they cost."""
    over: set[tuple[Item, int]] = set()  # by place: a decision need not be hashable
    share = model.share(mix)
    while share <= budget:
        added, room = model.added(mix), budget - share
        steps = [
            (scales[item].error * (_error(mix, item) - (p.error if p else 0.0)) / cost, item, place, p)
            for item in mix
            for place, p in enumerate((*item.proposals, None))
            if (item, place) not in over and ROUNDING < (cost := added(item, p)) <= room
        ]
        steps = [step for step in steps if step[0] >= 0]
        if not steps:
            break
        _, item, place, taken = max(steps, key=lambda step: step[0])
        changed = {i: p for i, p in mix.items() if i is not item} if taken is None else {**mix, item: taken}
        grown = model.share(changed)
        if grown > budget:
            over.add((item, place))
        else:
            mix, share = changed, grown
    return mix


def _error(mix: Mix, item: Item) -> float:
    return mix[item].error if item in mix else 0.0


def _clashes(items: Sequence[Item]) -> dict[Item, set[Item]]:
    """For each item those that a plan may not change beside it."""
    found: dict[Item, set[Item]] = {item: set() for item in items}
    for i, j in excluded_pairs(items):
        found[items[i]].add(items[j])
        found[items[j]].add(items[i])
    return found
