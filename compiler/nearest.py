"""Which of several measured plans comes nearest to a latency goal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

#: A plan that saves this much more of the latency than the goal asks for is made again: it may lose less.
NEAR = 0.02


def is_near(ratio: float, goal: float) -> bool:
    """Whether a latency ratio reaches a goal, and not by much more than it has to."""
    return goal - NEAR <= ratio <= goal


def nearest_from_below(seen: Sequence[tuple[float, T]], goal: float) -> tuple[float, T]:
    """Of (latency ratio, plan) pairs, one at least, the one nearest to the goal among those that reach it; where none
    does, the fastest."""
    within = [pair for pair in seen if pair[0] <= goal]
    return max(within, key=_ratio) if within else min(seen, key=_ratio)


def _ratio(pair: tuple[float, object]) -> float:
    return pair[0]
