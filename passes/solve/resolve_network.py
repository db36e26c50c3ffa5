"""The sequential re-solve of a whole student: each layer in order, on what the layers before it now deliver."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.data.kept import first_of
from ...compiler.data.live_bytes import live_bytes
from ...compiler.data.output_error import output_error
from ...compiler.ir.edit import set_tensors
from ...compiler.ir.execute import descendants, run_until
from ...compiler.ir.program import Program, is_tensor
from ...compiler.support.errors import Reject, plural
from ...compiler.support.memory import at_most, samples_at_once
from ...compiler.support.progress import Progress, silent
from ...compiler.support.setting_checks import Allowed, check_number, check_whole, settled
from .changes import Changes
from .closed_form import MARGIN, Correction, judged_solve
from .joins import group_targets
from .layers import Layer, add_delta, current_parameter, find_layers
from .lockstep import Lockstep, Step, plan_steps
from .moments import Moments, SplitMoments, check_finite, split_batch_size, thinning
from .refine import propose_step
from .targets import Kept, Target, counterparts, residual_at, trace_target


@dataclass(frozen=True, kw_only=True)
class ResolveSettings:
    """How layers are re-solved.

    `ridge` is relative to the Gram's mean diagonal (None: 5 / samples, at most 0.1, which held-out errors favour from
    50 to 500 samples; layers whose held-out rows lose a share of `margin` less so take up to a hundred times that, or
    stay); `refine` is the number of rounds in which the inner layers of a branch are corrected for the error left at
    its end. `rows_per_column` caps the rows of A that a solve reads, relative to its columns (None: all): neighbouring
    patches say much the same. `batch_size` None lets memory decide; `ram_bytes` bounds the frontiers kept in memory
    (None: two fifths of what is free).
    """

    ridge: float | None = None
    margin: float = MARGIN
    refine: int = 2
    rows_per_column: int | None = 200
    batch_size: int | None = None
    guard_samples: int = 32
    ram_bytes: int | None = None

    def __post_init__(self) -> None:
        check_number("ridge", self.ridge, Allowed(least=0, none=True))
        check_number("margin", self.margin, Allowed(least=0, most=1))
        check_whole("rows_per_column", self.rows_per_column, Allowed(least=1, none=True))
        check_whole("batch_size", self.batch_size, Allowed(least=1, none=True))
        check_whole("ram_bytes", self.ram_bytes, Allowed(least=0, none=True))
        for name in ("refine", "guard_samples"):
            check_whole(name, getattr(self, name), Allowed(least=0))
        settled(self)

    def ridge_for(self, samples: int) -> float:
        return min(0.1, 5 / samples) if self.ridge is None else self.ridge


#: A layer's inputs and outputs as rows, its residual and what a step back along a branch keeps: so many values as large
#: as the largest.
COPIES = 6
#: So many rows for each column of a layer are few.
FEW_ROWS = 20
#: Another round of refining follows one that took at least this share of the error at a branch's end: the next takes
#: less still, and costs as much.
REFINED_AGAIN = 0.05
#: How networks are re-solved while blocks are compared: enough to tell which can be recovered.
QUICK_RESOLVE = ResolveSettings(refine=0, rows_per_column=20, guard_samples=0)
#: How they are while plans are compared, and between the rewrites of one: cuts of wide layers overfit few samples. Not
#: for the comparison of blocks: on a ResNet-56 with most of them dropped, the order found so costs nine points.
TRIAL_RESOLVE = replace(QUICK_RESOLVE, margin=0.0)


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
    changes: Changes,
    *,
    settings: ResolveSettings | None = None,
    progress: Progress = silent,
) -> Resolved:
    """Re-solve every layer of `student` that a rewrite touches, in topological order, in one streamed sweep.

    `changes` say what was rewritten. A layer takes part when its input or its anchor differs from the teacher's. Layers
    that the teacher does not have (a first factor) have nothing to be solved toward: they are refined for the error
    behind the layer that they feed.

    Solves in float64 from float32 products; the graph does not change, only weights, biases and batch-norm biases. How
    far a layer's solve may go is judged on a quarter of the samples (`judged_solve`). When nothing differs, every
    weight stays as it is, bit for bit. Each layer's error at its own anchor never grows, and when the output error on
    the first `guard_samples` samples did, the student comes back as it was.
    """
    settings, calibration = settings or ResolveSettings(), calibration.views_together()
    settings = replace(settings, ridge=settings.ridge_for(len(calibration)))
    layers, locked = find_layers(student)
    roles = counterparts(student, teacher, changes.dropped)
    own = {name for name, node in student.nodes.items() if node.op == "call_function" and name not in teacher.nodes}
    targets, changed = touched(student, layers, roles, changes.kept, {*changes.replaced, *own})
    targets = [t if t.anchor in teacher.nodes else replace(t, counterparts=()) for t in targets]
    steps = plan_steps(teacher, student, group_targets(student, targets), changed)
    tensors: dict[str, torch.Tensor] = {}
    errors: list[LayerError] = []
    batch_size = split_batch_size(calibration, settings.batch_size or batch_size_for(student, layers.values()))
    with Lockstep(teacher, student, calibration, batch_size=batch_size, ram_bytes=settings.ram_bytes) as lockstep:
        for index, step in enumerate(steps):
            lockstep.advance(step, tensors)
            errors += _solve_group(lockstep, step, tensors, settings)
            lockstep.finish(step)
            progress("re-solve", index + 1, len(steps))
    program = set_tensors(student, tensors, note=f"re-solve {plural(len(targets), 'layer')}") if tensors else student
    if tensors and not _improves(teacher, student, program, first_of(calibration, settings.guard_samples)):
        return Resolved(program=student, layers=(), locked=tuple(locked))
    return Resolved(program=program, layers=tuple(errors), locked=tuple(locked))


def _improves(teacher: Program, before: Program, after: Program, samples: CalibrationSet) -> bool:
    """Layers that each improve could still add up to a worse output: then the student keeps its weights."""
    return not len(samples) or output_error(teacher, after, samples) <= output_error(teacher, before, samples)


def batch_size_for(program: Program, layers: Iterable[Layer], budget_bytes: int = 256 << 20) -> int:
    """Samples per batch such that the largest patch matrix of a layer stays within the budget, at most 64; fewer where
    memory is limited: beside that matrix a batch has the values of both networks, and copies of some."""
    largest = 1
    for layer in layers:
        weight = program.module.get_parameter(layer.weight)
        largest = max(largest, 4 * layer.rows_per_sample(program) * layer.groups * weight[0].numel())
    for node in program.graph.nodes:
        if is_tensor(node) and node.op == "call_function":
            largest = max(largest, 4 * math.prod(program.shape(node)))
    size = max(1, min(64, at_most(budget_bytes) // largest))
    live = live_bytes(program)
    return samples_at_once(2 * live.most + COPIES * live.largest, size)


def rows_are_few(program: Program, samples: int) -> bool:
    """Whether most of the weights are of layers whose inputs are few rows for their columns: the places of so many
    samples, those of one sample much alike. A solve then knows the samples by heart before it knows the layer."""
    few = total = 0
    for layer in find_layers(program)[0].values():
        weight = program.module.get_parameter(layer.weight)
        total += weight.numel()
        if layer.rows_per_sample(program) * samples < FEW_ROWS * weight[0].numel():
            few += weight.numel()
    return 2 * few > total


def touched(
    student: Program, layers: dict[str, Layer], roles: dict[str, str], kept: Mapping[str, Kept], other: set[str]
) -> tuple[list[Target], set[str]]:
    """Targets of the layers to solve, in order, and all student nodes whose value will differ from the teacher's."""
    smaller = {name for name in kept if name in student.nodes} | other
    changed = descendants(student, {*roles, *smaller}) | smaller
    targets = []
    for name, layer in layers.items():
        target = trace_target(student, layer, roles, kept)
        if layer.input in changed or layer.input in roles or target.anchor in changed or target.anchor in roles:
            targets.append(target)
            changed |= {name} | descendants(student, [name])
    return targets, changed


