"""The goal in measured latency, with hot or cold caches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

from ...runtime.measure.measurement import Measurement
from ...runtime.measure.regime import Regime
from ..plan.goal import Delivered, Goal
from ..rewrite.budget import Shape
from ..rewrite.context import Context
from ..rewrite.rewrite import Applied
from ..rewrite.search import PlanSearch
from ..support.errors import GoalError
from .latency_budget import LatencyBudget


@dataclass(frozen=True)
class Latency(Goal):
    """Goal: a measured latency of at most `ratio` of the original's, or of at most `ms` milliseconds.

    Latency is that of one inference on the chosen backend, at the batch size and number of threads of the compile.
    Exactly one of `ratio` and `ms` is given.

    Arguments:
        ratio: Share of the original's latency, between 0 and 1, both excluded.
        ms: Latency in milliseconds, above 0.
        regime: ``hot``: the caches hold the network, as in a loop without pauses. ``cold``: they hold nothing of it,
            as in a server with pauses between requests.

    Raises:
        GoalError: If not exactly one of `ratio` and `ms` is given, if it is out of range, or if the regime is
            unknown.

    Example:
        >>> foldcut.Latency(0.7).words()
        "at most 0.7 of the original's latency"
        >>> print(foldcut.Latency(ms=2.5, regime="cold"))
        cold latency 2.5 ms
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
        """The ratio. A goal in milliseconds has one only after `relative`."""
        assert self.ratio is not None
        return self.ratio

    def relative(self, before_ms: float) -> Latency:
        """The goal as a ratio.

        Arguments:
            before_ms: Measured latency of the original in milliseconds.

        Returns:
            The goal with a ratio: ``ms / before_ms`` if it was in milliseconds, itself otherwise.

        Raises:
            GoalError: If the original is fast enough already.
        """
        if self.ms is None:
            return self
        if self.ms >= before_ms:
            raise GoalError(
                f"the original takes {before_ms:.3f} ms here, which is within {self}",
                hint="ask for less, or measure at the batch size and on the machine that count",
            )
        return self.at(self.ms / before_ms)

    def at(self, share: float) -> Latency:
        """The same goal with the ratio `share`."""
        return replace(self, ratio=share, ms=None)

    def settled(self, ctx: Context) -> Latency:
        """The goal as a ratio of the measured latency of the original."""
        assert ctx.latency is not None
        return self if self.ms is None else self.relative(ctx.latency.original_ms())

    def budget(self, ctx: Context, shape: Shape) -> LatencyBudget:
        """The budget in measured latency."""
        assert ctx.latency is not None
        return LatencyBudget(self.share, ctx.latency, shape)

    def sought(self, search: PlanSearch) -> tuple[Applied, bool]:
        """The plan of least error found within the ratio, and whether it is within."""
        search.offer(self.share)
        found = search.searched(self.share)
        return search.best_made(found, self.share), found.met

    def recounted(self, delivered: Delivered) -> bool:
        """Whether the plan was measured to reach the goal."""
        return delivered.planned

    def reached(self, measurement: Measurement, recounted: bool, error: float | None = None) -> bool:
        """The verdict by the final measurement: the ratio must be met, or the upper end of its 95 % interval where
        the plan was not measured to reach the goal.
        """
        del error
        return (measurement.ratio if recounted else measurement.high) <= self.share

    def words(self) -> str:
        """The goal as reports word it."""
        where = " with cold caches" if self.regime == "cold" else ""
        if self.ms is not None:
            return f"at most {self.ms:g} ms for one inference{where}"
        return f"at most {self.share:g} of the original's latency{where}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON. The regime is left out if it is ``hot``."""
        wanted = {"ms": float(self.ms)} if self.ms is not None else {"ratio": float(self.share)}
        # plans of earlier versions name no regime
        return {"kind": "latency", **wanted, **({} if self.regime == "hot" else {"regime": self.regime})}

    def __str__(self) -> str:
        wanted = f"{self.ms:g} ms" if self.ms is not None else f"ratio {self.share:g}"
        return f"latency {wanted}" if self.regime == "hot" else f"{self.regime} latency {wanted}"
