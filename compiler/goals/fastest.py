"""What goals share that bound a loss and ask for the fastest network."""

from __future__ import annotations

from ..plan.goal import Goal
from ..rewrite.budget import Shape
from ..rewrite.context import Context
from .latency_budget import LatencyBudget

#: No plan is looked for below this latency ratio when only a loss is bounded, nor nearer than this to one that is
#: known.
LEAST_RATIO, NARROW = 0.25, 0.04


class Fastest(Goal):
    """A goal whose plans mix all rewrites and are compared by measured latency, from `LEAST_RATIO` up."""

    mixes = True
    measured = True

    def budget(self, ctx: Context, shape: Shape) -> LatencyBudget:
        """The budget in measured latency."""
        assert ctx.latency is not None
        return LatencyBudget(LEAST_RATIO, ctx.latency, shape)
