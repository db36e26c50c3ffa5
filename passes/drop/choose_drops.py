"""Which blocks to drop: greedy, joint, one at a time. A policy over numbers; it never touches a tensor.

After each drop the errors are those of the network as it then stands, so two blocks that can only stand in for each
other are not both taken. With savings, the block with the least added error per saved latency goes first (PRACTISE's
score, with the joint error in place of single drops); without, the one with the least error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...compiler.analysis.regions import Region
from .decision import DropBlock

#: Regions that save less than this share of the latency are not worth any error; it also keeps the score finite.
LEAST_SAVING = 0.002
#: Candidates looked at again at a time: they share the passes over the data.
CHUNK = 3

#: Given the regions chosen so far and the candidates, the predicted relative output error with each candidate dropped
#: as well.
Errors = Callable[[Sequence[Region], Sequence[Region]], Mapping[str, float]]
#: Whether the goal is met by the regions chosen so far.
Enough = Callable[[Sequence[Region]], bool]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The regions in the order chosen, the decisions that drop them, and whether the goal was met."""

    regions: tuple[Region, ...]
    decisions: tuple[DropBlock, ...]
    met: bool


def choose_drops(
    candidates: Sequence[Region],
    *,
    errors: Errors,
    savings: Mapping[str, float] | None,
    enough: Enough,
    chosen: Sequence[Region] = (),
    decisions: Sequence[DropBlock] = (),
) -> Choice:
    """Drop greedily until `enough` says so or no candidate is left.

    `savings` maps region names to the measured share of the latency that each saves, or is None when latency does not
    matter. `chosen` and `decisions` continue an earlier choice.
    """
    taken, made = list(chosen), list(decisions)
    current = made[-1].error or 0.0 if made else 0.0
    stale: dict[str, float] = {}
    while not enough(taken):
        left = [r for r in candidates if not any(r.overlaps(t) for t in taken)]
        if savings is not None:
            left = [r for r in left if savings[r.name] >= LEAST_SAVING]
        if not left:
            return Choice(regions=tuple(taken), decisions=tuple(made), met=False)
        best, current = _best(left, taken, errors, savings, current, stale)
        taken.append(best)
        saving = None if savings is None else savings[best.name]
        made.append(DropBlock(entry=best.entry, exit=best.exit, path=best.path, error=current, saving=saving))
    return Choice(regions=tuple(taken), decisions=tuple(made), met=True)


def _best(
    left: Sequence[Region],
    taken: Sequence[Region],
    errors: Errors,
    savings: Mapping[str, float] | None,
    current: float,
    stale: dict[str, float],
) -> tuple[Region, float]:
    """The best candidate and its error, looking again only at those whose last known added error could still win.

    Lazy greedy: what a drop adds seldom shrinks once others are gone, so an older figure serves as a bound. `stale`
    keeps the added errors from call to call.
    """
    fresh: dict[str, float] = {}
    while True:
        ranked = sorted(left, key=lambda r: (_score(stale.get(r.name, -math.inf), r, savings), r.name))
        if ranked[0].name in fresh:
            return ranked[0], fresh[ranked[0].name]
        unknown = [r for r in ranked if r.name not in stale]
        chunk = unknown or [r for r in ranked if r.name not in fresh][:CHUNK]
        for name, error in errors(taken, chunk).items():
            fresh[name] = error
            stale[name] = error - current


def _score(added: float, region: Region, savings: Mapping[str, float] | None) -> float:
    """Added error, per saved latency where that counts."""
    if savings is None:
        return added
    # an error that falls counts most where it saves most: dividing a negative number by the saving would turn that
    # round
    return added / savings[region.name] if added > 0 else added * savings[region.name]
