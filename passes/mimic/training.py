"""One training of `mimic`: the networks, the optimiser, the order of the samples, and its state at any iteration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.data.live_bytes import live_bytes
from ...compiler.data.output_error import relative_to
from ...compiler.devices.precision import WideSum, WideSums, totals
from ...compiler.ir.compare import squared_distance
from ...compiler.ir.cost import call_macs
from ...compiler.ir.edit import expose
from ...compiler.ir.execute import device_of, placed
from ...compiler.ir.program import Batch, Program, as_arguments
from ...compiler.processes.sharing import by_first, in_place, own
from ...compiler.processes.team import team
from ...compiler.support import tally
from ...compiler.support.errors import MimicError, first_line
from ...compiler.support.memory import at_most, samples_at_once
from ..solve.targets import Kept, kept_on, select_kept
from .crops import Crop, Read, find_crop
from .divided_adam import DividedAdam, to_be_divided
from .pairs import batch_first, compared_pairs, read_parameters, same_as_teacher
from .settings import MimicSettings
from .timetable import Timetable
from .training_macs import TrainingMacs

#: Values of the network that is trained are there so often: themselves, their gradients and the copies of operators.
TRAINED = 3
#: The samples of an iteration come in so many parts, whatever the number of processes: gradients then are the same, bit
#: for bit. Each part takes so many multiply-accumulates of a forward pass at least: smaller ones cost time.
PARTS, PART_MACS = 4, 4 * 10**9


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Who learns from whom, and by what: `fit` to train with, `judge` to look at the held-out error. `kept` names what
    channel cuts left of each node of the teacher; `seed` decides the order of the samples."""

    teacher: Program
    student: Program
    fit: CalibrationSet
    judge: CalibrationSet
    kept: Mapping[str, Kept] = field(default_factory=dict, repr=False)
    seed: int = 0


