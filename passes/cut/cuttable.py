"""Which groups can be cut at all, and what to do when a cut is refused after all: leave the culprit alone, with the
reason, and choose again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from ...compiler.analysis.provenance import Provenance
from ...compiler.analysis.unit_groups import UnitGroup
from ...compiler.support.errors import Reject, RewriteError
from .prune_channels import CutRefusedError, prove_cut, prune_channels

T = TypeVar("T")
#: A group that stays whole, and why.
Stuck = tuple[UnitGroup, RewriteError]
#: Random subsets that a group is tried with, besides the regular ones.
RANDOM_TRIALS = 2


def cuttable_groups(provenance: Provenance, groups: Sequence[UnitGroup]) -> tuple[list[UnitGroup], list[Stuck]]:
    """The groups that the rewriter can cut, and the others with its reason.

    Each is tried with several patterns of units gone: the last half, the first half, every other one, random ones, all
    but one. All groups are tried together; where that fails they are halved until each culprit stands alone.
    """
    good: list[UnitGroup] = list(groups)
    bad: list[Stuck] = []
    for trial, pattern in enumerate(_patterns(groups)):
        refused = _refusing(provenance, good, pattern, prune=trial == 0)
        bad += refused
        good = [g for g in good if all(g is not other for other, _ in refused)]
    return good, bad


def _patterns(groups: Sequence[UnitGroup]) -> Iterator[dict[str, torch.Tensor]]:
    """What goes of each group, trial by trial; in graph order each group loses at least one unit and keeps one."""
    yield {g.name: g.units[(len(g) + 1) // 2 :] for g in groups}
    yield {g.name: g.units[: len(g) // 2] for g in groups}
    yield {g.name: g.units[1::2] for g in groups}
    generator = torch.Generator().manual_seed(0)
    for _ in range(RANDOM_TRIALS):
        found = {}
        for g in groups:
            count = int(torch.randint(1, len(g), (1,), generator=generator))
            found[g.name] = g.units[torch.randperm(len(g), generator=generator)[:count]]
        yield found
    yield {g.name: g.units[1:] for g in groups}


def _refusing(
    provenance: Provenance, groups: Sequence[UnitGroup], gone: dict[str, torch.Tensor], *, prune: bool
) -> list[Stuck]:
    """The groups that refuse to lose these units, alone or together with others that do not."""
    if not groups:
        return []
    try:
        units = torch.cat([gone[g.name] for g in groups])
        if prune:
            prune_channels(provenance, units)
        else:
            prove_cut(provenance, units)
        return []
    except RewriteError as cause:
        if len(groups) == 1:
            return [(groups[0], cause)]
        whole = cause
    middle = len(groups) // 2
    halves = groups[:middle], groups[middle:]
    found = [stuck for half in halves for stuck in _refusing(provenance, half, gone, prune=prune)]
    # each half can be cut alone, both together cannot: the last one gives way
    return found or [(groups[-1], whole)]


def refusing_groups(provenance: Provenance, groups: Sequence[UnitGroup], units: torch.Tensor) -> list[Stuck]:
    """Which groups have to stay whole for a cut that was refused to be possible."""
    gone = {g.name: g.units[torch.isin(g.units, units)] for g in groups}
    return _refusing(provenance, [g for g in groups if len(gone[g.name])], gone, prune=True)


def cut_again(
    provenance: Provenance, groups: Sequence[UnitGroup], attempt: Callable[[list[UnitGroup]], T]
) -> tuple[T, list[UnitGroup], list[Reject]]:
    """The result of `attempt` with the groups that it could cut, these groups, and a Reject for each of the others.

    `attempt` chooses units of the groups that it is given and cuts; where a cut is refused, the group that refuses is
    left out and the choice is made again. Every other error goes through.
    """
    left: list[UnitGroup] = list(groups)
    rejects: list[Reject] = []
    while True:
        try:
            return attempt(left), left, rejects
        except CutRefusedError as cause:
            stuck = refusing_groups(provenance, left, cause.units)
            if not stuck:
                raise
            names = {g.name for g, _ in stuck}
            left = [g for g in left if g.name not in names]
            rejects += [Reject(reason=str(why.message), node=g.name) for g, why in stuck]


__all__ = ["Stuck", "cut_again", "cuttable_groups", "refusing_groups"]
