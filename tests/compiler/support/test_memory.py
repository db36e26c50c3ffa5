"""The memory that may be taken: the least of what the machine and its container leave."""

from __future__ import annotations

from pathlib import Path

import pytest
from foldcut.compiler.support import memory


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CONTAINERS", ((tmp_path / "max", tmp_path / "current"),))
    return tmp_path


def test_where_nothing_is_known(told: Path) -> None:
    assert memory.available_bytes() == memory.LEAST_BYTES


def test_what_the_machine_has(told: Path) -> None:
    (told / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:  1 kB\nMemAvailable:  8000 kB\n")
    assert memory.available_bytes() == 8000 * 1024
    (told / "max").write_text("max\n")  # a container without a bound
    (told / "current").write_text("5\n")
    assert memory.available_bytes() == 8000 * 1024


def test_what_the_container_leaves(told: Path) -> None:
    (told / "meminfo").write_text("MemAvailable:  8000 kB\n")
    (told / "max").write_text("1000000\n")
    (told / "current").write_text("400000\n")
    assert memory.available_bytes() == 600_000


def test_this_machine_has_some() -> None:
    assert memory.available_bytes() > 1 << 20
