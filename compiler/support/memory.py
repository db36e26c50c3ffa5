"""How much memory there is to work with, and what of it each place may take.

What is kept for later, and how many samples go through a network at once, has a bound of its own in each place. Those
bounds are made for `PLENTY_BYTES`: with less to work with they shrink in proportion (`at_most`, `samples_at_once`).
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath

from .errors import CompilerError, first_line

try:
    import resource
except ImportError:  # there is none on Windows
    resource = None  # type: ignore[assignment]

#: Where Linux says what a process may use: the machine's free memory, and the bounds of the container around it.
_MACHINE = Path("/proc/meminfo")
_CONTAINERS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
#: Which of their groups this process is in.
_GROUPS = Path("/proc/self/cgroup")
#: Where it says what this process has: addresses, what of them is in memory, and what of them is its own data.
_PROCESS = Path("/proc/self/statm")
#: ... and the most of it that was ever in memory.
_PEAK = Path("/proc/self/status")
#: What is taken to be there where nothing says so.
LEAST_BYTES = 4 << 30
#: With so much to work with, nothing is done differently.
PLENTY_BYTES = 8 << 30
#: The share of a machine or a container that a compile counts on where nobody has said how much it may take.
_OWN_SHARE = 0.75
#: The share of the memory to work with that one batch may take on its way through a network.
_BATCH_SHARE = 0.25

#: How torch says that it got no memory, and the linker that there is no room for a library.
_NO_MEMORY = ("can't allocate memory", "failed to map segment", "cannot allocate memory")
#: What a compile imports at its first use.
_LATE = ("scipy.special", "scipy.sparse.csgraph")
#: Addresses that are taken and hold nothing: what threads reserve for their heaps, and gaps that mapping leaves.
_RESERVED_BYTES = 384 << 20
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(kw_only=True)
class _Within:
    """What a compile was told to stay under, the peak of the process before it, and what it has to work with, once that
    is known; `device_bytes` on the device where it computes, where that is not the CPU and a bound was set."""

    limit_bytes: int | None
    before_bytes: int | None
    working_bytes: int | None = None
    device_bytes: int | None = None


_within: list[_Within] = []


def available_bytes() -> int:
    """Bytes that can be taken without swapping: what Linux calls available, or what the container, the limits of the
    process (``RLIMIT_AS``, ``RLIMIT_DATA``) or that of the compile leave if that is less. Where none is known,
    `LEAST_BYTES`."""
    found = [_machine("MemAvailable"), *(max(0, total - used) for total, used in _limits().values())]
    return min((count for count in found if count is not None), default=LEAST_BYTES)


@contextmanager
def memory_within(limit_bytes: int | None) -> Iterator[None]:
    """Inside, the process stays under `limit_bytes` of resident memory; None leaves that to the machine, its container
    and the limits of the process. Raises CompilerError where the process has more already, where memory runs out
    under a limit, and where a device has too little."""
    outer = _within[-1].limit_bytes if _within else None
    known = [count for count in (limit_bytes, outer) if count is not None]
    _within.append(_Within(limit_bytes=min(known, default=None), before_bytes=peak_bytes()))
    try:
        _refuse_less_than(0)
        yield
    except (MemoryError, RuntimeError, ImportError) as cause:
        if _ran_out_on_a_device(cause):
            raise CompilerError(
                f"the device has too little memory: {first_line(cause)}",
                hint='end what else runs there, or compute on the CPU: device="cpu"',
            ) from cause
        if not _bounds() or not (isinstance(cause, MemoryError) or any(words in str(cause) for words in _NO_MEMORY)):
            raise
        raise CompilerError(
            f"memory ran out under {' and '.join(_bounds())}", hint="allow more, or give smaller samples"
        ) from cause
    finally:
        _within.pop()


def _ran_out_on_a_device(cause: BaseException) -> bool:
    """Whether torch says so: by a class of its own, or in words (``mps``)."""
    torch = sys.modules.get("torch")
    known = torch is not None and isinstance(cause, torch.OutOfMemoryError)
    return known or (isinstance(cause, RuntimeError) and "backend out of memory" in str(cause))


def settle_memory(least_bytes: int, device_bytes: int | None = None) -> None:
    """Find out what there is to work with, now that the network and the samples are in memory: for the rest of the
    innermost `memory_within`. Raises CompilerError where a limit leaves less than `least_bytes`, or where reading the
    network took more than it allows.

    `device_bytes` bounds what values may take on another device than the CPU.

    The number is a round one, so that it is the same when the compile is made again: what depends on it, depends on
    the limit, and not on how a few pages happened to lie."""
    _within[-1].device_bytes = device_bytes
    if _bounds():
        import_late()
    _refuse_less_than(least_bytes)
    above = _above()
    if above is not None:
        limit = f"a memory limit of {bytes_in_words(limit_in_effect() or 0)}"
        raise _too_little(limit, above, "what reading the network and the samples took")
    machine, boxes = _machine("MemTotal"), (_bytes_in(limit) for limit, _ in _containers())
    whole = [int(_OWN_SHARE * count) for count in (machine, *boxes) if count is not None]
    left = [total - used for total, used in _limits().values()]
    _within[-1].working_bytes = min((_round(count) for count in (*whole, *left)), default=None)


def agree_on_memory(agreed: Callable[[int], int]) -> None:
    """Take for what there is to work with what `agreed` makes of it: of several processes the least that one has, since
    batches follow from it."""
    working = _within[-1].working_bytes
    found = agreed(sys.maxsize if working is None else working)
    _within[-1].working_bytes = None if found == sys.maxsize else found


def import_late() -> None:
    """Import what a compile imports at its first use. Code takes memory and addresses too: under a limit it does so
    before they are nearly all taken."""
    for name in _LATE:
        import_module(name)


def at_most(most_bytes: int) -> int:
    """What a place that takes `most_bytes` where there is plenty may take."""
    within = _within[-1] if _within else None
    known = [count for count in (within.working_bytes, within.device_bytes) if count is not None] if within else []
    return most_bytes * min([*known, PLENTY_BYTES]) // PLENTY_BYTES


def samples_at_once(sample_bytes: int, most: int) -> int:
    """How many samples may go through a network together when each takes `sample_bytes`: at most so many, and as many
    unless memory is short or a limit was set, since sums over other batches round in another way."""
    working = told_bytes()
    return max(1, min(most, int(_BATCH_SHARE * min(working)) // max(1, sample_bytes))) if working else most


def limited() -> bool:
    """Whether a limit, or that of a control group, leaves less than plenty: memory is then given back as soon as it is
    free."""
    return any(total - used < PLENTY_BYTES for total, used in _limits().values())


def limit_in_effect() -> int | None:
    """What the innermost `memory_within` was told."""
    return _within[-1].limit_bytes if _within else None


def told_bytes() -> list[int]:
    """What there is to work with where a limit was set or it is less than plenty, and on the device where that has one,
    else nothing: batches, and with them the last bits of sums, follow from it."""
    working, device = (_within[-1].working_bytes, device_budget()) if _within else (None, None)
    told = [] if working is None or (working >= PLENTY_BYTES and not _bounds()) else [working]
    return told if device is None else [*told, device]


def device_budget() -> int | None:
    """What values may take on the device where the innermost `memory_within` computes; None without a bound, and on the
    CPU."""
    return _within[-1].device_bytes if _within else None


def peak_bytes() -> int | None:
    """The most that this process has ever had in memory at once; None where the system does not say."""
    try:  # what getrusage says begins with what the process that started this one had
        lines = _PEAK.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    if resource is None:
        return None
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(found) if sys.platform == "darwin" else int(found) << 10


def warn_if_above() -> None:
    """Warn where the process went above the limit of the innermost `memory_within`, and had not been there before."""
    above = _above()
    if above is not None:
        warnings.warn(
            f"the process had {bytes_in_words(above)} in memory at once, above its limit of "
            f"{bytes_in_words(limit_in_effect() or 0)}: what a library takes by itself is only estimated",
            stacklevel=3,
        )


def _above() -> int | None:
    """The peak of the process where it is above the limit, and was not when that was set."""
    peak, limit = peak_bytes(), limit_in_effect()
    if peak is None or limit is None:
        return None
    return peak if (_within[-1].before_bytes or 0) <= limit < peak else None


def read_bytes(text: str) -> int:
    """The number of bytes that ``4G``, ``512M``, ``1.5GiB`` or ``800000`` says; units are powers of 1024. Raises
    CompilerError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:ib)?", text.strip().lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1 or (found and found[2] == "" and text.strip().lower().endswith("ib")):
        raise CompilerError(f"{text!r} is no amount of memory", hint="give bytes, or units of 1024: 512M, 4G, 4GiB")
    return size


