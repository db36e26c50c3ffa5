"""Plans and folders are read where nothing of foldcut has been used before, and those of earlier versions are."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.support.strict_json import json_file
from torch import nn

pytestmark = pytest.mark.usefixtures("quick_measurement")

DECISIONS: tuple[foldcut.Decision, ...] = (
    foldcut.PruneChannels(group="0", kept=tuple(range(16)), total=32),
    foldcut.FactorizeLayer(layer="linear_1", scheme="channel", ranks=(3,), full=(16,)),
)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


@pytest.fixture(scope="module", params=[foldcut.Latency(0.7), foldcut.MaxError(0.1), foldcut.Parameters(0.5)], ids=str)
def folder(request: pytest.FixtureRequest, net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `apply` saves of a plan with decisions of two rewrites, beside the network that it was made for."""
    folder = tmp_path_factory.mktemp("out")
    program = foldcut.capture(net, torch.randn(2, 8))
    plan = foldcut.Plan(decisions=DECISIONS, goal=request.param, fingerprint=program.fingerprint, predicted={})
    foldcut.apply(net, plan, calibration=torch.randn(24, 8), mimic=False, cache=False).save(folder / "made")
    exported = torch.export.export(net, (torch.randn(2, 8),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.export.save(exported, folder / "net.pt2")
    return folder


#: Each is run by a process that has imported torch and nothing of foldcut.
READS = (
    "foldcut.load(folder / 'made').plan",
    "foldcut.Plan.load(folder / 'made/plan.json')",
    "foldcut.apply(folder / 'net.pt2', folder / 'made/plan.json').plan",
)
FORKS = """
import os, pathlib, sys, torch
folder = pathlib.Path({folder!r})
for said in {reads!r}:
    child = os.fork()
    if child == 0:
        import foldcut
        plan = eval(said)
        print([type(decision).__name__ for decision in plan.decisions], plan.goal, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, said
assert not any(name.startswith("foldcut") for name in sys.modules)
"""


def test_a_plan_is_read_whole_in_a_new_process(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS.format(folder=str(folder), reads=READS)],
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    goal = foldcut.Plan.load(folder / "made" / "plan.json").goal
    assert done.stdout.splitlines() == [f"['PruneChannels', 'FactorizeLayer'] {goal}"] * len(READS), done.stderr


def test_a_folder_of_version_1_is_read(folder: Path, net: nn.Module, tmp_path: Path) -> None:
    """Its digest is one of the plan as it was written then, with the names of then."""
    for name in ("model.onnx", "model.pt2"):
        (tmp_path / name).write_bytes((folder / "made" / name).read_bytes())
    data: dict[str, Any] = json.loads((folder / "made" / "plan.json").read_text())
    files = data.pop("files")
    data["version"] = 1
    data["decisions"][1]["kind"] = "factorize_layer"
    files["plan.json"] = hashlib.blake2b(json_file(data), digest_size=16).hexdigest()
    (tmp_path / "plan.json").write_bytes(json_file({**data, "files": files}))
    (tmp_path / "report.json").write_bytes(json_file({"decisions": data["decisions"]}))
    with pytest.raises(foldcut.OutputError, match="is not a report"):  # it is compared with the plan before it is read
        foldcut.load(tmp_path)
    (tmp_path / "report.json").unlink()
    again = foldcut.load(tmp_path)
    assert again.plan.decisions == foldcut.load(folder / "made").plan.decisions
    x = torch.randn(3, 8)
    assert torch.equal(again.module(x), foldcut.apply(net, tmp_path / "plan.json", example=x).module(x))
    assert again.plan.to_dict()["version"] == 2
    edited = {**data, "decisions": data["decisions"][:1], "files": files}
    (tmp_path / "plan.json").write_bytes(json_file(edited))
    with pytest.raises(foldcut.OutputError, match="not as it was saved"):
        foldcut.load(tmp_path)
