"""What a plan may do to a network, rewrite by rewrite, and the exact choice among it under a budget. No tensors."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from .decision import Decision
from .option_milp import Overlap, choose_options


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One way to change an `Item`.

    Arguments:
        error: Relative output error that the change is predicted to add. Errors of one rewrite are compared with each
            other; how they compare with those of other rewrites is learnt from whole plans.
        saving: Share of what the goal bounds (latency, MACs, parameters) that the change saves.
        decision: What the rewrite then applies.
        overlap: Share of what other changes save that need the same nodes, and no longer save beside this one. A layer
            that computes in a third of its time saves a third by what else is cut off it.
        boundaries: What it saves less for each of these nodes that stay as they are: those that the plan neither
            removes nor changes by the same rewrite. Between a layer in int8 and one that is not, values are converted.

    Example:
        >>> drop = foldcut.DropBlock(entry="relu", exit="relu_1")
        >>> foldcut.Proposal(error=0.02, saving=0.1, decision=drop)
        Proposal(error=0.02, saving=0.1)
    """

    error: float
    saving: float
    decision: Decision = field(repr=False)
    overlap: float = field(default=0.0, repr=False)
    boundaries: Mapping[str, float] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What a change does to nodes of the program. Of two changes that clash a plan takes only one.

    Two changes clash where both remove or both replace a node, where one replaces what the other resizes, and where one
    removes all that the other needs.

    Arguments:
        removes: Names of nodes that are gone afterwards.
        replaces: Names of nodes that something else then stands for.
        resizes: Names of nodes whose weights change shape along a dimension of their own.
        needs: Names of nodes of which at least one has to be there.

    Example:
        >>> block = foldcut.Claims(removes=frozenset({"conv2d", "relu"}))
        >>> layer = foldcut.Claims(replaces=frozenset({"conv2d"}), needs=frozenset({"conv2d"}))
        >>> block.clashes(layer)
        True
    """

    removes: frozenset[str] = frozenset()
    replaces: frozenset[str] = frozenset()
    resizes: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()

    def clashes(self, other: Claims) -> bool:
        """Whether a plan may take only one of two changes.

        Arguments:
            other: The claims of the other change.

        Returns:
            Whether they clash.
        """
        return bool(
            self.removes & other.removes
            or self.replaces & (other.replaces | other.resizes)
            or self.resizes & other.replaces
            or (self.needs and self.needs <= other.removes)
            or (other.needs and other.needs <= self.removes)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """Something that can be changed in one of several ways, or left alone: a region, a unit group, a layer.

    Arguments:
        kind: Name of the rewrite.
        name: Name of what is changed.
        claims: What any of the changes does to nodes.
        proposals: The ways to change it.

    Example:
        >>> drop = foldcut.DropBlock(entry="relu", exit="relu_1")
        >>> proposal = foldcut.Proposal(error=0.02, saving=0.1, decision=drop)
        >>> claims = foldcut.Claims(removes=frozenset({"conv2d"}))
        >>> foldcut.Item(kind="drop_blocks", name=drop.region, claims=claims, proposals=(proposal,))
        Item(kind='drop_blocks', name='relu>relu_1')
    """

    kind: str
    name: str
    claims: Claims = field(repr=False)
    proposals: tuple[Proposal, ...] = field(repr=False)


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
    """What the predictions of one kind are multiplied by: learnt from whole plans. `overlap` is for what its changes no
    longer save beside others."""

    error: float = 1.0
    saving: float = 1.0
    overlap: float = 1.0


def kinds_of(mix: Mapping[Item, Proposal]) -> tuple[str, ...]:
    """The kinds of rewrite that a plan uses."""
    return tuple(dict.fromkeys(item.kind for item in mix))


def predicted_error(mix: Mapping[Item, Proposal], scales: Mapping[str, Scale]) -> float:
    """The sum of the proposals' errors."""
    return sum(scales[item.kind].error * proposal.error for item, proposal in mix.items())


def predicted_saving(mix: Mapping[Item, Proposal], scales: Mapping[str, Scale]) -> float:
    """The sum of what the proposals save beside each other."""
    return sum(savings_in(mix, {item: scales[item.kind] for item in mix}).values())


