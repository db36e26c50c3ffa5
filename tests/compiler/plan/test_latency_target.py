"""Plans that are measured until one comes near to a latency goal."""

from collections.abc import Callable

import pytest
from foldcut.compiler.plan.latency_target import MORE, MOST_MEASURED, NEAR, is_near, nearest_from_below, reach
from hypothesis import given
from hypothesis import strategies as st


def steps(size: float, most: float = 1.0) -> Callable[[float], tuple[int, bool]]:
    """Plans are so many steps of a size; all of them save `most`."""

    def planned(saving: float) -> tuple[int, bool]:
        count = next((n for n in range(round(most / size) + 1) if n * size >= saving - 1e-9), None)
        return (round(most / size), False) if count is None else (count, True)

    return planned


@given(st.floats(0.3, 0.9), st.floats(0.5, 2.0))
def test_savings_that_are_off_by_one_factor_are_put_right_at_once(goal: float, truth: float) -> None:
    seen = reach(goal, steps(0.002), lambda n: 0.002 * n, lambda n: 1 - truth * 0.002 * n)
    ratio, _ = nearest_from_below(seen, goal)
    if truth >= 1 or goal > 1 - 0.9 * truth:  # within what all steps together save
        assert goal - max(NEAR, (MORE - 1) * (1 - goal)) - 0.002 * truth <= ratio <= goal
        assert len(seen) <= 2


def test_a_correction_that_leads_to_the_same_plan_asks_for_more() -> None:
    """The second step is needed though the first was off by a hair."""
    seen = reach(0.52, steps(0.5, 1.5), lambda n: 0.5 * n, lambda n: 1 - 0.475 * n)
    assert [plan for _, plan in seen] == [1, 2]
    assert nearest_from_below(seen, 0.52) == (pytest.approx(0.05), 2)


def test_more_is_asked_for_after_every_miss() -> None:
    """Each further step saves less than the one before, so each correction falls short."""
    seen = reach(0.7, steps(0.01), lambda n: 0.01 * n, lambda n: 1 - sum(0.01 * 0.985**i for i in range(n)))
    assert len(seen) <= MOST_MEASURED
    assert nearest_from_below(seen, 0.7)[0] <= 0.7


def test_a_plan_that_saves_too_much_is_made_again() -> None:
    seen = reach(0.6, steps(0.01), lambda n: 0.01 * n, lambda n: 1 - 0.02 * n)
    assert [ratio for ratio, _ in seen] == pytest.approx([0.2, 0.6])


def test_between_a_plan_that_missed_and_one_that_saves_too_much_lies_the_next() -> None:
    """What is saved depends on the plan in steps, and one factor never puts it right."""

    def ratio(count: int) -> float:
        return 1 - (0.002 * count if count < 120 else 0.006 * count - 0.48)

    seen = reach(0.6, steps(0.002), lambda n: 0.002 * n, ratio)
    assert [found > 0.6 for found, _ in seen[:3]] == [False, True, True]
    assert is_near(nearest_from_below(seen, 0.6)[0], 0.6)


def test_a_goal_out_of_reach_is_measured_once() -> None:
    seen = reach(0.2, steps(0.1, 0.5), lambda n: 0.1 * n, lambda n: 1 - 0.1 * n)
    assert seen == [(pytest.approx(0.5), 5)]


def test_nothing_is_measured_where_nothing_can_be_done() -> None:
    assert reach(0.5, lambda _: (0, False), lambda _: 0.0, lambda _: pytest.fail("measured")) == []


def test_near_is_at_the_goal_or_a_little_below() -> None:
    assert is_near(0.6, 0.6)
    assert is_near(0.6 - NEAR, 0.6)
    assert not is_near(0.601, 0.6)
    assert not is_near(0.599 - NEAR, 0.6)
    assert nearest_from_below([(0.7, "a"), (0.65, "b")], 0.6) == (0.65, "b")
