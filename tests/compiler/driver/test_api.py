"""The main job end to end, on a backend whose latency is known."""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foldcut
import numpy as np
import onnxruntime
import pytest
import torch
from foldcut.compiler.data.data_distance import FAR
from foldcut.compiler.ir.cost import program_cost
from foldcut.compiler.ir.program import Program
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.usefixtures("quick_measurement")
MIMIC = foldcut.MimicSettings(iterations=6, batch_size=16, checks=2, bfloat16=False)


@pytest.fixture(scope="module")
def compiled(residual_net: nn.Module, counting_backend: Any, nets: SimpleNamespace) -> foldcut.Compiled:
    return run(residual_net, nets.images(40), counting_backend, foldcut.Blocks(2))


def run(net: nn.Module, data: Any, backend: Any, goal: Any, **options: Any) -> foldcut.Compiled:
    options = {"mimic": MIMIC, "progress": False, **options}
    return foldcut.compile(net, data, goal=goal, backend=backend, **options)


def test_two_blocks_are_gone_the_useless_one_first(compiled: foldcut.Compiled, residual: Program) -> None:
    assert next(d.path for d in compiled.plan.decisions) == "blocks.1"
    assert len(compiled.plan.decisions) == 2
    assert compiled.plan.decisions[0].error < 1e-6 < compiled.plan.decisions[1].error
    before, after = program_cost(residual), program_cost(compiled.program)
    assert before.macs - after.macs == 2 * 2 * 8 * 64 * 8 * 9
    assert compiled.program.history[0] == "drop blocks.1"


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_module_runs_at_any_batch_size(compiled: foldcut.Compiled, nets: SimpleNamespace, count: int) -> None:
    result = compiled.module(nets.images(count, seed=5))
    assert result.shape == (count, 4)
    assert result.isfinite().all()


def test_it_computes_nearly_what_the_original_does(
    compiled: foldcut.Compiled, residual_net: nn.Module, nets: SimpleNamespace
) -> None:
    errors = compiled.report.output_errors
    assert errors["re-solved"] < errors["rewritten"]
    assert errors["mimicked"] < errors["rewritten"]
    assert compiled.report.output_error == compiled.outcome.tested.error < errors["rewritten"]  # type: ignore[union-attr]
    x = nets.images(64, seed=11)
    with torch.no_grad():
        wanted = residual_net(x)
        error = float((compiled.module(x) - wanted).square().sum() / wanted.square().sum())
    assert error < errors["rewritten"]


def test_the_report_has_what_was_promised(compiled: foldcut.Compiled, residual: Program) -> None:
    data = json.loads(json.dumps(compiled.report.to_dict()))
    assert data["goal"] == {"kind": "blocks", "count": 2}
    assert data["backend"] == "counting"
    assert set(data["latency"]) >= {"ratio", "low", "high", "pairs", "clock", "before_ms", "after_ms"}
    assert data["latency"]["ratio"] == pytest.approx(41 / 81)
    assert data["latency"]["before_ms"] == pytest.approx(81)
    assert data["macs"] == {
        "before": program_cost(residual).macs,
        "after": program_cost(compiled.program).macs,
    }
    assert data["parameters"] == {
        "before": residual.parameter_count(),
        "after": compiled.program.parameter_count(),
    }
    assert data["output_error"] == pytest.approx(compiled.report.output_error)
    for decision, made in zip(data["decisions"], compiled.plan.decisions, strict=True):
        assert decision["kind"] == "drop_blocks"
        assert decision["region"] == made.region
        assert decision["error"] == made.error
        assert "saving" in decision
    assert {"capture", "analyse", "choose", "re-solve", "mimic", "export", "measure"} <= set(data["seconds"])
    assert all(set(value) == {"wall", "cpu"} for value in data["seconds"].values())
    assert data["environment"] == {"backend": "counting", "threads": 1, "batch": 1}
    assert data["met"] is True
    assert data["calibration"]["samples"] == 40
    assert data["onnx_difference"] < 1e-4
    # the batch norms of the network keep random statistics
    (far,) = data["warnings"]
    assert far.startswith("the samples are 0.8") and data["calibration"]["distance"]["median"] > FAR


