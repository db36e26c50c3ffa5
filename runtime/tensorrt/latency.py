"""Latency of one network by trtexec's protocol: 200 ms of warm-up, at least 3 s of inferences, transfers excluded."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ..measure.backend import Clock, Runner
from ..measure.timing import time_block, warm_up

_FEWEST = 10  # trtexec's --iterations


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds per inference on `clock`, over `count` single inferences."""

    clock: Clock
    count: int
    median_ms: float
    mean_ms: float
    least_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    largest_ms: float


def measure_latency(runner: Runner, *, seconds: float = 3.0, warmup_ms: float = 200.0) -> Latency:
    """Time single inferences for at least `seconds` of wall time, and at least 10 of them.

    Comparable with trtexec's "GPU Compute Time" when the runner's clock is ``cuda``. Two networks are compared with
    `measure.measure_pair`: it takes them in turns, so that a GPU that slows down as it warms up slows both.
    Raises BackendError: the clock does not move, or the runner fails. ValueError: `seconds` or `warmup_ms` below 0.
    """
    if seconds < 0 or warmup_ms < 0:
        raise ValueError(f"seconds and warmup_ms must not be negative: {seconds}, {warmup_ms}")
    warm_up(runner, warmup_ms)
    end = time.perf_counter() + seconds
    samples: list[float] = []
    while len(samples) < _FEWEST or time.perf_counter() < end:
        samples.append(time_block(runner, 1).clock_ms)
    p90, p95, p99 = np.percentile(samples, [90, 95, 99]).tolist()
    return Latency(
        clock=runner.clock,
        count=len(samples),
        median_ms=float(np.median(samples)),
        mean_ms=float(np.mean(samples)),
        least_ms=min(samples),
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        largest_ms=max(samples),
    )
