"""The goal that bounds the error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...runtime.measure.measurement import Measurement
from ..plan.goal import Delivered, Goal
from ..plan.joint_search import Found, Tried
from ..rewrite.budget import Shape
from ..rewrite.context import Context
from ..rewrite.rewrite import Applied
from ..rewrite.search import PlanSearch
from ..support.errors import GoalError
from .latency_budget import LatencyBudget

#: No plan is looked for below this latency ratio when only the error is bounded, nor nearer than this to one that is
#: known, nor at more ratios than this.
LEAST_RATIO, NARROW, MOST_RATIOS = 0.25, 0.04, 5
#: A network whose error is this share below its bound has room left.
ROOM = 0.15


@dataclass(frozen=True)
class MaxError(Goal):
    """Be as fast as can be while the relative output error stays at most `error`: sum ||S - T||^2 / sum ||T||^2 over
    all outputs. The verdict is that of the test samples, which no choice has seen."""

    error: float

    kind = "max_error"
    mixes = True
    measured = True
    bounds_error = True

    def __post_init__(self) -> None:
        if not isinstance(self.error, (int, float)) or isinstance(self.error, bool) or not 0 < self.error < 1:
            raise GoalError(
                f"MaxError({self.error!r}) is not a goal",
                hint="give a relative squared error between 0 and 1: MaxError(0.02) allows two percent",
            )

    def budget(self, ctx: Context, shape: Shape) -> LatencyBudget:
        assert ctx.latency is not None
        return LatencyBudget(LEAST_RATIO, ctx.latency, shape)

    def sought(self, search: PlanSearch) -> tuple[Applied, bool]:
        """The fastest network whose output error stays within the bound.

        The latency is bisected: each search gives the plan of least error at a latency, and all that it tried counts.
        Plans are compared after a quick re-solve on few samples; the whole re-solve mostly leaves less: when the first
        network has room left, or is above the bound, the bound on what plans may lose is moved by as much, once, and a
        second time when no network has come out within. A network counts with the upper end of its error's interval:
        the verdict is that of the test samples, which nothing here has seen, and those may come out higher.
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
        return delivered.planned

    def reached(self, measurement: Measurement, recounted: bool, error: float | None = None) -> bool:
        del measurement
        return recounted if error is None else error <= self.error

    def unmet(self, result: Any) -> str:
        return f"{self} is not met: the least that was found is {result.outcome.tested}"

    def words(self) -> str:
        return f"as fast as a relative output error of {self.error:g} allows"

    def to_dict(self) -> dict[str, Any]:
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
