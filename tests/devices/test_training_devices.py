"""Trainings on another device: mimicking and Frank-Wolfe."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.export.edit_device import moved
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from foldcut.passes.drop.drop_blocks import drop_blocks
from foldcut.passes.frank_wolfe import (
    Constraint,
    FrankWolfe,
    GroupKSupport,
    KSparse,
    KSupport,
    LpBall,
    NuclearBall,
    SpectralKSparse,
    SpectralKSupport,
    Subspace,
)
from foldcut.passes.mimic.settings import MimicSettings
from foldcut.passes.mimic.timetable import Timetable
from foldcut.passes.mimic.training import Lesson, Training
from foldcut.passes.mimic.training_stage import Mimicked, mimic

QUICK = MimicSettings(iterations=8, batch_size=8, checks=2, bfloat16=False, learning_rate=0.002)
CPU = torch.device("cpu")


def lesson_on(device: torch.device, nets: SimpleNamespace) -> Lesson:
    teacher: Program = capture(nets.seeded(lambda: nets.ResNet(3), seed=1), nets.images())
    student = drop_blocks(teacher, [find_regions(teacher).blocks[0]])
    fit, judge = CalibrationSet.of(nets.images(24, seed=1)), CalibrationSet.of(nets.images(8, seed=2))
    return Lesson(teacher=moved(teacher, device), student=moved(student, device), fit=fit, judge=judge)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_mimicking(cache_bytes: int, nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    settings = replace(QUICK, cache_bytes=cache_bytes)
    here, there = (mimic(lesson_on(device, nets), settings) for device in (CPU, elsewhere.device))
    assert there.iterations == here.iterations == 8
    assert there.before == pytest.approx(here.before, rel=1e-4)
    assert there.after == pytest.approx(here.after, rel=1e-4) and there.after < there.before
    wanted = here.program.module.state_dict()
    for name, value in there.program.module.state_dict().items():
        assert value.device == elsewhere.device
        torch.testing.assert_close(value.cpu(), wanted[name], rtol=1e-4, atol=1e-5)


def test_iterations_wait_for_nothing(nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    """Where the teacher's values are not kept on the device, whose rows are then picked from the CPU."""
    settings = replace(QUICK, cache_bytes=0)
    run = Training(lesson_on(elsewhere.device, nets), settings, Timetable(settings, None))
    assert run.cache is None and run.step()
    with elsewhere.watched() as waits:
        for _ in range(4):
            assert run.step()
    assert Counter(waits) == Counter()
    with elsewhere.watched() as waits:
        assert run.sound()
    assert len(waits) == 1


def test_a_training_that_breaks_ends_at_the_next_look(nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    """As on the CPU, where it ends at once: with the weights that it began with."""
    lesson = lesson_on(elsewhere.device, nets)
    (leaf,) = lesson.fit.leaves
    broken = replace(lesson, fit=replace(lesson.fit, leaves=(leaf * torch.nan,)))
    found: Mimicked = mimic(broken, QUICK)
    assert found.after == found.before and found.iterations < 8
    wanted = lesson.student.module.state_dict()
    assert all(torch.equal(v.cpu(), wanted[n].cpu()) for n, v in found.program.module.state_dict().items())


def test_a_training_goes_on_from_its_state(nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    """The state is on the CPU, where it is written from; a training goes on from it with the same weights."""
    lesson = lesson_on(elsewhere.device, nets)
    first = Training(lesson, QUICK, Timetable(QUICK, None))
    for _ in range(3):
        first.step()
    state = {name: value.clone() for name, value in first.state().items()}
    assert {value.device.type for value in state.values()} == {"cpu"}
    again = Training(lesson, QUICK, Timetable(QUICK, None))
    again.go_on(3, state)
    for run in (first, again):
        run.step()
    for name, value in first.weights().items():
        assert torch.equal(value.cpu(), again.weights()[name].cpu())


SETS = (
    LpBall(p=2.0),
    LpBall(p=torch.inf),
    KSparse(k=3),
    KSupport(k=3),
    GroupKSupport(k=2),
    NuclearBall(),
    SpectralKSparse(k=2),
    SpectralKSupport(k=2, oracle=Subspace()),
)


@pytest.mark.parametrize("constraint", SETS, ids=str)
@pytest.mark.parametrize("rescale", ["gradient", "diameter"])
def test_frank_wolfe(constraint: Constraint, rescale: str, elsewhere: SimpleNamespace) -> None:
    found = {}
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(8, 10, generator=generator) for _ in range(2)]
    target = torch.randn(8, 10, generator=generator)
    for device in (CPU, elsewhere.device):
        weights = [torch.nn.Parameter(start.clone().to(device)) for start in starts]
        aim = target.to(device)
        groups = [{"params": [w], "constraint": constraint.with_radius(4.0)} for w in weights]
        optimizer = FrankWolfe(groups, lr=0.1, momentum=0.9, rescale=rescale)
        optimizer.make_feasible()
        for _ in range(4):
            optimizer.zero_grad()
            sum((w - aim).square().sum() for w in weights).backward()
            optimizer.step()
        found[device.type] = [w.detach().cpu() for w in weights]
    for here, there in zip(found["cpu"], found["elsewhere"], strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)