def _solve_group(
    lockstep: Lockstep, step: Step, tensors: dict[str, torch.Tensor], settings: ResolveSettings
) -> list[LayerError]:
    """Solve the layers of a group in order, then refine its inner layers for what its end is left with."""
    errors: dict[str, LayerError] = {}
    seen: dict[str, Moments] = {}
    for target in step.targets:
        moments = split_step_moments(lockstep, step, target, tensors, settings)
        check_finite(moments.whole, lockstep.student, target.layer.node)
        seen[target.layer.node] = moments.whole
        if not target.counterparts:
            continue
        errors[target.layer.node] = _apply(lockstep.student, target, moments, tensors, settings)
    for turn in range(settings.refine):
        proposed = propose_step(lockstep, step, tensors, seen, seed=turn)
        if not proposed or not _refine(lockstep, step, tensors, settings, proposed, errors):
            break
    return list(errors.values())


def _refine(
    lockstep: Lockstep,
    step: Step,
    tensors: dict[str, torch.Tensor],
    settings: ResolveSettings,
    proposed: Mapping[str, torch.Tensor],
    errors: dict[str, LayerError],
) -> bool:
    """A proposed step of the inner layers, then the end layers again; undone when it did not lower the error at the
    end. Returns whether it lowered that by enough for another."""
    ends = [target for target in step.targets if target.anchor == step.targets[-1].anchor]
    first = errors[ends[0].layer.node].after
    old = {name: current_parameter(lockstep.student, name, tensors) for name in proposed}
    tensors.update(proposed)
    for index, target in enumerate(ends):
        moments = split_step_moments(lockstep, step, target, tensors, settings)
        before = errors[target.layer.node]
        if index == 0 and not moments.whole.error() / moments.whole.rows < before.after:
            tensors.update(old)
            return False
        now = _apply(lockstep.student, target, moments, tensors, settings)
        errors[target.layer.node] = replace(before, after=now.after)
    return errors[ends[0].layer.node].after <= (1 - REFINED_AGAIN) * first


