"""Any number of processes makes the network that one makes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.support.errors import ProcessError
from torch import nn


@pytest.fixture(scope="module")
def by_one(processes: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = processes.results(1, "compiles", tmp_path_factory.mktemp("one"))[0]
    return found


def check_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["decisions"] == wanted["decisions"]
    assert found["error"] == pytest.approx(wanted["error"], rel=1e-6, abs=1e-9)
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        assert torch.allclose(found["weights"][name], weight, rtol=0, atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_same_plan_and_weights(
    size: int, by_one: dict[str, Any], processes: SimpleNamespace, tmp_path: Path
) -> None:
    for found in processes.results(size, "compiles", tmp_path):
        assert found.keys() == by_one.keys()
        for case, wanted in by_one.items():
            check_same(found[case], wanted)
            assert len(found[case]["processes"]["macs"]) == size, "the report says who did what"


@pytest.mark.slow
def test_a_killed_process_ends_all_and_others_go_on(
    by_one: dict[str, Any], processes: SimpleNamespace, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    codes = processes.wait(processes.start(2, "killed", tmp_path / "first", cache))
    log = (tmp_path / "first" / "0.log").read_text()
    assert codes == [0, -9], log
    said = torch.load(tmp_path / "first" / "0.pt", weights_only=False)
    took_s, _, words = said.partition(" ")
    assert float(took_s) < 60 and "lost another" in words, said
    kept = list(Path(cache).rglob("*.safetensors"))
    assert kept, "what was done by then is kept"
    for found in processes.results(3, "resumed", tmp_path / "second", cache):
        check_same(found, by_one["cnn latency"])
    assert all(path.exists() for path in kept)


def test_unequal_arguments(processes: SimpleNamespace, tmp_path: Path) -> None:
    first, last = processes.results(2, "unequal", tmp_path)
    for name, word in (("seed", "settings"), ("goal", "goals"), ("samples", "samples"), ("network", "networks")):
        assert first[name].startswith("ProcessError") and last[name].startswith("ProcessError"), name
        assert f"different {word}" in first[name], first[name]
    assert last["bad here"].startswith("CalibrationError")
    assert first["bad here"].startswith("LostError") and "process 1 of 2 failed" in first["bad here"]
    assert all("cuda:77" in found["bad device"] and "what to do" in found["bad device"] for found in (first, last))
    assert float(first["by itself"]) > 0


def test_each_process_reads_its_part(processes: SimpleNamespace, tmp_path: Path) -> None:
    (wanted,) = processes.results(1, "parts", tmp_path / "one")
    for found in (found for size in (2, 3) for found in processes.results(size, "parts", tmp_path / str(size))):
        assert found["samples"] == [59, 59] == wanted["samples"], "what a sampler repeats counts once"
        for weights in found["weights"]:
            for name, weight in wanted["weights"][0].items():
                assert torch.allclose(weights[name], weight, rtol=0, atol=1e-6), name
        assert "no process has any samples" in found["nothing"]
        assert "differ in their inputs" in found["others"]


def test_processes_are_asked_for_where_there_are_none() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    settings = foldcut.PipelineSettings(processes=True)
    with pytest.raises(ProcessError, match="no process group") as error:
        foldcut.compile(net, torch.randn(20, 8), goal=foldcut.Channels(0.5), settings=settings, progress=False)
    assert error.value.hint is not None and "torchrun" in error.value.hint
    with pytest.raises(foldcut.CompilerError, match="processes"):
        foldcut.PipelineSettings(processes="two")  # type: ignore[arg-type]
