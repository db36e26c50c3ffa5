"""How far the whole is: what is expected of stages, corrected by what they took, on a clock of the test's own."""

from __future__ import annotations

from itertools import pairwise

import pytest
from foldcut.compiler.support.whole import (
    SPREAD,
    Expected,
    Forecast,
    Whole,
    clock_words,
    left_words,
    span_words,
)

PLAN = {
    "export": Expected(seconds=2, when="any"),
    "offer channels": Expected(seconds=20),
    "try plans": Expected(seconds=30, when="search"),
    "re-solve": Expected(seconds=10, when="search"),
    "mimic": Expected(seconds=30, when="last"),
    "measure": Expected(seconds=8, when="last"),
}


def run_stage(whole: Whole, now: float, name: str, seconds: float, calls: int = 1) -> tuple[float, list[float]]:
    """The time after a stage, and the fractions seen while it ran."""
    seen = []
    for _ in range(calls):
        whole.began(now, name)
        for _ in range(10):
            now += seconds / calls / 10
            seen.append(whole.fraction(now))
        whole.ended(now, name)
    return now, seen


def started(stages: dict[str, Expected] | None = None) -> Whole:
    whole = Whole(began_s=0.0)
    whole.foresee(Forecast(stages or PLAN))
    return whole


def run(times: list[tuple[str, float]], whole: Whole | None = None) -> tuple[Whole, float, list[float]]:
    whole = whole or started()
    now, seen = 0.0, [0.0]
    for name, seconds in times:
        now, more = run_stage(whole, now, name, seconds)
        seen += more
    return whole, now, seen


def test_a_forecast_that_comes_true_is_a_straight_line() -> None:
    whole, now, seen = run([(name, stage.seconds) for name, stage in PLAN.items()])
    assert now == pytest.approx(100)
    assert seen[-1] > 0.98 and whole.left_s(now) == pytest.approx(0)
    for place in (20, 30, 40, 50):
        assert seen[place] == pytest.approx(whole_at(seen, place), abs=0.03)


def whole_at(seen: list[float], place: int) -> float:
    """The share of the 100 expected seconds that have gone by at a step of the run above: 10 steps a stage."""
    seconds = [stage.seconds for stage in PLAN.values()]
    done, left = divmod(place, 10)
    assert len(seen) == 61
    return (sum(seconds[:done]) + (seconds[done] * left / 10 if left else 0)) / 100


@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0, 6.0])
def test_it_never_runs_backwards_and_ends_full(factor: float) -> None:
    times = [(name, factor * stage.seconds) for name, stage in PLAN.items()]
    whole, now, seen = run([*times, ("try plans", 40.0 * factor), *times[-3:]])
    assert all(after >= before for before, after in pairwise(seen))
    assert max(seen) < 1
    whole.finish(now)
    assert whole.fraction(now) == 1.0


def test_it_goes_on_more_slowly_where_more_turns_out_to_be_left() -> None:
    whole = started()
    now, first = run_stage(whole, 0.0, "export", 2)
    now, _ = run_stage(whole, now, "offer channels", 20)
    expected = whole.fraction(now)
    _, slow = run_stage(whole, now, "try plans", 300)
    rise = [after - before for before, after in pairwise([expected, *slow])]
    assert all(step > 0 for step in rise)
    # 30 s were expected: a tenth of the stage's 300 s is over its time
    assert rise[-1] / 30 < (first[-1] - first[0]) / 2


def test_stages_that_took_longer_say_so_of_the_others() -> None:
    whole = started()
    now, _ = run_stage(whole, 0.0, "offer channels", 20)
    before = whole.left_s(now)
    slower = started()
    now, _ = run_stage(slower, 0.0, "offer channels", 80)
    after = slower.left_s(now)
    assert before is not None and after is not None
    assert before == pytest.approx(80, rel=0.01) and 2 < after / before < 4


def test_a_plan_that_needs_no_search_leaves_the_end_alone() -> None:
    whole = started()
    now, _ = run_stage(whole, 0.0, "export", 2)
    left = whole.left_s(now)
    whole.began(now, "mimic")
    assert left == pytest.approx(98, rel=0.01) and whole.left_s(now) == pytest.approx(38, rel=0.01)


def test_another_search_after_a_goal_that_was_missed() -> None:
    whole, now, _ = run([(name, stage.seconds) for name, stage in PLAN.items()])
    assert whole.left_s(now) == pytest.approx(0)
    whole.began(now, "try plans")
    left = whole.left_s(now)
    assert left is not None and left > 40  # mimic, measure and half of the search again


