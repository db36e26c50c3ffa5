"""The measuring protocol on runners whose clock is simulated, so that nothing here depends on the machine."""

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import repeat
from typing import Any

import numpy as np
import pytest
from foldcut.compiler.support.errors import BackendError
from foldcut.runtime.measure import measure
from foldcut.runtime.measure.backend import Array, Clock, TimedRunner
from foldcut.runtime.measure.measure import self_check
from foldcut.runtime.measure.measurement import Measurement
from foldcut.runtime.measure.timing import Timing, Until, choose_repeats, time_block

NO_WARMUP: dict[str, Any] = {"min_block_ms": 0, "warmup_ms": 0}


HOW = {field.name for field in fields(Timing)}
UNTIL = {field.name for field in fields(Until)}


def split(options: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Those of the options, taken out."""
    return {name: options.pop(name) for name in names & options.keys()}


def measure_pair(before: Any, after: Any, **options: Any) -> Measurement:
    how, until = Timing(**split(options, HOW)), Until(**split(options, UNTIL))
    return measure.measure_pair(before, after, how, until=until, **options)


def measure_savings(reference: Any, variants: Any, **options: Any) -> tuple[Measurement, ...]:
    how = Timing(**{"warmup_ms": 50.0, **split(options, HOW)})
    return measure.measure_savings(reference, variants, how, **options)


def measure_single(runner: Any, **options: Any) -> float:
    return measure.measure_single(runner, Timing(**split(options, HOW)), **options)


class SimulatedRunner:
    """Reports times from a stream instead of a clock, and notes each run that is timed in a shared log."""

    def __init__(self, times_ms: Iterator[float], *, name: str = "", log: list[str] | None = None) -> None:
        self.clock: Clock = "cuda"
        self.times_ms = times_ms
        self.name = name
        self.log = [] if log is None else log
        self.closed = False

    def run(self) -> None: ...

    def elapsed_ms(self) -> float:
        self.log.append(self.name)
        return next(self.times_ms)

    def outputs(self) -> tuple[Array, ...]:
        return ()

    def close(self) -> None:
        self.closed = True


class StuckRunner(SimulatedRunner):
    """Claims CPU time but uses none to speak of: the simulated clocks below do not move."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(repeat(0.0))
        self.clock = clock


def steady(time_ms: float, **options: Any) -> SimulatedRunner:
    return SimulatedRunner(repeat(time_ms), **options)


def noisy(time_ms: float, seed: int, sigma: float) -> SimulatedRunner:
    generator = np.random.default_rng(seed)
    return SimulatedRunner(time_ms * float(np.exp(generator.normal(0, sigma))) for _ in iter(int, 1))


def test_steady_times_stop_at_the_fewest_pairs() -> None:
    result = measure_pair(steady(10.0), steady(8.0), min_pairs=20, **NO_WARMUP)
    assert result.ratio == pytest.approx(0.8)
    assert result.low == pytest.approx(result.high)
    assert result.pairs == 20
    assert (result.before_ms, result.after_ms) == pytest.approx((10, 8))
    assert result.clock == "cuda"
    assert result.faster
    assert not result.contended


def test_noise_is_met_with_more_pairs() -> None:
    result = measure_pair(noisy(10, 1, 0.03), noisy(9, 2, 0.03), **NO_WARMUP)
    assert 20 < result.pairs < 200
    assert result.half_width <= 0.01
    assert result.ratio == pytest.approx(0.9, rel=0.03)
    assert result.low < result.ratio < result.high


def test_hopeless_noise_stops_at_the_cap_and_is_flagged() -> None:
    result = measure_pair(noisy(10, 1, 0.5), noisy(10, 2, 0.5), max_pairs=30, **NO_WARMUP)
    assert result.pairs == 30
    assert result.half_width > 0.01
    assert result.contended
    assert not result.faster


def test_time_limit_still_gives_six_pairs() -> None:
    result = measure_pair(noisy(10, 1, 0.5), noisy(10, 2, 0.5), max_seconds=1e-9, **NO_WARMUP)
    assert result.pairs == 6


def test_order_reverses_from_pair_to_pair() -> None:
    log: list[str] = []
    runners = steady(10, name="a", log=log), steady(10, name="b", log=log)
    measure_pair(*runners, min_pairs=8, max_pairs=8, **NO_WARMUP)
    rounds = ["".join(log[-16:][i : i + 2]) for i in range(0, 16, 2)]
    assert all(set(pair) == {"ab", "ba"} for pair in zip(rounds[::2], rounds[1::2], strict=True))


def test_steady_drift_cancels() -> None:
    machine = iter(np.linspace(10, 20, 10_000))  # one clock for both, slower with every inference

    def drifting(scale: float) -> SimulatedRunner:
        return SimulatedRunner(scale * time for time in machine)

    assert measure_pair(drifting(1), drifting(0.5), **NO_WARMUP).ratio == pytest.approx(0.5, rel=1e-3)


def test_progress_sees_every_fourth_pair_and_may_end_the_measurement() -> None:
    seen: list[int] = []

    def stop(result: Measurement) -> None:
        seen.append(result.pairs)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_pair(noisy(10, 1, 0.5), noisy(10, 2, 0.5), progress=stop, **NO_WARMUP)
    assert seen == [4, 8]


def test_savings_are_in_the_order_of_the_variants() -> None:
    done: list[tuple[int, int]] = []
    results = measure_savings(
        steady(10),
        [steady(9), steady(5), steady(12)],
        pairs=4,
        progress=lambda now, total: done.append((now, total)),
        **NO_WARMUP,
    )
    assert [result.ratio for result in results] == pytest.approx([0.9, 0.5, 1.2])
    assert [result.pairs for result in results] == [4, 4, 4]
    assert [result.slower for result in results] == [False, False, True]
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_savings_time_each_network_once_a_round() -> None:
    log: list[str] = []
    runners = [steady(10, name=name, log=log) for name in "abcd"]
    measure_savings(runners[0], runners[1:], pairs=6, **NO_WARMUP)
    rounds = ["".join(log[-24:][i : i + 4]) for i in range(0, 24, 4)]
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds)) > 2
    assert all(there == back[::-1] for there, back in zip(rounds[::2], rounds[1::2], strict=True))


