"""How long a training goes on, and when the held-out error is looked at: a number of iterations, or as many of them as
fit into a time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Any

from ...compiler.processes.sharing import by_first
from .settings import MimicSettings

#: Iterations that say how long the next ones take. The first of all, which makes room in memory, counts only as long as
#: it is the only one.
WINDOW = 20
#: What is made beforehand, to save time later, may take this share of the time that is left.
MOST_AHEAD = 0.25


class Timetable:
    """The iterations of one training, planned anew before each where it has a time to fit into; `kept` is the `state`
    of one that was cut off. Time runs from here on."""

    def __init__(self, settings: MimicSettings, kept: Mapping[str, Any] | None = None) -> None:
        kept = kept or {}
        #: The largest number of iterations.
        self.most = self._wanted = settings.iterations
        self._checks, self._seconds = settings.checks, settings.seconds
        #: How many there are, as planned now: the learning rate comes down over them.
        self.iterations = int(kept.get("iterations", self._wanted))
        #: How many there had been when the held-out error was last looked at.
        self.checked = int(kept.get("checked", 0))
        self._look_s = float(kept.get("look_s", 0.0))
        self._step_s: deque[float] = deque(kept.get("step_s", ()), maxlen=WINDOW)
        self._steps = len(self._step_s)
        self._began = monotonic() - float(kept.get("spent_s", 0.0))

    def state(self) -> dict[str, Any]:
        """What a training that is cut off goes on with, as plain data."""
        planned = {"iterations": self.iterations, "checked": self.checked}
        return {**planned, "look_s": self._look_s, "step_s": list(self._step_s), "spent_s": monotonic() - self._began}

    def at_most(self, iterations: int) -> None:
        """Make no more than so many."""
        self.most = min(self.most, iterations)
        self.iterations = min(self.iterations, self.most)

    @property
    def left_s(self) -> float:
        """The time that is left, in seconds."""
        return math.inf if self._seconds is None else self._seconds - (monotonic() - self._began)

    def allows_ahead(self, needed_s: float) -> bool:
        """Whether something may take so long before training begins."""
        return self._seconds is None or by_first(lambda: needed_s <= MOST_AHEAD * self.left_s)

    def goes_on(self, done: int) -> bool:
        """Whether there is another iteration behind those that are done."""
        if self._seconds is None:
            return done < self.iterations
        self.iterations, left = by_first(lambda: self._planned(done))
        return left and done < self.iterations

    def _planned(self, done: int) -> tuple[int, bool]:
        """How many iterations fit in, and whether any time is left."""
        left_s, iterations = self.left_s, self.iterations
        if self._step_s:
            step_s = sum(self._step_s) / len(self._step_s)
            looks = math.ceil(self._checks * (1 - self.checked / max(1, self.iterations)))
            more = affordable(left_s, step_s, self._look_s, max(1, looks))
            iterations = max(done, min(self.most, done + more))
        return iterations, left_s > 0

    def ran_out(self, done: int) -> bool:
        """Whether time has ended the training before its iterations were done."""
        return self._seconds is not None and done < self.most

    def due(self, done: int) -> bool:
        """Whether it is time to look at the held-out error."""
        whole = self.iterations == self._wanted
        every = self.iterations // self._checks if whole else math.ceil(self.iterations / self._checks)
        return done - self.checked >= max(1, every) or done >= self.iterations

    @contextmanager
    def step(self) -> Iterator[None]:
        """What is done inside is an iteration."""
        began = monotonic()
        yield
        self._steps += 1
        if self._steps == 2:
            self._step_s.clear()
        self._step_s.append(monotonic() - began)

    @contextmanager
    def look(self, done: int) -> Iterator[None]:
        """What is done inside is a look at the held-out error."""
        began = monotonic()
        yield
        self.checked, self._look_s = done, monotonic() - began


def affordable(left: float, iteration: float, look: float, checks: int) -> int:
    """How many iterations there may be, of such a time or work each, with so many looks at the held-out error among
    them; a look behind each where there are fewer."""
    iteration = max(iteration, 1e-9)
    spread, each = (left - checks * look) // iteration, left // (iteration + look)
    return int(max(0, spread, min(checks, each)))
