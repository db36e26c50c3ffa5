"""Any number of processes makes the network that one makes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.support.errors import ProcessError
from torch import nn

FoundBy = Callable[[int, str], list[Any]]


def check_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["decisions"] == wanted["decisions"]
    assert found["error"] == pytest.approx(wanted["error"], rel=1e-6, abs=1e-9)
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        assert torch.allclose(found["weights"][name], weight, rtol=0, atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_same_plan_and_weights(size: int, found_by: FoundBy) -> None:
    (by_one,) = found_by(1, "compiles")
    for found in found_by(size, "compiles"):
        assert len(found) == len(by_one) if size == 2 else len(found) > 3
        for case in found:
            check_same(found[case], by_one[case])
            assert len(found[case]["processes"]["macs"]) == size, "the report says who did what"


@pytest.mark.slow
def test_a_killed_process_ends_all_and_others_go_on(
    found_by: FoundBy, processes: SimpleNamespace, tmp_path: Path
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
    (by_one,) = found_by(1, "compiles")
    for found in processes.results(3, "resumed", tmp_path / "second", cache):
        check_same(found, by_one["cnn latency"])
    assert all(path.exists() for path in kept)


def test_unequal_arguments(found_by: FoundBy) -> None:
    first, last = found_by(2, "unequal")
    for name, word in (("seed", "settings"), ("goal", "goals"), ("samples", "samples"), ("network", "networks")):
        assert first[name].startswith("ProcessError") and last[name].startswith("ProcessError"), name
        assert f"different {word}" in first[name], first[name]
    assert last["bad here"].startswith("CalibrationError")
    assert first["bad here"].startswith("LostError") and "process 1 of 2 failed" in first["bad here"]
    assert all("cuda:77" in found["bad device"] and "what to do" in found["bad device"] for found in (first, last))
    assert float(first["by itself"]) > 0


def test_each_process_reads_its_part(found_by: FoundBy) -> None:
    (wanted,) = found_by(1, "parts")
    for found in (found for size in (2, 3) for found in found_by(size, "parts")):
        assert found["samples"] == [59, 59] == wanted["samples"], "what a sampler repeats counts once"
        for weights in found["weights"]:
            for name, weight in wanted["weights"][0].items():
                assert torch.allclose(weights[name], weight, rtol=0, atol=1e-6), name
        assert "no process has any samples" in found["nothing"]
        assert "differ in their inputs" in found["others"]


@pytest.mark.slow
def test_sweeps_plans_half_precision_and_made_samples(found_by: FoundBy) -> None:
    (wanted,) = found_by(1, "others")
    assert len(wanted) == 5
    for found in found_by(2, "others"):
        for place, weights in wanted.items():
            for name, weight in weights.items():
                assert torch.allclose(found[place][name], weight, rtol=0, atol=1e-6), (place, name)


def test_frank_wolfe_under_ddp(found_by: FoundBy) -> None:
    (wanted,) = found_by(1, "frank_wolfe")
    first, last = found_by(2, "frank_wolfe")
    for name, weight in wanted.items():
        assert torch.equal(first[name], last[name]), name
        assert torch.allclose(first[name], weight, rtol=0, atol=1e-5), name


@pytest.mark.slow
def test_plans_are_tried_by_an_executor(found_by: FoundBy) -> None:
    (found,) = found_by(1, "executed")
    assert found["count"] > 2, "several plans were handed out"
    assert found["there"]["tried"] == found["here"]["tried"] and found["there"]["error"] == found["here"]["error"]
    for name, weight in found["here"]["weights"].items():
        assert torch.equal(found["there"]["weights"][name], weight), name
    assert "the executor failed: OSError: the cluster is away" in found["lost"]


def test_what_is_no_executor() -> None:
    with pytest.raises(foldcut.CompilerError, match="submit"):
        foldcut.PipelineSettings(executor=3)  # type: ignore[arg-type]


def test_torchrun_writes_once(tmp_path: Path) -> None:
    """On the command line: the first process writes and speaks; shards are read by one process each."""
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    torch.onnx.export(net, (torch.randn(2, 8),), tmp_path / "net.onnx", dynamic_shapes=({0: "batch"},), verbose=False)
    samples = torch.randn(40, 8)
    (tmp_path / "parts").mkdir()
    for number, part in enumerate(samples.split(15)):
        torch.save(part, tmp_path / "parts" / f"{number}.pt")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "foldcut", "compile"]
    model, goal = str(tmp_path / "net.onnx"), ["--macs", "0.6", "--no-mimic", "--fresh"]
    for folder, start in (("two", run), ("one", run[:1] + run[5:])):
        command = [*start, model, "--calib", str(tmp_path / "parts"), *goal, "-o", str(tmp_path / folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("wrote ") == 1, done.stdout
    reports = [json.loads((tmp_path / folder / "report.json").read_text()) for folder in ("one", "two")]
    assert [report["calibration"]["samples"] for report in reports] == [40, 40]
    assert reports[0]["output_error"] == pytest.approx(reports[1]["output_error"], rel=1e-6)
    assert reports[0]["decisions"] == reports[1]["decisions"]
    assert len(reports[1]["processes"]["macs"]) == 2 and not reports[0]["processes"]
    bad = [*run, model, "--calib", str(tmp_path / "nothing.npy"), *goal, "-o", str(tmp_path / "bad")]
    done = subprocess.run(bad, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode != 0 and "no such file or folder" in done.stderr and not (tmp_path / "bad").exists()


def test_processes_are_asked_for_where_there_are_none() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    settings = foldcut.PipelineSettings(processes=True)
    with pytest.raises(ProcessError, match="no process group") as error:
        foldcut.compile(net, torch.randn(20, 8), goal=foldcut.Channels(0.5), settings=settings, progress=False)
    assert error.value.hint is not None and "torchrun" in error.value.hint
    with pytest.raises(foldcut.CompilerError, match="processes"):
        foldcut.PipelineSettings(processes="two")  # type: ignore[arg-type]