def test_the_report_as_rows(compiled: foldcut.Compiled) -> None:
    rows = {name: (before, after, change) for name, before, after, change in compiled.report.rows()}
    assert rows["latency"][0] == "81.000 ms"
    assert rows["latency"][2].startswith("x0.506")
    assert {"MACs", "parameters"} <= set(rows)


def test_the_folder_has_five_files_that_agree(
    compiled: foldcut.Compiled, nets: SimpleNamespace, tmp_path: Path, residual: Program
) -> None:
    out = compiled.save(tmp_path / "new" / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        "model.onnx",
        "model.pt2",
        "plan.json",
        "report.html",
        "report.json",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new"]
    x = nets.images(5, seed=8)
    wanted = compiled.module(x).detach()
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    assert [v.name for v in session.get_inputs()] == ["x"]
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], wanted.numpy(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.load(out / "model.pt2").module()(x), wanted)
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(compiled.report.to_dict()))
    plan = foldcut.Plan.load(out / "plan.json")
    assert plan == compiled.plan
    plan.check(residual.fingerprint)
    assert (out / "model.onnx").read_bytes() == compiled.onnx


def test_the_written_network_can_be_compiled_from(compiled: foldcut.Compiled, nets: SimpleNamespace) -> None:
    """torch.export names nodes anew, so the fingerprints may differ; weights and function do not."""
    again = foldcut.capture(torch.export.load(BytesIO(compiled.files["model.pt2"])))
    first, second = compiled.module.state_dict(), again.module.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert torch.equal(again(nets.images(3)), compiled.program(nets.images(3)))
    assert len(foldcut.find_regions(again).blocks) == 1


def test_a_saved_network_is_loaded(compiled: foldcut.Compiled, nets: SimpleNamespace, tmp_path: Path) -> None:
    saved = foldcut.load(compiled.save(tmp_path / "out"))
    x = nets.images(3, seed=8)
    assert torch.equal(saved.module(x), compiled.module(x))
    assert saved.plan == compiled.plan
    assert saved.onnx == compiled.onnx
    assert saved.report == json.loads(json.dumps(compiled.report.to_dict()))
    assert saved.program.parameter_count() == compiled.program.parameter_count()


def test_a_folder_that_is_no_compiled_network(compiled: foldcut.Compiled, tmp_path: Path) -> None:
    with pytest.raises(foldcut.OutputError, match=r"is not a compiled network: it has no model\.onnx, no model\.pt2"):
        foldcut.load(tmp_path / "nothing")
    out = compiled.save(tmp_path / "out")
    (out / "report.json").write_text("[]")
    with pytest.raises(foldcut.OutputError, match=r"report\.json is not a report"):
        foldcut.load(out)
    (out / "report.json").write_text("{")
    with pytest.raises(foldcut.OutputError, match="cannot read"):
        foldcut.load(out)
    (out / "plan.json").write_text("{}")
    with pytest.raises(foldcut.PlanError, match="not a plan"):
        foldcut.load(out)
    (out / "model.pt2").unlink()
    with pytest.raises(foldcut.OutputError, match=r"it has no model\.pt2"):
        foldcut.load(out)


def test_files_of_two_runs_are_not_taken_for_one(
    compiled: foldcut.Compiled, residual_net: nn.Module, counting_backend: Any, nets: SimpleNamespace, tmp_path: Path
) -> None:
    """As a save leaves them that was killed between two renames."""
    other = foldcut.compile(
        residual_net,
        nets.images(24),
        goal=foldcut.Blocks(2),
        backend=counting_backend,
        mimic=None,
        progress=False,
        cache=False,
    )
    for name in ("model.onnx", "model.pt2", "plan.json"):
        out = compiled.save(tmp_path / name)
        foldcut.load(out)
        (out / name).write_bytes(other.files[name])
        with pytest.raises(foldcut.OutputError, match=r"is not the one that plan\.json was saved with|another plan"):
            foldcut.load(out)


