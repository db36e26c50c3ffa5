"""A plan put into effect again, with the weights of the first time or with data; several goals in one sweep."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foldcut
import numpy as np
import pytest
import torch
from foldcut.compiler.cli import main as cli
from foldcut.compiler.cli.goals import read_settings
from foldcut.compiler.cli.options import SweepOptions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.output_error import output_error
from foldcut.compiler.driver import sweep as sweep_module
from foldcut.compiler.driver.sweep import Sweep, SweepPoint
from foldcut.compiler.export.exporter import to_exported, to_onnx, to_pt2
from foldcut.compiler.ir.edit_folds import fold_parameters
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


def test_a_report_of_another_network_goes(
    saved: tuple[foldcut.Compiled, Path], net: nn.Module, data: torch.Tensor, tmp_path: Path
) -> None:
    _, folder = saved
    shutil.copytree(folder, tmp_path / "out")
    again = foldcut.apply(net, folder / "plan.json", calibration=data, mimic=False)
    again.save(tmp_path / "out")
    loaded = foldcut.load(tmp_path / "out")
    assert loaded.compiled_report is None
    assert torch.equal(loaded.module(data), again.module(data))


def test_weights_of_another_run_are_said_to_be(
    saved: tuple[foldcut.Compiled, Path], net: nn.Module, data: torch.Tensor, tmp_path: Path
) -> None:
    """Beside the plan they are a mistake; where they are named, they may have been trained further."""
    _, folder = saved
    other = foldcut.apply(net, folder / "plan.json", calibration=data[:24], mimic=False)
    other.save(tmp_path / "other")
    shutil.copytree(folder, tmp_path / "mixed")
    shutil.copy(tmp_path / "other/model.pt2", tmp_path / "mixed/model.pt2")
    with pytest.raises(foldcut.OutputError, match=r"model\.pt2 is not the one that plan\.json was saved with"):
        foldcut.apply(net, tmp_path / "mixed/plan.json", example=data[:2])
    with pytest.warns(UserWarning, match="is not the model.pt2 that was saved with the plan"):
        taken = foldcut.apply(net, folder / "plan.json", weights=tmp_path / "other/model.pt2", example=data[:2])
    assert torch.equal(taken.module(data), other.module(data))


def wrong_network(net: nn.Module) -> dict[str, Any]:
    torch.manual_seed(9)
    return {"model": type(net)(3, 8).eval()}


CASES: list[tuple[Callable[..., dict[str, Any]], str]] = [
    (wrong_network, "another network"),
    (lambda net: {"weights": net}, "not those of this plan"),
    # with both, the weights are what counts: solving again would have been possible
    (lambda net: {"calibration": torch.zeros(4, 3, 8, 8), "weights": net}, "the weights are not those of this plan"),
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


def test_weights_are_taken_where_data_only_shows_the_inputs(
    saved: tuple[foldcut.Compiled, Path], net: nn.Module, data: torch.Tensor
) -> None:
    made, folder = saved
    again = foldcut.apply(net, folder / "plan.json", weights=folder / "model.pt2", calibration=data[:4])
    assert torch.equal(again.program(data), made.program(data))
    assert again.output_errors == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"scheme": "magic"}, "no scheme 'magic' for this layer"),
        ({"ranks": (99,)}, "ranks out of range"),
        ({"ranks": (2, 2)}, "ranks out of range"),
        ({"layer": "conv2d_99"}, "conv2d_99"),
        ({"layer": "conv2d_1"}, "conv2d_1"),
    ],
    ids=str,
)
def test_an_edited_plan_is_refused_with_data_as_without(
    damage: dict[str, Any], message: str, net: nn.Module, data: torch.Tensor
) -> None:
    """Before anything is solved, and not as a mistake of foldcut's own."""
    program = fold_parameters(foldcut.capture(net, data[:2]))
    drop = foldcut.DropBlock(entry="relu", exit="relu_2")
    layer = foldcut.FactorizeLayer(layer="conv2d_3", scheme="channel", ranks=(4,), full=(8,))
    plan = foldcut.Plan(decisions=(drop, layer), goal=foldcut.Macs(0.5), fingerprint=program.fingerprint, predicted={})
    foldcut.apply_plan(program, plan)
    edited = replace(plan, decisions=(drop, replace(layer, **damage)))
    stages: list[str] = []
    for act in (
        lambda: foldcut.apply_plan(program, edited),
        lambda: foldcut.apply(net, edited, calibration=data, progress=lambda stage, *_counts: stages.append(stage)),
    ):
        with pytest.raises(foldcut.RewriteError, match=message):
            act()
    assert stages == []


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
    assert json.loads(shown.stdout)["output_errors"].keys() >= {"rewritten", "re-solved"}
    other = run("apply", plan, files / "net.onnx", "-o", tmp_path / "no")
    assert other.exit_code == 1 and not (tmp_path / "no").exists()


WORDS = """
import torch
from torch import nn


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.more = nn.Embedding(10, 6), nn.Linear(4, 6)
        self.up, self.down, self.head = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, tokens, extra):
        x = self.words(tokens) + self.more(extra)
        return self.head(x + self.down(torch.relu(self.up(x))))


def build():
    torch.manual_seed(0)
    return Words()
"""


