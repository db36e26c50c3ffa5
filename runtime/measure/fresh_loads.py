"""Two networks compared over fresh loads of both, beside a second session of the original: an interval that the next
measurement of the same files keeps to.

Sessions of one and the same network differ by 1 % and more, from where their buffers happen to lie, and by what the
machine does in that moment. So the load is what is sampled: each gives one ratio, and the interval is that of
their mean (`loads_interval`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace

import numpy as np

from ...compiler.support.errors import BackendError
from .backend import Clock, Regime, Runner
from .bootstrap import loads_interval
from .cache_eviction import check_evictable
from .environment import OtherWork, host_environment
from .measure import Environment, Rounds, common_clock
from .measurement import Measurement
from .timing import Timing

REGIMES: tuple[Regime, ...] = ("hot", "cold")
#: Fewer loads say too little about the next one, however slow the networks are.
_FEWEST_LOADS = 3
_FEWEST_ROUNDS = 2  # both orders
#: So many rounds are enough of a load where they take so many seconds: the interval is made of what loads differ by,
#: and a slow network's single inferences scatter less.
_ROUNDS_OF_SLOW, _SLOW_S = 2, 0.8
_COLD_ROUNDS = 2  # times as many: a cold sample is a single inference
#: A machine is contended where others keep more of its CPUs busy: they share caches, memory and often a core's units.
_MOST_OTHER_WORK = 0.1
#: Memory held between two loads, at random, so that the next load's buffers do not fall where the last one's were.
_MOST_BALLAST_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much a comparison over fresh loads may take: `loads` at least, `most_loads` where the interval's half width
    is still above `target_halfwidth`, `rounds` in each; and `seconds`, after which it ends, but not before three loads
    of two rounds. On a contended machine `together` so many loads count as one: what disturbs it lasts longer than a
    load, and the next measurement meets another disturbance. With `apart` each network is loaded when no other is, for
    those of which memory holds one: what the machine does meanwhile is in the interval, which is wider for it."""

    loads: int = 5
    most_loads: int = 9
    rounds: int = 8
    target_halfwidth: float = 0.01
    warmup_ms: float = 100.0
    seconds: float = 40.0
    together: float = 3.0
    regime: Regime = "hot"
    both: bool = False
    apart: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (2 <= self.loads <= self.most_loads and self.rounds >= 1):
            raise ValueError(f"loads start at 2, rounds at 1, and loads <= most_loads: {self}")
        if not (self.target_halfwidth > 0 and self.seconds > 0 and self.warmup_ms >= 0 and self.together >= 1):
            raise ValueError(f"target_halfwidth and seconds must be above 0, warmup_ms from 0, together from 1: {self}")


#: For a result that is reported.
FULL = Effort()
#: For one of many plans that are compared on the way. On a restless machine more loads are cheaper than the cuts that a
#: wide interval asks for: a plan counts with the upper end of its own.
QUICK = Effort(loads=4, most_loads=8, rounds=6, target_halfwidth=0.03, warmup_ms=30.0, seconds=20.0, together=1.0)


@dataclass(kw_only=True)
class _Taken:
    """What the loads so far gave in one regime: ratios and controls, one for each, and all samples in milliseconds."""

    ratios: list[float] = field(default_factory=list)
    controls: list[float] = field(default_factory=list)
    samples: list[tuple[float, float]] = field(default_factory=list)
    contended: bool = False

    def add(self, times_ms: Sequence[Sequence[float]], *, contended: bool) -> None:
        """Take the times of the original, of the original again, and of the other network."""
        count = min(map(len, times_ms))
        first, second, after = (np.asarray(times[:count]) for times in times_ms)
        before = (first + second) / 2
        self.ratios.append(float(np.exp(np.median(np.log(after / before)))))
        self.controls.append(float(np.exp(np.median(np.log(second / first)))))
        self.samples += zip(before.tolist(), after.tolist(), strict=True)
        self.contended = self.contended or contended

    def measurement(self, regime: Regime, clock: Clock, together: float, environment: Environment) -> Measurement:
        interval = loads_interval(self.ratios, self.controls, together=together if self.contended else 1.0)
        before, after = zip(*self.samples, strict=True)
        return Measurement(
            ratio=interval.estimate,
            low=interval.low,
            high=interval.high,
            pairs=len(self.samples),
            clock=clock,
            before_ms=float(np.median(before)),
            after_ms=float(np.median(after)),
            samples=tuple(self.samples),
            environment=dict(environment),
            contended=self.contended,
            regime=regime,
            loads=tuple(self.ratios),
            control=float(np.exp(np.mean(np.log(self.controls)))),
        )


