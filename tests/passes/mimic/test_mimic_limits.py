"""Mimicking keeps to a time and to a budget of work, and is left out where it cannot pay."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.sample_sets import SampleSets
from foldcut.compiler.driver.pipeline import mimicking
from foldcut.compiler.driver.pipeline_settings import PipelineSettings
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.cost import program_cost
from foldcut.compiler.ir.program import Program
from foldcut.compiler.report.page import report_page
from foldcut.compiler.store.analysis_store import AnalysisStore
from foldcut.compiler.store.checkpoint import Standing
from foldcut.passes.drop.drop_blocks import drop_blocks
from foldcut.passes.mimic import stored, timetable, training
from foldcut.passes.mimic.settings import MimicSettings
from foldcut.passes.mimic.timetable import Timetable, affordable
from foldcut.passes.mimic.training import Lesson, Training
from foldcut.passes.mimic.training_macs import TrainingMacs
from foldcut.passes.mimic.training_stage import NO_ROOM, NOTHING_TO_TRAIN, Mimicked, mimic

QUICK: dict[str, Any] = {"batch_size": 8, "bfloat16": False, "patience": 100}
LOOK_S = 0.5


class Clock:
    """A clock that only training moves: a step takes `step_s`, a look at the held-out error `LOOK_S`."""

    def __init__(self) -> None:
        self.now_s, self.step_s = 1000.0, 1.0
        self.paces: list[float] = []

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timetable, "monotonic", made)
    monkeypatch.setattr(training, "monotonic", made)
    step, error, pace = Training.step, Training.error, Training._pace

    def slow_step(self: Training) -> bool:
        made.now_s += made.step_s
        return step(self)

    def slow_error(self: Training) -> tuple[float, float]:
        made.now_s += LOOK_S
        return error(self)

    def noted_pace(self: Training, iteration: int) -> float:
        made.paces.append(pace(self, iteration))
        return made.paces[-1]

    monkeypatch.setattr(Training, "step", slow_step)
    monkeypatch.setattr(Training, "error", slow_error)
    monkeypatch.setattr(Training, "_pace", noted_pace)
    return made


class Kept:
    """A checkpoint in memory: keeps the state of every iteration, begins with one of them."""

    def __init__(self, first: Standing | None = None) -> None:
        self.first = first
        self.states: list[Standing] = []

    def read(self) -> Standing | None:
        return self.first

    def keep(self, standing: Callable[[], Standing]) -> None:
        data, tensors = standing()
        self.states.append((json.loads(json.dumps(data)), {name: value.clone() for name, value in tensors.items()}))


@pytest.fixture(scope="module")
def lesson(nets: SimpleNamespace) -> Lesson:
    teacher = capture(nets.seeded(lambda: nets.ResNet(3), seed=1), nets.images())
    student = drop_blocks(teacher, [find_regions(teacher).blocks[0]])
    fit, judge = CalibrationSet.of(nets.images(24, seed=1)), CalibrationSet.of(nets.images(8, seed=2))
    return Lesson(teacher=teacher, student=student, fit=fit, judge=judge)


def same_weights(a: Program, b: Program) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_as_many_iterations_are_made_as_fit_into_the_time(lesson: Lesson, clock: Clock) -> None:
    began = clock.now_s
    result = mimic(lesson, MimicSettings(**QUICK, seconds=40))
    assert 36 <= clock.now_s - began <= 40
    assert 30 <= result.iterations < 40 and result.after < 0.8 * result.before
    assert max(clock.paces) > 0.9 and clock.paces[-1] < 0.02, "the learning rate has come up, and down again"
    assert result.said == (f"mimicking ended after {result.iterations} of 400 iterations, within 40 s",)


@pytest.mark.parametrize("factor", [3.0, 0.4])
def test_a_machine_that_changes_its_pace(lesson: Lesson, clock: Clock, factor: float) -> None:
    def progress(_stage: str, done: int, _total: int) -> None:
        clock.step_s = factor if done >= 12 else 1.0

    began = clock.now_s
    result = mimic(lesson, MimicSettings(**QUICK, seconds=40), progress=progress)
    assert 36 <= clock.now_s - began <= 40 + factor + LOOK_S
    assert clock.paces[-1] < 0.1 and result.after < result.before


def test_time_enough_changes_nothing(lesson: Lesson, clock: Clock) -> None:
    plain, timed = (mimic(lesson, MimicSettings(**QUICK, iterations=20, seconds=s)) for s in (None, 10_000))
    assert plain.iterations == timed.iterations == 20 and timed.said == ()
    assert same_weights(plain.program, timed.program)


@pytest.mark.parametrize("done", [1, 2, 7, 20])
def test_a_resumed_training_goes_on_with_what_is_left(lesson: Lesson, clock: Clock, done: int) -> None:
    settings = MimicSettings(**QUICK, seconds=40)
    whole = Kept()
    mimic(lesson, settings, checkpoint=whole)
    spent_s = whole.states[done - 1][0]["time"]["spent_s"]
    assert done + LOOK_S <= spent_s <= done * (1 + LOOK_S) + LOOK_S
    clock.now_s += 5000.0  # nobody was training meanwhile
    began, seen = clock.now_s, []
    again = mimic(
        lesson,
        settings,
        progress=lambda _stage, now, _total: seen.append(now),
        checkpoint=Kept(whole.states[done - 1]),
    )
    assert seen == list(range(done + 1, again.iterations + 1))
    assert 36 <= spent_s + clock.now_s - began <= 40
    assert clock.paces[-1] < 0.02


def test_a_training_that_was_cut_off_at_its_end_has_a_last_look(lesson: Lesson, clock: Clock) -> None:
    whole = Kept()
    mimic(lesson, MimicSettings(**QUICK, iterations=9, checks=1), checkpoint=whole)
    data, tensors = whole.states[6]
    data["time"]["spent_s"] = 100.0
    result = mimic(lesson, MimicSettings(**QUICK, iterations=9, checks=1, seconds=60), checkpoint=Kept((data, tensors)))
    assert result.iterations == 7 and result.after < result.before


@pytest.mark.parametrize("seconds", [0.1, 0.9, 1.6, 2.9])
def test_little_time_is_no_error(lesson: Lesson, clock: Clock, seconds: float) -> None:
    """The first look takes half a second, a step one: time is over before the first check."""
    result = mimic(lesson, MimicSettings(**QUICK, checks=1, seconds=seconds))
    assert result.iterations == (0 if seconds < LOOK_S else max(1, int(seconds - 2 * LOOK_S)))
    assert result.skipped == (NO_ROOM if seconds < LOOK_S else None)
    assert result.after <= result.before
    assert (result.after < result.before) == (not same_weights(result.program, lesson.student))


def test_a_slow_teacher_is_not_run_on_all_samples_first(
    lesson: Lesson, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That would take all the time: its values are computed in every iteration."""
    values, asked = Training._values, []

    def slow(self: Training, module: Any, batch: Any) -> list[torch.Tensor]:
        if module is self.teacher:
            clock.now_s += 10.0
            asked.append(len(batch))
        return values(self, module, batch)

    monkeypatch.setattr(Training, "_values", slow)
    result = mimic(lesson, MimicSettings(**QUICK, seconds=100))
    assert len(asked) == result.iterations + 1 and 5 <= result.iterations <= 9
    asked.clear()
    mimic(lesson, MimicSettings(**QUICK, iterations=5))
    assert asked == [8, 8, 8]