def test_no_variants_no_savings() -> None:
    assert measure_savings(steady(10), []) == ()


def test_single_is_the_median() -> None:
    assert measure_single(noisy(10, 1, 0.01), samples=15, **NO_WARMUP) == pytest.approx(10, rel=0.02)


def test_self_check_closes_both_and_accepts_equals() -> None:
    made: list[SimulatedRunner] = []

    def make() -> SimulatedRunner:
        made.append(noisy(50, len(made), 0.01))
        return made[-1]

    assert self_check(make).ratio == pytest.approx(1, abs=0.02)
    assert [runner.closed for runner in made] == [True, True]


def test_self_check_keeps_the_environment_and_shows_progress() -> None:
    seen: list[int] = []
    result = self_check(lambda: steady(50), environment={"batch": 4}, progress=lambda part: seen.append(part.pairs))
    assert result.environment == {"batch": 4}
    assert seen == [4, 8, 12, 16, 20]


def test_self_check_refuses_unequal_copies() -> None:
    made = iter([steady(50), steady(55)])
    with pytest.raises(BackendError, match="against itself") as caught:
        self_check(lambda: next(made))
    assert "1.1000" in str(caught.value.actual)


def test_self_check_closes_the_first_when_the_second_fails() -> None:
    first = steady(50)
    made: Iterator[Callable[[], SimulatedRunner]] = iter([lambda: first])
    with pytest.raises(StopIteration):
        self_check(lambda: next(made)())
    assert first.closed


