"""Inputs changed by gradient descent until a network's batch norms see what they remember of its data.

The loss of a batch x of samples is

    L = mean over batch norms l and channels c of  ((m_lc(x) - M_lc) / S_lc)^2 + (s_lc(x) / S_lc - 1)^2
        + diverse * cross entropy of the outputs with classes that are each asked for equally often
        + smooth * total variation of images
        + compete * (1 - disagreement with another network), where there is one: `disagreement`

with m and s the mean and deviation of the batch at the input of a batch norm, M and S those that it holds
(DeepInversion, Yin et al., CVPR 2020, arXiv 1912.08795, equation 4; here relative to the deviation of each channel, so
that no layer outweighs another). The network runs in eval mode. Images are shifted by a pixel or so before each step,
at random, or the strides of a network leave a grid on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from ..ir.execute import bind, run_until
from ..ir.program import Batch, Program, is_tensor, output_nodes
from ..store.checkpoint import Standing
from .disagreement import Rival
from .input_kinds import InputKind, Kind
from .norm_statistics import NormTarget, statistics_distance
from .settings import SynthesisSettings

#: Of Adam: how fast the averages of gradients and of their squares forget.
_FORGETS = (0.9, 0.99)
_HALF = (torch.float16, torch.bfloat16)
#: Images are shifted by at most a pixel for so many of their side.
_SHIFT_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What samples are changed towards: the statistics of batch norms, and classes at an output (its node, and how many
    there are) where there is one to ask for, and disagreement with another network, the rival, with its weight."""

    program: Program
    kinds: tuple[InputKind, ...]
    targets: tuple[NormTarget, ...]
    classes: tuple[str, int] | None
    settings: SynthesisSettings
    rival: Rival | None = None
    compete: float = 0.0

    @property
    def competes(self) -> bool:
        """Whether disagreement counts."""
        return self.rival is not None and self.compete > 0

    @property
    def has_gradient(self) -> bool:
        """Whether there is anything to change, and to change it towards."""
        asked = self.targets or self.competes or (self.classes is not None and self.settings.diverse)
        return bool(asked) and self.settings.iterations > 0 and any(k.kind is not Kind.INDICES for k in self.kinds)


def class_output(program: Program) -> tuple[str, int] | None:
    """The output that holds one number for each of several classes, and how many; None where there is none such."""
    nodes = output_nodes(program.graph)
    if len(nodes) != 1 or not is_tensor(nodes[0]):
        return None
    shape = program.shape(nodes[0], 2)
    return (nodes[0].name, shape[1]) if len(shape) == 2 and shape[0] == 2 and shape[1] > 1 else None


