"""What a latency depends on besides the network: the machine, its load and the software on it."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path


def host_environment() -> dict[str, str | int]:
    """Describe this machine: Python, OS, CPU model, logical CPUs that this process may use, one-minute load.

    `load_1min` is a string with two decimals (runnable processes, not a share), empty where the OS has none.
    """
    return {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "cpu": cpu_model(),
        "cpus_available": cpus_available(),
        "load_1min": _load_1min(),
    }


def cpu_model() -> str:
    """Name the CPU as the OS does; falls back to the instruction set (``x86_64``) where there is no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def cpus_available() -> int:
    """Count the logical CPUs in this process's affinity mask; a container's CPU quota does not show there."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def version_tuple(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, (2026, 4) of ``2026.4.1-22982-e213a147257``: enough to compare."""
    numbers = []
    for part in version.split("-")[0].split("+")[0].split(".")[:2]:
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


class OtherWork:
    """What other processes, and a hypervisor, keep this machine's CPUs busy with, from when it is made on."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float:
        """The share of all CPUs that others kept busy, 0 to 1; 0 too where the OS does not say (other than Linux)."""
        wall, own, busy = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return min(max((busy - own) / max(wall * (os.cpu_count() or 1), 1e-9), 0.0), 1.0)

    def _now(self) -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), _busy_s()


def _busy_s() -> float:
    """Seconds since its start that its CPUs were busy, or kept by a hypervisor; 0 where the OS does not say."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)
        user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = (int(word) for word in words[1:9])
        return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return 0.0


def _load_1min() -> str:
    try:
        return f"{os.getloadavg()[0]:.2f}"
    except (OSError, AttributeError):
        return ""


def lasting(environment: Mapping[str, str | int]) -> str:
    """The part of an environment that a measurement can be looked up by again: without the load of the moment and
    Python's version, sorted, as text."""
    passing = {"load_1min", "python", "batch", "threads"}
    return json.dumps({key: environment[key] for key in sorted(environment) if key not in passing})