def test_saving_onto_a_file_writes_nothing(compiled: foldcut.Compiled, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(foldcut.OutputError):
        compiled.save(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "mine"


def test_the_same_seed_gives_the_same_bits(
    compiled: foldcut.Compiled, residual_net: nn.Module, counting_backend: Any, nets: SimpleNamespace
) -> None:
    again = run(residual_net, nets.images(40), counting_backend, foldcut.Blocks(2))
    first, second = compiled.module.state_dict(), again.module.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert again.plan == compiled.plan
    assert again.report.output_errors == compiled.report.output_errors


def test_the_original_is_left_alone(compiled: foldcut.Compiled, residual_net: nn.Module, residual: Program) -> None:
    assert foldcut.capture(residual_net, torch.zeros(2, 3, 8, 8)).fingerprint == residual.fingerprint
    assert compiled.outcome.ctx.teacher.fingerprint == residual.fingerprint


def test_a_latency_goal(residual_net: nn.Module, counting_backend: Any, nets: SimpleNamespace) -> None:
    """81 ms; each block takes 20: two have to go for 0.6, and no more do."""
    net = residual_net.train()
    seen: set[str] = set()
    try:
        with pytest.warns(UserWarning, match="training mode"):
            result = run(
                net,
                DataLoader(TensorDataset(nets.images(24), torch.arange(24)), batch_size=10),
                counting_backend,
                foldcut.Latency(0.6),
                rewrites=("drop_blocks",),
                mimic=False,
                progress=lambda stage, _done, _total: seen.add(stage),
            )
        assert all(module.training for module in net.modules())
    finally:
        net.eval()
    assert len(result.plan.decisions) == 2
    assert result.report.latency["ratio"] == pytest.approx(41 / 81)
    assert [d.saving for d in result.plan.decisions] == pytest.approx([20 / 81] * 2)
    assert result.plan.predicted["latency_ratio"] == pytest.approx(41 / 81)
    assert "mimicked" not in result.report.output_errors
    assert any("training mode" in message for message in result.report.warnings)
    assert {"measure savings", "choose blocks", "re-solve"} <= seen


class SmallBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.relu(self.up(x)))


def test_a_goal_out_of_reach_keeps_the_best(counting_backend: Any, nets: SimpleNamespace, tmp_path: Path) -> None:
    net = nets.seeded(lambda: nn.Sequential(nn.Linear(4, 6), SmallBlock(), SmallBlock(), nn.Linear(6, 3)))
    data = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    with (
        pytest.warns(UserWarning, match="fewer than 50"),
        pytest.raises(foldcut.GoalError, match="only 2 of 50 blocks") as caught,
    ):
        run(net, data, counting_backend, foldcut.Blocks(50), mimic=None)
    best = caught.value.best
    assert isinstance(best, foldcut.Compiled)
    assert len(best.plan.decisions) == 2
    assert best.report.met is False
    assert len(list(best.save(tmp_path / "best").iterdir())) == 5
    assert ".best" in str(caught.value.hint)


def test_a_useless_last_block_is_dropped_and_mimicked(counting_backend: Any, nets: SimpleNamespace) -> None:
    """The network without it is the same, so there is nothing to train; that must not be an error."""
    net = nets.seeded(lambda: nets.ResNet(2), seed=1)
    nets.silence(net.blocks[1])
    result = run(net, nets.images(24), counting_backend, foldcut.Blocks(1))
    assert [d.path for d in result.plan.decisions] == ["blocks.1"]
    torch.testing.assert_close(result.module(nets.images(3)), net(nets.images(3)), rtol=1e-4, atol=1e-5)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def bad_inputs() -> dict[str, tuple[type[foldcut.CompilerError], dict[str, Any]]]:
    x = torch.randn(8, 3, 8, 8)
    nan = x.clone()
    nan[3, 1, 2, 2] = float("nan")
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)).eval()
    pairs = DataLoader(TensorDataset(x, torch.zeros(8)), batch_size=4)
    return {
        "untraceable model": (foldcut.CaptureError, {"model": Branching().eval()}),
        "no model": (foldcut.CaptureError, {"model": 3}),
        "missing file": (foldcut.CaptureError, {"model": "missing.pt2"}),
        "wrong shape": (foldcut.CompilerError, {"calibration": torch.randn(8, 5, 8, 8)}),
        "wrong dtype": (foldcut.CompilerError, {"calibration": x.to(torch.uint8)}),
        "empty": (foldcut.CalibrationError, {"calibration": x[:0]}),
        "empty list": (foldcut.CalibrationError, {"calibration": []}),
        "nan": (foldcut.CalibrationError, {"calibration": nan}),
        "a path": (foldcut.CalibrationError, {"calibration": "images"}),
        "nothing": (foldcut.CalibrationError, {"calibration": None}),
        "unknown backend": (foldcut.BackendError, {"backend": "abacus"}),
        "backend class": (foldcut.BackendError, {"backend": object}),
        "no region": (foldcut.GoalError, {"model": small}),
        "no region, labels": (foldcut.GoalError, {"model": small, "calibration": pairs}),
        "no goal": (foldcut.GoalError, {"goal": 0.7}),
        "rewrites": (foldcut.CompilerError, {"rewrites": ("paint",)}),
        "no rewrites": (foldcut.CompilerError, {"rewrites": ()}),
        "batch": (foldcut.CompilerError, {"batch": 0}),
        "threads": (foldcut.CompilerError, {"threads": 0}),
        "seed": (foldcut.CompilerError, {"seed": -1}),
        "large seed": (foldcut.CompilerError, {"seed": 2**63}),
    }


