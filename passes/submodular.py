"""Data-efficient channel selection: which channels the next layer can best do without.

For a layer with inputs A (rows of patches), target T and kept units S (a unit = its columns of A: kh * kw for a conv
channel, a head's columns for attention),

    F(S) = ||T||^2 - min_W ||A_S W - T||^2 = tr(C_S^T G_SS^-1 C_S),      G = A^T A,  C = A^T T.

F is monotone and weakly submodular, so greedy selection reaches 1 - exp(-gamma) of the best (El Halabi et al., NeurIPS
2022, arXiv 2203.04940, eq. 3 and prop. 3.3). Everything follows from the streamed moments: a block Cholesky
factorisation grows by one unit a step, and the Schur complements of all candidates are updated together, so a step
costs O(columns * kept columns * unit columns) and nothing is refitted. All sums in float64. The gains of a weakly
submodular function may grow, so a lazy queue would not be exact; all candidates are looked at, in one batched solve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .calibrate import Moments

#: Directions whose unexplained part is below this share of their own energy count as explained: products of float32
#: activations leave noise of about 1e-7, which must not be divided by.
EXPLAINED = 1e-6


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One consumer's part of F: `gram` (groups, columns, columns), `cross` (groups, columns, outputs), `energy` the
    target's sum of squares, and `units` (units, columns a unit) the columns of each unit, -1 where it has fewer.

    `always` are columns that stay whatever is chosen (the bias, channels of other groups).
    """

    gram: torch.Tensor = field(repr=False)
    cross: torch.Tensor = field(repr=False)
    energy: float
    units: torch.Tensor
    always: torch.Tensor

    @classmethod
    def of(
        cls,
        moments: Moments,
        weight: torch.Tensor,
        units: torch.Tensor,
        *,
        bias: bool,
        gain: torch.Tensor | None = None,
    ) -> Objective:
        """From the moments of the residual R = T - A W^T, the weights (groups, out, columns) and the units' columns.

        T = R + A W^T, so C = A^T R + G W^T. With `bias` the column of ones is always kept. `gain` (groups, out) weighs
        the outputs' errors: what each is multiplied by behind the layer.
        """
        groups, size, _ = moments.gram.shape
        full = torch.zeros(groups, size, weight.shape[1], dtype=torch.float64)
        full[:, :-1] = weight.double().transpose(1, 2)
        image = moments.gram @ full
        cross = moments.cross + image
        energies = moments.energy + 2 * (full * moments.cross).sum(1) + (full * image).sum(1)
        if gain is not None:
            cross, energies = cross * gain.unsqueeze(1), energies * gain.square()
        energy = float(energies.sum())
        columns = torch.arange(size if bias else size - 1)
        always = columns[~torch.isin(columns, units)]
        return cls(gram=moments.gram, cross=cross, energy=energy, units=units, always=always)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Units in the order chosen, and the relative error left after each: `errors[k]` with the first k units kept.

    `errors[0]` is that of no unit at all. `ratio_bound` is a lower bound of the submodularity ratio, from the extreme
    eigenvalues of the normalised Gram matrices, and `guarantee` = 1 - exp(-ratio_bound) the share of the best possible
    F that greedy selection is sure to reach; both None where they were not asked for.
    """

    order: torch.Tensor
    errors: torch.Tensor
    ratio_bound: float | None = None

    @property
    def guarantee(self) -> float | None:
        return None if self.ratio_bound is None else -math.expm1(-self.ratio_bound)


def select_units(objectives: Sequence[Objective], count: int, *, bound: bool = False) -> Selection:
    """Choose `count` units greedily for the sum of the consumers' relative objectives.

    Ties go to the unit that comes first. Units that explain nothing (dead channels) come last and never disturb the
    factorisation.
    """
    total = len(objectives[0].units)
    states = [_State(o, count) for o in objectives if o.energy > 0]
    order: list[int] = []
    taken = torch.zeros(total, dtype=torch.bool)
    errors = [_mean_error(states)]
    for _ in range(count):
        gains = sum((s.gains() for s in states), torch.zeros(total, dtype=torch.float64))
        best = int(gains.masked_fill(taken, -1.0).argmax())
        order.append(best)
        taken[best] = True
        for state in states:
            state.take(best)
        errors.append(_mean_error(states))
    return Selection(
        order=torch.tensor(order, dtype=torch.long),
        errors=torch.tensor(errors, dtype=torch.float64),
        ratio_bound=min((submodularity_bound(o) for o in objectives), default=1.0) if bound else None,
    )


def submodularity_bound(objective: Objective) -> float:
    """Lower bound of the submodularity ratio: least over largest eigenvalue of the Gram matrix with unit diagonal.

    Directions without energy (dead channels) are left out. Zero when channels are linearly dependent: then the
    bound says nothing, though the greedy choice is usually far better than it.
    """
    diagonal = torch.diagonal(objective.gram, dim1=1, dim2=2)
    # what the kept columns leave of the others has its eigenvalues within those of all together
    columns = torch.cat([objective.units[objective.units >= 0], objective.always])
    least = 1.0
    for gram, energy in zip(objective.gram, diagonal, strict=True):
        alive = columns[energy[columns] > 0]
        if not len(alive):
            continue
        scale = energy[alive].rsqrt()
        values = torch.linalg.eigvalsh(gram[alive][:, alive] * scale * scale.unsqueeze(1))
        least = min(least, float(values[0].clamp(min=0) / values[-1]))
    return least


class _State:
    """One consumer while units are taken: Schur complements of all candidates with respect to the taken columns.

    `blocks` (groups, units, b, b) and `cross` (groups, columns, outputs) are what the taken columns leave unexplained;
    `factor` (groups, columns, taken columns) the rows of the Cholesky factor.
    """

    def __init__(self, objective: Objective, count: int) -> None:
        groups, size, _ = objective.gram.shape
        self.units, self.energy = objective.units, objective.energy
        self.width = self.units.shape[1]
        self.explained = 0.0
        # an empty column at the end stands for what a narrower unit lacks
        gram = objective.gram.new_zeros(groups, size + 1, size + 1)
        gram[:, :size, :size] = objective.gram
        cross = objective.cross.new_zeros(groups, size + 1, objective.cross.shape[2])
        cross[:, :size] = objective.cross
        self.gram, self.cross = gram, _thin(cross)
        self.columns = torch.where(self.units < 0, torch.full_like(self.units, size), self.units)
        own = torch.diagonal(gram, dim1=1, dim2=2)
        self.floor = torch.where(own > 0, own, torch.ones_like(own))
        self.factor = gram.new_zeros(groups, size + 1, len(objective.always) + count * self.width)
        self.taken = 0
        rows = self.columns
        self.blocks = gram[:, rows.unsqueeze(2), rows.unsqueeze(1)].clone()
        if len(objective.always):
            self._take(objective.always)

    @property
    def error(self) -> float:
        return max(0.0, 1 - self.explained / self.energy)

    def gains(self) -> torch.Tensor:
        """What each unit would explain more, relative to the target's energy."""
        whitener = _whitener(self.blocks, self.floor[:, self.columns])
        rest = whitener.transpose(2, 3) @ self.cross[:, self.columns]
        return rest.square().sum((0, 2, 3)) / self.energy

    def take(self, unit: int) -> None:
        self._take(self.columns[unit])

    def _take(self, columns: torch.Tensor) -> None:
        done = self.factor[:, :, : self.taken]
        fresh = self.gram[:, :, columns] - done @ done[:, columns].transpose(1, 2)
        whitener = _whitener(fresh[:, columns], self.floor[:, columns])
        rows, weights = fresh @ whitener, whitener.transpose(1, 2) @ self.cross[:, columns]
        self.explained += float(weights.square().sum())
        self.factor[:, :, self.taken : self.taken + len(columns)] = rows
        self.taken += len(columns)
        self.cross -= rows @ weights
        parts = rows[:, self.columns]
        self.blocks -= parts @ parts.transpose(2, 3)


