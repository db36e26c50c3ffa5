"""Caches emptied between inferences: what a network costs that does not find itself in them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ...compiler.support.errors import BackendError
from .backend import EvictingRunner, Runner

#: So many times the last level's size is streamed through: caches do not always throw out what is oldest.
_TIMES = 2
#: What is taken for the last level's size where the system does not say, and most of it that is believed.
_UNKNOWN_BYTES, _MOST_BYTES = 32 << 20, 512 << 20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class CacheEviction:
    """Empties the caches that a runner computes in. The memory that is streamed through lasts as long as this does.

    On several threads the other cores keep what their own caches hold, which the shared last level does not.
    """

    def __init__(self) -> None:
        self._memory = np.zeros(eviction_bytes() // 8, dtype=np.int64)

    def __call__(self, runner: Runner) -> None:
        """Leave nothing of the runner's network in the caches. Raises BackendError where that cannot be done."""
        check_evictable(runner)
        if isinstance(runner, EvictingRunner):
            runner.evict_caches()
        else:
            np.add(self._memory, 1, out=self._memory)  # written, so that no cache keeps a line for others


def eviction_bytes() -> int:
    """The memory that is streamed through to empty the caches of this machine's CPU."""
    return _TIMES * min(last_level_bytes() or _UNKNOWN_BYTES, _MOST_BYTES)


def check_evictable(runner: Runner) -> None:
    """Raise BackendError for a runner whose device has caches that nothing here empties."""
    elsewhere = runner.clock == "cuda" or getattr(runner, "device", "cpu") != "cpu"
    if elsewhere and not isinstance(runner, EvictingRunner):
        raise BackendError(
            "the regime 'cold' is not there on this backend: it does not empty its device's caches",
            hint="measure hot, or give the backend's runner evict_caches()",
        )


def last_level_bytes(folder: Path = _CACHES) -> int | None:
    """The size of the CPU's largest cache; None where the system does not say (it is Linux that does)."""
    sizes = []
    for path in folder.glob("index*/size"):
        try:
            found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text(encoding="ascii").strip())
        except (OSError, ValueError):
            continue
        if found is not None:
            sizes.append(int(found[1]) * _UNITS[found[2]])
    return max(sizes, default=None)
