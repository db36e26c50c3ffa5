"""How far the whole of some work is and how long it will take, from what its stages are expected to take, corrected by
what they took. Knows neither clock nor terminal: whoever calls says what time it is, in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

#: When a stage comes: ``once``; several times while plans are looked for (``search``); when there is a plan (``last``);
#: or now and then (``any``).
When = Literal["once", "search", "last", "any"]
#: What a forecast may be off by, either way: it comes from one timed forward pass and counts of what is to be done.
SPREAD = 1.6
#: A stage that takes longer than expected is taken to need this share of what it took in addition.
LATE = 0.1
#: Seconds of stages that count as expected: what short stages take says little about the others. And the least and the
#: most that stages which are over change what is expected of the others.
PRIOR_S, LEAST_RATE, MOST_RATE = 5.0, 0.2, 5.0
#: A network that misses its goal is planned again, in about this share of the time: most is known by then.
AGAIN = 0.5
#: No bar is full before all is done.
MOST_SHOWN = 0.99


@dataclass(frozen=True, kw_only=True)
class Expected:
    """About how long a stage takes, all its calls together; `least_s` where it may turn out to be less, or nothing."""

    seconds: float
    when: When = "once"
    least_s: float | None = None


@dataclass(frozen=True)
class Forecast:
    """What the stages of some work are expected to take, by name and in the order in which they first come."""

    stages: Mapping[str, Expected]

    @property
    def least_s(self) -> float:
        """Where it goes well, and what may not be needed is not."""
        stages = self.stages.values()
        return sum(stage.seconds if stage.least_s is None else stage.least_s for stage in stages) / SPREAD

    @property
    def most_s(self) -> float:
        """Where it does not."""
        return sum(stage.seconds for stage in self.stages.values()) * SPREAD

    def words(self) -> str:
        """The time that it takes, as a range: ``about 3 to 8 min``."""
        return f"about {span_words(self.least_s, self.most_s)}"


def span_words(least_s: float, most_s: float) -> str:
    """A range of time, no finer than it is known."""
    (least, unit), (most, larger) = _rounded(least_s), _rounded(most_s)
    if (least, unit) == (most, larger):
        return f"{most:g} {larger}"
    return f"{least:g} to {most:g} {larger}" if unit == larger else f"{least:g} {unit} to {most:g} {larger}"


def left_words(seconds: float) -> str:
    """The time that is left."""
    number, unit = _rounded(seconds)
    return f"about {number:g} {unit} left"


def clock_words(seconds: float) -> str:
    """Seconds as a clock shows them."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rounded(seconds: float) -> tuple[float, str]:
    """A number and its unit."""
    if seconds < 10:
        return max(1, round(seconds)), "s"
    if seconds < 90:
        return 5 * round(seconds / 5), "s"
    minutes = seconds / 60
    if minutes < 90:
        return (max(2, round(minutes)) if minutes < 10 else 5 * round(minutes / 5)), "min"
    hours = minutes / 60
    return (round(2 * hours) / 2 if hours < 10 else round(hours)), "h"


@dataclass(kw_only=True)
class StageLine:
    """One stage, all its calls together: the seconds of those that ended, when the one that runs began, and what it
    said last: that it or a stage inside it (`said`) is `done` of `total`."""

    name: str
    spent_s: float = 0.0
    since_s: float | None = None
    said: str = ""
    done: int = 0
    total: int = 0
    #: When what it said began to count anew, and the plan, of those that were made, that it was last needed for.
    counting_s: float = 0.0
    round: int = 0

    @property
    def running(self) -> bool:
        return self.since_s is not None

    def taken_s(self, now: float) -> float:
        return self.spent_s + (0.0 if self.since_s is None else now - self.since_s)

    def share(self) -> float:
        """How much of what it said last is done."""
        return min(1.0, self.done / self.total) if self.total > 0 else 0.0

    def counted(self, now: float, stage: str, done: int, total: int) -> None:
        if stage != self.said or done < self.done:
            self.counting_s = now
        self.said, self.done, self.total = stage, done, total

    def ended(self, now: float) -> None:
        self.spent_s, self.since_s = self.taken_s(now), None


