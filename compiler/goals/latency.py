"""The goal in measured latency, and what the caches hold when it is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

from ...runtime.measure.measurement import Measurement
from ...runtime.measure.regime import Regime
from ..plan.decision import counted_words
from ..plan.goal import Delivered, Goal
from ..rewrite.budget import Shape
from ..rewrite.context import Context
from ..rewrite.rewrite import Applied
from ..rewrite.search import PlanSearch
from ..support.errors import GoalError
from .latency_budget import LatencyBudget


@dataclass(frozen=True)
class Latency(Goal):
    """Reach a measured latency of at most `ratio` times the original's, or of at most `ms` milliseconds for one
    inference at the batch measured. Give one of them.

    `regime` says what the caches hold: ``hot``, the network itself, as in a loop without pauses; ``cold``, nothing of
    it, as in a server whose requests come with pauses.
    """

    ratio: float | None = None
    ms: float | None = None
    regime: Regime = "hot"

    kind = "latency"
    mixes = True
    measured = True
    needs_change = True

    def __post_init__(self) -> None:
        given = {name: value for name, value in (("ratio", self.ratio), ("ms", self.ms)) if value is not None}
        values = [v for v in given.values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
        most = 1.0 if self.ms is None else float("inf")
        if len(given) != 1 or not values or not 0 < values[0] < most:
            text = ", ".join(f"{name}={value!r}" if name == "ms" else repr(value) for name, value in given.items())
            raise GoalError(
                f"Latency({text}) is not a goal",
                hint="give a ratio between 0 and 1, or ms above 0: Latency(0.7) asks for 30 % less time, "
                "Latency(ms=2) for two milliseconds",
            )
        if self.regime not in get_args(Regime):
            raise GoalError(
                f"regime={self.regime!r} is not a regime of latency",
                hint="hot is a loop without pauses, cold a server with pauses: Latency(0.7, regime='cold')",
            )

    @property
    def share(self) -> float:
        """The ratio. A goal in milliseconds has none before it is `relative`."""
        assert self.ratio is not None
        return self.ratio

    def relative(self, before_ms: float) -> Latency:
        """The goal as a ratio, for an original that takes `before_ms`. Raises GoalError when that is fast enough."""
        if self.ms is None:
            return self
        if self.ms >= before_ms:
            raise GoalError(
                f"the original takes {before_ms:.3f} ms here, which is within {self}",
                hint="ask for less, or measure at the batch size and on the machine that count",
            )
        return self.at(self.ms / before_ms)

    def at(self, share: float) -> Latency:
        """The same goal at another ratio."""
        return replace(self, ratio=share, ms=None)

    def settled(self, ctx: Context) -> Latency:
        assert ctx.latency is not None
        return self if self.ms is None else self.relative(ctx.latency.original_ms())

    def budget(self, ctx: Context, shape: Shape) -> LatencyBudget:
        assert ctx.latency is not None
        return LatencyBudget(self.share, ctx.latency, shape)

    def sought(self, search: PlanSearch) -> tuple[Applied, bool]:
        search.offer(self.share)
        found = search.searched(self.share)
        return search.made(found), found.met

    def recounted(self, delivered: Delivered) -> bool:
        return delivered.planned

    def reached(self, measurement: Measurement, recounted: bool, error: float | None = None) -> bool:
        """A plan that was found to reach the goal has been measured with its whole interval below it, so of the second
        measurement the ratio has to be; of any other network the whole interval."""
        del error
        return (measurement.ratio if recounted else measurement.high) <= self.share

    def unmet(self, result: Any) -> str:
        m = result.outcome.measurement
        done = " and ".join(counted_words(result.plan.decisions)) or "nothing done"
        return f"{self} is not met: with {done}, the ratio is {m.ratio:.3f} ({m.low:.3f} to {m.high:.3f})"

    def words(self) -> str:
        where = " with cold caches" if self.regime == "cold" else ""
        if self.ms is not None:
            return f"at most {self.ms:g} ms for one inference{where}"
        return f"at most {self.share:g} of the original's latency{where}"

    def to_dict(self) -> dict[str, Any]:
        wanted = {"ms": float(self.ms)} if self.ms is not None else {"ratio": float(self.share)}
        # plans of earlier versions name no regime
        return {"kind": "latency", **wanted, **({} if self.regime == "hot" else {"regime": self.regime})}

    def __str__(self) -> str:
        wanted = f"{self.ms:g} ms" if self.ms is not None else f"ratio {self.share:g}"
        return f"latency {wanted}" if self.regime == "hot" else f"{self.regime} latency {wanted}"
