"""Memory is kept at hand while foldcut works, and given back."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foldcut.compiler.support.allocator import memory_at_hand

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not os.confstr("CS_GNU_LIBC_VERSION"), reason="glibc alone is told"
)
#: 64 MiB.
VALUES = 16 << 20
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def pages_asked_for(times: int) -> int:
    """Page faults of so many tensors, made one after another."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(VALUES)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def test_a_block_that_was_freed_is_had_again_without_the_system() -> None:
    whole = 4 * VALUES // PAGE_BYTES
    assert pages_asked_for(4) >= 3 * whole
    with memory_at_hand():
        pages_asked_for(12)  # the heap grows until a block fits between others
        with memory_at_hand():
            assert pages_asked_for(4) < whole
        assert pages_asked_for(4) < whole, "an inner one changes nothing"
    assert pages_asked_for(4) >= 3 * whole, "as before"


def test_what_was_kept_goes_back_to_the_system() -> None:
    before = resident_bytes()
    with memory_at_hand():
        pages_asked_for(12)
        assert resident_bytes() > before + 2 * VALUES
    assert resident_bytes() < before + 2 * VALUES


@pytest.mark.parametrize(
    "setting", [{"MALLOC_TRIM_THRESHOLD_": "1000"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000"}], ids=str
)
def test_what_the_user_has_set_stays(setting: dict[str, str]) -> None:
    script = (
        "from unittest import mock\n"
        "from foldcut.compiler.support import allocator\n"
        "with mock.patch.object(allocator.ctypes, 'CDLL') as library:\n"
        "    with allocator.memory_at_hand(): pass\n"
        "    print(library.called)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **setting}, capture_output=True, text=True, check=True
    )
    assert found.stdout == "False\n"