def test_looks_count_in_what_can_be_afforded() -> None:
    assert affordable(100, 10, 0, 8) == 10
    assert affordable(100, 10, 5, 2) == 9
    assert affordable(100, 10, 30, 8) == 2, "a look behind each of two"
    assert affordable(5, 10, 0, 8) == affordable(-1, 10, 1, 8) == 0
    for left, step, look, checks in ((57, 3, 2, 4), (12, 5, 1, 8), (1000, 7, 11, 3)):
        n = affordable(left, step, look, checks)
        assert n * step + min(n, checks) * look <= left < (n + 1) * step + min(n + 1, checks) * look


def work_of(macs: float) -> TrainingMacs:
    """The work of a training of a network with so many, with all the samples that judge at most."""
    settings = MimicSettings()
    assert settings.macs is not None
    return TrainingMacs(
        teacher_macs=int(macs),
        student_macs=int(macs),
        most_macs=settings.macs,
        iterations=settings.iterations,
        batch=settings.batch_size,
        samples=64,
        checks=settings.checks,
    )


@pytest.mark.parametrize("macs", [125e6, 300e6], ids=["ResNet-56", "MobileNetV2"])
def test_the_default_bound_leaves_usual_networks_alone(macs: float) -> None:
    """At 32 and 224 pixels; the teacher's values cached or not."""
    work = work_of(macs)
    assert work.affords() >= 400 and work.affords(cached=True) >= 400 and work.judges == 64
    assert work.smaller(400, crop=None, cached=True) == ()


