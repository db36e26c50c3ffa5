"""Feasibility as an invariant: weights stay in their sets, though rounding pushes them out and norms are expensive.

In exact arithmetic a convex combination of points of the set is in the set. In floating point each step may add a
little, and the norm of a spectral set costs a full decomposition. So an upper bound of the norm goes along,

    bound <- (1 - eta) bound + eta radius + rounding of this step,

and only when it passes the radius is the norm computed. A weight found at the boundary is scaled to just inside, by as
much as the rounding of some hundred steps, so that one that stays there is not decomposed at every step. Far from the
boundary norms are hardly ever computed.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch

from .constraints import Constraint, rounding_slack
from .errors import FrankWolfeError

#: A weight at the boundary gets room for the rounding of so many steps, but at most this share of the radius.
STEPS_OF_ROOM, MOST_ROOM = 256, 1e-3


class NormBounds:
    """Upper bounds of the norms of weights, kept in the optimizer's state as `norm_bound`.

    A weight that somebody else writes to is noticed by its version counter (what is written through `.data` is not),
    and its norm computed. The bound kept stays if it holds for the new values, so that a run resumed from a checkpoint
    computes norms when the first would have, and goes on bit for bit.
    """

    def __init__(self, state: MutableMapping[torch.Tensor, Any]) -> None:
        self._state = state
        self._seen: dict[torch.Tensor, tuple[Constraint, int]] = {}

    def bound(self, weight: torch.Tensor, constraint: Constraint) -> float:
        """An upper bound of the norm that is at most the radius, or else the norm itself. Writes nothing to state."""
        kept: float = self._state[weight].get("norm_bound", math.inf) if weight in self._state else math.inf
        usable = kept <= constraint.radius
        if usable and self._seen.get(weight) == _stamp(weight, constraint):
            return kept
        norm = constraint.norm(weight)
        return max(norm, kept) if usable else norm

    def admit(self, weight: torch.Tensor, constraint: Constraint, name: str) -> float:
        """`bound`; raises `FrankWolfeError` when the weight lies outside of its set by more than rounding."""
        norm = self.bound(weight, constraint)
        # written so that the norm of a weight that is not finite is refused too
        if not norm <= constraint.radius * (1 + rounding_slack(weight)):
            raise FrankWolfeError(
                "a weight is not in its set",
                node=name,
                expected=f"norm <= {constraint.radius:.6g}, the radius of {constraint}",
                actual=f"{norm:.6g}",
                hint="call make_feasible() before the first step and after changing weights by hand",
            )
        return norm

    def advance(self, weight: torch.Tensor, constraint: Constraint, *, before: float, eta: float) -> None:
        """After a step of size eta from a weight with the bound `before`: the new bound, and back inside if need be."""
        reached = (1 - eta) * before + eta * constraint.radius + _rounding(weight, constraint, eta)
        if reached > constraint.radius:
            room = min(STEPS_OF_ROOM * _rounding(weight, constraint, 0.0) / constraint.radius, MOST_ROOM)
            reached = pull_inside(weight, constraint, room=room)
        self._state[weight]["norm_bound"] = reached
        self._seen[weight] = _stamp(weight, constraint)


@torch.no_grad()
def pull_inside(weight: torch.Tensor, constraint: Constraint, *, room: float = 0.0) -> float:
    """Scale the weight, in place, until its norm, after rounding, is at most the radius; the norm reached.

    A weight that has less than half of `room`, a share of the radius, is given all of it.
    """
    norm = constraint.norm(weight)
    limit = constraint.radius * (1 - room / 2)
    margin = max(torch.finfo(weight.dtype).eps, room)
    while norm > limit:
        weight.mul_(constraint.radius / norm * (1 - margin))
        margin = min(2 * margin, 0.5)
        norm, limit = constraint.norm(weight), constraint.radius
    return norm


def _stamp(weight: torch.Tensor, constraint: Constraint) -> tuple[Constraint, int]:
    """What a bound holds for: this unit set, and the tensor as it was at this version."""
    return constraint.with_radius(1.0), weight._version


def _rounding(weight: torch.Tensor, constraint: Constraint, eta: float) -> float:
    """How much one step's rounding may add to the norm: of the weight as it is stored, of the last addition, in float32
    at least, and of eta times the vertex, which is itself exact to a few units of rounding."""
    stored = torch.finfo(weight.dtype)
    if weight.dtype == torch.float16:
        # small entries are rounded by an absolute amount: nothing relative holds, the norm is computed every time
        return float("inf")
    arithmetic = min(torch.finfo(torch.float32).eps, stored.eps) * (1 + 16 * eta)
    return constraint.radius * constraint.rounding_growth(weight.shape) * (stored.eps + arithmetic)
