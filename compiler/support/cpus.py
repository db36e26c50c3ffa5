"""How many CPUs this process has to itself: what its affinity and its container's quota leave of the machine."""

from __future__ import annotations

import math
import os
from pathlib import Path

#: Microseconds of CPU time in a period, and the period: in one file, or in two.
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_OLD_QUOTA = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))


def free_cpus() -> int:
    """CPUs that may run this process at once: those of its affinity mask, or what the quota of its container comes to,
    if that is less; a part of one counts as one."""
    count = len(usable_cpus())
    quota = _quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def usable_cpus() -> frozenset[int]:
    """The CPUs of the process's affinity mask, by their numbers."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _quota() -> float | None:
    """CPUs that the container may keep busy; None where it has no quota."""
    try:
        texts = _QUOTA.read_text().split() if _QUOTA.exists() else [path.read_text() for path in _OLD_QUOTA]
        time, period = (int(text) for text in texts)
    except (OSError, ValueError):  # there is no container, or it says max
        return None
    return time / period if time > 0 and period > 0 else None
