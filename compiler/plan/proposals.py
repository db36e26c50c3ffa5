"""What a plan may do to a network, kind by kind, and the exact choice among it under a latency goal. No tensors."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from .option_milp import choose_options


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One change: the relative output error that it is predicted to add and the share of the latency that it saves.
    `change` is what the rewrite of its kind takes."""

    error: float
    saving: float
    change: Any = field(repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """Something that can be changed in one of several ways, or left alone: a region, a unit group, a layer.

    `kind` names the rewrite, `nodes` the calls of the program that the change concerns, `producers` those without which
    nothing is left to change, where that is not all of them: the layers that make the units of a group.
    """

    kind: str
    name: str
    nodes: frozenset[str] = field(repr=False)
    proposals: tuple[Proposal, ...] = field(repr=False)
    producers: frozenset[str] = field(default=frozenset(), repr=False)


#: No change is predicted to lose less than this share of what those of its kind do, at the median.
LEAST_ERROR = 0.01


def with_least_errors(items: Sequence[Item]) -> list[Item]:
    """The items with none of their errors next to zero: predictions are corrected by factors, and no factor mends a
    zero."""
    errors: dict[str, list[float]] = {}
    for item in items:
        errors.setdefault(item.kind, []).extend(p.error for p in item.proposals if p.error > 0)
    least = {kind: LEAST_ERROR * statistics.median(found or [1.0]) for kind, found in errors.items()}
    return [
        replace(item, proposals=tuple(replace(p, error=max(p.error, least[item.kind])) for p in item.proposals))
        for item in items
    ]


#: The items that a plan changes, each with the proposal taken.
Mix = dict[Item, Proposal]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the predictions of one kind are multiplied by: learnt from whole plans."""

    error: float = 1.0
    saving: float = 1.0


def kinds_of(mix: Mapping[Item, Proposal]) -> tuple[str, ...]:
    """The kinds of rewrite that a plan uses."""
    return tuple(dict.fromkeys(item.kind for item in mix))


def predicted_error(mix: Mapping[Item, Proposal], scales: Mapping[str, Scale]) -> float:
    """The sum of the proposals' errors."""
    return sum(scales[item.kind].error * proposal.error for item, proposal in mix.items())


def predicted_saving(mix: Mapping[Item, Proposal], scales: Mapping[str, Scale]) -> float:
    """The sum of the proposals' savings."""
    return sum(scales[item.kind].saving * proposal.saving for item, proposal in mix.items())


def excluded_pairs(items: Sequence[Item]) -> list[tuple[int, int]]:
    """Pairs of items of which a plan may change only one.

    Regions that share a node; a region and what lies wholly inside it, or a group whose units are made inside it; a
    unit group and a layer that makes or consumes its units, since both change that layer's weight.
    """
    found = []
    for (i, one), (j, other) in combinations(enumerate(items), 2):
        kinds = {one.kind, other.kind}
        if kinds == {"drop_blocks"} or kinds == {"prune_channels", "factorize"}:
            clash = bool(one.nodes & other.nodes)
        elif "drop_blocks" in kinds:
            region, inside = (one, other) if one.kind == "drop_blocks" else (other, one)
            clash = (inside.producers or inside.nodes) <= region.nodes
        else:
            clash = False
        if clash:
            found.append((i, j))
    return found


def choose_mix(
    items: Sequence[Item], saving: float, scales: Mapping[str, Scale], known: Sequence[Mapping[Item, Proposal]] = ()
) -> Mix | None:
    """The proposals of least predicted error that together save `saving` of the latency; None when nothing does.
    A mix among the `known` ones does not come back."""
    return choose_corrected(items, saving, [scales[item.kind] for item in items], known)


def choose_corrected(
    items: Sequence[Item], saving: float, scales: Sequence[Scale], known: Sequence[Mapping[Item, Proposal]] = ()
) -> Mix | None:
    """`choose_mix` with a scale for each of the items."""
    errors = [[0.0, *(by.error * p.error for p in item.proposals)] for item, by in zip(items, scales, strict=True)]
    return _picked(items, errors, -saving, scales, known)


def most_saving(items: Sequence[Item], scales: Mapping[str, Scale]) -> Mix:
    """The proposals that save the most together."""
    each = [scales[item.kind] for item in items]
    found = _picked(items, _costs(items, each), 0.0, each)
    assert found is not None  # leaving all alone is allowed
    return found


def _costs(items: Sequence[Item], scales: Sequence[Scale]) -> list[list[float]]:
    """What each choice adds to the latency: nothing where an item is left alone, else less than that."""
    return [[0.0, *(-by.saving * p.saving for p in item.proposals)] for item, by in zip(items, scales, strict=True)]


def _picked(
    items: Sequence[Item],
    errors: Sequence[Sequence[float]],
    budget: float,
    scales: Sequence[Scale],
    known: Sequence[Mapping[Item, Proposal]] = (),
) -> Mix | None:
    taken = [[1 + item.proposals.index(mix[item]) if item in mix else 0 for item in items] for mix in known]
    found = choose_options(errors, _costs(items, scales), budget, excluded_pairs(items), taken)
    if found is None:
        return None
    return {item: item.proposals[i - 1] for item, i in zip(items, found, strict=True) if i}