class Training:
    """The two networks, the optimiser and the teacher's cached values of one training."""

    def __init__(self, lesson: Lesson, settings: MimicSettings, timetable: Timetable) -> None:
        teacher, trainee = lesson.teacher, lesson.student
        self.work = TrainingMacs.of(teacher, trainee, (len(lesson.fit), len(lesson.judge)), settings)
        self.settings, self.calibration = settings, lesson.fit
        self.held_out = lesson.judge.take(slice(0, self.work.judges))  # their order is random
        self.done = 0
        self._time = timetable
        self.pairs, self.judges = compared_pairs(
            teacher, trainee, outputs_weight=settings.outputs, hints_weight=settings.hints
        )
        self.device = device_of(trainee)
        self.kept = [kept_on(lesson.kept.get(p.student, ()), self.device) for p in self.pairs]
        self.teacher = expose(teacher, [p.teacher for p in self.pairs])
        self.student = expose(trainee, [p.student for p in self.pairs], copy_tensors=True)
        self._programs = {False: teacher, True: trainee}
        self.bfloat16 = _bfloat16_pays(self.device) if settings.bfloat16 is None else settings.bfloat16
        #: Samples that go through a network together: those of an iteration, unless memory is limited.
        self._at_once = settings.batch_size
        self._by_sample = all(batch_first(teacher, teacher.nodes[p.teacher]) for p in self.pairs)
        if self._by_sample:
            taken = live_bytes(teacher).whole + TRAINED * live_bytes(trainee).whole
            self._at_once = samples_at_once(taken, settings.batch_size)
        self._generator = torch.Generator().manual_seed(lesson.seed)
        self._order = torch.empty(0, dtype=torch.long)
        self._sound = torch.ones((), dtype=torch.bool, device=self.device)
        frozen = same_as_teacher(teacher, trainee)
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and name not in frozen)
        trained = {name for name, p in self.student.named_parameters() if p.requires_grad}
        bearing = read_parameters(trainee, [p.student for p in self.pairs if p.weight])
        self.parameters = [p for p in self.student.parameters() if p.requires_grad] if trained & bearing else []
        if not self.parameters:
            return
        #: What the learning rate is divided by.
        self.slower = 1.0
        self._rates = [settings.learning_rate * max(_rms(p), 1e-3) for p in self.parameters]
        self._divided = to_be_divided(self.parameters, self.device)
        self._optimiser = DividedAdam(self.parameters, divided=self._divided)
        #: What iterations see of each sample, where they do not see all, and the teacher's values on all samples.
        self.crop: Crop | None = None
        self.cache: list[torch.Tensor] | None = None
        #: What was made smaller, in words.
        self.said: tuple[str, ...] = ()
        self._fit_work(lesson)

    def _fit_work(self, lesson: Lesson) -> None:
        """Cache the teacher's values; where that, or the memory for it, leaves too much work, go over to crops, then to
        fewer iterations."""
        teacher, student, work = lesson.teacher, lesson.student, self.work
        cacheable = self.settings.augment is None and self._by_sample
        if cacheable and work.affords(cached=True) >= work.iterations:
            self.cache = self._teacher_values()
            cacheable = self.cache is not None
        if work.affords(cached=self.cache is not None) < work.iterations:
            networks = [Read(program=teacher, names=[p.teacher for p in self.pairs])]
            networks.append(Read(program=student, names=[p.student for p in self.pairs]))
            crop = find_crop(networks, self.calibration, work.share, self._mean_squares)
            if crop is not None and work.affords(share=crop.share) > work.affords(cached=cacheable):
                self.crop = crop
            elif cacheable and work.affords(cached=True) * work.batch >= len(self.calibration):
                self.cache = self._teacher_values()
            share = 1.0 if self.crop is None else self.crop.share
            self._time.at_most(int(min(work.iterations, work.affords(cached=self.cache is not None, share=share))))
        self.said = work.smaller(self._time.most, crop=self.crop, cached=cacheable)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the student's."""
        return {name: p.detach().clone() for name, p in self.student.named_parameters()}

    def again_from(self, weights: Mapping[str, torch.Tensor], slower: float) -> None:
        """Go back to some weights, and on from there with a learning rate so many times lower."""
        with torch.no_grad():
            for name, parameter in self.student.named_parameters():
                parameter.copy_(weights[name])
        self.slower *= slower
        self._optimiser = DividedAdam(self.parameters, divided=self._divided)

    def state(self) -> dict[str, torch.Tensor]:
        """All that the iterations to come depend on, but for the number of those `done`: in the first of several
        processes, which all call this."""
        slower = torch.tensor(self.slower, dtype=torch.float64)
        found = {"generator": self._generator.get_state(), "order": self._order, "slower": slower}
        for index, parameter in enumerate(self.parameters):
            found[f"{index} weight"] = parameter.detach()
        found |= self._optimiser.state()
        return {name: value.contiguous().cpu() for name, value in found.items()}

    def go_on(self, done: int, state: Mapping[str, torch.Tensor]) -> None:
        """Be as after `done` iterations, from what `state` gave then."""
        self.done, self._order, self.slower = done, state["order"], float(state["slower"])
        self._generator.set_state(state["generator"])
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in state.items():
            index, _, what = name.partition(" ")
            if not index.isdigit():
                continue
            parameter = self.parameters[int(index)].detach()
            if what == "weight":
                parameter.copy_(value)
            else:  # moments in the parameter's own memory format, as the optimiser makes them
                own = value if what == "step" else torch.empty_like(parameter).copy_(value)
                moments.setdefault(int(index), {})[what] = own
        self._optimiser.load(moments)

    def step(self) -> bool:
        """One iteration; False when loss or gradients are not finite (the weights are then left as they are). On a
        device other than the CPU nothing waits for that: `sound` says it of all iterations so far."""
        self.done += 1
        indices = self._next()
        batch = self.calibration.batch(indices)
        if self.settings.augment is not None:
            batch = self.settings.augment(batch, self._generator)
        if self.crop is not None:
            batch = self.crop.cut(batch, self._generator)
        if not self._gradients(batch, indices):
            return False  # nothing that is trained bears on the features
        norm = nn.utils.get_total_norm([p.grad for p in self.student.parameters() if p.grad is not None])
        if self.device.type != "cpu":
            self._sound = self._sound & norm.isfinite()
        elif not bool(norm.isfinite()):
            return False
        pace = self._pace(self.done - 1)
        self._optimiser.step([rate * pace / self.slower for rate in self._rates])
        return True

    def sound(self) -> bool:
        """Whether loss and gradients were finite in all iterations."""
        return bool(self._sound)

    def _gradients(self, batch: Batch, indices: torch.Tensor) -> bool:
        """Leave the loss's gradients with the parameters; whether there are any. Samples go through in parts, of which
        each of several processes has its own, and the gradients add up in float64: each loss is relative to what all
        of them have."""
        size = self._part(len(indices))
        bounds = [(at, at + size) for _, at in own(range(0, len(indices), size))]
        parts = [pytree.tree_map(lambda leaf, a=a, b=b: leaf[a:b], batch) for a, b in bounds]
        if self.cache is None:
            wanted = [self._values(self.teacher, part) for part in parts]
        else:
            wanted = [[value[indices[a:b]] for value in self.cache] for a, b in bounds]
        energies = self._energies(wanted)
        gradient = WideSum()
        cause: MimicError | None = None
        for part, theirs in zip(parts, wanted, strict=True):
            self._optimiser.zero_grad()
            loss = self._loss(self._values(self.student, part), theirs, energies)
            if not loss.requires_grad:
                break
            cause = _backward(loss)
            if cause is not None:
                break
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            gradient.add(torch.cat([grad.reshape(-1) for grad in grads]))
        for other in team().objects(cause):
            if other is not None:
                raise other
        (whole,) = totals([gradient])
        if whole is None:
            return False
        each = whole.split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, each, strict=True):
            parameter.grad = part.reshape(parameter.shape).to(parameter)
        return True

    def _part(self, samples: int) -> int:
        """How many of some samples go through together: where values can be told by sample, as many parts as several
        processes find something to do in."""
        parts = min(PARTS, max(1, samples * self.work.student_macs // PART_MACS)) if self._by_sample else 1
        return min(self._at_once, -(-samples // parts))

    def _energies(self, wanted: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """Of each value that is compared the sum of squares over all parts."""
        sums = [WideSum() for _ in self.pairs]
        for part in wanted:
            for total, value in zip(sums, part, strict=True):
                total.add(value.float().square().sum())
        return [torch.zeros(()) if total is None else total.float().to(self.device) for total in totals(sums)]

    def error(self) -> tuple[float, float]:
        """Held-out relative squared error in full precision: (mean over features and outputs, mean over outputs
        alone)."""
        sums = WideSums()
        with torch.no_grad():
            for _, batch in own(self.held_out.batches(self._part(len(self.held_out)))):
                batch = placed(self._programs[True], batch)
                args, kwargs = as_arguments(batch)
                tally.count(tally.FORWARD, sum(call_macs(p, p.flatten(batch)) for p in self._programs.values()))
                ours, theirs = self.student(*args, **kwargs), self._shared(self.teacher(*args, **kwargs))
                for index in range(self.judges):
                    part, norm = squared_distance(theirs[index], ours[index])
                    sums.add(f"error {index}", part)
                    sums.add(f"energy {index}", norm)
        found = sums.floats()
        relative = [relative_to(found, f"error {index}", f"energy {index}") for index in range(self.judges)]
        outputs = [r for pair, r in zip(self.pairs, relative, strict=False) if pair.output]
        return sum(relative) / max(1, len(relative)), sum(outputs) / max(1, len(outputs))

    def _pace(self, iteration: int) -> float:
        """What the learning rate is multiplied with: up in a straight line, down by a cosine."""
        iterations = max(1, self._time.iterations)
        warm = max(1, iterations // 20)
        along = min(1.0, iteration / iterations)
        return min(1.0, (iteration + 1) / warm) * 0.5 * (1 + math.cos(math.pi * along))

    def _loss(
        self, ours: list[torch.Tensor], theirs: list[torch.Tensor], energies: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        for pair, s, t, energy in zip(self.pairs, ours, theirs, energies, strict=True):
            if pair.weight == 0:
                continue
            total = total + pair.weight * (s.float() - t.float()).square().sum() / energy.clamp(min=1e-12)
        return total

    def _next(self) -> torch.Tensor:
        """The next batch of a seeded shuffle; every sample comes up once before any comes up again."""
        size = min(self.settings.batch_size, len(self.calibration))
        if len(self._order) < size:
            self._order = torch.cat([self._order, torch.randperm(len(self.calibration), generator=self._generator)])
        indices, self._order = self._order[:size], self._order[size:]
        return indices

    def _values(self, module: fx.GraphModule, batch: Batch) -> list[torch.Tensor]:
        trains = module is self.student
        program = self._programs[trains]
        batch = placed(program, batch)
        args, kwargs = as_arguments(pytree.tree_map(_channels_last, batch))
        macs = call_macs(program, program.flatten(batch))
        tally.count(tally.FORWARD, macs)
        tally.count(tally.GRADIENT, 2 * macs * trains)  # with respect to inputs and to weights
        with (
            torch.set_grad_enabled(trains),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16),
        ):
            values = list(module(*args, **kwargs))
        return values if trains else self._shared(values)

    def _shared(self, values: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """The teacher's values in the channels that the student still has."""
        return [select_kept(value, kept) for value, kept in zip(values, self.kept, strict=True)]

    def _mean_squares(self, batch: Batch) -> list[float]:
        """Those of the teacher's values that are trained on."""
        values = zip(self._values(self.teacher, batch), self.pairs, strict=True)
        return [float(value.float().square().mean()) for value, pair in values if pair.weight]

    def _teacher_values(self) -> list[torch.Tensor] | None:
        """The teacher's values on all samples, or None when they would not fit into memory or time."""
        size = self._part(len(self.calibration))
        parts: list[list[torch.Tensor]] = []
        batches = own(self.calibration.batches(size))

        def first() -> tuple[float, int]:
            """What the first batch takes."""
            began = monotonic()
            parts.append(self._values(self.teacher, next(batches)[1]))
            return monotonic() - began, sum(v.numel() * v.element_size() for v in parts[0])

        seconds, held = by_first(first)
        times = len(self.calibration) / size
        if held * times > at_most(self.settings.cache_bytes) or not self._time.allows_ahead(seconds * times):
            return None
        parts += [self._values(self.teacher, batch) for _, batch in batches]
        return [torch.cat(column) for column in zip(*in_place(parts), strict=True)]


def _backward(loss: torch.Tensor) -> MimicError | None:
    """What to raise where an operator has no gradient: that is the network's, and no fault of the training."""
    try:
        loss.backward()
    except RuntimeError as cause:  # torch's own operators raise NotImplementedError, which is one, custom ones this
        if isinstance(cause, NotImplementedError) or "no autograd formula was registered" in str(cause):
            return MimicError(
                f"an operator has no gradient: {first_line(cause)}",
                hint="leave mimicking out (mimic=False), or register the operator's gradient",
            )
        raise
    return None


def _channels_last(leaf: object) -> object:
    """Images in the layout in which convolutions on CPUs need no reordering."""
    if isinstance(leaf, torch.Tensor) and leaf.dim() == 4 and leaf.is_floating_point():
        return leaf.contiguous(memory_format=torch.channels_last)
    return leaf


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())


def _bfloat16_pays(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware, where mixed precision about halves the time: a CPU
    with AMX, an NVIDIA GPU since Ampere."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())
