"""Feature mimicking: gradient descent on the difference between student and teacher features, from unlabelled inputs.

The loss is, over the features before the head and over *hints* (the last stream of each shape, where a stage ends),

    L = sum_f  ||S_f(x) - T_f(x)||^2 / ||T_f||^2     (+ the same for the outputs, times `outputs`)

(the feature term is PRACTISE's, Wang & Wu, CVPR 2023, arXiv 2202.07861, section 3; here relative, with hints, in eval
mode and from re-solved weights). Batch norms keep their statistics; they are folded into their convolutions for the
time of the training and taken out afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..compiler.calibration_set import CalibrationSet
from ..compiler.edit import expose, set_tensors, signature
from ..compiler.edit_folds import fold_batch_norms, unfold_tensors
from ..compiler.errors import CalibrationError
from ..compiler.program import Batch, Program, as_arguments, is_tensor
from ..compiler.progress import Progress, silent
from ..compiler.verify import squared_distance
from .features import compared_outputs, head_features
from .targets import Kept, select_kept

#: Changes a batch of inputs at random (flips, crops, mixes); the teacher sees what it returns.
Augment = Callable[[Batch, torch.Generator], Batch]


@dataclass(frozen=True, kw_only=True)
class MimicSettings:
    """`learning_rate` is relative to the root mean square of each weight tensor, so it needs no tuning per network;
    it falls by a cosine.

    `hints` and `outputs` weigh the losses at stage ends and outputs. `augment` draws a new version of each batch (the
    teacher then runs in every iteration; without it, its features are computed once and kept while they fit into
    `cache_bytes`). `checks` times the held-out error is looked at; the best state wins. `patience` checks without
    improvement end the training. `bfloat16` None uses it where the CPU multiplies bfloat16 matrices in hardware.
    """

    iterations: int = 400
    batch_size: int = 32
    learning_rate: float = 0.015
    hints: float = 6.0
    outputs: float = 0.0
    augment: Augment | None = None
    checks: int = 8
    patience: int = 4
    bfloat16: bool | None = None
    cache_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch_size < 1 or not self.learning_rate > 0 or self.checks < 1:
            raise CalibrationError(
                "mimic settings out of range",
                expected="iterations, batch_size, checks >= 1 and learning_rate > 0",
                actual=str(self),
            )


@dataclass(frozen=True, kw_only=True)
class Mimicked:
    """The trained program, the held-out error (relative, of features and outputs) before and after, and the
    iterations run."""

    program: Program
    before: float
    after: float
    iterations: int


def mimic(
    teacher: Program,
    student: Program,
    calibration: CalibrationSet,
    held_out: CalibrationSet,
    *,
    kept: Mapping[str, Kept] | None = None,
    settings: MimicSettings | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Mimicked:
    """Train all weights of `student` to reproduce the teacher's features on `calibration`, in the channels that it
    has: `kept` names what channel cuts left of each node.

    The graph does not change. The returned weights are those of the least held-out error of features and outputs at
    which the outputs alone are no worse either, the starting
    ones included, so the held-out error never ends above where it began; a step that is not finite ends the training.
    Same seed, same result.
    """
    settings = settings or MimicSettings()
    trainee, norms = fold_batch_norms(student)
    run = _Run(fold_batch_norms(teacher)[0], trainee, calibration, held_out, settings, kept or {})
    if not run.parameters:
        error, _ = run.error()
        return Mimicked(program=student, before=error, after=error, iterations=0)
    best_error, limit = run.error()
    before, best = best_error, run.state()
    generator = torch.Generator().manual_seed(seed)
    every, misses, done = max(1, settings.iterations // settings.checks), 0, 0
    for done in range(1, settings.iterations + 1):
        finite = run.step(generator)
        progress("mimic", done, settings.iterations)
        if not finite:
            break
        if done % every == 0 or done == settings.iterations:
            error, at_outputs = run.error()
            better = error < best_error and at_outputs <= limit
            misses = 0 if better else misses + 1
            if better:
                best_error, best = error, run.state()
            if misses >= settings.patience:
                break
    if best_error >= before:
        return Mimicked(program=student, before=before, after=before, iterations=done)
    trained = set_tensors(trainee, best, note="mimic")
    program = set_tensors(student, unfold_tensors(student, trained, norms), note=f"mimic {done} iterations")
    return Mimicked(program=program, before=before, after=best_error, iterations=done)


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """One pair of values that the loss compares: node names in teacher and student, and the weight."""

    teacher: str
    student: str
    weight: float
    output: bool = False


def _compared(teacher: Program, student: Program, settings: MimicSettings) -> tuple[list[_Compared], int]:
    """What is compared: features and outputs, which also judge the result, then hints; and how many judge.

    A feature that went with a dropped region, or that the student cannot change, is left out; without features the
    outputs are trained on.
    """
    own = {name: name for name in student.nodes} | _stand_ins(teacher, student)
    outputs = [node.name for node in compared_outputs(teacher) if node.name in own]
    features = [name for name in head_features(teacher) if name in own and name not in outputs]
    weight = settings.outputs if features else max(1.0, settings.outputs)
    pairs = [_Compared(teacher=name, student=own[name], weight=1.0) for name in features]
    pairs += [_Compared(teacher=name, student=own[name], weight=weight, output=True) for name in outputs]
    judges = len(pairs)
    taken = {pair.teacher for pair in pairs}
    hints = [n for n in stage_ends(student) if n in teacher.nodes and n not in taken]
    pairs += [_Compared(teacher=n, student=n, weight=settings.hints) for n in hints]
    return pairs, judges


def _stand_ins(teacher: Program, student: Program) -> dict[str, str]:
    """Teacher nodes that are gone and the student nodes that their readers, or the outputs, read in their place."""
    found: dict[str, str] = {}
    for name, node in student.nodes.items():
        other = teacher.nodes.get(name)
        if other is None or len(other.all_input_nodes) != len(node.all_input_nodes):
            continue
        for theirs, ours in zip(other.all_input_nodes, node.all_input_nodes, strict=True):
            if theirs.name != ours.name and theirs.name not in student.nodes and signature(theirs) == signature(ours):
                found[theirs.name] = ours.name
    return found


def batch_first(program: Program, node: fx.Node) -> bool:
    """Whether dim 0 of the value is the batch, so that samples can be picked from it."""
    shape = node.meta["val"].shape
    return len(shape) > 0 and str(shape[0]) in program.batch_symbols


def stage_ends(program: Program) -> tuple[str, ...]:
    """The last activation of each shape that is read more than once (a stream with a shortcut): where a stage ends."""
    last: dict[str, str] = {}
    for name, node in program.nodes.items():
        read_twice = is_tensor(node) and node.op == "call_function" and len(node.users) > 1
        if read_twice and node.meta["val"].is_floating_point() and batch_first(program, node):
            last[signature(node)] = name
    return tuple(last.values())


class _Run:
    """The two networks, the optimiser and the teacher's cached values of one training."""

    def __init__(
        self,
        teacher: Program,
        trainee: Program,
        calibration: CalibrationSet,
        held_out: CalibrationSet,
        settings: MimicSettings,
        kept: Mapping[str, Kept],
    ) -> None:
        self.settings = settings
        self.calibration = calibration
        self.held_out = held_out
        self.pairs, self.judges = _compared(teacher, trainee, settings)
        self.kept = [kept.get(p.student, ()) for p in self.pairs]
        self.teacher = expose(teacher, [p.teacher for p in self.pairs])
        self.student = expose(trainee, [p.student for p in self.pairs], copy_tensors=True)
        self.bfloat16 = _bfloat16_pays() if settings.bfloat16 is None else settings.bfloat16
        by_sample = all(batch_first(teacher, teacher.nodes[p.teacher]) for p in self.pairs)
        self.cache = self._teacher_values() if settings.augment is None and by_sample else None
        self._order = torch.empty(0, dtype=torch.long)
        frozen = _same_as_teacher(teacher, trainee)
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and name not in frozen)
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        if not self.parameters:
            return
        groups = [{"params": [p], "lr": settings.learning_rate * max(_rms(p), 1e-3)} for p in self.parameters]
        self.optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
        warm = max(1, settings.iterations // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda i: min(1.0, (i + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, i / settings.iterations))),
        )

    def state(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.student.named_parameters()}

    def step(self, generator: torch.Generator) -> bool:
        """One iteration; False when loss or gradients are not finite (the weights are then left as they are)."""
        indices = self._next(generator)
        batch = self.calibration.batch(indices)
        if self.settings.augment is not None:
            batch = self.settings.augment(batch, generator)
        wanted = self._values(self.teacher, batch) if self.cache is None else [v[indices] for v in self.cache]
        loss = self._loss(self._values(self.student, batch), wanted)
        if not loss.requires_grad:
            return False  # nothing that is trained bears on the features
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.student.parameters() if p.grad is not None])
        if not bool(norm.isfinite()):
            return False
        self.optimiser.step()
        self.schedule.step()
        return True

    def error(self) -> tuple[float, float]:
        """Held-out relative squared error in full precision: (mean over features and outputs, mean over outputs
        alone)."""
        error, energy = [0.0] * self.judges, [0.0] * self.judges
        with torch.no_grad():
            for batch in self.held_out.batches(self.settings.batch_size):
                args, kwargs = as_arguments(batch)
                ours, theirs = self.student(*args, **kwargs), self._shared(self.teacher(*args, **kwargs))
                for index in range(self.judges):
                    part, norm = squared_distance(theirs[index], ours[index])
                    error[index] += part
                    energy[index] += norm
        relative = [e / w if w > 0 else e for e, w in zip(error, energy, strict=True)]
        outputs = [r for pair, r in zip(self.pairs, relative, strict=False) if pair.output]
        return sum(relative) / max(1, len(relative)), sum(outputs) / max(1, len(outputs))

    def _loss(self, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(())
        for pair, s, t in zip(self.pairs, ours, theirs, strict=True):
            if pair.weight == 0:
                continue
            wanted = t.float()
            total = total + pair.weight * (s.float() - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12)
        return total

    def _next(self, generator: torch.Generator) -> torch.Tensor:
        """The next batch of a seeded shuffle; every sample comes up once before any comes up again."""
        size = min(self.settings.batch_size, len(self.calibration))
        if len(self._order) < size:
            self._order = torch.cat([self._order, torch.randperm(len(self.calibration), generator=generator)])
        indices, self._order = self._order[:size], self._order[size:]
        return indices

    def _values(self, module: fx.GraphModule, batch: Batch) -> list[torch.Tensor]:
        args, kwargs = as_arguments(pytree.tree_map(_channels_last, batch))
        with (
            torch.set_grad_enabled(module is self.student),
            torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16),
        ):
            values = list(module(*args, **kwargs))
        return values if module is self.student else self._shared(values)

    def _shared(self, values: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """The teacher's values in the channels that the student still has."""
        return [select_kept(value, kept) for value, kept in zip(values, self.kept, strict=True)]

    def _teacher_values(self) -> list[torch.Tensor] | None:
        """The teacher's values on all samples, or None when they would not fit."""
        parts: list[list[torch.Tensor]] = []
        for batch in self.calibration.batches(self.settings.batch_size):
            parts.append(self._values(self.teacher, batch))
            if (
                sum(v.numel() * v.element_size() for v in parts[0]) * len(self.calibration)
                > self.settings.cache_bytes * self.settings.batch_size
            ):
                return None
        return [torch.cat(column) for column in zip(*parts, strict=True)]


def _same_as_teacher(teacher: Program, student: Program) -> set[str]:
    """Parameters that only nodes with the teacher's own value read: in front of the first change there is nothing to
    mend."""
    theirs, ours = (dict(p.module.named_parameters()) for p in (teacher, student))
    same: set[str] = set()
    for name, node in student.nodes.items():
        other = teacher.nodes.get(name)
        if other is None or other.target != node.target or len(other.all_input_nodes) != len(node.all_input_nodes):
            continue
        pairs = zip(node.all_input_nodes, other.all_input_nodes, strict=True)
        if node.op == "get_attr":
            target = str(node.target)
            if target in ours and not (target in theirs and torch.equal(ours[target], theirs[target])):
                continue
        elif not all(a.name == b.name and a.name in same for a, b in pairs):
            continue
        same.add(name)
    attributes = [n for n in student.graph.nodes if n.op == "get_attr"]
    return {str(n.target) for n in attributes if n.name in same and all(user.name in same for user in n.users)}


def _channels_last(leaf: object) -> object:
    """Images in the layout in which convolutions on CPUs need no reordering."""
    if isinstance(leaf, torch.Tensor) and leaf.dim() == 4 and leaf.is_floating_point():
        return leaf.contiguous(memory_format=torch.channels_last)
    return leaf


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())


def _bfloat16_pays() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX), where mixed precision about halves the time."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())
