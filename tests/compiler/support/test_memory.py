"""The memory that may be taken: the least of what the machine, its container and the limits of the process leave."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from foldcut.compiler.cli.goals import read_settings
from foldcut.compiler.cli.options import CompileOptions
from foldcut.compiler.support import cpus, memory
from foldcut.compiler.support.errors import CompilerError


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


def test_what_the_limits_of_the_process_leave() -> None:
    script = (
        "import resource\n"
        "from foldcut.compiler.support import memory\n"
        "for name in ('RLIMIT_DATA', 'RLIMIT_AS'):\n"
        "    resource.setrlimit(getattr(resource, name), (1 << 30, resource.RLIM_INFINITY))\n"
        "    print(memory.available_bytes(), memory.limited())\n"
        "    resource.setrlimit(getattr(resource, name), (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "print(memory.limited())\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *limited, free = found.stdout.splitlines()
    assert free == "False" and len(limited) == 2
    for line in limited:
        left, is_limited = line.split()
        assert 0 < int(left) < 1 << 30 and is_limited == "True"


@pytest.mark.parametrize(
    ("text", "size"),
    [("4G", 4 << 30), ("512M", 512 << 20), ("4GiB", 4 << 30), ("1.5g", 3 << 29), ("800000", 800_000), (" 2k ", 2048)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert memory.read_bytes(text) == size
    options = CompileOptions(model="m", calib=Path("c"), output=Path("o"), memory=text)
    assert read_settings(options).memory_bytes == size


@pytest.mark.parametrize("text", ["", "G", "4GB", "-4G", "0", "0.1", "4 gigs", "4iB", "nan", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(CompilerError, match="no amount of memory") as refused:
        memory.read_bytes(text)
    assert refused.value.hint is not None and "4GiB" in refused.value.hint


def test_budgets_are_whole_where_there_is_plenty(told: Path) -> None:
    assert memory.at_most(1000) == 1000 and memory.samples_at_once(1 << 60, 32) == 32, "no compile runs"
    (told / "meminfo").write_text(f"MemTotal: {64 << 20} kB\n")
    with memory.memory_within(None):
        assert memory.told_bytes() == []
        memory.settle_memory(1 << 60)  # nobody has set a limit that could be too little
        assert memory.at_most(1000) == 1000 and memory.samples_at_once(1 << 60, 32) == 32
        assert memory.told_bytes() == []


def test_budgets_shrink_with_the_machine(told: Path) -> None:
    (told / "meminfo").write_text(f"MemTotal: {2 << 20} kB\n")
    with memory.memory_within(None):
        memory.settle_memory(0)
        assert memory.told_bytes() == [3 << 29], "three quarters of it"
        assert memory.at_most(1 << 30) == (1 << 30) * 3 // 16
        assert memory.samples_at_once(3 << 25, 32) == 4 and memory.samples_at_once(1 << 60, 32) == 1
    (told / "max").write_text(str(1 << 30))
    with memory.memory_within(None):
        memory.settle_memory(0)
        assert memory.told_bytes() == [3 << 28], "three quarters of the container"


def test_a_limit_is_what_is_left_of_it(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"resident": (500 << 20) // resource.getpagesize()}
    monkeypatch.setattr(memory, "_PROCESS", told / "statm")

    def holds(resident_bytes: int) -> None:
        pages["resident"] = resident_bytes // resource.getpagesize()
        (told / "statm").write_text(f"0 {pages['resident']} 0 0 0 0 0")

    holds(500 << 20)
    with memory.memory_within(1 << 30), memory.memory_within(None):
        assert memory.limit_in_effect() == 1 << 30, "the inner one is not free of it"
        memory.settle_memory(400 << 20)
        assert memory.told_bytes() == [512 << 20], "524 MiB are left, in a round number"
        holds(700 << 20)
        assert memory.available_bytes() == 324 << 20, "what is left now"
        assert memory.told_bytes() == [512 << 20], "batches stay as they are"
        with pytest.raises(CompilerError, match=r"limit of 1.00 GiB is too little: about 1.07 GiB are needed"):
            memory.settle_memory(400 << 20)
    with pytest.raises(CompilerError, match="too little"), memory.memory_within(600 << 20):
        pass


def test_memory_that_runs_out_is_a_limit_that_is_too_small() -> None:
    with pytest.raises(CompilerError, match="memory ran out under a memory limit"), memory.memory_within(1 << 50):
        raise MemoryError
    with pytest.raises(CompilerError, match="ran out"), memory.memory_within(1 << 50):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    with pytest.raises(RuntimeError, match="another"), memory.memory_within(1 << 50):
        raise RuntimeError("another")
    with pytest.raises(MemoryError), memory.memory_within(None):
        raise MemoryError


def test_the_peak_is_that_of_the_process() -> None:
    peak = memory.peak_bytes()
    assert peak is not None and memory._taken()[1] <= peak + (1 << 20)


def test_a_peak_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [1 << 49]
    monkeypatch.setattr(memory, "peak_bytes", lambda: peaks[-1])
    with memory.memory_within(1 << 50):
        memory.warn_if_above()
        memory.settle_memory(0)
        peaks.append(3 << 49)
        with pytest.warns(UserWarning, match="had 1572864.00 GiB in memory at once, above its limit"):
            memory.warn_if_above()
        with pytest.raises(CompilerError, match=r"too little: about 1572864.00 GiB are needed"):
            memory.settle_memory(0)
    with memory.memory_within(1 << 50):  # it was above before
        memory.warn_if_above()
        memory.settle_memory(0)
    with memory.memory_within(None):
        memory.warn_if_above()


@pytest.mark.parametrize(("quota", "count"), [("150000 100000", 2), ("10000 100000", 1), ("max 100000", 8), (None, 8)])
def test_cpus_of_a_container(quota: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cpus, "_OLD_QUOTA", (tmp_path / "none", tmp_path / "none"))
    monkeypatch.setattr(cpus.os, "sched_getaffinity", lambda _process: set(range(8)), raising=False)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    assert cpus.free_cpus() == count


def test_what_a_control_group_leaves(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group around the process counts, and what it holds of files makes room."""
    (told / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n")
    (told / "own").write_text("12:cpuset:/elsewhere\n4:memory:/jobs/mine\n0::/jobs/mine\nno group\n"[:-9])
    monkeypatch.setattr(memory, "_GROUPS", told / "own")
    for name, limit, used in (("jobs", "9223372036854771712", 5000), ("jobs/mine", "6000000", 5_500_000)):
        (told / name).mkdir()
        (told / name / "max").write_text(f"{limit}\n")
        (told / name / "current").write_text(f"{used}\n")
    (told / "jobs/mine/memory.stat").write_text("cache 1\ninactive_file 2000000\nactive_file 500000\n")
    assert memory.available_bytes() == 3_000_000
    assert memory.limited()
    with (
        pytest.raises(CompilerError, match="a control group's limit of 6 MiB is too little"),
        memory.memory_within(None),
    ):
        memory.settle_memory(4_000_000)
    with memory.memory_within(None):
        memory.settle_memory(1_000_000)
        assert memory.told_bytes()[0] <= 3_000_000
    (told / "jobs/mine/max").write_text("max\n")
    assert memory.available_bytes() == 60_000_000 << 10 and not memory.limited()