def split_step_moments(
    lockstep: Lockstep, step: Step, target: Target, tensors: dict[str, torch.Tensor], settings: ResolveSettings
) -> SplitMoments:
    """Moments of one layer of a group over the whole calibration set, with the weights as they stand, and those of the
    held-out batches."""
    return SplitMoments.of(_parts(lockstep, step, target, tensors, settings))


def _parts(
    lockstep: Lockstep, step: Step, target: Target, tensors: dict[str, torch.Tensor], settings: ResolveSettings
) -> Iterator[tuple[int, Moments]]:
    """The moments of each batch of this process, with its place among all."""
    student = lockstep.student
    wanted = [target.layer.input, target.anchor]
    for view in lockstep.views(step):
        with torch.no_grad():
            ours = run_until(student, wanted, view.student, tensors)
        rows = settings.rows_per_column
        yield view.batch, batch_moments(student, target, ours, view.teacher, len(lockstep), rows)


def batch_moments(
    student: Program,
    target: Target,
    ours: Mapping[str, torch.Tensor],
    theirs: Mapping[str, torch.Tensor],
    batches: int,
    rows_per_column: int | None,
) -> Moments:
    """Moments of one batch out of `batches` equal ones, from the student's and the teacher's values at the target."""
    layer, value, anchor = target.layer, ours[target.layer.input], ours[target.anchor]
    columns, count = layer.extent(student, value)
    every = left = thinning(count * batches, columns, rows_per_column)
    if _thins_first(target, anchor, every):
        # the residual of rows that are not read is not worked out
        anchor, left = layer.picked(anchor, every), 1
        theirs = {name: layer.picked(theirs[name], every) for name in target.counterparts}
    residual = (
        residual_at(target.teacher_value(theirs), anchor, target.zone)
        if target.counterparts
        else torch.zeros_like(anchor)
    )
    return Moments.of(layer.rows(student, value, every), layer.outputs(target.pull_back(residual), left))


def _thins_first(target: Target, anchor: torch.Tensor, every: int) -> bool:
    """Whether the rows can be picked at the anchor already: an image whose places are the output's."""
    channels_only = all(indices is None or dim == 1 for dim, indices in enumerate(target.kept))
    return every > 1 and target.pointwise and anchor.dim() == 4 and target.layer.window is not None and channels_only


def _apply(
    student: Program, target: Target, moments: SplitMoments, tensors: dict[str, torch.Tensor], settings: ResolveSettings
) -> LayerError:
    """Solve, and put the new weight and shift into `tensors`."""
    ridge, bias = settings.ridge or 0.0, target.shift is not None
    correction = judged_solve(moments, ridge=ridge, bias=bias, margin=settings.margin)
    return write_correction(student, target, correction, moments.whole.rows, tensors)


def write_correction(
    student: Program, target: Target, correction: Correction, rows: int, tensors: dict[str, torch.Tensor]
) -> LayerError:
    """Put what a solve found into `tensors`: the new weight, and the shift where the layer can take one."""
    layer = target.layer
    weight = current_parameter(student, layer.weight, tensors)
    tensors[layer.weight] = add_delta(weight, correction.weight)
    if correction.bias is not None:
        add_shift(student, target, correction.bias, tensors)
    return LayerError(node=layer.node, before=correction.before / rows, after=correction.after / rows)


def add_shift(student: Program, target: Target, change: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    """Add a change of the layer's bias to the shift, in `tensors`, where the layer can take one."""
    if target.shift is None:
        return
    change = change if target.shift_scale is None else change * target.shift_scale
    tensors[target.shift] = add_delta(current_parameter(student, target.shift, tensors), change)
