"""What a sweep keeps of each batch on its way through the networks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from foldcut.passes.drop.drop_blocks import changes_of_drops, drop_blocks
from foldcut.passes.solve import refine
from foldcut.passes.solve.layers import find_layers
from foldcut.passes.solve.lockstep import Lockstep, Step, plan_steps
from foldcut.passes.solve.resolve_network import resolve_network
from foldcut.passes.solve.targets import trace_target
from torch import nn


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[str], set[str]]]:
    """The names of the values, the teacher's and the student's, whenever a batch's are stored."""
    found: list[tuple[set[str], set[str]]] = []
    real = Lockstep._store

    def store(self: Lockstep, index: int, frontier: Any) -> None:
        found.append((set(frontier[0]), set(frontier[1])))
        real(self, index, frontier)

    monkeypatch.setattr(Lockstep, "_store", store)
    return found


def test_values_go_with_their_last_reader(
    residual: Program, nets: SimpleNamespace, stored: list[tuple[set[str], set[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch holds what the group at hand and later ones read, however many nodes were run to get there."""
    steps: list[Step] = []
    real = Lockstep.advance

    def advance(self: Lockstep, step: Step, tensors: Any) -> None:
        steps.append(step)
        before = len(stored)
        real(self, step, tensors)
        for teacher, student in stored[before:]:
            assert teacher == step.teacher_needs and student == step.student_needs

    monkeypatch.setattr(Lockstep, "advance", advance)
    block = find_regions(residual).blocks[0]
    resolve_network(
        residual, drop_blocks(residual, [block]), CalibrationSet.of(nets.images(8)), changes_of_drops([block])
    )
    assert sum(len(step.teacher_runs) + len(step.student_runs) for step in steps) > 20
    # a stream, what is added to it, a layer's input and its target: not all that was run
    assert max(len(teacher | student) for teacher, student in stored) <= 8
    for step in steps:
        assert step.teacher_keeps <= step.teacher_needs and step.student_keeps <= step.student_needs


class Grid(nn.Module):
    """A convolution whose output has so many places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("side", "samples"), [(1, refine.STEP_ROWS), (16, refine.STEP_ROWS // 256), (64, refine.STEP_SAMPLES)]
)
def test_a_refining_step_takes_few_samples_where_each_has_many_places(side: int, samples: int) -> None:
    program = capture(Grid().eval(), torch.randn(2, 3, side, side))
    (layer,) = find_layers(program)[0].values()
    assert refine._samples(program, trace_target(program, layer, {})) == samples


def test_views_of_some_of_the_batches(residual: Program, nets: SimpleNamespace) -> None:
    lockstep = Lockstep(residual, residual, CalibrationSet.of(nets.images(20)), batch_size=4)
    first = next(iter(find_layers(residual)[0].values()))
    (step,) = plan_steps(residual, residual, [[trace_target(residual, first, {})]], set(residual.nodes))
    counts = [len(list(lockstep.views(step, most))) for most in (None, 1, 4, 5, 100)]
    assert counts == [5, 1, 1, 2, 5]
