"""The error that is reported: of samples that nothing was chosen by, with an interval."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.output_error import output_error
from foldcut.compiler.data.sampled_error import SampledError, sampled_error, squares_by_sample, warn_if_lost
from foldcut.compiler.driver import pipeline, pipeline_settings
from foldcut.compiler.driver.pipeline_settings import PipelineSettings
from foldcut.compiler.ir.edit import set_tensors
from foldcut.compiler.ir.program import Program
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class TimeFirst(nn.Module):
    """An output whose first dimension is not the batch, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        return y.transpose(0, 1), y.mean(1)


def pair(net: nn.Module, data: torch.Tensor, noise: float = 0.1) -> tuple[Program, Program]:
    teacher = foldcut.capture(net.eval(), data[:2])
    generator = torch.Generator().manual_seed(1)
    changed = {
        name: value + noise * torch.randn(value.shape, generator=generator)
        for name, value in teacher.module.named_parameters()
    }
    return teacher, set_tensors(teacher, changed, note="noise")


class Score(nn.Linear):
    """One number for each sample."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[:, 0]


@pytest.mark.parametrize("net", [nn.Linear(4, 3), Score(4, 3), TimeFirst()], ids=["rows", "scores", "time first"])
def test_it_is_the_output_error_sample_by_sample(net: nn.Module) -> None:
    data = torch.randn(70, *([5] if isinstance(net, TimeFirst) else []), 4)
    teacher, student = pair(net, data)
    samples = CalibrationSet.of(data)
    found = sampled_error(teacher, student, samples)
    assert found.samples == 70
    assert found.error == pytest.approx(output_error(teacher, student, samples), rel=1e-6)
    assert found.low is not None and found.high is not None and 0 < found.low < found.error < found.high
    errors, energies = squares_by_sample(teacher, student, samples)
    for index in (0, 33, 69):
        alone = samples.take(slice(index, index + 1))
        assert errors[index] / energies[index] == pytest.approx(output_error(teacher, student, alone), rel=1e-5)
    assert sampled_error(teacher, student, samples) == found


def test_nothing_changed_and_single_samples() -> None:
    data = torch.randn(9, 4)
    teacher, student = pair(nn.Linear(4, 3), data)
    same = sampled_error(teacher, teacher, CalibrationSet.of(data))
    assert (same.error, same.low, same.high) == (0.0, 0.0, 0.0)
    single = sampled_error(teacher, student, CalibrationSet.of(data[:1]))
    assert single.low is None and single.high is None and single.most == single.error > 0


def test_an_error_that_is_not_finite_stays_so() -> None:
    data = torch.randn(9, 4)
    teacher, _ = pair(nn.Linear(4, 3), data)
    broken = set_tensors(teacher, {"weight": torch.full((3, 4), math.inf)}, note="broken")
    found = sampled_error(teacher, broken, CalibrationSet.of(data))
    assert not math.isfinite(found.error) and not math.isfinite(found.most)


def test_the_interval_covers_the_truth() -> None:
    """Of 200 samples of 64 inputs the interval holds the error of all inputs nearly as often as it says."""
    everything = torch.randn(4000, 4) * torch.rand(4000, 1, generator=torch.Generator().manual_seed(2))
    teacher, student = pair(nn.Linear(4, 3), everything)
    truth = output_error(teacher, student, CalibrationSet.of(everything), batch_size=4000)
    held = 0
    for seed in range(200):
        chosen = torch.randperm(4000, generator=torch.Generator().manual_seed(seed))[:64]
        found = sampled_error(teacher, student, CalibrationSet.of(everything[chosen]), seed=seed)
        held += found.low <= truth <= found.high  # type: ignore[operator]
    assert held / 200 > 0.88


def compiled(net: nn.Module, data: Any, goal: Any, **options: Any) -> foldcut.Compiled:
    return foldcut.compile(net, data, goal=goal, mimic=None, progress=False, cache=False, **options)


@pytest.mark.usefixtures("quick_measurement")
def test_the_report_has_the_error_of_the_test_samples(residual_net: nn.Module, nets: Any) -> None:
    data = nets.images(60)
    labelled = DataLoader(TensorDataset(data, torch.zeros(60)), batch_size=16)
    made = compiled(residual_net, labelled, foldcut.Blocks(2))
    report = made.report.to_dict()
    sets = PipelineSettings().split(CalibrationSet.of(data), made.outcome.ctx.teacher)
    wanted = sampled_error(made.outcome.ctx.teacher, made.program, sets.test)
    assert report["test"] == wanted.to_dict() and report["output_error"] == wanted.error
    assert wanted.low is not None and wanted.low < wanted.error
    judged = output_error(made.outcome.ctx.teacher, made.program, sets.judge)
    assert list(report["output_errors"].values())[-1] == pytest.approx(judged)
    assert {key: report["calibration"][key] for key in ("samples", "fit", "judge", "test", "shared")} == {
        "samples": 60, "fit": 48, "judge": 6, "test": 6, "shared": False,
    }  # fmt: skip
    page = made.files["report.html"].decode()
    assert report["calibration"]["ignored"] == ["field 2"] and "no inputs: field 2" in page
    assert "on 6 test samples" in page and "test samples" in str(made.report.rows())
    again = foldcut.apply(residual_net, made.plan, calibration=data, mimic=None, cache=False)
    assert again.tested is not None and again.tested.samples == 6


@pytest.mark.usefixtures("quick_measurement")
def test_what_the_test_samples_are_chooses_nothing(
    residual_net: nn.Module, nets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other test samples, the same network; the error that is reported is another."""
    data = nets.images(60)
    first = compiled(residual_net, data, foldcut.Blocks(2))
    real = pipeline_settings.divided

    def others(samples: CalibrationSet, *how: Any) -> Any:
        sets = real(samples, *how)
        return replace(sets, test=CalibrationSet.of(3 * nets.images(7) + 1))

    monkeypatch.setattr(pipeline_settings, "divided", others)
    second = compiled(residual_net, data, foldcut.Blocks(2))
    assert second.program.fingerprint == first.program.fingerprint
    assert second.report.output_errors == first.report.output_errors
    assert second.report.output_error != first.report.output_error


