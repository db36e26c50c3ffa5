"""Memory that is kept at hand while foldcut works, instead of being given back and asked for again."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .memory import limited

# the numbers of malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
#: Blocks below so many bytes come from the heap, a heap that is free at its end keeps so many (an int holds no more),
#: and it grows by so many at least.
_AT_HAND = {_MMAP_THRESHOLD: (1 << 31) - 1, _TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 64 << 20}
#: Under a limit, each block of a size is the system's own and goes back to it when it is free.
_GIVEN_BACK = {_MMAP_THRESHOLD: 1 << 20, _TRIM_THRESHOLD: 4 << 20, _TOP_PAD: 1 << 20}
#: What glibc goes to by itself in a process that works with large blocks, and its least step.
_USUAL = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 128 << 10}
#: Whoever sets one of these has said how memory is to be had.
_SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")

_depth = 0


@contextmanager
def memory_at_hand() -> Iterator[None]:
    """Inside, large blocks come from the heap and stay in it.

    A network's activations are megabytes each, freed and wanted again with every node. glibc asks the system for each
    such block anew, which takes longer to hand out (and clear) its pages than a convolution takes to fill them: three
    quarters of a forward of MobileNetV2 at 224 px with 32 images. On leaving, what is free goes back to the system, and
    blocks are had as glibc has them by itself. Nothing is changed on another C library, or where the user has set how
    memory is had (``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``).

    A heap that keeps what is free grows past what is used, by whatever does not fit into its gaps. Where a limit is set
    (`limited`), large blocks are therefore had from the system one by one, and the process has what it uses.
    """
    global _depth
    libc = _glibc() if _depth == 0 else None
    _depth += 1
    try:
        if libc is not None:
            for option, value in (_GIVEN_BACK if limited() else _AT_HAND).items():
                libc.mallopt(option, value)
        yield
    finally:
        _depth -= 1
        if libc is not None:
            for option, value in _USUAL.items():
                libc.mallopt(option, value)
            libc.malloc_trim(0)


def give_back() -> None:
    """What is free goes back to the system, where a limit is set: at the end of a stage, which leaves much behind."""
    libc = _glibc() if _depth and limited() else None
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc and its settings are its own."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SET_BY_USER):
        return None
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
