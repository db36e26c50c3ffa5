"""What values take on a device has a bound: beyond it frontiers are in host memory, then in files."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.devices.room import free_bytes
from foldcut.compiler.devices.spilled import Hosted, Spilled
from foldcut.compiler.export.edit_device import moved
from foldcut.compiler.ir.program import Program
from foldcut.compiler.support import memory
from foldcut.passes.drop.drop_blocks import changes_of_drops, drop_blocks
from foldcut.passes.solve import lockstep
from foldcut.passes.solve.lockstep import Lockstep
from foldcut.passes.solve.resolve_network import Resolved, ResolveSettings, resolve_network

pytestmark = pytest.mark.usefixtures("quick_measurement")

SETTINGS = ResolveSettings(batch_size=6, refine=1, guard_samples=24)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Where frontiers were kept."""
    found: set[str] = set()
    real = Lockstep._store

    def store(self: Lockstep, index: int, frontier: Any) -> None:
        real(self, index, frontier)
        kept = self._frontiers[index]
        if not any(frontier):
            return  # nothing is left behind the last group
        if isinstance(kept, Hosted):
            tensors = [v for v in kept.values.values() if isinstance(v, torch.Tensor)]
            assert all(v.device.type == "cpu" for v in tensors)
        found.add({Hosted: "host", Spilled: "disk"}.get(type(kept), "device"))

    monkeypatch.setattr(Lockstep, "_store", store)
    return found


def solved(program: Program, nets: SimpleNamespace, device: torch.device) -> Resolved:
    regions = [find_regions(program).blocks[1]]
    student = moved(drop_blocks(program, regions), device)
    samples = CalibrationSet.of(nets.images(24))
    return resolve_network(moved(program, device), student, samples, changes_of_drops(regions), settings=SETTINGS)


@pytest.mark.parametrize(
    ("device_bytes", "host_bytes", "wanted"),
    [(1 << 30, 1 << 30, "device"), (1000, 1 << 30, "host"), (1000, 1000, "disk")],
)
def test_frontiers_go_to_the_host_and_then_to_the_disk(
    device_bytes: int,
    host_bytes: int,
    wanted: str,
    residual: Program,
    nets: SimpleNamespace,
    elsewhere: SimpleNamespace,
    places: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each place gives the same result, bit for bit."""
    known = solved(residual, nets, elsewhere.device)
    places.clear()
    given = {"cpu": host_bytes, elsewhere.device.type: device_bytes}
    monkeypatch.setattr(lockstep, "free_bytes", lambda device: given[device.type])
    found = solved(residual, nets, elsewhere.device)
    assert wanted in places and places <= {"device", "host", "disk"}
    assert (places == {"device"}) is (wanted == "device")
    assert ("disk" in places) is (wanted == "disk")
    for name, value in found.program.module.state_dict().items():
        assert value.device.type == "elsewhere"
        assert torch.equal(value.cpu(), known.program.module.state_dict()[name].cpu())


def test_the_bound_is_that_of_the_device_alone(elsewhere: SimpleNamespace) -> None:
    cpu, before = torch.device("cpu"), free_bytes(elsewhere.device)
    with memory.memory_within(None):
        memory.settle_memory(0, 1 << 20)
        assert free_bytes(elsewhere.device) == 1 << 20 < min(before, free_bytes(cpu))
        assert memory.samples_at_once(1 << 10, 1000) == 256, "a quarter of it"
        assert memory.at_most(1 << 30) == (1 << 30) * (1 << 20) // memory.PLENTY_BYTES
        assert 1 << 20 in memory.told_bytes(), "sums of other batches round otherwise"
    assert memory.device_budget() is None and free_bytes(elsewhere.device) > 1 << 20


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)).eval()


OPTIONS: dict[str, Any] = {"goal": foldcut.Channels(0.5), "mimic": False, "progress": False, "cache": False}


def test_a_compile_keeps_to_it(elsewhere: SimpleNamespace, places: set[str]) -> None:
    samples = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    settings = foldcut.PipelineSettings(device=elsewhere.device, device_memory_bytes=16 << 10)
    plain = foldcut.compile(net(), samples, settings=replace(settings, device_memory_bytes=None), **OPTIONS)
    assert places == {"device"}
    places.clear()
    out = foldcut.compile(net(), samples, settings=settings, **OPTIONS)
    assert "host" in places and "disk" not in places
    # other batches are held out to judge a solve, so it comes out a little otherwise
    assert [cut.kept for cut in out.plan.decisions] == [cut.kept for cut in plain.plan.decisions]
    assert out.report.output_error == pytest.approx(plain.report.output_error, rel=0.2)


def test_too_little_is_refused(elsewhere: SimpleNamespace) -> None:
    settings = foldcut.PipelineSettings(device=elsewhere.device, device_memory_bytes=100)
    with pytest.raises(foldcut.CompilerError, match="device memory limit of 1 MiB is too little"):
        foldcut.compile(net(), torch.randn(64, 16), settings=settings, **OPTIONS)


def test_the_cpu_has_none() -> None:
    samples = torch.randn(64, 16)
    plain = foldcut.compile(net(), samples, **OPTIONS)
    out = foldcut.compile(net(), samples, settings=foldcut.PipelineSettings(device_memory_bytes=100), **OPTIONS)
    assert torch.equal(out.module(samples), plain.module(samples))


def test_no_amount_is_refused() -> None:
    with pytest.raises(foldcut.CompilerError, match="device_memory_bytes"):
        foldcut.PipelineSettings(device_memory_bytes=0)