def test_a_module_of_several_inputs_is_replayed_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("foldcut_replay_words.py").write_text(WORDS)
    chance = np.random.default_rng(0)
    extra = chance.standard_normal((20, 4)).astype(np.float32)
    np.savez("data.npz", tokens=chance.integers(0, 10, 20), extra=extra)
    model, common = "foldcut_replay_words:build", ("--calib", "data.npz", "--no-mimic", "-q")
    made = run("compile", model, *common, "--keep", 0.5, "--multiple-of", 2, "-o", "out")
    assert made.exit_code == 0, made.output
    alone = run("apply", "out/plan.json", model, "-o", "no")
    assert alone.exit_code == 1 and "--solved model.pt2 and --calib DATA" in alone.stderr
    done = run("apply", "out/plan.json", model, "--calib", "data.npz", "--solved", "out/model.pt2", "-o", "again")
    assert done.exit_code == 0, done.output
    assert "output error" not in done.output
    first, again = foldcut.load("out"), foldcut.load("again")
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name])
    solved = run("apply", "out/plan.json", model, *common, "--json", "-o", "solved")
    assert json.loads(solved.stdout)["output_errors"].keys() >= {"rewritten", "re-solved"}


def test_options_of_samples_need_samples(files: Path, tmp_path: Path) -> None:
    for option, value in (("--key", "x"), ("--size", "2,2"), ("--mean", "0,0,0"), ("--std", "1,1,1")):
        ended = run("apply", "plan.json", files / "net.pt2", option, value, "-o", tmp_path / "no")
        assert ended.exit_code == 1 and f"{option}: there are no samples to read" in ended.stderr


def swept(files: Path, *arguments: Any) -> Any:
    return run(
        "sweep", files / "net.pt2", "--calib", files / "inputs.npy", "--no-mimic", "--multiple-of", 2, *arguments
    )


def test_a_sweep_with_a_mistake_in_its_arguments_is_an_error(files: Path, tmp_path: Path) -> None:
    """As for compile: that no goal can be worked towards is hardly the goals' fault."""
    out = tmp_path / "out"
    for arguments in (("--macs", "0.8,0.5"), ("--latency", "0.8", "--macs", "0.8")):
        ended = swept(files, *arguments, "--ignore", "typo*", "-o", out, "-q")
        assert ended.exit_code == 1, ended.output
        assert "matches 'typo*'" in ended.stderr and "  hint: " in ended.stderr
        assert ended.stderr.count("typo*") == 1
        assert not out.exists()


def test_every_unmet_goal_is_told(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = swept(files, "--latency", "99999ms", "--macs", "0.8,0.001", "-o", out, "-q")
    assert ended.exit_code == 3, ended.output
    assert ended.stdout == ""
    lines = [line for line in ended.stderr.splitlines() if line.startswith("goal: ")]
    assert len(lines) == 2
    assert lines[0].startswith("goal: the original takes") and "latency 99999 ms" in lines[0]
    assert lines[1].startswith("goal: MACs ratio 0.001 cannot be met")
    points = json.loads((out / "sweep.json").read_text())["points"]
    assert [point["met"] for point in points] == [False, True, False]
    assert sorted(p.name for p in out.iterdir()) == ["MACs-ratio-0.001", "MACs-ratio-0.8", "sweep.json"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, foldcut.BackendError("no memory left")], ids=str)
@pytest.mark.parametrize("fresh", [False, True])
def test_what_a_sweep_has_finished_is_indexed(
    fault: Any, fresh: bool, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = sweep_module.compile_model

    def failing(*arguments: Any, **options: Any) -> Any:
        if options["goal"] == foldcut.Macs(0.5):
            raise fault
        return compiled(*arguments, **options)

    monkeypatch.setattr(sweep_module, "compile_model", failing)
    out = tmp_path / "out"
    ended = swept(files, "--macs", "0.8,0.5,0.3", "-o", out, "-q", *(["--fresh"] if fresh else []))
    points = json.loads((out / "sweep.json").read_text())["points"]
    assert [(point["goal"]["ratio"], point["folder"]) for point in points] == [(0.8, "MACs-ratio-0.8")]
    assert foldcut.load(out / "MACs-ratio-0.8").report["goal"] == points[0]["goal"]
    if isinstance(fault, foldcut.BackendError):
        assert ended.exit_code == 1 and ended.stderr == "backend: no memory left\n"
        return
    kept = "" if fresh else "; what is done is kept, and the same command goes on from there"
    assert ended.exit_code == 130 and ended.stderr == f"interrupted; finished goals are in the folder{kept}\n"


def test_what_is_left_alone_is_sorted_out_for_every_goal(net: nn.Module, data: torch.Tensor) -> None:
    """`blocks.0.conv2` is a layer and no group: a goal that prunes would refuse its name."""
    names, samples = ["blocks.0.conv2", "blocks.1.conv1"], CalibrationSet.of(data)
    common: Any = {"model": "net.pt2", "calib": Path("x.npy"), "output": Path("out")}
    settings = read_settings(SweepOptions(multiple_of="2", ignore=names, **common))
    mixed = [foldcut.Latency(0.5), foldcut.Macs(0.5)]
    for rewrites in sweep_module._leaving_alone(sweep_module._chosen(mixed, None, settings), net, samples).values():
        for rewrite in rewrites:
            assert rewrite.ignore == (("blocks.1.conv1",) if rewrite.name == "prune_channels" else tuple(names))
    alike = [foldcut.Macs(0.8), foldcut.Macs(0.5)]
    chosen = sweep_module._chosen(alike, None, settings)
    assert sweep_module._leaving_alone(chosen, net, samples) is chosen
    with pytest.raises(foldcut.GoalError, match=r"no unit group or output matches 'blocks\.0\.conv2'"):
        foldcut.sweep(net, data, goals=alike, settings=settings, mimic=False, progress=False)


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
    wrong = run("sweep", *common, "--macs", "0.5", "--rewrites", "drop_all", "-o", tmp_path / "no")
    assert wrong.exit_code == 1 and "drop_all" in wrong.output and not (tmp_path / "no").exists()


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
