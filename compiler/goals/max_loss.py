"""The goal with a bound on what the user's own metric may lose."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..metric.reading import Loss
from ..plan.goal import Delivered
from ..plan.tried import NEGLIGIBLE
from ..rewrite.rewrite import Applied
from ..rewrite.search import PlanSearch
from ..support.errors import GoalError
from .fastest import LEAST_RATIO, NARROW, Fastest

#: Plans are looked for at so many latency ratios, and so many of them finished and read.
MOST_SEARCHES, MOST_FINISHED = 7, 5
#: The next ratio lies this far inside the interval that is left, at the least, whatever the losses say.
INSIDE = 0.25


@dataclass(frozen=True)
class MaxLoss(Fastest):
    """Goal: the fastest network found that loses at most `loss` in the metric passed as ``evaluate``.

    The loss is in the metric's own units: in points of a percent for `Top1`, say 0.02 for a metric between 0 and 1.
    Where the metric gives a number for each sample, the loss is held with the sampling error to spare: its one-sided
    95 % interval, in pairs of the same samples, must end below the bound. A metric that gives one number is taken at
    its word. Where nothing faster holds, the original comes back as it was.

    Arguments:
        loss: What may be lost, from 0 on.

    Raises:
        GoalError: If the loss is out of range, or if there is no metric.

    Example:
        >>> foldcut.MaxLoss(0.5).words()
        'as fast as a loss of 0.5 in the metric allows'
    """

    loss: float

    kind = "max_loss"
    needs_metric = True

    def __post_init__(self) -> None:
        number = isinstance(self.loss, (int, float)) and not isinstance(self.loss, bool)
        if not number or not 0 <= self.loss < math.inf:
            raise GoalError(
                f"MaxLoss({self.loss!r}) is not a goal",
                hint="give what the metric may lose, in its own units, from 0 on: MaxLoss(0.5) allows half a point of "
                "a metric in percent",
            )

    def sought(self, search: PlanSearch) -> tuple[Applied, bool]:
        """Search for the fastest network that loses at most so much.

        The latency ratio is narrowed down from both sides: by networks that held, which are finished and read, and by
        those that did not. Where both are known, the next ratio is where a straight line through their losses meets the
        bound. A plan whose error after a quick re-solve is at least that of one that did not hold is not finished.

        Arguments:
            search: The search over plans.

        Returns:
            The fastest network that held, or the original; and True.
        """
        search.offer(LEAST_RATIO)
        known = _Known(self.loss)
        for _ in range(MOST_SEARCHES):
            if known.high - known.low < NARROW or len(known.finished) == MOST_FINISHED:
                break
            ratio = known.next_ratio()
            found = search.searched(ratio)
            plan = found.best
            if not plan.mix or plan.ratio >= known.high or known.is_hopeless(plan.error):
                known.low = ratio
                continue
            made, loss = search.finished(found)
            known.take(_Finished(plan.ratio, plan.error, made, loss))
            if not found.met:  # there is nothing that fast
                known.low = max(known.low, ratio)
        held = [network for network in known.finished if known.holds(network)]
        if not held:
            return search.unchanged(f"nothing that is faster keeps within {self}"), True
        fastest = min(held, key=lambda network: network.ratio)
        return fastest.made, True

    def recounted(self, delivered: Delivered) -> bool:
        """Whether the network was found to hold, which was read on the network that goes out."""
        return delivered.planned

    def words(self) -> str:
        """The goal as reports word it."""
        return f"as fast as a loss of {self.loss:g} in the metric allows"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"kind": self.kind, "loss": float(self.loss)}

    def __str__(self) -> str:
        return f"metric loss at most {self.loss:g}"


@dataclass(frozen=True)
class _Finished:
    """A network that was finished: the latency ratio and the error of its plan, and what the metric says it loses."""

    ratio: float
    plan_error: float
    made: Applied
    loss: Loss | None

    @property
    def error(self) -> float:
        """Its output error on the judging samples."""
        return list(self.made.errors.values())[-1]


@dataclass
class _Known:
    """What is known of ratios: nothing above `high` is looked for, since that holds, nor below `low`."""

    bound: float
    low: float = LEAST_RATIO
    high: float = 1.0
    finished: list[_Finished] = field(default_factory=list)

    def holds(self, network: _Finished) -> bool:
        """By the metric; where that says nothing, by the error: no more than that of a network that held, or next to
        nothing."""
        if network.loss is not None:
            return network.loss.most <= self.bound
        others = [f.error for f in self.finished if f.loss is not None and f.loss.most <= self.bound]
        return network.error <= max([NEGLIGIBLE, *others])

    def is_hopeless(self, plan_error: float) -> bool:
        """Whether a plan loses at least what one did that then did not hold."""
        return any(plan_error >= f.plan_error for f in self.finished if not self.holds(f))

    def take(self, network: _Finished) -> None:
        """Narrow the interval by a network."""
        self.finished.append(network)
        if self.holds(network):
            self.high = min(self.high, network.ratio)
        else:
            self.low = max(self.low, network.ratio)

    def next_ratio(self) -> float:
        """Where the losses meet the bound, well inside of what is left; its middle where no loss is known below."""
        span = self.high - self.low
        place = 0.5
        below = [f for f in self.finished if f.ratio <= self.low and f.loss is not None]
        if below:
            most = max(below, key=lambda f: f.ratio).loss
            above = [f.loss.most for f in self.finished if f.ratio == self.high and f.loss is not None]
            start = above[0] if above else 0.0  # the original loses nothing
            assert most is not None
            if most.most > start:
                place = (most.most - self.bound) / (most.most - start)
        return self.low + span * min(1 - INSIDE, max(INSIDE, place))
