"""Optimisers of whose states each process keeps a part move the weights as those that keep all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


def check_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


def test_frank_wolfe(processes: SimpleNamespace, tmp_path: Path) -> None:
    """Under torch's ZeroRedundancyOptimizer; its state goes on in either."""
    every = processes.results(2, "frank_wolfe_divided", tmp_path)
    assert sum(found["kept"] for found in every) == every[0]["all"] and all(found["kept"] for found in every)
    for found in every:
        check_equal(found["divided"], found["whole"])
        check_equal(found["together"], found["whole"])


@pytest.mark.parametrize("size", [2, 3])
def test_mimicking(size: int, processes: SimpleNamespace, tmp_path: Path) -> None:
    every: list[dict[str, Any]] = processes.results(size, "mimicked", tmp_path)
    (whole,) = every[0]["together"]["sizes"]
    parts = [next(iter(found["divided"]["sizes"])) for found in every]
    assert sum(parts) == whole and max(parts) < whole, "each keeps its part"
    for found in every:
        assert found["together"]["steps"] == found["divided"]["steps"] == 12
        assert found["again"]["steps"] == 12 - 7, "it goes on from the state of all of them"
        for name in ("together", "divided", "again"):
            check_equal(found[name]["weights"], every[0]["together"]["weights"])