class Descent:
    """The steps of one batch of samples; `leaves` are the samples as they are, one tensor for each input, those of half
    precision in float32: what is added up over steps is lost in half."""

    def __init__(self, aim: Aim, leaves: Sequence[torch.Tensor], seed: int) -> None:
        self._aim, self._seed = aim, seed
        self.leaves = [leaf.float() if leaf.dtype in _HALF else leaf.clone() for leaf in leaves]
        self.done = 0
        self._moved = [i for i, kind in enumerate(aim.kinds) if kind.kind is not Kind.INDICES]
        many = {i: self.leaves[i].numel() > 1 for i in self._moved}
        self._scales = [float(self.leaves[i].std() if many[i] else 0.0) or 1.0 for i in self._moved]
        self._first = [torch.zeros_like(self.leaves[i]) for i in self._moved]
        self._second = [torch.zeros_like(self.leaves[i]) for i in self._moved]
        self._weights = _laid_out(aim.program)
        self._rival_weights = _laid_out(aim.rival.program) if aim.rival is not None else {}
        self._asked = self._classes()

    def step(self) -> float:
        """One step; returns how far the statistics were before it. Raises RuntimeError where an operator has no
        gradient, or where values overflow: the samples are then as they were."""
        before = list(self.leaves)
        try:
            with torch.enable_grad():
                for place in self._moved:
                    self.leaves[place] = self.leaves[place].detach().requires_grad_(True)
                moved = [self.leaves[place] for place in self._moved]
                distance, loss = self._loss()
                gradients = torch.autograd.grad(loss, moved, allow_unused=True)
        finally:
            self.leaves = before
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
        if not math.isfinite(float(loss.detach())) or not finite:
            raise RuntimeError("values overflow")
        self.done += 1
        settings = self._aim.settings
        rate = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (self.done - 1) / settings.iterations))
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                self._move(number, gradient, rate)
        return distance

    @property
    def samples(self) -> list[torch.Tensor]:
        """The samples as they are, as the network takes them."""
        return [leaf.to(kind.dtype) for leaf, kind in zip(self.leaves, self._aim.kinds, strict=True)]

    def state(self) -> dict[str, torch.Tensor]:
        """All that changes from step to step, beside their number."""
        named = {f"leaf {i}": leaf for i, leaf in enumerate(self.leaves)}
        named |= {f"first {i}": value for i, value in enumerate(self._first)}
        return named | {f"second {i}": value for i, value in enumerate(self._second)}

    def go_on(self, done: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up a state again."""
        self.done = done
        for name, values in (("leaf", self.leaves), ("first", self._first), ("second", self._second)):
            values[:] = [tensors[f"{name} {i}"] for i in range(len(values))]

    def distance(self) -> float:
        """How far the statistics are as the samples now stand."""
        with torch.no_grad():
            return self._loss(shifted=False)[0]

    def disagreement(self) -> float:
        """How much the other network disagrees as the samples now stand; 0 without one."""
        rival = self._aim.rival
        if rival is None:
            return 0.0
        with torch.no_grad():
            ours = self._values([one for one, _ in rival.outputs], self.leaves)
            return float(self._disagreement(rival, ours, self.leaves))

    def values(self, wanted: Sequence[str]) -> dict[str, torch.Tensor]:
        """What nodes hold for the samples as they now stand."""
        with torch.no_grad():
            return self._values(wanted, self.leaves)

    def _move(self, number: int, gradient: torch.Tensor, rate: float) -> None:
        """Adam, with steps relative to the deviation of the input."""
        first, second = self._first[number], self._second[number]
        first.lerp_(gradient, 1 - _FORGETS[0])
        second.lerp_(gradient.square(), 1 - _FORGETS[1])
        mean, square = (v / (1 - f**self.done) for v, f in zip((first, second), _FORGETS, strict=True))
        direction = mean / (square.sqrt() + 1e-12)
        self.leaves[self._moved[number]] -= rate * self._scales[number] * direction

    def _loss(self, *, shifted: bool = True) -> tuple[float, torch.Tensor]:
        """(distance of the statistics, loss)."""
        aim, settings = self._aim, self._aim.settings
        leaves = self._shifted() if shifted else self.leaves
        wanted = [target.source for target in aim.targets] + ([aim.classes[0]] if aim.classes else [])
        rival = aim.rival if aim.competes else None
        wanted += [one for one, _ in rival.outputs] if rival is not None else []
        values = self._values(wanted, leaves)
        loss = torch.zeros(())
        if aim.targets:
            loss = statistics_distance(aim.targets, values)
        distance = float(loss.detach())
        if aim.classes is not None and settings.diverse:
            loss = loss + settings.diverse * functional.cross_entropy(values[aim.classes[0]], self._asked)
        if settings.smooth:
            loss = loss + settings.smooth * sum(self._variations())
        if rival is not None:
            loss = loss + aim.compete * (1 - self._disagreement(rival, values, leaves))
        return distance, loss

    def _values(self, wanted: Sequence[str], leaves: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        program = self._aim.program
        return run_until(program, dict.fromkeys(wanted), bind(program, self._batch(leaves)), self._weights)

    def _disagreement(
        self, rival: Rival, values: Mapping[str, torch.Tensor], leaves: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Of what the network holds, and what the other one makes of the same samples."""
        other, wanted = rival.program, [theirs for _, theirs in rival.outputs]
        found = run_until(other, dict.fromkeys(wanted), bind(other, self._batch(leaves)), self._rival_weights)
        return rival.disagreement([values[ours] for ours, _ in rival.outputs], [found[theirs] for theirs in wanted])

    def _batch(self, leaves: Sequence[torch.Tensor]) -> Batch:
        """The samples as the network is called with them."""
        taken = [leaf.to(kind.dtype) for leaf, kind in zip(leaves, self._aim.kinds, strict=True)]
        args, kwargs = self._aim.program.structure([_channels_last(leaf) for leaf in taken])
        return kwargs or args

    def _shifted(self) -> list[torch.Tensor]:
        """The samples as this step sees them: images shifted, the same way in all of the batch."""
        generator = torch.Generator().manual_seed(_mixed(self._seed, self.done))
        found = []
        for leaf, kind in zip(self.leaves, self._aim.kinds, strict=True):
            if kind.kind is not Kind.IMAGE:
                found.append(leaf)
                continue
            dims = (1, 2) if kind.channels_last else (2, 3)
            most = max(1, min(leaf.shape[d] for d in dims) // _SHIFT_SIDE)
            shift = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
            found.append(torch.roll(leaf, shift, dims))
        return found

    def _variations(self) -> Iterator[torch.Tensor]:
        """The total variation of each input of images, in its variance."""
        for place, scale in zip(self._moved, self._scales, strict=True):
            kind, leaf = self._aim.kinds[place], self.leaves[place] / scale
            if kind.kind is Kind.IMAGE:
                for dim in (1, 2) if kind.channels_last else (2, 3):
                    yield leaf.diff(dim=dim).square().mean()

    def _classes(self) -> torch.Tensor:
        """The class that each sample is to belong to: every class as often as any other, in random order."""
        count = len(self.leaves[0])
        classes = self._aim.classes[1] if self._aim.classes is not None else 1
        order = torch.randperm(classes, generator=torch.Generator().manual_seed(_mixed(self._seed, -1)))
        return order.repeat(-(-count // classes))[:count]


def standing(descent: Descent, finished: Sequence[torch.Tensor], data: Mapping[str, object]) -> Standing:
    """What is needed to go on: the batches that are finished, one tensor for each input, and the one that is not."""
    tensors = {f"finished {i}": leaf for i, leaf in enumerate(finished)} | descent.state()
    return {**data, "done": descent.done}, {name: value.contiguous() for name, value in tensors.items()}


def _mixed(seed: int, step: int) -> int:
    """A seed for one step."""
    return (seed * 1_000_003 + step + 1) % 2**63


def _channels_last(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.contiguous(memory_format=torch.channels_last) if leaf.dim() == 4 else leaf


def _laid_out(program: Program) -> dict[str, torch.Tensor]:
    """The weights, to which no gradient goes; filters with the channels innermost, which is faster for gradients on
    CPUs: half as long for ResNet-56."""
    state = program.module.state_dict(keep_vars=False)
    return {name: _channels_last(value.detach()) for name, value in state.items() if value.is_floating_point()}
