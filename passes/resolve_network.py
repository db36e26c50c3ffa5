"""The sequential re-solve of a whole student: each layer in order, on what the layers before it now deliver."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..compiler.calibration_set import CalibrationSet
from ..compiler.edit import set_tensors
from ..compiler.errors import Reject
from ..compiler.execute import descendants
from ..compiler.program import Program, is_tensor
from ..compiler.progress import Progress, silent
from .calibrate import Moments, check_finite
from .layers import Layer, find_layers
from .lockstep import Lockstep, Step, plan_steps
from .resolve import Correction, solve
from .targets import Target, counterparts, residual_at, trace_target


@dataclass(frozen=True, kw_only=True)
class ResolveSettings:
    """`ridge` relative to the Gram's mean diagonal; `rounds` of solving one layer when its anchor feeds an activation with a flat zone
    (the target then depends on the student's sign pattern, which the solve changes). `rows_per_column` caps the rows of A that a
    solve reads, relative to its columns (None: all). `batch_size` None lets memory decide; `ram_bytes` bounds the frontiers kept in memory."""

    ridge: float = 1e-3
    rounds: int = 1
    rows_per_column: int | None = None
    batch_size: int | None = None
    ram_bytes: int = 2 << 30


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Squared error of one layer at its anchor over the calibration set, per row, before and after its solve."""

    node: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The re-solved program, the layers' errors in the order solved, and the contractions that were locked."""

    program: Program
    layers: tuple[LayerError, ...]
    locked: tuple[Reject, ...]


def resolve_network(
    teacher: Program,
    student: Program,
    calibration: CalibrationSet,
    dropped: Iterable[tuple[str, str]],
    *,
    settings: ResolveSettings | None = None,
    progress: Progress = silent,
) -> Resolved:
    """Re-solve every layer of `student` that the dropped regions touch, in topological order, in one streamed sweep.

    `dropped` lists (entry, exit) of the bypassed regions in teacher names. A layer takes part when its input or its anchor differs from
    the teacher's. Solves in float64 from float32 products; the graph does not change, only weights, biases and batch-norm biases.
    When nothing differs, every weight stays as it is, bit for bit. Each layer's error at its own anchor never grows.
    """
    settings = settings or ResolveSettings()
    layers, locked = find_layers(student)
    roles = counterparts(student, teacher, dropped)
    targets, changed = _touched(student, layers, roles)
    steps = plan_steps(teacher, student, targets, changed)
    tensors: dict[str, torch.Tensor] = {}
    errors = []
    batch_size = settings.batch_size or batch_size_for(student, layers.values())
    with Lockstep(teacher, student, calibration, batch_size=batch_size, ram_bytes=settings.ram_bytes) as lockstep:
        for index, step in enumerate(steps):
            errors.append(_solve_step(lockstep, step, tensors, settings))
            lockstep.finish(step)
            progress("re-solve", index + 1, len(steps))
    program = set_tensors(student, tensors, note=f"re-solve {len(steps)} layers") if tensors else student
    return Resolved(program=program, layers=tuple(errors), locked=tuple(locked))


def batch_size_for(program: Program, layers: Iterable[Layer], budget_bytes: int = 256 << 20) -> int:
    """Samples per batch such that the largest patch matrix of a layer stays within the budget, at most 64."""
    largest = 1
    for layer in layers:
        weight = program.module.get_parameter(layer.weight)
        positions = math.prod(program.shape(program.nodes[layer.node])) // weight.shape[0]
        largest = max(largest, 4 * positions * layer.groups * weight[0].numel())
    for node in program.graph.nodes:
        if is_tensor(node) and node.op == "call_function":
            largest = max(largest, 4 * math.prod(program.shape(node)))
    return max(1, min(64, budget_bytes // largest))


def _touched(student: Program, layers: dict[str, Layer], roles: dict[str, str]) -> tuple[list[Target], set[str]]:
    """Targets of the layers to solve, in order, and all student nodes whose value will differ from the teacher's."""
    changed = descendants(student, roles)
    targets = []
    for name, layer in layers.items():
        target = trace_target(student, layer, roles)
        if layer.input in changed or layer.input in roles or target.anchor in changed or target.anchor in roles:
            targets.append(target)
            changed |= {name} | descendants(student, [name])
    return targets, changed


def _solve_step(
    lockstep: Lockstep, step: Step, tensors: dict[str, torch.Tensor], settings: ResolveSettings
) -> LayerError:
    target = step.target
    moments = _moments(lockstep.student, target, lockstep.compare(step, tensors), settings, len(lockstep))
    check_finite(moments, lockstep.student, target.layer.node)
    first = _apply(lockstep.student, target, moments, tensors, settings)
    last, rows = first, max(1, moments.rows)
    if target.zone is not None:
        for _ in range(settings.rounds - 1):
            moments = _moments(lockstep.student, target, lockstep.again(step, tensors), settings, len(lockstep))
            last = _apply(lockstep.student, target, moments, tensors, settings)
    return LayerError(node=target.layer.node, before=first.before / rows, after=last.after / rows)


def _moments(
    student: Program,
    target: Target,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    settings: ResolveSettings,
    count: int,
) -> Moments:
    total: Moments | None = None
    for value, teacher, current in batches:
        residual = target.pull_back(residual_at(teacher, current, target.zone))
        rows, residual = target.layer.rows(student, value), target.layer.outputs(residual)
        step = thinning(rows.shape[2] * count, rows.shape[1], settings.rows_per_column)
        part = Moments.of(rows[:, :, ::step], residual[:, :, ::step])
        total = part if total is None else total + part
    assert total is not None  # a calibration set holds at least one sample
    return total


def thinning(rows: int, columns: int, rows_per_column: int | None) -> int:
    """Take every so-many-th row to keep about `rows_per_column` rows per column; odd, so that it does not run along an image's columns."""
    if rows_per_column is None:
        return 1
    return max(1, rows // (rows_per_column * columns)) // 2 * 2 + 1 if rows > 2 * rows_per_column * columns else 1


def _apply(
    student: Program,
    target: Target,
    moments: Moments,
    tensors: dict[str, torch.Tensor],
    settings: ResolveSettings,
) -> Correction:
    """Solve, and put the new weight and shift into `tensors`."""
    layer = target.layer
    correction = solve(moments, ridge=settings.ridge, bias=target.shift is not None)
    weight = _current(student, layer.weight, tensors)
    tensors[layer.weight] = (weight.double() + correction.weight.reshape(weight.shape)).to(weight.dtype)
    if target.shift is not None and correction.bias is not None:
        change = correction.bias if target.shift_scale is None else correction.bias * target.shift_scale
        shift = _current(student, target.shift, tensors)
        tensors[target.shift] = (shift.double() + change).to(shift.dtype)
    return correction


def _current(student: Program, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors[name] if name in tensors else student.module.get_parameter(name).detach()