def test_a_device_is_measured_for_three_seconds_by_default() -> None:
    """The three functions share 3 s of device time among the blocks; one inference takes 5 ms."""
    log: list[str] = []

    def runs_per_block(measured: Callable[[list[SimulatedRunner]], object], blocks: int) -> float:
        runners = [steady(5.0, name=name, log=log) for name in "abc"]
        log.clear()
        measured(runners)
        found = log.count("a")
        # 1, 10, ... inferences until a block is long enough come before the blocks
        return (found - sum(n for n in (1, 10) if n * 5 < 3000 / blocks)) / blocks

    assert 3000 / 40 / 5 <= runs_per_block(lambda r: measure_pair(r[0], r[1], warmup_ms=0), 20) < 17
    assert 3000 / 36 / 5 <= runs_per_block(lambda r: measure_savings(r[0], r[1:], warmup_ms=0), 12) < 19
    assert 3000 / 20 / 5 <= runs_per_block(lambda r: measure_single(r[0], warmup_ms=0), 20) < 33


def test_measurement_is_json_with_and_without_samples() -> None:
    result = measure_pair(steady(10.0), steady(8.0), environment={"cpu": "x", "cpus": 2}, **NO_WARMUP)
    whole = json.loads(json.dumps(result.to_dict()))
    assert whole["samples"] == [[10.0, 8.0]] * 20
    assert whole["environment"] == {"cpu": "x", "cpus": 2}
    short = json.loads(json.dumps(result.to_dict(samples=False)))
    assert set(whole) - set(short) == {"samples"}
    assert {"ratio", "low", "high", "pairs", "clock", "before_ms", "after_ms", "contended"} <= set(short)


def test_environment_is_the_hosts_by_default() -> None:
    assert "cpu" in measure_pair(steady(10), steady(10), **NO_WARMUP).environment


@pytest.mark.parametrize(
    ("ratio", "low", "high", "faster", "slower"),
    [
        (0.80, 0.79, 0.81, True, False),
        (0.99, 0.985, 0.995, False, False),  # sure, but too little to claim
        (0.90, 0.79, 1.01, False, False),  # much, but not sure
        (1.20, 1.10, 1.30, False, True),
        (1.00, 0.99, 1.01, False, False),
    ],
)
def test_what_may_be_claimed(ratio: float, low: float, high: float, faster: bool, slower: bool) -> None:
    result = Measurement(
        ratio=ratio, low=low, high=high, pairs=20, clock="wall", before_ms=1, after_ms=ratio,
        samples=(), environment={}, contended=False,
    )  # fmt: skip
    assert (result.faster, result.slower) == (faster, slower)
    assert result.verdict == ("faster" if faster else "slower" if slower else "no difference that can be claimed")


def test_different_clocks_are_refused() -> None:
    with pytest.raises(BackendError, match="different clocks"):
        measure_pair(steady(10), StuckRunner("wall"), **NO_WARMUP)


