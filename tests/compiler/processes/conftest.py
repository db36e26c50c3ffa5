"""Processes started as `torchrun` starts them, running functions of `work.py`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock

#: Seconds after which the processes of a test are ended.
MOST_S = 900.0
WORK = Path(__file__).with_name("work.py")
#: What so many processes do, one after another: to start one takes seconds, and so does its first capture.
JOBS = {
    1: ("compiles", "parts", "others", "frank_wolfe", "executed"),
    2: ("exchanges", "unequal", "compiles", "parts", "others", "frank_wolfe"),
    3: ("exchanges", "compiles", "parts"),
}


def start(size: int, name: str, folder: Path, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """Start so many processes. Each leaves ``<rank>.pt`` in the folder, and what it says in ``<rank>.log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for rank in range(size):
        given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
        environment = {**os.environ, **given, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with (folder / f"{rank}.log").open("wb") as log:
            command = [sys.executable, str(WORK), name, str(folder), *arguments]
            found.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return found


def wait(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes, once all have ended."""
    end = time.monotonic() + MOST_S
    try:
        return [process.wait(max(1.0, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def results(size: int, name: str, folder: Path, *arguments: str) -> list[Any]:
    """What each of so many processes has found out."""
    codes = wait(start(size, name, folder, *arguments))
    logs = "\n".join((folder / f"{rank}.log").read_text(errors="replace")[-2000:] for rank in range(size))
    assert codes == [0] * size, logs
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="session")
def processes() -> SimpleNamespace:
    """Starts processes, waits for them, and reads what they leave."""
    return SimpleNamespace(start=start, wait=wait, results=results)


@pytest.fixture(scope="session")
def found_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], list[Any]]:
    """What each of so many processes finds out in one of their `JOBS`, which are done once for all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def found(size: int, name: str) -> list[Any]:
        folder, ended = base / f"processes-{size}", base / f"processes-{size}.codes"
        with FileLock(base / f"processes-{size}.lock"):
            if not ended.exists():
                ended.write_text(str(wait(start(size, ",".join(JOBS[size]), folder))))
        kept = [folder / name / f"{rank}.pt" for rank in range(size)]
        # what was done before something failed stands
        if not all(path.exists() for path in kept) or (name == JOBS[size][-1] and ended.read_text() != str([0] * size)):
            logs = [(folder / f"{rank}.log").read_text(errors="replace")[-2000:] for rank in range(size)]
            pytest.fail(f"exit codes {ended.read_text()}\n" + "\n".join(logs))
        return [torch.load(path, weights_only=False) for path in kept]

    return found
