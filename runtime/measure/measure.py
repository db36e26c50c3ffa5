"""Latency of two networks compared by interleaved pairs, so that what slows the machine slows both.

The time of one network, measured alone, moves by 10 % and more between repeats on a shared machine; the
ratio of two that were timed next to each other, on the CPU time of one thread, moves by one or two. What is loaded once
is measured once: see `fresh_loads` for an interval that another load of the same networks keeps to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing

import numpy as np

from ...compiler.support.errors import BackendError
from .backend import Clock, Regime, Runner
from .bootstrap import ratio_interval, relative_spread
from .cache_eviction import CacheEviction, check_evictable
from .environment import host_environment
from .measurement import Measurement
from .timing import BRIEFLY_WARMED, ENOUGH, WARMED, Block, Timing, Until, choose_repeats, time_block, warm_up

Environment = Mapping[str, str | int]

# The range of n samples covers their median with probability 1 - 2 ** (1 - n): 6 is the first to reach 95 %.
_FEWEST_PAIRS = 6
_CHECK_EVERY = 4  # pairs; even, so that both orders have been timed equally often whenever it stops
_BLOCK_MS = 10.0
# Inferences before a hot block that do not count: what ran before has taken the caches. At most as many as are timed.
_LEAD_IN = 2
# What trtexec does by default: a GPU's clocks take a while to settle. Here for all networks of a measurement together.
_DEVICE_MS = 3000.0
_CONTENDED_WALL_PER_CPU = 1.2
_CONTENDED_SPREAD = 0.15  # an idle machine shows 0.02 or so on either clock


def measure_pair(
    before: Runner,
    after: Runner,
    how: Timing = WARMED,
    *,
    until: Until = ENOUGH,
    environment: Environment | None = None,
    progress: Callable[[Measurement], None] | None = None,
) -> Measurement:
    """Measure the latency of `after` as a ratio to `before`, with a 95 % interval over this load of both.

    Both are warmed up, then timed in turns in blocks, in an order that reverses from pair to pair (ABBA), which cancels
    a steady drift. On the clock ``cuda`` blocks are by default so long that the fewest pairs last about 3 s.
    `environment` (a backend's `environment()`, with threads and batch) is kept with the result; by default it is the
    host's. `progress` gets the result so far every 4 pairs, and ends the measurement by raising. In the regime ``hot``
    one or two inferences that do not count lead into each block; in ``cold`` a block is one inference, and the caches
    are emptied before it.

    Biased: stopping on the width that the same samples gave favours samples that look calm by chance; in
    simulation the interval held the true ratio in 92 to 93 % of runs, under normal and under heavy-tailed
    noise. The ratio itself is not shifted, for the rule never looks at it. Fix the number (`min_pairs` =
    `max_pairs`) where that matters. Where a load happens to put its buffers is part of the ratio, by 1 % and more, and
    no number of pairs averages that out: `measure_loads` does.
    Raises BackendError: the clocks differ, a clock does not move, or the device's caches cannot be emptied.
    """
    deadline = time.perf_counter() + until.max_seconds
    rounds = Rounds((before, after), until.min_pairs, how)
    known = dict(host_environment() if environment is None else environment)
    while True:
        rounds.time_round()
        out_of_time = time.perf_counter() >= deadline and rounds.count >= min(_FEWEST_PAIRS, until.min_pairs)
        if not (rounds.count % _CHECK_EVERY == 0 or out_of_time or rounds.count == until.max_pairs):
            continue
        result = rounds.compare(0, 1, seed=how.seed, environment=known)
        if progress is not None:
            progress(result)
        narrow = rounds.count >= until.min_pairs and result.half_width <= until.target_halfwidth
        if narrow or out_of_time or rounds.count >= until.max_pairs:
            return result


def measure_savings(
    reference: Runner,
    variants: Sequence[Runner],
    how: Timing = BRIEFLY_WARMED,
    *,
    pairs: int = 12,
    environment: Environment | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Measurement, ...]:
    """Measure several variants against one reference: one measurement each, in the order of `variants`.

    In each of `pairs` rounds every network is timed once; the order is drawn anew every second round and
    reversed in between. Cheaper than one `measure_pair` for each, since the reference is timed once per
    round. All of `variants` stay loaded together, so mind the memory. Blocks last as in `measure_pair`.
    `progress` gets (rounds done, rounds in all).

    Biased: the measurements share the reference's samples, so their errors go together (a ranking gains
    by that, a sum does not); and of many variants the one that looks fastest looks faster than it is.
    Confirm it with `measure_loads`.
    Raises BackendError as `measure_pair` does; ValueError: an option out of range.
    """
    _check_counts(pairs, pairs)
    if not variants:
        return ()
    runners = (reference, *variants)
    rounds = Rounds(runners, pairs, how)
    for done in range(1, pairs + 1):
        rounds.time_round()
        if progress is not None:
            progress(done, pairs)
    known = dict(host_environment() if environment is None else environment)
    return tuple(rounds.compare(0, index, seed=how.seed, environment=known) for index in range(1, len(variants) + 1))


def measure_single(runner: Runner, how: Timing = WARMED, *, samples: int = 20) -> float:
    """Return the median time of one inference in milliseconds, on the runner's clock.

    Biased by whatever the machine does meanwhile: two such numbers taken apart differ by 10 % for one and
    the same network on a shared machine. Compare networks with `measure_pair`.
    Raises BackendError if the clock does not move or caches cannot be emptied; ValueError for an option out of range.
    """
    _check_counts(samples, samples)
    rounds = Rounds((runner,), samples, how)
    for _ in range(samples):
        rounds.time_round()
    return float(np.median(rounds.times_ms[0]))


def self_check(
    make_runner: Callable[[], Runner],
    *,
    tolerance: float = 0.02,
    max_seconds: float = 30.0,
    seed: int = 0,
    environment: Environment | None = None,
    progress: Callable[[Measurement], None] | None = None,
) -> Measurement:
    """Measure a network against a second copy of itself: the ratio must be 1 within `tolerance`.

    It shows what this machine can resolve at present. Both runners are closed. `environment` and `progress` are
    those of `measure_pair`. Raises BackendError if the ratio is further from 1, for then no difference of that size
    can be believed.
    """
    _check_positive(tolerance=tolerance)
    with closing(make_runner()) as first, closing(make_runner()) as second:
        result = measure_pair(
            first,
            second,
            Timing(seed=seed),
            until=Until(target_halfwidth=tolerance / 2, max_seconds=max_seconds),
            environment=environment,
            progress=progress,
        )
    if abs(result.ratio - 1) > tolerance:
        raise BackendError(
            "a network measured against itself does not come out equal; smaller differences cannot be resolved",
            expected=f"1 within {tolerance}",
            actual=f"{result.ratio:.4f} [{result.low:.4f}, {result.high:.4f}] from {result.pairs} pairs",
            hint="stop what else is running, measure on one thread, or raise min_block_ms",
        )
    return result


class Rounds:
    """Times a group of runners in turns: round by round, one block each, `rounds` times at least."""

    def __init__(
        self,
        runners: Sequence[Runner],
        rounds: int,
        how: Timing,
    ) -> None:
        min_block_ms, regime = how.min_block_ms, how.regime
        self._runners = tuple(runners)
        self._evict = _eviction(runners) if regime == "cold" else None
        self.regime: Regime = regime
        self.clock = common_clock(runners)
        for runner in runners:
            warm_up(runner, how.warmup_ms)
        if min_block_ms is None:
            on_device = self.clock == "cuda"
            min_block_ms = max(_BLOCK_MS, _DEVICE_MS / (rounds * len(runners))) if on_device else _BLOCK_MS
        # a second inference in a row would not be cold
        self._repeats = [1 if self._evict else choose_repeats(runner, min_block_ms) for runner in runners]
        self._blocks: list[list[Block]] = [[] for _ in runners]
        self._orders = _orders(len(runners), how.seed)

    @property
    def count(self) -> int:
        """Rounds timed so far."""
        return len(self._blocks[0])

    @property
    def times_ms(self) -> list[list[float]]:
        """Per runner, the time of one inference in each round."""
        return [[block.per_run_ms for block in blocks] for blocks in self._blocks]

    @property
    def contended(self) -> bool:
        """Whether something else used the machine while any of the runners was timed."""
        return any(self._contended(index) for index in range(len(self._runners)))

    def time_round(self) -> None:
        """Time each runner once; an interrupted round leaves no trace."""
        order = next(self._orders)
        timed = {index: self._time(index) for index in order}
        for index, block in timed.items():
            self._blocks[index].append(block)

    def _time(self, index: int) -> Block:
        runner, repeats, evict = self._runners[index], self._repeats[index], self._evict

        def prepare() -> None:
            if evict is not None:
                evict(runner)
                return
            for _ in range(min(_LEAD_IN, repeats)):
                runner.run()

        return time_block(runner, repeats, prepare)

    def compare(self, first: int, second: int, *, seed: int, environment: dict[str, str | int]) -> Measurement:
        """One runner's time over another's, from the pairs of this load."""
        times = self.times_ms
        before, after = times[first], times[second]
        interval = ratio_interval(before, after, seed=seed)
        return Measurement(
            ratio=interval.estimate,
            low=interval.low,
            high=interval.high,
            pairs=self.count,
            clock=self.clock,
            before_ms=float(np.median(before)),
            after_ms=float(np.median(after)),
            samples=tuple(zip(before, after, strict=True)),
            environment=dict(environment),
            contended=self._contended(first) or self._contended(second),
            regime=self.regime,
        )

    def _contended(self, index: int) -> bool:
        blocks = self._blocks[index]
        if relative_spread([block.per_run_ms for block in blocks]) > _CONTENDED_SPREAD:
            return True
        # On any other clock the wait for a core is part of the time itself, and shows as spread.
        waits = self._runners[index].clock == "thread_cpu"
        wall, cpu = sum(block.wall_ms for block in blocks), sum(block.clock_ms for block in blocks)
        return waits and wall > _CONTENDED_WALL_PER_CPU * cpu


def common_clock(runners: Sequence[Runner]) -> Clock:
    """The clock of all of them. Raises BackendError where there is more than one."""
    clocks = sorted({runner.clock for runner in runners})
    if len(clocks) > 1:
        raise BackendError(
            "runners on different clocks cannot be compared",
            expected="one clock",
            actual=", ".join(clocks),
            hint="load all of them with the same backend and the same number of threads",
        )
    return clocks[0]


def _eviction(runners: Sequence[Runner]) -> CacheEviction:
    for runner in runners:
        check_evictable(runner)
    return CacheEviction()


def _orders(count: int, seed: int) -> Iterator[tuple[int, ...]]:
    """Yield an order of the runners for each round: a random one, then its reverse, and so on."""
    generator = np.random.default_rng(seed)
    while True:
        order = tuple(generator.permutation(count).tolist())
        yield order
        yield order[::-1]


def _check_counts(fewest: int, most: int) -> None:
    if fewest < 1 or most < fewest:
        raise ValueError(f"the number of pairs must be at least 1 and min_pairs <= max_pairs: {fewest}, {most}")


def _check_positive(**options: float) -> None:
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, not {value}")