@pytest.mark.parametrize(
    "options",
    [
        {"min_pairs": 0},
        {"min_pairs": 30, "max_pairs": 20},
        {"target_halfwidth": 0},
        {"max_seconds": -1},
        {"min_block_ms": -1},
        {"warmup_ms": -1},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        measure_pair(steady(10), steady(10), **options)


def test_short_inferences_are_repeated_within_a_sample() -> None:
    assert choose_repeats(steady(0.25), 10) == 40
    assert choose_repeats(steady(3), 10) == 4
    assert choose_repeats(steady(50), 10) == 1


def test_block_reports_the_time_of_one_inference() -> None:
    runner = steady(0.5)
    block = time_block(runner, 8)
    assert isinstance(runner, TimedRunner)
    assert block.clock_ms == pytest.approx(4)
    assert block.per_run_ms == pytest.approx(0.5)


def test_clock_that_does_not_move_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldcut.runtime.measure.timing.time.thread_time_ns", lambda: 0)
    monkeypatch.setattr("foldcut.runtime.measure.timing._MOST_REPEATS", 100)
    with pytest.raises(BackendError, match="the clock 'thread_cpu' counted 0 ms"):
        choose_repeats(StuckRunner("thread_cpu"), 10)
    monkeypatch.setattr("foldcut.runtime.measure.timing._MOST_STANDSTILL_MS", 1)
    with pytest.raises(BackendError, match="the clock 'thread_cpu' counted 0 ms"):
        time_block(StuckRunner("thread_cpu"), 1)


def test_clock_that_stands_still_for_a_moment_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start and end of a block are read; the third block is the first in which the clock moves."""
    readings = iter([7, 7, 7, 7, 7, 2_000_007])
    monkeypatch.setattr("foldcut.runtime.measure.timing.time.thread_time_ns", lambda: next(readings))
    assert time_block(StuckRunner("thread_cpu"), 4).per_run_ms == pytest.approx(0.5)


def test_waiting_for_a_core_is_flagged_as_contention(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 10**12, 10_000_000))
    wall = iter(range(0, 10**12, 15_000_000))
    monkeypatch.setattr("foldcut.runtime.measure.timing.time.thread_time_ns", lambda: next(ticks))
    monkeypatch.setattr("foldcut.runtime.measure.timing.time.perf_counter_ns", lambda: next(wall))
    result = measure_pair(StuckRunner("thread_cpu"), StuckRunner("thread_cpu"), **NO_WARMUP)
    assert result.ratio == 1
    assert result.contended


def test_cuda_clock_needs_a_runner_that_times_itself() -> None:
    class Untimed:
        clock: Clock = "cuda"

        def run(self) -> None: ...

        def outputs(self) -> tuple[Array, ...]:
            return ()

        def close(self) -> None: ...

    with pytest.raises(BackendError, match="does not time itself"):
        time_block(Untimed(), 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_runner_that_reports_nonsense(bad: float) -> None:
    with pytest.raises(BackendError, match="clock read"):
        time_block(steady(bad), 1)


def test_collector_runs_again_after_an_interrupted_block() -> None:
    class Interrupted(SimulatedRunner):
        def run(self) -> None:
            raise KeyboardInterrupt

    assert gc.isenabled()
    with pytest.raises(KeyboardInterrupt):
        time_block(Interrupted(repeat(1.0)), 1)
    assert gc.isenabled()


class Watched(SimulatedRunner):
    """Notes all that is done with it, in order, and can empty its own caches."""

    def __init__(self, name: str, log: list[str], time_ms: float = 10.0) -> None:
        super().__init__(repeat(time_ms), name=name)
        self.done = log

    def run(self) -> None:
        self.done.append(f"{self.name} run")

    def elapsed_ms(self) -> float:
        self.done.append(f"{self.name} timed")
        return super().elapsed_ms()

    def evict_caches(self) -> None:
        self.done.append(f"{self.name} evict")


def test_what_ran_before_does_not_count_in_a_hot_block() -> None:
    """The other network has taken the caches, so a block begins with inferences that are not timed."""
    log: list[str] = []
    measure_pair(Watched("a", log), Watched("b", log), min_pairs=2, max_pairs=2, **NO_WARMUP)
    blocks = log[-12:]
    for start in range(0, len(blocks), 3):
        name = blocks[start][0]
        assert blocks[start : start + 3] == [f"{name} run", f"{name} run", f"{name} timed"]
    assert not any("evict" in event for event in log)


def test_a_cold_sample_is_one_inference_after_empty_caches() -> None:
    log: list[str] = []
    result = measure_pair(
        Watched("a", log, 1.0), Watched("b", log, 2.0), min_pairs=4, max_pairs=4, regime="cold", warmup_ms=0
    )
    assert (result.ratio, result.regime, result.pairs) == (2, "cold", 4)
    blocks = log[4:]  # two inferences of warm-up each
    assert len(blocks) == 4 * 2 * 3
    for start in range(0, len(blocks), 3):
        name = blocks[start][0]
        assert blocks[start : start + 3] == [f"{name} evict", f"{name} run", f"{name} timed"]


def test_caches_that_nobody_can_empty_are_not_called_cold() -> None:
    with pytest.raises(BackendError, match="'cold' is not there on this backend"):
        measure_pair(steady(10), steady(10), regime="cold", **NO_WARMUP)
