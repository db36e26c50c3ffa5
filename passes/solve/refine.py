"""Refining the inner layers of a branch for the error that its end is left with.

The inner layers were solved toward the teacher's own values, but after a drop those are no longer what the branch
should compute. With e the residual at the branch's end, J the derivative of the end by an inner layer's output, A its
input rows and u = J^T v for random signs v,

    D = A^T (J^T e),     dW = (G + l I)^-1 D (Q + m I)^-1,     G = A^T A,  Q = sum u u^T,

is a Gauss-Newton step for ||e||^2 with the Hessian in Kronecker form (Martens and Grosse, ICML 2015, arXiv
1503.05671), taken for all inner layers at once with one line search along it. G, D and Q are means over the layer's
rows, each over those that it was collected from: G may come from fewer, and layers differ in their number of rows, yet
all their steps have one length. The layers at the end are then re-solved in closed form; the caller undoes a step that
did not lower the error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from ...compiler.devices.precision import WideSum, WideSums, totals, wide_sum
from ...compiler.ir.execute import evaluate
from ...compiler.ir.program import Program
from ...compiler.processes.sharing import spread
from ...compiler.support import tally
from ...compiler.support.memory import at_most
from .closed_form import solving_macs
from .layers import add_delta, current_parameter
from .lockstep import Lockstep, Step, View
from .moments import Moments, self_products
from .targets import Target, residual_at

#: Ridge of the input side and of the output side, relative to the mean diagonals.
INPUT_RIDGE, OUTPUT_RIDGE = 1e-2, 0.2
#: The line search differentiates along the step numerically, with this change relative to the layers' outputs.
PROBE = 0.03
#: The gradients of a step take so many times the multiply-accumulates of the values: those with respect to weights and
#: inputs, and those of a probe with respect to inputs.
GRADIENTS_OF_FORWARD = 3
#: A step and its length come from so many samples at least, and from so many rows of the layer at the end where there
#: are as many: places of one image say much the same. What becomes of the error is then seen on all of them.
STEP_SAMPLES, STEP_ROWS = 64, 1 << 15
#: What values at a branch's end may take while its step is worked out.
ENDS_BYTES = 256 << 20


def propose_step(
    lockstep: Lockstep, step: Step, tensors: dict[str, torch.Tensor], moments: Mapping[str, Moments], *, seed: int
) -> dict[str, torch.Tensor]:
    """New weights for the inner layers of a group, by tensor name; empty when there is nothing to gain.

    `moments` holds those of each inner layer from its solve, whose Gram matrix conditions the step; a slightly old one
    does no harm, since the line search measures the step's effect.
    """
    end = step.targets[-1]
    inner = [t for t in step.targets if t.anchor != end.anchor]
    if not inner:
        return {}
    ends = _Ends()
    gradients, sides = _collect(lockstep, step, inner, tensors, seed, ends)
    if not gradients:
        return {}
    seen = [moments[target.layer.node] for target in inner]
    tasks = [(solving_macs(m), partial(_change, m, g, s)) for m, g, s in zip(seen, gradients, sides, strict=True)]
    changes = spread(tasks)
    if not all(bool(c.isfinite().all()) and bool(c.any()) for c in changes):
        return {}
    length = _line_search(lockstep, step, inner, changes, tensors, ends)
    return {
        target.layer.weight: add_delta(
            current_parameter(lockstep.student, target.layer.weight, tensors), change, length
        )
        for target, change in zip(inner, changes, strict=True)
    }


def _change(seen: Moments, gradient: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """(G + l I)^-1 D (Q + m I)^-1, transposed."""
    gram = seen.gram[:, :-1, :-1] / seen.rows
    left = torch.linalg.solve(_damped(gram, INPUT_RIDGE), gradient.transpose(1, 2))
    return torch.linalg.solve(_damped(side, OUTPUT_RIDGE), left.transpose(1, 2))


class _Ends:
    """Values at a branch's end with the weights as they stand, batch by batch, of as many batches as memory has room
    for: a step and its length are both worked out from them."""

    def __init__(self) -> None:
        self._left, self._values = at_most(ENDS_BYTES), dict[int, torch.Tensor]()

    def keep(self, batch: int, value: torch.Tensor) -> None:
        """Keep a batch's value if there is room."""
        self._left -= value.numel() * value.element_size()
        if self._left >= 0:
            self._values[batch] = value

    def pop(self, batch: int) -> torch.Tensor | None:
        """A batch's value, if it was kept, for the last time."""
        return self._values.pop(batch, None)


