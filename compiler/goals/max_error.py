"""The goal with a bound on the output error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...runtime.measure.measurement import Measurement
from ..plan.goal import Delivered
from ..plan.tried import Found, Tried
from ..rewrite.rewrite import Applied
from ..rewrite.search import PlanSearch
from ..support.errors import GoalError
from .fastest import LEAST_RATIO, NARROW, Fastest

#: Plans are looked for at so many latency ratios at the most.
MOST_RATIOS = 5
#: A network whose error is this share below its bound has room left.
ROOM = 0.15


@dataclass(frozen=True)
class MaxError(Fastest):
    """Goal: the fastest network found whose relative output error is at most `error`.

    The error is ``sum ||S(x) - T(x)||^2 / sum ||T(x)||^2`` over all outputs, in float64, with S the result and T the
    original. Latency ratios below 0.25 are not looked for. The verdict is that of the test samples, which no choice
    has seen.

    Arguments:
        error: The bound, between 0 and 1, both excluded.

    Raises:
        GoalError: If the bound is out of range.

    Example:
        >>> foldcut.MaxError(0.02).words()
        'as fast as a relative output error of 0.02 allows'
    """

    error: float

    kind = "max_error"
    bounds_error = True

    def __post_init__(self) -> None:
        if not isinstance(self.error, (int, float)) or isinstance(self.error, bool) or not 0 < self.error < 1:
            raise GoalError(
                f"MaxError({self.error!r}) is not a goal",
                hint="give a relative squared error between 0 and 1: MaxError(0.02) allows two percent",
            )

    def sought(self, search: PlanSearch) -> tuple[Applied, bool]:
        """Search for the fastest network whose output error is within the bound.

        The latency ratio is bisected. Plans are compared after a quick re-solve on few samples, which mostly leaves
        more error than the full one. If the finished network is above the bound, or far below it, the bound on plans
        is scaled accordingly, at most twice. A network counts with the upper end of the 95 % interval of its error on
        the judging samples.

        Arguments:
            search: The search over plans.

        Returns:
            The network, and whether it is within the bound on the judging samples.

        Raises:
            GoalError: If nothing can be changed within the bound.
        """
        search.offer(LEAST_RATIO)
        bound, best = self.error, None
        for attempt in range(3):
            if attempt == 2 and best is not None and best[2]:
                break
            found = _bisected(search, bound)
            if not found.best.mix:
                break
            made = search.made(found)
            error = search.most_error(made)
            within = error <= self.error
            standing = (not within, found.best.ratio if within else error)
            if best is None or standing < best[0]:
                best = standing, made, within
            if not error > 0 or (1 - ROOM) * self.error <= error <= self.error:
                break
            bound = self.error * found.best.error / error
        if best is None:
            raise GoalError(f"nothing can be done within {self}", hint=search.reasons())
        return best[1], best[2]

    def recounted(self, delivered: Delivered) -> bool:
        """Whether the network was found to be within the bound on the judging samples."""
        return delivered.planned

    def within(self, error: float) -> bool:
        """Whether the error is within the bound."""
        return error <= self.error

    def reached(self, measurement: Measurement, recounted: bool, error: float | None = None) -> bool:
        """Whether the error on the test samples is within the bound; `recounted` if it is not known."""
        del measurement
        return recounted if error is None else self.within(error)

    def unmet(self, result: Any) -> str:
        """The error on the test samples, in words."""
        return f"{self} is not met: the least that was found is {result.outcome.tested}"

    def words(self) -> str:
        """The goal as reports word it."""
        return f"as fast as a relative output error of {self.error:g} allows"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"kind": self.kind, "error": float(self.error)}

    def __str__(self) -> str:
        return f"output error at most {self.error:g}"


def _bisected(search: PlanSearch, bound: float) -> Found:
    """The fastest plan that was tried and loses at most `bound`; where none does, the one that loses least."""
    low, high = LEAST_RATIO, 1.0
    tried: list[Tried] = []
    found: Found | None = None
    for _ in range(MOST_RATIOS):
        if high - low < NARROW:
            break
        ratio = (low + high) / 2
        found = search.searched(ratio)
        tried += found.tried
        within = [plan.ratio for plan in tried if plan.error <= bound]
        high = min([high, *within])
        if not found.met or found.best.error > bound:
            low = max(low, min(ratio, high))
    assert found is not None
    good = [plan for plan in tried if plan.error <= bound]
    best = min(good, key=lambda p: p.ratio) if good else min(tried, key=lambda p: p.error, default=found.best)
    return replace(found, best=best, met=bool(good), tried=tuple(tried))