def test_the_default_bound_is_for_large_inputs() -> None:
    detector = work_of(20e9)
    assert 0 < detector.affords() < 20 < detector.affords(share=0.05)
    assert detector.share < 0.05
    assert detector.judges == 13 and 9 * detector.look_macs <= 0.25 * detector.most_macs
    assert "13 of 64 samples judge it" in detector.smaller(5, crop=None, cached=True)[0]
    assert work_of(200e9).judges == 8
    assert MimicSettings(macs=None).macs is None


def test_a_budget_of_work_makes_fewer_iterations(lesson: Lesson, clock: Clock) -> None:
    whole = TrainingMacs.of(lesson.teacher, lesson.student, (24, 8), MimicSettings(**QUICK))
    budget = replace(whole, iterations=10).asked(cached=True)
    result = mimic(lesson, MimicSettings(**QUICK, macs=int(budget)))
    assert result.iterations == 10 and result.after < result.before
    assert clock.paces[-1] < 0.05, "the learning rate comes down within them"
    (said,) = result.said
    assert "400 iterations of 8 samples" in said and "10 iterations are made" in said and "crops" not in said
    allowed = int(eval(said.split("MimicSettings(macs=")[1].split(")")[0]))
    assert mimic(lesson, MimicSettings(**QUICK, macs=allowed)).said == ()


def test_fewer_samples_judge_where_looks_would_take_it_all(lesson: Lesson, nets: SimpleNamespace) -> None:
    many = replace(lesson, judge=CalibrationSet.of(nets.images(40, seed=2)))
    one = program_cost(lesson.teacher).macs + program_cost(lesson.student).macs
    result = mimic(many, MimicSettings(**QUICK, checks=1, macs=4 * 2 * 10 * one))
    assert "10 of 40 samples judge it" in result.said[0] and result.iterations > 0
    ten = replace(lesson, judge=many.judge.take(slice(0, 10)))
    assert result.before == mimic(ten, MimicSettings(**QUICK, iterations=1)).before


def test_a_budget_below_an_iteration(lesson: Lesson) -> None:
    result = mimic(lesson, MimicSettings(**QUICK, macs=1))
    assert (result.iterations, result.skipped) == (0, NO_ROOM)
    assert result.program is lesson.student and "0 iterations are made" in result.said[0]
    assert mimic(lesson, MimicSettings(**QUICK, macs=None, iterations=2)).said == ()


def test_nothing_behind_the_change(lesson: Lesson) -> None:
    result = mimic(replace(lesson, student=lesson.teacher), MimicSettings(**QUICK))
    assert (result.iterations, result.skipped, result.before) == (0, NOTHING_TO_TRAIN, 0.0)
    assert result.program is lesson.teacher


def test_weights_that_nothing_compared_depends_on(nets: SimpleNamespace, lesson: Lesson) -> None:
    """The layer behind the features, where the outputs do not count: its gradient would be none."""
    teacher = lesson.teacher
    broken = foldcut.compiler.ir.edit.set_tensors(teacher, {"head.weight": torch.zeros(4, 8)}, note="damage")
    judged_alone = MimicSettings(**QUICK, hints=0.0)
    assert mimic(replace(lesson, student=broken), judged_alone).skipped == NOTHING_TO_TRAIN
    assert mimic(replace(lesson, student=broken), replace(judged_alone, outputs=1.0, iterations=8)).skipped is None


