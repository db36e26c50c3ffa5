"""Sums that stay on a device, with a device and a backend that stand for a GPU and NCCL."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.processes.on_device import kinds_on_device, place


def test_sums_stay_where_each_process_has_a_device(processes: SimpleNamespace, tmp_path: Path) -> None:
    (wanted,) = processes.results(1, "devices", tmp_path / "one")
    for rank, found in enumerate(processes.results(2, "devices", tmp_path / "two")):
        there = "elsewhere" if rank else "cpu"  # a sum comes back where the term was
        sums = [([2.0, 2.0, 2.0], there), (1.0, "cpu"), None]
        (by_one, on_one), _ = found["one"]
        assert by_one == sums and on_one == 0, "two processes of one device: through the host"
        (by_host, on_broken), warned = found["broken"]
        assert by_host == sums and on_broken == 0, "a backend that fails is not used"
        assert ("sums go through the host" in warned and "no devices like these" in warned) == (rank == 0)
        (by_device, on_own), _ = found["own"]
        assert by_device == sums and on_own == 1
        assert found["sums"] > 10, "so do those of a compile"
        for name, weight in wanted["weights"].items():
            assert torch.allclose(found["weights"][name], weight, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ("cpu:gloo,cuda:gloo", {}),
        ("cuda:nccl", {"cuda": "nccl"}),
        ("cpu:gloo,cuda:nccl", {"cuda": "nccl"}),
        ("xpu:xccl", {"xpu": "xccl"}),
        ("cpu:mpi,cuda:mpi", {}),
    ],
)
def test_which_backends_take_tensors_of_a_device(config: str, kinds: dict[str, str]) -> None:
    assert kinds_on_device(config) == kinds


def test_devices_are_told_apart() -> None:
    places = [place(torch.device("cuda", number)) for number in range(4)]
    assert len(set(places)) == 4 and all(0 < number < 2**63 for number in places)
