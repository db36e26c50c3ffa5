"""The Frank-Wolfe step itself, for many equal-shaped weights at once.

    v = lmo(m),   w <- w + eta (v - w),   eta = min(lr * f, 1)

with f = ||m|| / ||w - v|| (`gradient`: the step is as long as that of SGD), ||m|| / (half the diameter)
(`fast_gradient`), 1 / diameter (`diameter`), or 1 (None); norms are L2. Source: Pokutta, Spiegel & Zimmer, arXiv
2010.07243, and Zimmer, Spiegel & Pokutta, arXiv 2205.11921.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch

from ...compiler.devices.precision import widest
from .constraints import Constraint
from .ordering import working

Rescale = Literal["gradient", "fast_gradient", "diameter"]
RESCALES: tuple[str, ...] = get_args(Rescale)
#: Entries that are stacked at most: the temporaries of a step are a few times this.
STACKED = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Job:
    """One weight to move: its momentum, its set, lr and rescaling, and the basis of a warm-started oracle."""

    weight: torch.Tensor = field(repr=False)
    direction: torch.Tensor = field(repr=False)
    constraint: Constraint
    lr: float
    rescale: Rescale | None
    basis: torch.Tensor | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[object, ...]:
        """Jobs of equal keys can be stacked: the sets may differ in radius only."""
        w, basis = self.weight, None if self.basis is None else self.basis.shape
        return self.constraint.with_radius(1.0), self.rescale, w.shape, w.dtype, w.device, basis


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a step did: eta of each weight, float64 (jobs,), and their bases for the next step or None."""

    etas: torch.Tensor
    bases: torch.Tensor | None


def stacked(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """The jobs in lists of equal keys, in order, of at most `STACKED` entries."""
    alike: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        alike.setdefault(job.key, []).append(job)
    for members in alike.values():
        size = max(1, STACKED // members[0].weight.numel())
        for start in range(0, len(members), size):
            yield members[start : start + size]


def move(jobs: Sequence[Job]) -> Moved:
    """Take the step for jobs of one key, writing to the weights. Where their device has no float64 the CPU takes it."""
    if widest(jobs[0].weight.device) != torch.float64:
        return _moved_on_the_cpu(jobs)
    first = jobs[0]
    unit = first.constraint.with_radius(1.0)
    m, weights = _stack([job.direction for job in jobs]), _stack([job.weight for job in jobs])
    bases = None if first.basis is None else _stack([job.basis for job in jobs if job.basis is not None])
    found = unit.unit_vertices(m, bases)
    w = working(weights)
    ones = [1] * (w.dim() - 1)
    radii = _numbers([job.constraint.radius for job in jobs], w.device)
    vertices = (found.points * radii.view(-1, *ones).to(found.points.dtype)).to(w.dtype)
    etas = _rates(jobs, m, vertices - w, radii * unit.half_width(first.weight.shape))
    reached = torch.lerp(w, vertices, etas.to(w.dtype).view(-1, *ones))
    torch._foreach_copy_([job.weight for job in jobs], list(reached.unbind()))
    return Moved(etas=etas, bases=found.bases)


def _moved_on_the_cpu(jobs: Sequence[Job]) -> Moved:
    copies = [
        replace(
            job,
            weight=job.weight.detach().cpu(),
            direction=job.direction.cpu(),
            basis=None if job.basis is None else job.basis.cpu(),
        )
        for job in jobs
    ]
    moved = move(copies)
    for job, copy in zip(jobs, copies, strict=True):
        job.weight.copy_(copy.weight)
    return moved


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Without a copy where there is one only."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _numbers(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """In float64 on a device, without waiting for it."""
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)


def _rates(jobs: Sequence[Job], m: torch.Tensor, way: torch.Tensor, half_widths: torch.Tensor) -> torch.Tensor:
    """eta of each job, float64; 0 where the weight is at its vertex already."""
    lrs = _numbers([job.lr for job in jobs], m.device)
    rescale = jobs[0].rescale
    if rescale is None:
        return lrs
    if rescale == "diameter":
        return (lrs / (2 * half_widths)).clamp(max=1)
    lengths = _lengths(way) if rescale == "gradient" else half_widths
    rates = lrs * _lengths(m) / torch.where(lengths > 0, lengths, 1)
    return torch.where(lengths > 0, rates, 0.0).clamp(max=1)


def _lengths(stack: torch.Tensor) -> torch.Tensor:
    # float64, so that the squares of large momenta do not overflow
    return torch.linalg.vector_norm(stack.reshape(len(stack), -1), dim=1, dtype=torch.float64)
