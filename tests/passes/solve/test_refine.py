"""Gauss-Newton steps of inner layers: exact where the error is quadratic in their weights, whatever rows each has."""

from dataclasses import replace

import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from foldcut.passes.solve import refine
from foldcut.passes.solve.layers import find_layers
from foldcut.passes.solve.lockstep import Lockstep, plan_steps
from foldcut.passes.solve.resolve_network import ResolveSettings, split_step_moments
from foldcut.passes.solve.targets import trace_target
from torch import nn

SAMPLES, TOKENS = 48, 4


class TwoInner(nn.Module):
    """A linear map of each token, another of the sample as a whole, and a third of the sums of both."""

    def __init__(self, left: float, right: tuple[float, float]) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(1, 1, bias=False), nn.Linear(2, 1, bias=False)
        self.end = nn.Linear(2, 1, bias=False)
        self.left.weight.data[:] = left
        self.right.weight.data[:] = torch.tensor(right)
        self.end.weight.data[:] = torch.tensor([[2.0, -0.5]])

    def forward(self, tokens: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        return self.end(torch.cat([self.left(tokens).sum(1), self.right(whole)], 1))


def uncorrelated() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of which no two correlate, by Walsh functions, also where only each third sample is looked at: the Hessian
    is exactly that of the Kronecker form, without terms between the layers."""
    walsh = torch.ones(1, 1)
    for _ in range(4):
        walsh = torch.cat([torch.cat([walsh, walsh], 1), torch.cat([walsh, -walsh], 1)])
    columns = walsh.repeat(SAMPLES // len(walsh), 1)
    return columns[:, 1 : 1 + TOKENS].unsqueeze(2), columns[:, 5:7]


def proposed(teacher: Program, student: Program, settings: ResolveSettings) -> dict[str, torch.Tensor]:
    layers, _ = find_layers(student)
    targets = [trace_target(student, layer, {}) for layer in layers.values()]
    targets = [replace(t, anchor=t.layer.node, counterparts=(t.layer.node,), steps=()) for t in targets]
    (step,) = plan_steps(teacher, student, [targets], set(student.nodes))
    with Lockstep(teacher, student, CalibrationSet.of(uncorrelated()), batch_size=SAMPLES) as lockstep:
        lockstep.advance(step, {})
        moments = {t.layer.node: split_step_moments(lockstep, step, t, {}, settings).whole for t in targets}
        if settings.rows_per_column is not None:
            thinned = [SAMPLES * TOKENS / moments["linear"].rows, SAMPLES / moments["linear_1"].rows]
            assert thinned[0] > 2 * thinned[1] > 2
        return refine.propose_step(lockstep, step, {}, moments, seed=0)


@pytest.mark.parametrize("rows_per_column", [None, 8])
def test_the_step_is_exact_on_a_quadratic(rows_per_column: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step reaches the teacher's weights, whether or not the Gram matrices come from fewer rows."""
    monkeypatch.setattr(refine, "INPUT_RIDGE", 1e-9)
    monkeypatch.setattr(refine, "OUTPUT_RIDGE", 1e-9)
    example = uncorrelated()
    teacher, student = (
        capture(TwoInner(*weights).eval(), example) for weights in ((0.7, (1.5, -2.0)), (-0.4, (0.3, 0.2)))
    )
    found = proposed(teacher, student, ResolveSettings(rows_per_column=rows_per_column))
    for name, weight in found.items():
        torch.testing.assert_close(weight, teacher.module.get_parameter(name).detach(), rtol=1e-4, atol=1e-4)
    assert len(found) == 2