@pytest.mark.usefixtures("quick_measurement")
@pytest.mark.parametrize("reported", [0.049, 0.051])
def test_a_bound_on_the_error_goes_by_the_test_samples(
    residual_net: nn.Module, nets: Any, work_backend: Any, monkeypatch: pytest.MonkeyPatch, reported: float
) -> None:
    """Whatever the judging samples say."""
    found = SampledError(error=reported, low=0.04, high=0.06, samples=6)
    monkeypatch.setattr(pipeline, "sampled_error", lambda *_, **__: found)
    options = {"rewrites": ("drop_blocks",), "backend": work_backend}
    if reported <= 0.05:
        assert compiled(residual_net, nets.images(60), foldcut.MaxError(0.05), **options).report.met
        return
    with pytest.raises(foldcut.GoalError, match=r"is not met.* 0\.051 \(95 %: 0\.04 to 0\.06, 6 test") as caught:
        compiled(residual_net, nets.images(60), foldcut.MaxError(0.05), **options)
    best: Any = caught.value.best
    assert not best.report.met and best.report.output_error == reported


@pytest.mark.parametrize("error", [0.5, 3.0, math.inf, math.nan])
def test_a_result_that_is_hardly_the_original_any_more_says_so(error: float) -> None:
    with pytest.warns(UserWarning, match=r"little is left .* output error .* \(1 test sample\) .*; ask for less"):
        warn_if_lost(SampledError(error=error, low=None, high=None, samples=1))


def test_a_result_that_is_still_the_original_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_lost(SampledError(error=0.49, low=0.3, high=0.7, samples=9))


def test_a_compile_and_an_applied_plan_warn_of_what_is_lost() -> None:
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64, bias=False)).eval()
    data = torch.randn(60, 64)
    with pytest.warns(UserWarning, match="little is left") as compiled:
        made = foldcut.compile(net, data, goal=foldcut.Channels(0.03), mimic=None, cache=False)
    with pytest.warns(UserWarning, match="little is left") as applied:
        foldcut.apply(net, made.plan, calibration=data, mimic=False, cache=False)
    for found in (compiled, applied):
        (warning,) = (one for one in found if "little is left" in str(one.message))
        assert warning.filename == __file__, "it names the caller's line"
