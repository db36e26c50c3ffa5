"""What a rewrite offers, held to what the search and the plan's file rely on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations

from ..data.output_error import bounded
from ..plan.decision import Decision
from ..plan.proposals import Proposal
from ..support.errors import RewriteError
from ..support.strict_json import json_text
from .rewrite import Offer, Rewrite


def checked_offer(rewrite: Rewrite, offer: Offer) -> Offer:
    """The offer, with no predicted error beyond that of a broken network. Raises RewriteError for one that no search
    can go by: items of another kind or of one name, a saving that is no number, plans whose changes clash, decisions
    that no plan can hold."""
    names = [item.name for item in offer.items]
    _require(rewrite, len(set(names)) == len(names), "offers two items of one name")
    for item in offer.items:
        _require(rewrite, item.kind == rewrite.name, f"offers an item of the kind {item.kind!r}")
        _require(rewrite, bool(item.proposals), f"offers no way to change {item.name}")
        numbers = [proposal.saving for proposal in item.proposals]
        _require(rewrite, all(map(math.isfinite, numbers)), f"offers a saving that is no number for {item.name}")
    check_decisions(rewrite, [item.proposals[0].decision for item in offer.items])
    for start in offer.starts:
        clash = any(one.claims.clashes(other.claims) for one, other in combinations(start, 2))
        _require(rewrite, not clash, "offers a plan whose changes clash")
    if all(math.isfinite(p.error) for item in offer.items for p in item.proposals):
        return offer
    same = {item: replace(item, proposals=tuple(map(_bounded, item.proposals))) for item in offer.items}
    starts = tuple({same.get(item, item): _bounded(taken) for item, taken in start.items()} for start in offer.starts)
    return replace(offer, items=tuple(same.values()), starts=starts)


def check_decisions(rewrite: Rewrite, decisions: Sequence[Decision]) -> None:
    """Raise RewriteError unless a plan can hold the decisions: plain data, of the rewrite's kind, one a subject."""
    for decision in decisions:
        _require(rewrite, decision.kind == rewrite.name, f"decides something of the kind {decision.kind!r}")
        try:
            json_text(decision.to_dict())
        except (TypeError, ValueError) as cause:
            raise RewriteError(
                f"{rewrite.name} decides what plan.json cannot hold: {cause}",
                hint="use numbers, strings, lists and dicts in the fields of a decision",
            ) from cause
    twice = _first_twice(decision.subject for decision in decisions)
    _require(rewrite, twice is None, f"has two decisions about {twice}")


def _first_twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _bounded(proposal: Proposal) -> Proposal:
    return replace(proposal, error=bounded(proposal.error))


def _require(rewrite: Rewrite, holds: bool, what: str) -> None:
    if not holds:
        raise RewriteError(f"the rewrite {rewrite.name} {what}", hint="see foldcut.Rewrite and foldcut.Offer")
