"""What long work tells whoever watches: a stage, how far it is, and of how much."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from .allocator import give_back

#: Seconds that a log of a running compile says nothing.
LONGEST_S = 30.0


class Progress(Protocol):
    """Receives the state of the running stage. Called from the working thread; must be cheap."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """Shows nothing."""


class StageClock:
    """Wall and process-CPU seconds of each stage; stages of one name add up, nested stages count in both. What a stage
    leaves free goes back to the system, where memory is limited."""

    def __init__(self) -> None:
        self.wall_s: dict[str, float] = {}
        self.cpu_s: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            give_back()
            self.wall_s[name] = self.wall_s.get(name, 0.0) + time.perf_counter() - wall
            self.cpu_s[name] = self.cpu_s.get(name, 0.0) + time.process_time() - cpu

    def to_dict(self) -> dict[str, Any]:
        return {name: {"wall": round(self.wall_s[name], 3), "cpu": round(self.cpu_s[name], 3)} for name in self.wall_s}


def opened_progress(progress: bool | Progress) -> AbstractContextManager[Progress]:
    """What the argument `progress` stands for: True shows bars on stderr, False nothing, a function is called."""
    if progress is True:
        return rich_progress()
    return nullcontext(silent if progress is False else progress)


@contextmanager
def rich_progress() -> Iterator[Progress]:
    """A progress bar per stage on stderr, with elapsed time and an estimate of what is left; where stderr is no
    terminal, lines."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal and not console.is_jupyter:
        yield PlainProgress(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with Bars(*columns, console=console) as bars:

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update


class PlainProgress:
    """Progress for a log: a line when a stage is first heard of, and one where nothing has been said for `LONGEST_S`
    seconds. Stages come again many times, so their ends are not shown."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._seen: set[str] = set()
        self._began = self._last = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if stage in self._seen and now - self._last < LONGEST_S:
            return
        far = f" {done}/{total}" if stage in self._seen else ""
        self._seen.add(stage)
        self._last = now
        self._say(f"{now - self._began:6.0f} s  {stage}{far}")
