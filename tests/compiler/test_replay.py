"""A plan put into effect again, with the weights of the first time or with data; several goals in one sweep."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foldcut
import numpy as np
import pytest
import torch
from foldcut.compiler import cli
from foldcut.compiler.calibration_set import CalibrationSet
from foldcut.compiler.export import to_exported, to_onnx, to_pt2
from foldcut.compiler.sweep import Sweep, SweepPoint
from foldcut.compiler.verify import output_error
from torch import nn
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("quick_measurement")

#: One plan of each kind of rewrite.
GOALS: dict[str, tuple[foldcut.Plan, Any]] = {
    "drop_blocks": (foldcut.Blocks(1), None),
    "prune_channels": (foldcut.Channels(0.5), None),
    "factorize": (foldcut.Ranks(keep=0.5), None),
}
SETTINGS = foldcut.PipelineSettings(
    channels=foldcut.ChannelSettings(limits=foldcut.ChannelLimits(multiple_of=2)),
    ranks=foldcut.RankSettings(multiple_of=2),
)


@pytest.fixture(scope="module")
def net(nets: SimpleNamespace) -> nn.Module:
    torch.manual_seed(0)
    return nets.ResNet(3, 8).eval()


@pytest.fixture(scope="module")
def data(nets: SimpleNamespace) -> torch.Tensor:
    return nets.images(48)


@pytest.fixture(scope="module", params=list(GOALS))
def saved(
    request: pytest.FixtureRequest, net: nn.Module, data: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[foldcut.Compiled, Path]:
    goal, rewrites = GOALS[request.param]
    brief = foldcut.MimicSettings(iterations=10)
    made = foldcut.compile(
        net, data, goal=goal, rewrites=rewrites, mimic=brief, settings=SETTINGS, progress=False, cache=False
    )
    return made, made.save(tmp_path_factory.mktemp("saved") / "out")


def error_of(program: foldcut.Program, net: nn.Module, data: torch.Tensor) -> float:
    return output_error(foldcut.capture(net, data[:2]), program, CalibrationSet.of(data))


def test_the_saved_weights_give_the_same_network(
    saved: tuple[foldcut.Compiled, Path], net: nn.Module, data: torch.Tensor, tmp_path: Path
) -> None:
    made, folder = saved
    again = foldcut.apply(net, folder / "plan.json", example=data[:2])
    assert again.program.text() == made.program.text()
    assert torch.equal(again.program(data), made.program(data))
    assert again.output_errors == {}
    again.save(tmp_path / "again")
    assert (tmp_path / "again/plan.json").read_bytes() == (folder / "plan.json").read_bytes()
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["model.onnx", "model.pt2", "plan.json"]


def test_with_data_the_same_is_cut_and_solved_again(
    saved: tuple[foldcut.Compiled, Path], net: nn.Module, data: torch.Tensor
) -> None:
    made, folder = saved
    again = foldcut.apply(net, folder / "plan.json", calibration=data, mimic=False)
    plain = foldcut.apply_plan(foldcut.capture(net, data[:2]), made.plan)
    assert again.program.parameter_count() == made.program.parameter_count() == plain.parameter_count()
    assert again.plan.decisions == made.plan.decisions
    # solved with the same data as the first time, not just cut
    first = [e for stage, e in made.report.output_errors.items() if stage in {"re-solved", "polished"}][-1]
    assert again.output_errors["re-solved"] == pytest.approx(first, rel=0.05)
    assert error_of(again.program, net, data) < 0.9 * error_of(plain, net, data)


def test_mimicking_goes_on_from_there(saved: tuple[foldcut.Compiled, Path], net: nn.Module, data: torch.Tensor) -> None:
    brief = foldcut.MimicSettings(iterations=10)
    again = foldcut.apply(net, saved[0].plan, calibration=data, mimic=brief, settings=SETTINGS)
    assert again.output_errors["mimicked"] <= again.output_errors["re-solved"] * (1 + 1e-6)


def wrong_network(net: nn.Module) -> dict[str, Any]:
    torch.manual_seed(9)
    return {"model": type(net)(3, 8).eval()}


CASES: list[tuple[Callable[..., dict[str, Any]], str]] = [
    (wrong_network, "another network"),
    (lambda net: {"weights": net}, "not those of this plan"),
    (lambda net: {"calibration": torch.zeros(4, 3, 8, 8), "weights": net}, "not the weights"),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=[message for _, message in CASES])
def test_what_does_not_fit_is_refused(
    change: Callable[..., dict[str, Any]],
    message: str,
    saved: tuple[foldcut.Compiled, Path],
    net: nn.Module,
    data: torch.Tensor,
) -> None:
    arguments: dict[str, Any] = {"model": net, "plan": saved[1] / "plan.json", "example": data[:2], **change(net)}
    with pytest.raises(foldcut.PlanError, match=message):
        foldcut.apply(**arguments)


def test_a_plan_alone_is_not_enough(saved: tuple[foldcut.Compiled, Path], net: nn.Module, data: torch.Tensor) -> None:
    with pytest.raises(foldcut.PlanError, match="not the weights") as caught:
        foldcut.apply(net, saved[0].plan, example=data[:2])
    assert "calibration set" in str(caught.value)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def files(net: nn.Module, data: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    program = foldcut.capture(net, data[:2])
    (folder / "net.pt2").write_bytes(to_pt2(to_exported(program)))
    (folder / "net.onnx").write_bytes(to_onnx(program))
    np.save(folder / "inputs.npy", data.numpy())
    return folder


def test_apply_on_the_command_line(files: Path, tmp_path: Path) -> None:
    model, calib = files / "net.pt2", files / "inputs.npy"
    made = run("compile", model, "--calib", calib, "--blocks", 1, "--no-mimic", "-o", tmp_path / "out", "-q")
    assert made.exit_code == 0, made.output
    plan = tmp_path / "out/plan.json"
    done = run("apply", plan, model, "-o", tmp_path / "again")
    assert done.exit_code == 0, done.output
    assert "drop blocks." in done.output and (tmp_path / "again/model.onnx").is_file()
    shown = run("apply", plan, model, "--calib", calib, "--no-mimic", "-o", tmp_path / "solved", "--json")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["output_errors"].keys() == {"rewritten", "re-solved"}
    other = run("apply", plan, files / "net.onnx", "-o", tmp_path / "no")
    assert other.exit_code == 1 and not (tmp_path / "no").exists()


def test_sweep_on_the_command_line(files: Path, tmp_path: Path) -> None:
    common = (files / "net.pt2", "--calib", files / "inputs.npy", "--no-mimic", "--multiple-of", 2, "--cache", tmp_path)
    done = run("sweep", *common, "--macs", "0.8,0.5", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "out/sweep.json").read_text())
    assert [point["goal"]["ratio"] for point in found["points"]] == [0.8, 0.5]
    for point in found["points"]:
        assert point["macs"]["after"] <= point["goal"]["ratio"] * point["macs"]["before"]
        assert foldcut.load(tmp_path / "out" / point["folder"]).report["goal"] == point["goal"]
    errors = [point["output_error"] for point in found["points"]]
    assert errors[0] < errors[1]
    table = run("sweep", *common, "--macs", "0.8", "-o", tmp_path / "table")
    assert table.exit_code == 0 and "MACs ratio 0.8" in table.output
    unmet = run("sweep", *common, "--macs", "0.001", "-o", tmp_path / "unmet", "-q")
    assert unmet.exit_code == 3 and (tmp_path / "unmet/sweep.json").is_file()
    assert run("sweep", *common, "--macs", "half", "-o", tmp_path / "no").exit_code == 1
    assert run("sweep", *common, "--latency", ",", "-o", tmp_path / "no").exit_code == 1
    wrong = run("sweep", *common, "--macs", "0.5", "--rewrites", "drop_blocks", "-o", tmp_path / "no")
    assert wrong.exit_code == 1 and "drop_blocks" in wrong.output and not (tmp_path / "no").exists()


def test_analyses_are_shared_within_a_sweep(net: nn.Module, data: torch.Tensor) -> None:
    stages: list[str] = []
    found = foldcut.sweep(
        net,
        data,
        goals=[foldcut.Macs(0.8), foldcut.Macs(0.6)],
        mimic=False,
        settings=SETTINGS,
        cache=False,
        progress=lambda stage, _done, _total: stages.append(stage),
    )
    assert all(point.met for point in found.points) and stages.count("channel moments") == 1


def test_goals_of_a_sweep_are_checked(net: nn.Module, data: torch.Tensor) -> None:
    with pytest.raises(foldcut.GoalError, match="needs a goal"):
        foldcut.sweep(net, data, goals=[])
    with pytest.raises(foldcut.GoalError, match="twice"):
        foldcut.sweep(net, data, goals=[foldcut.Blocks(1), foldcut.Blocks(1)])


def test_the_front_is_what_no_other_point_beats() -> None:
    def point(number: int, ratio: float, error: float) -> SweepPoint:
        report = SimpleNamespace(latency={"ratio": ratio}, output_error=error)
        compiled: Any = SimpleNamespace(report=report)
        return SweepPoint(goal=foldcut.Blocks(number), compiled=compiled, met=True)

    points = [point(1, 0.8, 0.1), point(2, 0.6, 0.3), point(3, 0.7, 0.05), point(4, 0.6, 0.4), point(5, 0.9, 0.05)]
    nothing = SweepPoint(goal=foldcut.Blocks(6), compiled=None, met=False, reason="no")
    front = Sweep(points=(*points, nothing)).front
    assert [p.goal for p in front] == [foldcut.Blocks(2), foldcut.Blocks(3)]