@pytest.mark.parametrize("name", list(bad_inputs()))
def test_bad_input_is_a_clear_error_and_leaves_no_file(
    name: str, residual_net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kind, options = bad_inputs()[name]
    given: dict[str, Any] = {
        "model": residual_net,
        "calibration": torch.randn(8, 3, 8, 8),
        "goal": foldcut.Blocks(1),
        "progress": False,
        **options,
    }
    with pytest.raises(kind) as caught:
        foldcut.compile(given.pop("model"), given.pop("calibration"), **given)
    assert isinstance(caught.value, foldcut.CompilerError)
    message = str(caught.value)
    assert message.startswith(f"{caught.value.stage}: ")
    assert caught.value.hint or caught.value.expected or caught.value.actual
    assert not list(tmp_path.iterdir())


def test_samples_that_do_not_fit_an_exported_network(residual: Program, nets: SimpleNamespace) -> None:
    from foldcut.compiler.export.exporter import to_exported

    exported = to_exported(residual)
    with pytest.raises(foldcut.CalibrationError, match="wrong shape for input 'x'"):
        foldcut.compile(exported, torch.randn(8, 3, 9, 9), goal=foldcut.Blocks(1), progress=False)
    with pytest.raises(foldcut.CalibrationError, match="wrong dtype for input 'x'"):
        foldcut.compile(exported, nets.images(8).to(torch.uint8), goal=foldcut.Blocks(1), progress=False)


def test_no_region_says_what_was_looked_at(nets: SimpleNamespace) -> None:
    net = nets.image_net(nets.Downsample(), channels=16).eval()
    with pytest.raises(foldcut.GoalError, match=r"no removable region.*the shape changes"):
        foldcut.compile(net, nets.images(8), goal=foldcut.Blocks(1), progress=False)


def test_importing_is_light() -> None:
    """Exporters, runtimes and solvers are imported when they are needed."""
    heavy = ("onnxruntime", "onnx", "scipy", "onnxscript", "onnx_graphsurgeon", "PIL", "sklearn", "rich.progress")
    code = f"import sys, foldcut; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"


def test_all_that_is_promised_is_there() -> None:
    assert {"compile", "Latency", "Blocks", "Compiled", "MimicSettings", "CompilerError"} <= set(foldcut.__all__)
    assert all(hasattr(foldcut, name) for name in foldcut.__all__)
    goals = {"MaxError"}
    errors = [getattr(foldcut, name) for name in foldcut.__all__ if name.endswith("Error") and name not in goals]
    assert all(issubclass(e, foldcut.CompilerError) for e in errors)
    assert len({e.stage for e in errors}) == len(errors)


def test_the_report_holds_what_each_stage_did_and_could_not_do_without(
    compiled: foldcut.Compiled, residual: Program
) -> None:
    stages = {stage["stage"]: stage for stage in compiled.report.profile}
    assert list(stages) == list(compiled.report.seconds)
    samples = compiled.report.calibration["test"]
    both = program_cost(residual).macs + program_cost(compiled.program).macs
    assert stages["test"]["least_macs"] == samples * both
    for name in ("choose", "re-solve", "test"):
        assert sum(stages[name]["macs"].values()) >= stages[name]["least_macs"] > 0
    assert stages["mimic"]["macs"]["gradient"] > 0
    assert stages["export"]["least_macs"] is None
    rows = compiled.report.profile_rows()
    assert {row[0] for row in rows} == set(stages)
    assert all(len(row) == len(rows[0]) for row in rows)
