"""One sample of a runner's latency: a block of inferences between two readings of the runner's clock."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ...compiler.support.errors import BackendError
from .backend import Regime, Runner, TimedRunner

_NS_PER_MS = 1e6
_MOST_REPEATS = 100_000
_MOST_GROWTH = 10  # one short block says little about how many repeats the next needs
_MOST_WALL_PER_CLOCK = 200  # far beyond what sharing a core with other processes does
_MOST_STANDSTILL_MS = 1000.0
_SLOW_S = 0.1  # one inference that takes so long warms caches and allocators up by itself


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How networks are timed: each is warmed up for `warmup_ms`, then blocks last at least `min_block_ms` (None: 10 ms,
    on a device longer), in an order drawn by `seed`, with the caches as the `regime` says. Raises ValueError for an
    option out of range."""

    min_block_ms: float | None = None
    warmup_ms: float = 200.0
    seed: int = 0
    regime: Regime = "hot"

    def __post_init__(self) -> None:
        if (self.min_block_ms is not None and self.min_block_ms < 0) or self.warmup_ms < 0:
            raise ValueError("min_block_ms and warmup_ms must not be negative")


@dataclass(frozen=True, kw_only=True)
class Until:
    """When enough was measured: at the first check from `min_pairs` on where the interval's half width, relative to the
    ratio, is at most `target_halfwidth`; at `max_pairs`; or after `max_seconds`, warm-up included, but not before 6
    pairs. Raises ValueError for an option out of range."""

    min_pairs: int = 20
    max_pairs: int = 200
    target_halfwidth: float = 0.01
    max_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_pairs <= self.max_pairs:
            raise ValueError(f"the number of pairs must be at least 1 and min_pairs <= max_pairs: {self}")
        if not (self.target_halfwidth > 0 and self.max_seconds > 0):
            raise ValueError(f"target_halfwidth and max_seconds must be above 0: {self}")


WARMED, BRIEFLY_WARMED, ENOUGH = Timing(), Timing(warmup_ms=50.0), Until()


@dataclass(frozen=True, kw_only=True)
class Block:
    """`repeats` inferences in a row: their total time in ms on the runner's clock and on the wall."""

    repeats: int
    clock_ms: float
    wall_ms: float

    @property
    def per_run_ms(self) -> float:
        """Mean time of one inference on the runner's clock, in milliseconds."""
        return self.clock_ms / self.repeats


def time_block(runner: Runner, repeats: int, prepare: Callable[[], object] | None = None) -> Block:
    """Time `repeats` inferences in a row, again while the clock stands still. `prepare` is called before, outside of
    the time that counts: it brings the caches into the state that is wanted.

    Linux takes time that a hypervisor stole, or an interrupt used, out of a thread's CPU clock afterwards: the clock
    then counts nothing until the thread has run for as long. Raises BackendError if it still does not move after a
    second, or is not usable.
    """
    waited_ms = 0.0
    while True:
        if prepare is not None:
            prepare()
        block = _read_block(runner, repeats)
        if block.clock_ms > 0:
            return block
        waited_ms += block.wall_ms
        if waited_ms > _MOST_STANDSTILL_MS:
            raise _stuck_clock(runner, block)


def warm_up(runner: Runner, warmup_ms: float) -> None:
    """Run inferences until `warmup_ms` of wall time have passed: at least two, or a slow one."""
    start = time.perf_counter()
    end = start + warmup_ms / 1000
    runner.run()
    if time.perf_counter() - start < _SLOW_S:
        runner.run()
    while time.perf_counter() < end:
        runner.run()


def choose_repeats(runner: Runner, min_block_ms: float) -> int:
    """Find how many inferences make a block of at least about `min_block_ms` on the runner's clock.

    Longer blocks hide the clock's step (1 ns on Linux) and the cost of a Python call. Raises BackendError
    if the clock hardly moves.
    """
    repeats = 1
    while True:
        block = _read_block(runner, repeats)
        if block.clock_ms >= min_block_ms:
            return repeats
        at_limit = repeats == _MOST_REPEATS
        waits = block.wall_ms > _MOST_WALL_PER_CLOCK * max(block.clock_ms, min_block_ms)
        if waits or (at_limit and block.clock_ms == 0):
            raise _stuck_clock(runner, block)
        if at_limit:
            return repeats
        wanted = math.ceil(repeats * min_block_ms / block.clock_ms) if block.clock_ms > 0 else _MOST_REPEATS
        repeats = min(max(wanted, repeats + 1), repeats * _MOST_GROWTH, _MOST_REPEATS)


def _read_block(runner: Runner, repeats: int) -> Block:
    with _collector_paused():
        wall_start = time.perf_counter_ns()
        clock_ms = _device_ms(runner, repeats) if runner.clock == "cuda" else _cpu_ms(runner, repeats)
        wall_ms = (time.perf_counter_ns() - wall_start) / _NS_PER_MS
    if not (math.isfinite(clock_ms) and clock_ms >= 0):
        raise BackendError(f"the runner's clock read {clock_ms} ms", hint="fix its elapsed_ms()")
    return Block(repeats=repeats, clock_ms=clock_ms, wall_ms=wall_ms)


def _stuck_clock(runner: Runner, block: Block) -> BackendError:
    return BackendError(
        f"the clock '{runner.clock}' counted {block.clock_ms:.3g} ms for {block.repeats} inferences "
        f"that took {block.wall_ms:.3g} ms on the wall",
        hint="the runner computes where its clock does not count: let it declare the clock 'wall'",
    )


def _cpu_ms(runner: Runner, repeats: int) -> float:
    read = time.thread_time_ns if runner.clock == "thread_cpu" else time.perf_counter_ns
    run = runner.run
    start = read()
    for _ in range(repeats):
        run()
    return (read() - start) / _NS_PER_MS


def _device_ms(runner: Runner, repeats: int) -> float:
    if not isinstance(runner, TimedRunner):
        raise BackendError(
            f"a runner of type {type(runner).__name__} declares the clock 'cuda' but does not time itself",
            hint="give it elapsed_ms(), or declare the clock 'wall' and let run() wait for the device",
        )
    total = 0.0
    for _ in range(repeats):
        runner.run()
        total += runner.elapsed_ms()
    return total


@contextmanager
def _collector_paused() -> Iterator[None]:
    # With torch loaded a full collection takes longer than a block.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