def bytes_in_words(count: int) -> str:
    """``612 MiB``, ``1.5 GiB``."""
    return f"{count / 2**30:.2f} GiB" if count >= 1 << 30 else f"{-(-count // 2**20)} MiB"


def _refuse_less_than(least_bytes: int) -> None:
    """Raise CompilerError where a limit leaves less."""
    for name, (total, used) in _limits().items():
        if total - used < max(least_bytes, 1):
            words = f"{bytes_in_words(used)} that are taken by now, and {bytes_in_words(least_bytes)} more"
            raise _too_little(name, used + max(least_bytes, 1), words)


def _too_little(name: str, needed_bytes: int, why: str) -> CompilerError:
    return CompilerError(
        f"{name} is too little: about {bytes_in_words(needed_bytes)} are needed at the least",
        expected=why,
        hint="allow more, or compile with smaller samples or a smaller network",
    )


def _bounds() -> dict[str, tuple[int, int]]:
    """(bytes in all, bytes taken) of each limit on this process, by what it is called."""
    addresses, resident, data = _taken()
    limit = limit_in_effect()
    found = {} if limit is None else {f"a memory limit of {bytes_in_words(limit)}": (limit, resident)}
    if resource is not None:
        for name, used in (("RLIMIT_AS", addresses + _RESERVED_BYTES), ("RLIMIT_DATA", data)):
            total, _ = resource.getrlimit(getattr(resource, name))
            if total != resource.RLIM_INFINITY:
                found[f"{name} of {bytes_in_words(total)}"] = (total, used)
    return found