def measure_loads(
    load_before: Callable[[], Runner],
    load_after: Callable[[], Runner],
    effort: Effort = FULL,
    *,
    environment: Environment | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[Regime, Measurement]:
    """Measure the latency of `after` as a ratio to `before` over fresh loads, with a 95 % interval: by regime.

    Each time the original is loaded twice and the other network once, all anew, in an order that is drawn; their blocks
    take turns as in `measure_savings`, `rounds` times, unless they are loaded `apart`. A load's ratio is the median of
    its rounds against both sessions of the original. The interval comes from the scatter of the loads' ratios and from
    what the two sessions of the original differ by, so a difference that the original shows to itself is none. With
    `effort.both` the other regime is measured in the same loads, where the backend can. `progress` gets (loads done,
    loads at most), and ends the measurement by raising. Every runner is closed, however it ends.

    Biased: it goes on where the interval is wide, which favours loads that look calm by chance, and all loads are of
    one process within a minute; what changes from day to day is not in it.
    Raises BackendError: the clocks differ, a clock does not move, or the regime is not to be had; else what the loads
    raise.
    """
    known = host_environment() if environment is None else environment
    generator = np.random.default_rng(effort.seed)
    started, other_work = time.perf_counter(), OtherWork()
    taken: dict[Regime, _Taken] = {}
    done = 0
    take = _take_apart if effort.apart else _take_together
    while True:
        clock = take((load_before, load_before, load_after), effort, taken, generator)
        done += 1
        if progress is not None:
            progress(done, effort.most_loads)
        late = time.perf_counter() - started >= effort.seconds
        if done < (min(_FEWEST_LOADS, effort.loads) if late else effort.loads):
            continue
        disturbed = clock != "cuda" and other_work.share() > _MOST_OTHER_WORK
        seen = {name: replace(sums, contended=sums.contended or disturbed) for name, sums in taken.items()}
        found = {name: sums.measurement(name, clock, effort.together, known) for name, sums in seen.items()}
        if late or done == effort.most_loads or found[effort.regime].half_width <= effort.target_halfwidth:
            return found


def _take_together(
    loads: tuple[Callable[[], Runner], ...], effort: Effort, taken: dict[Regime, _Taken], generator: np.random.Generator
) -> Clock:
    """Load all, and time them in turns."""
    with ExitStack() as stack:
        runners = _loaded(stack, loads, generator)
        clock = common_clock(runners)
        for name, share in _shares(effort, taken, runners):
            rounds = _timed(runners, name, share, int(generator.integers(2**31)))
            taken[name].add(rounds.times_ms, contended=rounds.contended)
    return clock


def _take_apart(
    loads: tuple[Callable[[], Runner], ...], effort: Effort, taken: dict[Regime, _Taken], generator: np.random.Generator
) -> Clock:
    """Load and time one after the other, in an order that is drawn."""
    times: dict[Regime, dict[int, Sequence[float]]] = {}
    contended: set[Regime] = set()
    clocks: set[Clock] = set()
    for index in generator.permutation(len(loads)).tolist():
        with closing(loads[index]()) as runner:
            clocks.add(common_clock((runner,)))
            for name, share in _shares(effort, taken, (runner,)):
                rounds = _timed((runner,), name, share, int(generator.integers(2**31)))
                times.setdefault(name, {})[index] = rounds.times_ms[0]
                contended |= {name} if rounds.contended else set()
    for name, by_network in times.items():
        taken[name].add([by_network[index] for index in range(len(loads))], contended=name in contended)
    if len(clocks) > 1:
        raise BackendError(f"the runners measure on different clocks: {', '.join(sorted(clocks))}")
    return clocks.pop()


def _shares(
    effort: Effort, taken: dict[Regime, _Taken], runners: tuple[Runner, ...]
) -> Iterator[tuple[Regime, Effort]]:
    """The regimes, found out with the first load, and what each load may take for each."""
    if not taken:
        taken.update((name, _Taken()) for name in _regimes(effort.regime, effort.both, runners))
    for place, name in enumerate(taken):
        seconds = effort.seconds / effort.loads / len(taken)
        yield name, replace(effort, seconds=seconds, warmup_ms=0.0 if place else effort.warmup_ms)


def _loaded(
    stack: ExitStack, loads: tuple[Callable[[], Runner], ...], generator: np.random.Generator
) -> tuple[Runner, ...]:
    """A runner of each, loaded in an order that is drawn, with memory of a size that is drawn before each."""
    runners: dict[int, Runner] = {}
    ballast = []
    for index in generator.permutation(len(loads)).tolist():
        ballast.append(np.ones(int(generator.integers(1, _MOST_BALLAST_BYTES)), dtype=np.uint8))
        runner = loads[index]()
        stack.callback(runner.close)
        runners[index] = runner
    return tuple(runners[index] for index in range(len(loads)))


def _regimes(regime: Regime, both: bool, runners: tuple[Runner, ...]) -> tuple[Regime, ...]:
    """The regimes to measure, the one that is asked for first. Raises BackendError where that is not to be had."""
    if regime == "cold":
        check_evictable(runners[0])
    if not both:
        return (regime,)
    try:
        check_evictable(runners[0])
    except BackendError:
        return (regime,)
    return (regime, *(other for other in REGIMES if other != regime))


def _timed(runners: tuple[Runner, ...], regime: Regime, share: Effort, seed: int) -> Rounds:
    """The rounds of one load, which may take its `share`; fewer, but both orders, where the seconds are over or the
    networks are slow."""
    end = time.perf_counter() + share.seconds
    # a device's blocks are so long that all loads together last as long as one measurement of a pair
    rounds = Rounds(runners, share.loads * share.rounds, Timing(warmup_ms=share.warmup_ms, seed=seed, regime=regime))
    wanted = share.rounds * (_COLD_ROUNDS if regime == "cold" else 1)
    began = time.perf_counter()
    while rounds.count < wanted:
        rounds.time_round()
        now = time.perf_counter()
        slow = rounds.count >= _ROUNDS_OF_SLOW and now - began >= _SLOW_S
        late = rounds.count >= _FEWEST_ROUNDS and now >= end
        if rounds.count % 2 == 0 and (slow or late):
            break
    return rounds