def test_counts_correct_the_stage_that_runs() -> None:
    stages = {"mimic": Expected(seconds=100, when="last")}
    whole = started(stages)
    whole.began(0.0, "mimic")
    whole.counted(10.0, "mimic", 90, 100)
    left = whole.left_s(10.0)
    assert left is not None and left < 15  # 90 s by the forecast alone, 1 s by the count


def test_stages_within_others_are_lines_of_the_outermost() -> None:
    whole = started()
    whole.began(0.0, "offer channels")
    whole.counted(1.0, "channel moments", 1, 4)
    whole.began(2.0, "probe lattice")
    whole.counted(3.0, "probe lattice", 2, 3)
    assert list(whole.lines) == ["offer channels"]
    assert (whole.lines["offer channels"].said, whole.lines["offer channels"].done) == ("probe lattice", 2)
    whole.ended(4.0, "probe lattice")
    assert whole.lines["offer channels"].running
    whole.ended(5.0, "offer channels")
    assert not whole.lines["offer channels"].running and whole.lines["offer channels"].spent_s == 5.0


def test_a_stage_that_comes_again_has_one_line() -> None:
    whole = started()
    for call in range(4):
        run_stage(whole, 10.0 * call, "try plans", 2)
        run_stage(whole, 10.0 * call + 3, "re-solve", 1)
    assert list(whole.lines) == ["try plans", "re-solve"]
    assert whole.lines["try plans"].spent_s == pytest.approx(8)


def test_a_stage_that_is_only_told_of_ends_with_its_count_or_the_next() -> None:
    whole = Whole(began_s=0.0)
    whole.counted(1.0, "build", 0, 2)
    whole.counted(2.0, "measure", 1, 9)
    assert not whole.lines["build"].running and whole.lines["build"].spent_s == 1.0
    whole.counted(5.0, "measure", 9, 9)
    assert not whole.lines["measure"].running and whole.lines["measure"].spent_s == 3.0
    assert whole.left_s(5.0) is None and whole.fraction(5.0) == 0.0  # nobody said what is to come
    # told of just before its clock starts, as trials are
    whole.counted(6.0, "try plans", 3, 9)
    whole.began(6.0, "try plans")
    assert whole.lines["try plans"].done == 3
    whole.ended(7.0, "try plans")
    assert whole.lines["try plans"].spent_s == 1.0


def test_parts_of_a_sweep_are_one_whole() -> None:
    whole = Whole(began_s=0.0)
    now, seen, ends = 0.0, [], []
    for part in (1, 2, 3):
        whole.next_part(now, part, 3, f"goal {part}")
        assert list(whole.lines) == []
        whole.foresee(Forecast({"choose": Expected(seconds=30), "measure": Expected(seconds=10, when="last")}))
        for name, seconds in (("choose", 30.0 if part == 1 else 3.0), ("measure", 10.0)):
            now, more = run_stage(whole, now, name, seconds)
            seen += more
        ends.append(whole.fraction(now))
    assert all(after >= before for before, after in pairwise(seen))
    assert ends[0] < 0.5 and ends[1] < 0.9 and ends[2] > 0.95
    whole.finish(now)
    assert whole.fraction(now) == 1.0


def test_a_forecast_is_a_range() -> None:
    forecast = Forecast({"a": Expected(seconds=160), "b": Expected(seconds=160, least_s=0.0)})
    assert forecast.least_s == 160 / SPREAD and forecast.most_s == 320 * SPREAD
    assert forecast.words() == "about 2 to 9 min"


@pytest.mark.parametrize(
    ("least", "most", "words"),
    [
        (0.1, 0.2, "1 s"),
        (3, 8, "3 to 8 s"),
        (13, 41, "15 to 40 s"),
        (47, 200, "45 s to 3 min"),
        (170, 490, "3 to 8 min"),
        (700, 1900, "10 to 30 min"),
        (3000, 9000, "50 min to 2.5 h"),
        (40000, 90000, "11 to 25 h"),
    ],
)
def test_ranges_are_no_finer_than_they_are_known(least: float, most: float, words: str) -> None:
    assert span_words(least, most) == words


def test_times_in_words() -> None:
    assert left_words(100) == "about 2 min left" and left_words(0) == "about 1 s left"
    assert clock_words(0.4) == "0:00" and clock_words(75) == "1:15" and clock_words(3700) == "1:01:40"
