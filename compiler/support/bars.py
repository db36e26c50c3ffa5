"""Bars on a terminal: one for the whole, and one for each stage below it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .progress import WholeProgress
from .whole import StageLine, clock_words, left_words

#: Pictures a second: a thread that draws disturbs what is measured.
PICTURES = 4
#: Characters of a bar.
WIDTH = 32
#: Lines of a terminal that are left to what else is said.
SPARED_LINES = 3


class Bars(WholeProgress):
    """Progress as bars of a console. `title` names the whole."""

    def __init__(self, console: Console, title: str = "") -> None:
        super().__init__(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
        self._console, self._title = console, title or "in all"

    def picture(self) -> RenderableType:
        """The bars as they stand. As many stages as there is room for, what runs and what came last."""
        with self.lock:
            now, lines = time.perf_counter(), list(self.whole.lines.values())
            room = max(1, self._console.height - SPARED_LINES)
            if len(lines) > room:
                # the sort is stable: the last ones, and the one that runs
                latest = {line.name for line in sorted(lines, key=lambda line: line.running)[-room:]}
                lines = [line for line in lines if line.name in latest]
            table = Table.grid(padding=(0, 1))
            for _ in range(5):
                table.add_column(no_wrap=True)
            table.add_row(*self._whole_row(now))
            for line in lines:
                table.add_row(*_stage_row(line, now))
            return table

    def _whole_row(self, now: float) -> list[RenderableType]:
        whole = self.whole
        share, left = whole.fraction(now), whole.left_s(now)
        known = whole.finished or left is not None
        part = f" {whole.part}/{whole.parts}" if whole.parts > 1 else ""
        words = "" if whole.finished or left is None else left_words(left)
        return [
            Text(f"{self._title}{part}", style="bold"),
            _bar(share if known else None),
            Text(f"{100 * share:3.0f} %" if known else "", justify="right"),
            Text(clock_words(whole.elapsed_s(now)), justify="right"),
            Text(f"{whole.part_name}, {words}" if whole.part_name and words else words, overflow="ellipsis"),
        ]


def _stage_row(line: StageLine, now: float) -> list[RenderableType]:
    """A stage: full once it ended, till it comes again."""
    counted = line.running and line.total > 0
    inner = line.said if counted and line.said != line.name else ""
    return [
        Text(f"  {line.name}"),
        _bar(1.0 if not line.running else line.share() if counted else None),
        Text(f"{line.done}/{line.total}" if counted else "" if line.running else "done", justify="right"),
        Text(clock_words(line.taken_s(now)), justify="right"),
        Text(inner, overflow="ellipsis"),
    ]


def _bar(share: float | None) -> ProgressBar:
    """None: it runs, and how far it is is not known."""
    return ProgressBar(total=None if share is None else 1.0, completed=share or 0.0, width=WIDTH, pulse=share is None)


@contextmanager
def shown_bars(console: Console, title: str = "") -> Iterator[Bars]:
    """Bars while something runs. They stay, full, when it is done, and go with an error or Ctrl-C."""
    bars = Bars(console, title)
    with Live(get_renderable=bars.picture, console=console, refresh_per_second=PICTURES) as live:
        try:
            yield bars
        except BaseException:
            live.transient = True
            raise
        bars.finish()
