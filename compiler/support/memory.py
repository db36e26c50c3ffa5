"""How much memory there is to work with."""

from __future__ import annotations

from pathlib import Path

#: Where Linux says what a process may use: the machine's free memory, and the bounds of the container around it.
_MACHINE = Path("/proc/meminfo")
_CONTAINERS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
#: What is taken to be there where nothing says so.
LEAST_BYTES = 4 << 30


def available_bytes() -> int:
    """Bytes that can be taken without swapping: what Linux calls available, or what the container leaves if that is
    less. Where neither is known, `LEAST_BYTES`."""
    found = [_machine(), *(_left(*files) for files in _CONTAINERS)]
    return min((count for count in found if count is not None), default=LEAST_BYTES)


def _machine() -> int | None:
    try:
        lines = _MACHINE.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _left(limit: Path, used: Path) -> int | None:
    try:
        return max(0, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # there is no container, or it sets no bound
        return None
