"""Plans that were tried, and what a search found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .proposals import Mix, Scale, kinds_of

#: What loses less than this share of the outputs' energy counts as losing nothing: hardly a set of samples could tell
#: it from the original (0.0005 to 0.0015 took 0.06 points from a ResNet-56 and two of 400 images from a MobileNetV2).
#: Where a plan of layers in int8, say, reaches the goal so, no other rewrite is asked what it could do.
NEGLIGIBLE = 2e-3


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A plan with its output error after a quick re-solve and its measured latency ratio (upper end of the interval),
    and how many plans were measured until this one was found to save as much as it should."""

    mix: Mix
    error: float
    ratio: float
    rounds: int = 1

    @property
    def kinds(self) -> tuple[str, ...]:
        return kinds_of(self.mix)


@dataclass(frozen=True, kw_only=True)
class TriedPlan:
    """A plan that was tried on the way: the share that it leaves of what is bounded, its relative output error after a
    quick re-solve, how many decisions it has of each rewrite, by name, how many plans were measured until one like it
    was found to save enough, and whether it was chosen."""

    ratio: float
    error: float
    counts: Mapping[str, int]
    rounds: int = 1
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best plan, whether it reaches the goal, everything that was tried, and the scales at the end."""

    best: Tried
    met: bool
    tried: tuple[Tried, ...]
    scales: Mapping[str, Scale]

    def plans(self) -> tuple[TriedPlan, ...]:
        """What was tried, as plain figures."""
        return tuple(
            TriedPlan(
                ratio=plan.ratio,
                error=plan.error,
                counts=dict(Counter(item.kind for item in plan.mix)),
                rounds=plan.rounds,
                chosen=plan is self.best,
            )
            for plan in self.tried
        )
