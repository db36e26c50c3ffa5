"""What is shown while something runs: bars on a terminal, lines in a log."""

from __future__ import annotations

import io
import re
from itertools import count

import pytest
from foldcut.compiler.support import progress
from foldcut.compiler.support.bars import Bars, shown_bars
from foldcut.compiler.support.progress import PlainProgress, StageClock, opened_progress, silent
from foldcut.compiler.support.whole import Expected, Forecast
from rich.console import Console

FORECAST = Forecast({"choose": Expected(seconds=10), "measure": Expected(seconds=30, when="last")})


class Clock:
    """Seconds as the test sets them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", found)
    return found


def terminal(height: int = 30) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120, height=height, color_system=None)


def lines(bars: Bars) -> list[str]:
    """The picture as text."""
    console = terminal()
    console.print(bars.picture())
    written = console.file
    assert isinstance(written, io.StringIO)
    return [line.rstrip() for line in written.getvalue().splitlines()]


def test_bars_of_the_whole_and_of_its_stages(clock: Clock) -> None:
    bars = Bars(terminal(), "compile")
    stages = StageClock(bars)
    bars.foresee("80 samples", FORECAST)
    with stages.stage("choose"):
        bars("choose blocks", 2, 8)
        clock.now = 5.0
        whole, choose = lines(bars)
        assert whole.split()[0] == "compile" and "12 %" in whole and "0:05 about 35 s left" in whole
        assert choose.split()[0] == "choose" and "2/8" in choose and choose.endswith("0:05 choose blocks")
        full = choose.count("━")
        clock.now = 10.0
    with stages.stage("measure"):
        whole, choose, measure = lines(bars)
        assert "25 %" in whole
        assert "done 0:10" in choose and choose.count("━") > full  # it is full now
        assert measure.split()[0] == "measure"
        clock.now = 40.0
    bars.finish()
    whole, choose, measure = lines(bars)
    assert "100 %" in whole and whole.endswith("0:40") and "done 0:10" in choose and "done 0:30" in measure
    assert whole.count("━") == choose.count("━") == measure.count("━")


def test_a_low_terminal_shows_what_runs_and_what_came_last(clock: Clock) -> None:
    bars = Bars(terminal(height=6), "compile")
    stages = StageClock(bars)
    for name in ("capture", "export", "analyse", "choose", "test"):
        with stages.stage(name):
            clock.now += 1
    with stages.stage("export"):
        assert [line.split()[0] for line in lines(bars)] == ["compile", "export", "choose", "test"]


def test_bars_of_a_sweep_name_the_goal(clock: Clock) -> None:
    bars = Bars(terminal(), "sweep")
    bars.next_part(2, 3, "latency ratio 0.6")
    bars.foresee("80 samples", FORECAST)
    with StageClock(bars).stage("choose"):
        whole, _ = lines(bars)
    assert whole.startswith("sweep 2/3") and "latency ratio 0.6, about" in whole


def test_bars_stay_full_when_all_is_done_and_go_with_an_error() -> None:
    done, failed = terminal(), terminal()
    with shown_bars(done, "compile") as bars, StageClock(bars).stage("choose"):
        pass
    assert isinstance(done.file, io.StringIO) and isinstance(failed.file, io.StringIO)
    kept = done.file.getvalue()
    last = kept[kept.rindex("compile") :].splitlines()
    assert "100 %" in last[0] and "choose" in last[1] and "done" in last[1]
    with (
        pytest.raises(KeyboardInterrupt),
        shown_bars(failed, "compile") as bars,
        StageClock(bars).stage("choose"),
    ):
        raise KeyboardInterrupt
    end = failed.file.getvalue()
    assert end.rindex("\x1b[?25h") > end.rindex("\x1b[?25l")  # the cursor is back
    assert re.fullmatch(r"(\x1b\[\d*[AK]|\r)+", end[end.rindex("\x1b[?25h") + 6 :])  # and the lines are wiped


def test_lines_of_a_log_say_how_far_the_whole_is(clock: Clock) -> None:
    said: list[str] = []
    plain = PlainProgress(said.append)
    stages = StageClock(plain)
    with stages.stage("capture"):
        clock.now = 4.0
    plain.foresee("80 samples", FORECAST)
    with stages.stage("choose"):
        clock.now = 9.0
        plain("choose blocks", 3, 9)
        plain("choose blocks", 4, 9)
        clock.now = 40.0
        plain("choose blocks", 5, 9)
    with stages.stage("measure"):
        clock.now = 60.0
    plain.finish()
    assert said == [
        "     0 s  capture",
        "80 samples",
        "about 25 to 65 s for choose, measure",
        "[9 %, about 40 s left]      4 s  choose",
        "[20 %, about 35 s left]      9 s  choose blocks",
        said[5],
        said[6],
        "[100 %]     60 s  finished",
    ]
    assert re.fullmatch(r"\[\d+ %, about \d+ s left\] +40 s  choose blocks 5/9", said[5])
    assert re.fullmatch(r"\[\d+ %, about (\d+ s|\d+ min) left\] +40 s  measure", said[6])
    shares = [int(line[1:].split()[0]) for line in said if line.startswith("[")]
    assert shares == sorted(shares) and shares[-1] == 100


def test_a_sweep_says_its_samples_once(clock: Clock) -> None:
    said: list[str] = []
    plain = PlainProgress(said.append)
    for part in (1, 2):
        plain.next_part(part, 2, f"goal {part}")
        plain.foresee("80 samples", FORECAST)
        with StageClock(plain).stage("choose"):
            clock.now += 10
    words = "about 25 to 65 s for choose, measure"
    assert [line for line in said if not line.startswith("[")] == ["80 samples", f"goal 1: {words}", f"goal 2: {words}"]
    assert sum(line.endswith("s  choose") for line in said) == 2


def test_a_function_hears_of_counts_only(clock: Clock) -> None:
    heard: list[tuple[str, int, int]] = []
    with opened_progress(lambda *state: heard.append(state)) as show:
        stages = StageClock(show)
        with stages.stage("choose"):
            show("choose blocks", 1, 2)
    assert heard == [("choose blocks", 1, 2)] and list(stages.wall_s) == ["choose"]
    with opened_progress(False) as show:
        assert show is silent


def test_stages_are_timed_alike_with_and_without_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(ticks)))
    for show in (silent, PlainProgress(lambda line: None)):
        stages = StageClock(show)
        with stages.stage("choose"):
            pass
        assert stages.wall_s == {"choose": 1.0}