def _whitener(blocks: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """M with M^T B M = 1 for each block B, and zero columns for directions that are explained already.

    By Cholesky where all directions of a block have enough left (M = L^-T), by eigendecomposition of the others.
    """
    factor, info = torch.linalg.cholesky_ex(blocks)
    pivots = torch.diagonal(factor, dim1=-2, dim2=-1).square()
    sound = (info == 0) & (pivots > EXPLAINED * energy).all(-1)
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    safe = torch.where(sound[..., None, None], factor, identity)
    whitener = torch.linalg.solve_triangular(safe, identity.expand_as(safe), upper=False).transpose(-1, -2)
    if bool(sound.all()):
        return whitener
    whitener = whitener.clone()
    whitener[~sound] = _truncated(blocks[~sound], energy[~sound])
    return whitener


def _truncated(blocks: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """The whiteners of blocks with explained directions, in units of each column's own energy."""
    scale = energy.rsqrt()
    values, vectors = torch.linalg.eigh(blocks * scale.unsqueeze(-1) * scale.unsqueeze(-2))
    inverse = torch.where(values > EXPLAINED, values.clamp(min=EXPLAINED).rsqrt(), torch.zeros_like(values))
    return scale.unsqueeze(-1) * vectors * inverse.unsqueeze(-2)


def _thin(cross: torch.Tensor) -> torch.Tensor:
    """The same C C^T with at most as many outputs as columns: gains depend on nothing else."""
    if cross.shape[2] <= cross.shape[1]:
        return cross.clone()
    _, upper = torch.linalg.qr(cross.transpose(1, 2), mode="r")
    return upper.transpose(1, 2).contiguous()


def _mean_error(states: Sequence[_State]) -> float:
    return sum(s.error for s in states) / len(states) if states else 0.0
