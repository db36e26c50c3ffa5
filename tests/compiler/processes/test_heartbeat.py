"""A process that is silent ends the others; one that works does not."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.processes import heartbeat


def until_stopped(pid: int) -> None:
    end = time.monotonic() + 120
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < end, "it has not stopped"
        time.sleep(0.05)


@pytest.mark.parametrize(("size", "silent"), [(2, 1), (3, 0), (3, 2)])
def test_a_stopped_process_ends_all(size: int, silent: int, processes: SimpleNamespace, tmp_path: Path) -> None:
    started = processes.start(size, "stopped", tmp_path, str(silent))
    try:
        until_stopped(started[silent].pid)
        others = [rank for rank in range(size) if rank != silent]
        logs = "".join((tmp_path / f"{rank}.log").read_text() for rank in others)
        assert processes.wait([started[rank] for rank in others]) == [0] * len(others), logs
        for rank in others:
            took_s, said = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
            assert said.startswith(f"LostError: process {silent} of {size} has given no answer for 1 s"), said
            assert 0.5 < took_s < 12, "within a few beats of a quarter of a second"
        os.kill(started[silent].pid, signal.SIGCONT)
        assert processes.wait([started[silent]]) == [0]
        _, said = torch.load(tmp_path / f"{silent}.pt", weights_only=False)
        assert said.startswith("LostError: "), "it does not go on by itself"
    finally:
        for process in started:
            process.kill()


def test_one_that_works_is_not_silent(processes: SimpleNamespace, tmp_path: Path) -> None:
    """For many beats, also where nothing else in its process gets to run."""
    for found in processes.results(3, "busy", tmp_path):
        assert found["busy"] == found["again"] == 3.0


def test_a_minute_at_most() -> None:
    assert (heartbeat.MISSED + 3) * heartbeat.BEAT_S < 60, "turns to notice, turns until the others have heard"


def test_who_cannot_be_asked_is_told_of(processes: SimpleNamespace, tmp_path: Path) -> None:
    first, last = processes.results(2, "unreachable", tmp_path)
    assert "the processes cannot ask each other" in first["warned"] and "process 1: " in first["warned"]
    assert not last["warned"] and first["sum"] == last["sum"] == 2.0