def savings_in(mix: Mapping[Item, Proposal], scales: Mapping[Item, Scale]) -> dict[Item, float]:
    """What each proposal of a plan saves beside the others: where they overlap with it, less than alone, and less for
    what stays as it is at its boundaries. Nodes that it needs count alike."""
    lost: dict[str, float] = {}
    changed: dict[str, set[str]] = {}
    for item, proposal in mix.items():
        changed.setdefault(item.kind, set()).update(item.claims.needs)
        for node in item.claims.needs if proposal.overlap else ():
            lost[node] = lost.get(node, 0.0) + proposal.overlap
    removed = {node for item in mix for node in item.claims.removes}
    found = {}
    for item, proposal in mix.items():
        nodes = () if proposal.overlap else item.claims.needs
        share = sum(lost.get(node, 0.0) for node in nodes) / max(1, len(nodes))
        met = changed[item.kind] | removed
        less = sum(cost for node, cost in proposal.boundaries.items() if node not in met)
        found[item] = scales[item].saving * (proposal.saving * (1 - scales[item].overlap * share) - less)
    return found


def _overlaps(items: Sequence[Item], scales: Sequence[Scale]) -> list[Overlap]:
    """What pairs of items save less together than each alone, and more (`_bonds`)."""
    needing: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        for node in item.claims.needs:
            needing.setdefault(node, []).append(place)
    found = []
    for place, item in enumerate(items):
        met = Counter(other for node in item.claims.needs for other in needing[node] if other != place)
        for option, proposal in enumerate(item.proposals, 1):
            for other, shared in met.items() if proposal.overlap else ():
                by = scales[other]
                share = by.saving * by.overlap * proposal.overlap * shared / len(items[other].claims.needs)
                less = [0.0 if p.overlap else p.saving * share for p in items[other].proposals]
                if any(less):
                    found.append(Overlap(item=place, option=option, other=other, costs=(0.0, *less)))
    return found + _bonds(items, scales)


def _bonds(items: Sequence[Item], scales: Sequence[Scale]) -> list[Overlap]:
    """What pairs of items save more together than each alone: where one is changed alike, or removed, the other has no
    boundary with it."""
    found = []
    for place, item in enumerate(items):
        for option, proposal in enumerate(item.proposals, 1):
            for other, second in enumerate(items) if proposal.boundaries else ():
                met = second.claims.needs if second.kind == item.kind else second.claims.removes
                gain = scales[place].saving * sum(c for node, c in proposal.boundaries.items() if node in met)
                if gain and other != place:
                    costs = (0.0, *[-gain] * len(second.proposals))
                    found.append(Overlap(item=place, option=option, other=other, costs=costs))
    return found


def excluded_pairs(items: Sequence[Item]) -> list[tuple[int, int]]:
    """Pairs of items of which a plan may change only one: those whose claims clash."""
    pairs = combinations(enumerate(items), 2)
    return [(i, j) for (i, one), (j, other) in pairs if one.claims.clashes(other.claims)]


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
    taken = [[1 + item.proposals.index(mix[item]) if item in mix else 0 for item in items] for mix in known]
    overlaps = _overlaps(items, scales)
    found = choose_options(errors, _costs(items, scales), -saving, excluded_pairs(items), taken, overlaps)
    return None if found is None else _mix(items, found)


def most_saving(items: Sequence[Item], scales: Mapping[str, Scale]) -> Mix:
    """The proposals that save the most together."""
    each = [scales[item.kind] for item in items]
    overlaps = [replace(overlap, as_errors=True) for overlap in _overlaps(items, each)]
    found = choose_options(_costs(items, each), _costs(items, each), 0.0, excluded_pairs(items), (), overlaps)
    assert found is not None  # leaving all alone is allowed
    return _mix(items, found)


def _costs(items: Sequence[Item], scales: Sequence[Scale]) -> list[list[float]]:
    """What each choice by itself adds to the latency, with all of its boundaries; nothing where an item is left
    alone."""
    saved = [[p.saving - sum(p.boundaries.values()) for p in item.proposals] for item in items]
    return [[0.0, *(-by.saving * each for each in row)] for row, by in zip(saved, scales, strict=True)]


def _mix(items: Sequence[Item], options: Sequence[int]) -> Mix:
    return {item: item.proposals[i - 1] for item, i in zip(items, options, strict=True) if i}