def _collect(
    lockstep: Lockstep, step: Step, inner: Sequence[Target], tensors: dict[str, torch.Tensor], seed: int, ends: _Ends
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(D^T as (groups, out, columns), Q as (groups, out, out)) of each inner layer, per row, summed in float64. Keeps
    the values at the end."""
    student, end = lockstep.student, step.targets[-1]
    # of each layer the gradients, the sides, and the rows that they come from
    sums = [[WideSum(symmetric=kind == 1) for _ in inner] for kind in range(3)]
    for view in lockstep.views(step, _samples(student, end)):
        weights = {
            t.layer.weight: current_parameter(student, t.layer.weight, tensors).clone().requires_grad_() for t in inner
        }
        with torch.enable_grad(), tally.counted_into(tally.Tally()) as done:
            values = _forward(student, step, view, {**tensors, **weights})
        tally.count(tally.GRADIENT, GRADIENTS_OF_FORWARD * done[tally.FORWARD])
        result = values[end.anchor]
        if not result.requires_grad:
            break
        ends.keep(view.batch, result.detach())
        residual = residual_at(end.teacher_value(view.teacher), result.detach(), end.zone)
        # the same on any device, and whoever has the batch
        generator = torch.Generator().manual_seed(seed * len(lockstep) + view.batch)
        drawn = torch.randint(0, 2, result.shape, generator=generator)
        signs = drawn.to(result, non_blocking=True) * 2 - 1
        outputs = [values[t.layer.node] for t in inner]
        toward = _gradients(result, list(weights.values()), residual)
        probes = _gradients(result, outputs, signs)
        for index, target in enumerate(inner):
            side = target.layer.outputs(probes[index])
            sums[0][index].add(target.layer.matrix(toward[index]))
            square = side.new_empty(len(side), side.shape[1], side.shape[1])
            self_products(side, square)
            sums[1][index].add(square)
            sums[2][index].add(torch.tensor(side.shape[2], dtype=torch.float64, device="cpu"))
    found = [total for total in totals([part for parts in sums for part in parts]) if total is not None]
    if not found:
        return [], []
    gradients, sides, rows = (found[at : at + len(inner)] for at in range(0, len(found), len(inner)))
    means = [[t / count for t, count in zip(total, rows, strict=True)] for total in (gradients, sides)]
    return means[0], means[1]


def _samples(student: Program, end: Target) -> int:
    """How many samples a step needs."""
    return max(STEP_SAMPLES, -(-STEP_ROWS // max(1, end.layer.rows_per_sample(student))))


def _gradients(result: torch.Tensor, inputs: list[torch.Tensor], along: torch.Tensor) -> list[torch.Tensor]:
    """Vector-Jacobian products; zero where an operation without a derivative lies between."""
    found = torch.autograd.grad(result, inputs, along, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _line_search(
    lockstep: Lockstep,
    step: Step,
    inner: Sequence[Target],
    changes: Sequence[torch.Tensor],
    tensors: dict[str, torch.Tensor],
    ends: _Ends,
) -> float:
    """argmin over t of ||e - t dz||^2 with dz the end's derivative along the step, by a finite difference."""
    student, end = lockstep.student, step.targets[-1]
    weights = [current_parameter(student, t.layer.weight, tensors) for t in inner]
    small = min(
        PROBE * float(w.norm().to(c.device) / c.norm().clamp(min=1e-30)) for w, c in zip(weights, changes, strict=True)
    )
    ahead = dict(tensors)
    for target, weight, change in zip(inner, weights, changes, strict=True):
        ahead[target.layer.weight] = add_delta(weight, change, small)
    sums = WideSums()
    for view in lockstep.views(step, _samples(student, end)):
        with torch.no_grad():
            here = ends.pop(view.batch)
            if here is None:
                here = _forward(student, step, view, tensors)[end.anchor]
            there = _forward(student, step, view, ahead)[end.anchor]
        derivative = (there - here) / small
        residual = residual_at(end.teacher_value(view.teacher), here, end.zone)
        sums.add("along", wide_sum(residual * derivative))
        sums.add("square", wide_sum(derivative.square()))
    found = sums.floats()
    return found["along"] / found["square"] if found["square"] > 0 else 0.0


def _forward(student: Program, step: Step, view: View, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The group's values, from the frontier to the end."""
    values = dict(view.student)
    for name in step.scratch:
        values[name] = evaluate(student, student.nodes[name], values, tensors)
    return values


def _damped(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    level = torch.diagonal(matrix, dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    return matrix + torch.diag_embed((ridge * level).unsqueeze(1).expand(-1, matrix.shape[1]))
