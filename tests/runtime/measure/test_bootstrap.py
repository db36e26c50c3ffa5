"""The statistics on synthetic samples."""

import math
from typing import Any

import numpy as np
import pytest
from foldcut.runtime.measure.bootstrap import median_interval, ratio_interval, relative_spread
from hypothesis import given
from hypothesis import strategies as st

values = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40)
times = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40)
seeds = st.integers(0, 1000)


@given(values, seeds)
def test_interval_holds_the_median_and_stays_in_the_range(data: list[float], seed: int) -> None:
    interval = median_interval(data, resamples=200, seed=seed)
    assert interval.estimate == np.median(data)
    assert interval.low <= interval.estimate <= interval.high
    assert min(data) - 1e-9 <= interval.low
    assert interval.high <= max(data) + 1e-9


@given(values, st.floats(-1e3, 1e3), seeds)
def test_interval_moves_with_the_values(data: list[float], shift: float, seed: int) -> None:
    here = median_interval(data, resamples=200, seed=seed)
    there = median_interval([value + shift for value in data], resamples=200, seed=seed)
    for name in ("estimate", "low", "high"):
        assert getattr(there, name) == pytest.approx(getattr(here, name) + shift, abs=1e-8)


@given(st.floats(-1e3, 1e3), st.integers(1, 40))
def test_equal_values_have_no_width(value: float, count: int) -> None:
    interval = median_interval([value] * count, resamples=200)
    assert interval.low == interval.estimate == interval.high == value


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=40), seeds)
def test_swapping_the_networks_inverts_the_ratio(pairs: list[tuple[float, float]], seed: int) -> None:
    before, after = zip(*pairs, strict=True)
    ratio = ratio_interval(before, after, seed=seed).estimate
    assert ratio_interval(after, before, seed=seed).estimate == pytest.approx(1 / ratio)


@given(times, st.floats(0.01, 100))
def test_exact_ratio_is_found_whatever_the_times(before: list[float], ratio: float) -> None:
    interval = ratio_interval(before, [time * ratio for time in before])
    assert interval.estimate == pytest.approx(ratio)
    assert interval.high == pytest.approx(interval.low)


def test_more_samples_narrow_the_interval() -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, 400)
    wide, narrow = (median_interval(noise[:count]) for count in (20, 400))
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)


def test_outliers_do_not_move_the_ratio() -> None:
    before = np.full(21, 10.0)
    after = np.full(21, 8.0)
    after[:5] = 100.0
    assert ratio_interval(before, after).estimate == pytest.approx(0.8)


def test_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    intervals = [median_interval(generator.normal(0, 1, 30), resamples=400) for _ in range(200)]
    hits = sum(interval.low <= 0 <= interval.high for interval in intervals)
    assert 0.88 <= hits / len(intervals) <= 0.99


@pytest.mark.parametrize("data", [[], [math.nan], [1.0, math.inf], [[1.0, 2.0]]])
def test_bad_values(data: Any) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        median_interval(data)


@pytest.mark.parametrize("options", [{"confidence": 0}, {"confidence": 1}, {"resamples": 0}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="confidence"):
        median_interval([1.0, 2.0], **options)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([1.0], [1.0, 2.0], "pairs"),
        ([0.0], [1.0], "above 0"),
        ([1.0], [math.nan], "above 0"),
        ([], [], "finite"),
    ],
)
def test_bad_samples(before: list[float], after: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ratio_interval(before, after)


def test_relative_spread_has_no_unit() -> None:
    data = np.array([9.0, 10.0, 10.0, 11.0, 500.0])
    assert relative_spread(data) == pytest.approx(0.1)
    assert relative_spread(data * 1000) == pytest.approx(0.1)
