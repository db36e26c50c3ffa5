"""What a latency depends on besides the network: the machine, its load and the software on it."""

from __future__ import annotations

import os
import platform
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


def _load_1min() -> str:
    try:
        return f"{os.getloadavg()[0]:.2f}"
    except (OSError, AttributeError):
        return ""