def asked_of(contexts: Any, lesson: Lesson, error: float, settings: MimicSettings, **changes: Any) -> foldcut.Applied:
    """What the pipeline makes of a network with such an output error."""
    ctx = contexts(lesson.teacher, lesson.fit, judge=lesson.judge, goal=foldcut.Blocks(1))
    done = foldcut.Applied(program=lesson.student, errors={"re-solved": error})
    return mimicking(replace(ctx, **changes), [], done, PipelineSettings(mimic=settings))


def never(*_args: Any, **_kwargs: Any) -> Mimicked:
    raise AssertionError("it was not skipped")


def test_it_is_left_out_where_it_cannot_pay(
    lesson: Lesson, contexts: Any, nets: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = CalibrationSet.of(nets.images(1))
    alone = SampleSets(fit=one.with_views((foldcut.horizontal_flip,)), judge=one, test=one, shared=True)
    brief = MimicSettings(**QUICK, iterations=2)
    monkeypatch.setattr(stored, "mimic", never)
    for error, settings, changes, words in (
        (0.1, replace(brief, seconds=0), {}, "it was given 0 seconds"),
        (1e-7, brief, {}, "the output error is 1.0e-07"),
        (0.1, brief, {"sets": alone}, "are those that it would be trained on"),
    ):
        done = asked_of(contexts, lesson, error, settings, **changes)
        assert words in str(done.unmimicked)
        assert done.program is lesson.student and list(done.errors) == ["re-solved"]


def test_it_is_not_left_out_where_it_may_pay(lesson: Lesson, contexts: Any) -> None:
    brief = MimicSettings(**QUICK, iterations=2)
    tight = foldcut.MaxError(1e-8)
    two = SampleSets(fit=lesson.fit.take(slice(0, 1)), judge=lesson.judge, test=lesson.judge, shared=True)
    for error, changes in ((0.1, {}), (1e-7, {"goal": tight}), (0.1, {"sets": two}), (math.nan, {})):
        done = asked_of(contexts, lesson, error, brief, **changes)
        assert done.unmimicked is None


def test_what_is_kept_says_again_what_was_said(lesson: Lesson, contexts: Any, tmp_path: Any) -> None:
    ctx = contexts(lesson.teacher, lesson.fit, judge=lesson.judge, store=AnalysisStore(tmp_path))
    done = foldcut.Applied(program=lesson.student)
    programs = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="mimicking was made smaller"):
            programs.append(stored.mimicked(ctx, done, MimicSettings(**QUICK, iterations=40, macs=10**8)).program)
    assert ctx.store.reused == 1 and same_weights(*programs)
    with pytest.warns(UserWarning, match="made smaller"):
        assert stored.mimicked(ctx, done, MimicSettings(**QUICK, macs=1)).skipped == NO_ROOM


def test_the_report_says_why(counting_backend: Any, quick_measurement: None, nets: SimpleNamespace) -> None:
    net = nets.seeded(lambda: nets.ResNet(2), seed=1)
    nets.silence(net.blocks[1])
    options: dict[str, Any] = {
        "goal": foldcut.Blocks(1),
        "backend": counting_backend,
        "progress": False,
        "cache": False,
    }
    report = foldcut.compile(net, nets.images(24), mimic=MimicSettings(**QUICK, iterations=2), **options).report
    assert not report.mimicked and "mimicked" not in report.output_errors
    assert report["unmimicked"] == report.unmimicked and "counts as none" in str(report.unmimicked)
    assert f"no: {report.unmimicked}" in report_page(report.to_dict())
    plain = foldcut.compile(net, nets.images(24), mimic=False, **options).report
    assert plain.unmimicked is None


def test_a_timetable_without_a_time(clock: Clock) -> None:
    plan = Timetable(MimicSettings(iterations=20, checks=8))
    looks = []
    for done in range(1, 21):
        assert plan.goes_on(done - 1)
        if plan.due(done):
            with plan.look(done):
                looks.append(done)
    assert looks == list(range(2, 21, 2)) and not plan.goes_on(20)
    assert plan.left_s == math.inf and not plan.ran_out(3)