def _limits() -> dict[str, tuple[int, int]]:
    """All limits: those on this process, and those of the control groups around it."""
    return _bounds() | _group_bounds()


def _group_bounds() -> dict[str, tuple[int, int]]:
    """The same of each control group around this process that allows less than the machine has: what goes beyond such a
    limit is killed, without a word."""
    found = {}
    machine = _machine("MemTotal") or sys.maxsize
    for limit, used in _containers():
        total, taken = _bytes_in(limit), _bytes_in(used)
        if total is not None and taken is not None and total < machine:
            found[f"a control group's limit of {bytes_in_words(total)}"] = (total, taken - _cached(used))
    return found


def _taken() -> tuple[int, int, int]:
    """Bytes of addresses, in memory and of own data that this process has."""
    try:
        pages = [int(number) * os.sysconf("SC_PAGE_SIZE") for number in _PROCESS.read_text().split()]
    except (OSError, ValueError, AttributeError):  # not Linux: what it once had, it may still have
        peak = peak_bytes() or 0
        return peak, peak, peak
    return pages[0], pages[1], pages[5]


def _round(count: int) -> int:
    """Down to four binary digits."""
    shift = max(0, max(0, count).bit_length() - 4)
    return max(0, count) >> shift << shift


def _machine(name: str) -> int | None:
    try:
        lines = _MACHINE.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), None)


def _containers() -> list[tuple[Path, Path]]:
    """The limit and the use of each control group around this process, as far as they can be seen: the container's own,
    and groups that the process was put into (a service, a job of a queue)."""
    found = list(_CONTAINERS)
    try:
        lines = _GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return found
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        for limit, used in _CONTAINERS:
            group = PurePosixPath(name.strip("/"))
            folders = [limit.parent / part for part in (group, *group.parents) if part.parts]
            found += [(folder / limit.name, folder / used.name) for folder in folders]
    return found


def _cached(used: Path) -> int:
    """Bytes of files that a control group has in memory, which make room for what is needed."""
    try:
        lines = (line.split() for line in used.with_name("memory.stat").read_text().splitlines())
        return sum(int(words[1]) for words in lines if words[0] in {"active_file", "inactive_file"})
    except (OSError, ValueError, IndexError):
        return 0


def _bytes_in(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # there is no container, or it sets no bound
        return None