@dataclass(kw_only=True)
class Whole:
    """The stages of some work as they come and go. Those within others are shown with the outermost one, whose name
    stands once, however often it comes. `lines` are in the order in which they first came."""

    began_s: float
    lines: dict[str, StageLine] = field(default_factory=dict)
    forecast: Forecast | None = None
    #: The part of the work that runs, of so many, and what it is called: a sweep has one for each goal.
    part: int = 1
    parts: int = 1
    part_name: str = ""
    finished: bool = False
    _inside: list[str] = field(default_factory=list)
    #: A stage that is only told of, by nothing that says when it ends.
    _loose: StageLine | None = None
    _ending: bool = False
    _round: int = 1
    _part_began_s: float = 0.0
    _part_times_s: list[float] = field(default_factory=list)
    _shown: float = 0.0
    _shown_s: float = 0.0

    def __post_init__(self) -> None:
        self._part_began_s = self._shown_s = self.began_s

    def began(self, now: float, name: str) -> None:
        """A stage begins, perhaps within another."""
        self._inside.append(name)
        if len(self._inside) == 1:
            if self._loose is not None and self._loose.name != name:
                self._end(now, self._loose)
            self._loose = None
            self._start(now, name)

    def ended(self, now: float, name: str) -> None:
        """The stage that began last ends."""
        self._inside.pop()
        if not self._inside:
            self._end(now, self.lines[name])

    def counted(self, now: float, stage: str, done: int, total: int) -> None:
        """How far a stage is."""
        if self._inside:
            self.lines[self._inside[0]].counted(now, stage, done, total)
            return
        if self._loose is not None and self._loose.name != stage:
            self._end(now, self._loose)
        self._loose = self._start(now, stage)
        self._loose.counted(now, stage, done, total)
        if done >= total:
            self._end(now, self._loose)
            self._loose = None

    def foresee(self, forecast: Forecast) -> None:
        """From now on it is known what is to come."""
        self.forecast = forecast

    def next_part(self, now: float, part: int, parts: int, name: str) -> None:
        """Another part of the work begins, with stages of its own."""
        if part > 1:
            self._part_times_s.append(now - self._part_began_s)
        self.part, self.parts, self.part_name, self._part_began_s = part, parts, name, now
        self.lines, self._inside, self._loose, self._ending, self._round = {}, [], None, False, 1
        self.forecast = None

    def finish(self, now: float) -> None:
        """All is done."""
        for line in self.lines.values():
            if line.running:
                self._end(now, line)
        self.finished = True

    def elapsed_s(self, now: float) -> float:
        return now - self.began_s

    def left_s(self, now: float) -> float | None:
        """About how long it will still take; None where nothing is known of it."""
        if self.forecast is None and not self._part_times_s:
            return None
        here = now - self._part_began_s
        if self.forecast is None:
            left = max(0.0, self._part_times_s[-1] - here)
        else:
            rate = self._rate()
            left = sum(self._left_of(name, stage, rate, now) for name, stage in self.forecast.stages.items())
        # the first of several parts makes the analyses that the others find
        each = sum(self._part_times_s[1:] or self._part_times_s) / max(1, len(self._part_times_s[1:]) or 1)
        return left + (self.parts - self.part) * (each if self._part_times_s else here + left)

    def fraction(self, now: float) -> float:
        """The share of the whole that is done, never less than it was: where more turns out to be left, it goes on more
        slowly."""
        if self.finished:
            return 1.0
        left = self.left_s(now)
        if left is None:
            return self._shown
        elapsed, since = self.elapsed_s(now), max(0.0, now - self._shown_s)
        reached = elapsed / (elapsed + left) if elapsed + left > 0 else 0.0
        if reached < self._shown and left + since > 0:
            reached = self._shown + (1 - self._shown) * since / (left + since)
        self._shown, self._shown_s = min(MOST_SHOWN, max(self._shown, reached)), now
        return self._shown

    def _start(self, now: float, name: str) -> StageLine:
        line = self.lines.setdefault(name, StageLine(name=name, counting_s=now))
        if not line.running:
            line.since_s = now
            if not line.done < line.total:
                line.said, line.done, line.total = "", 0, 0
        when = self._when(name)
        if when == "search" and self._ending:
            self._ending, self._round = False, self._round + 1
        self._ending = self._ending or when == "last"
        line.round = self._round
        return line

    def _end(self, now: float, line: StageLine) -> None:
        if line.running:
            line.ended(now)
            line.done = line.total

    def _when(self, name: str) -> When:
        known = self.forecast.stages.get(name) if self.forecast is not None else None
        return "any" if known is None else known.when

    def _is_over(self, name: str, stage: Expected) -> bool:
        """Whether nothing more is expected of a stage."""
        if self._ending and stage.when in ("once", "search"):
            return True
        line = self.lines.get(name)
        if line is None or line.running:
            return False
        return stage.when == "once" or (stage.when == "last" and line.round == self._round)

    def _left_of(self, name: str, stage: Expected, rate: float, now: float) -> float:
        if self._is_over(name, stage):
            return 0.0
        expected, line = rate * stage.seconds, self.lines.get(name)
        if line is None or (stage.when == "last" and not line.running):
            return expected
        rounds = self._round - 1
        expected *= 1 + (AGAIN if stage.when == "search" else 1.0) * rounds
        taken = line.taken_s(now)
        left = max(0.0, expected - taken)
        if line.running:
            left = max(left, LATE * taken)
            share = line.share() if line.said == name and stage.when in ("once", "last") else 0.0
            if share > 0:
                left = (1 - share) * left + (now - line.counting_s) * (1 - share)
        return left

    def _rate(self) -> float:
        """What the stages that are over took, over what was expected of them."""
        assert self.forecast is not None
        over = [(name, stage) for name, stage in self.forecast.stages.items() if self._is_over(name, stage)]
        known = [(self.lines[name].spent_s, stage.seconds) for name, stage in over if name in self.lines]
        taken, expected = (sum(column) for column in zip(*known, strict=True)) if known else (0.0, 0.0)
        return min(MOST_RATE, max(LEAST_RATE, (taken + PRIOR_S) / (expected + PRIOR_S)))
