"""What long work tells whoever watches: a stage, how far it is, and of how much; and how far the whole is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from .allocator import give_back
from .tally import Tally, counted_into
from .whole import Forecast, Whole, left_words

#: Seconds that a log of a running compile says nothing.
LONGEST_S = 30.0


class Progress(Protocol):
    """Receives the state of the running stage. Called from the working thread; must be cheap."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """Shows nothing."""


class StageClock:
    """Wall and process-CPU seconds of each stage, and the multiply-accumulates that it does; stages of one name add up,
    nested stages count in both. Where `progress` shows a whole, it is told when stages begin and end. What a stage
    leaves free goes back to the system, where memory is limited."""

    def __init__(self, progress: Progress = silent) -> None:
        self.wall_s: dict[str, float] = {}
        self.cpu_s: dict[str, float] = {}
        self.macs: dict[str, Tally] = {}
        self._whole = progress if isinstance(progress, WholeProgress) else None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._tell(True, name)
        wall, cpu, macs = time.perf_counter(), time.process_time(), Tally()
        try:
            with counted_into(macs):
                yield
        finally:
            self.macs.setdefault(name, Tally()).update(macs)
            give_back()
            self.wall_s[name] = self.wall_s.get(name, 0.0) + time.perf_counter() - wall
            self.cpu_s[name] = self.cpu_s.get(name, 0.0) + time.process_time() - cpu
            self._tell(False, name)

    def to_dict(self) -> dict[str, Any]:
        return {name: {"wall": round(self.wall_s[name], 3), "cpu": round(self.cpu_s[name], 3)} for name in self.wall_s}

    def _tell(self, begins: bool, name: str) -> None:
        if self._whole is not None:
            (self._whole.began if begins else self._whole.ended)(name)


class WholeProgress:
    """Progress that shows how far the whole is, beside the stages. `say` shows a line that stays."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.whole = Whole(began_s=time.perf_counter())
        # bars are drawn by a thread of their own
        self.lock = threading.RLock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        with self.lock:
            now = time.perf_counter()
            self.whole.counted(now, stage, done, total)
            self._changed(now, stage, f" {done}/{total}")

    def began(self, stage: str) -> None:
        """A stage begins, perhaps within another."""
        with self.lock:
            now = time.perf_counter()
            self.whole.began(now, stage)
            self._changed(now, stage, "")

    def ended(self, stage: str) -> None:
        """The stage that began last ends."""
        with self.lock:
            self.whole.ended(time.perf_counter(), stage)

    def foresee(self, size: str, forecast: Forecast) -> None:
        """What is to be done, and how long that takes: said in two lines the first time, and in one for each further
        part."""
        with self.lock:
            self.whole.foresee(forecast)
            if self.whole.part == 1:
                self.say(size)
            head = f"{self.whole.part_name}: " if self.whole.part_name else ""
            self.say(f"{head}{forecast.words()} for {', '.join(forecast.stages)}")

    def next_part(self, part: int, parts: int, name: str) -> None:
        """One of several parts of the work begins."""
        with self.lock:
            self.whole.next_part(time.perf_counter(), part, parts, name)

    def finish(self) -> None:
        """All is done."""
        with self.lock:
            self.whole.finish(time.perf_counter())

    def _changed(self, now: float, stage: str, far: str) -> None:
        """Something was heard of a stage."""


class PlainProgress(WholeProgress):
    """Progress for a log: a line when a stage is first heard of, and one where nothing has been said for `LONGEST_S`
    seconds, with how far the whole is once that is known. Stages come again many times, so their ends are not shown."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(say)
        self._seen: set[str] = set()
        self._last_s = self.whole.began_s

    def next_part(self, part: int, parts: int, name: str) -> None:
        super().next_part(part, parts, name)
        self._seen.clear()

    def finish(self) -> None:
        super().finish()
        if self.whole.forecast is not None:
            self.say(f"[100 %] {self.whole.elapsed_s(time.perf_counter()):6.0f} s  finished")

    def _changed(self, now: float, stage: str, far: str) -> None:
        if stage in self._seen and now - self._last_s < LONGEST_S:
            return
        far = far if stage in self._seen else ""
        self._seen.add(stage)
        self._last_s = now
        left = self.whole.left_s(now)
        whole = "" if left is None else f"[{100 * self.whole.fraction(now):.0f} %, {left_words(left)}] "
        self.say(f"{whole}{self.whole.elapsed_s(now):6.0f} s  {stage}{far}")


def opened_progress(progress: bool | Progress, title: str = "") -> AbstractContextManager[Progress]:
    """What the argument `progress` stands for: True shows bars on stderr, with `title` beside that of the whole, False
    nothing, a function is called."""
    if progress is True:
        return rich_progress(title)
    return nullcontext(silent if progress is False else progress)


@contextmanager
def rich_progress(title: str = "") -> Iterator[Progress]:
    """A bar for the whole on stderr, with elapsed time and an estimate of what is left, and one for each stage; where
    stderr is no terminal, lines. After an error, or Ctrl-C, no bar is left."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal or console.is_jupyter:
        from .bars import shown_bars

        with shown_bars(console, title) as bars:
            yield bars
        return
    plain = PlainProgress(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
    yield plain
    plain.finish()
