"""Which plan comes nearest to a latency goal: plans are measured, and what they were predicted to save is corrected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

P = TypeVar("P")

#: A plan that saves this much more of the latency than the goal asks for is made again: it may lose less.
NEAR = 0.02
#: How often a plan is made again when its measured latency misses the goal, or saves too much.
MOST_MEASURED = 4
#: Beyond so many times `NEAR` below the goal, what to ask for is sought between that plan and one that missed.
FAR = 1.5
#: How much more is asked for after a plan that missed; after the next one twice as much more again.
MORE = 1.03
#: What a plan saves counts for no less than this share of what it should when it is held against its prediction.
LEAST_SAVED = 0.1


def is_near(ratio: float, goal: float) -> bool:
    """Whether a latency ratio reaches a goal, and not by much more than it has to."""
    return goal - NEAR <= ratio <= goal


def nearest_from_below(seen: Sequence[tuple[float, P]], goal: float) -> tuple[float, P]:
    """Of (latency ratio, plan) pairs, one at least, the one nearest to the goal among those that reach it; where none
    does, the fastest."""
    within = [pair for pair in seen if pair[0] <= goal]
    return max(within, key=_ratio) if within else min(seen, key=_ratio)


def reach(
    goal: float,
    planned: Callable[[float], tuple[P, bool]],
    predicted: Callable[[P], float],
    measure: Callable[[P], float],
) -> list[tuple[float, P]]:
    """Plans with their measured latency ratios, in the order in which they were made; the last comes near to the goal
    where one was found that does.

    `planned` makes the plan that should save a share of the latency, and says whether it should (else it is the plan
    that saves the most); `predicted` is the share that it should save. The first plan is asked for what the goal needs.
    What was predicted is then held against what was measured, and the next one asked for so much more, or less; after
    each that missed the goal for a little more than that, since what a plan is made of differs in how far off it is.
    Once one plan missed and another saved too much, the next is asked for what lies between them.
    A plan is measured once: where the corrected request leads to the same one, more is asked for. An empty plan is not
    measured and ends the search.
    """
    seen: list[tuple[float, P]] = []
    saving, misses = 1 - goal, 0
    while len(seen) < MOST_MEASURED:
        plan, possible = planned(saving * MORE**misses)
        before = next((ratio for ratio, known in seen if known == plan), None)
        if not plan or (before is not None and (before <= goal or not possible)):
            break
        if before is not None:
            misses += 1
            continue
        ratio = measure(plan)
        seen.append((ratio, plan))
        if is_near(ratio, goal) or (ratio > goal and not possible):
            break
        if ratio > goal:
            misses += sum(known > goal for known, _ in seen)
        between = _between(seen, predicted, goal)
        if between is None:
            saving = predicted(plan) * (1 - goal) / saved_share(ratio, goal)
        else:
            saving, misses = between, 0
    return seen


def _between(seen: Sequence[tuple[float, P]], predicted: Callable[[P], float], goal: float) -> float | None:
    """What to ask for to come a little below the goal, on the line between the nearest plan that missed it and the
    nearest that reached it; None where there are not both, where that one is not far off, or the line says nothing."""
    missed = min((pair for pair in seen if pair[0] > goal), key=_ratio, default=None)
    met = max((pair for pair in seen if pair[0] <= goal), key=_ratio, default=None)
    if missed is None or met is None or met[0] >= goal - FAR * NEAR:
        return None
    low, high = predicted(missed[1]), predicted(met[1])
    share = (missed[0] - goal + NEAR / 2) / (missed[0] - met[0])
    return low + share * (high - low) if low < high else None


def saved_share(ratio: float, goal: float) -> float:
    """The share of the latency that a plan saves, as its prediction is held against it: never next to nothing."""
    return max(1 - ratio, LEAST_SAVED * (1 - goal))


def _ratio(pair: tuple[float, object]) -> float:
    return pair[0]
