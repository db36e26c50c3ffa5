"""Processes started as `torchrun` starts them, each running one of the functions of `work.py`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

#: Seconds after which the processes of a test are ended.
MOST_S = 400.0
WORK = Path(__file__).with_name("work.py")


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
