"""Data-efficient channel selection: which channels the next layer can best do without.

For a layer with inputs A (rows of patches), target T and kept units S (a unit = its columns of A: kh * kw for a conv
channel, a head's columns for attention),

    F(S) = ||T||^2 - min_W ||A_S W - T||^2 = tr(C_S^T G_SS^-1 C_S),      G = A^T A,  C = A^T T.

F is monotone and weakly submodular, so greedy selection reaches 1 - exp(-gamma) of the best (El Halabi et al., NeurIPS
2022, arXiv 2203.04940, eq. 3 and prop. 3.3).

With fewer rows than columns any few units explain everything, and F says nothing. So the objective is the one that
`resolve.solve_without` minimises, ridge r and pull toward the old weights W0 included:

    J(S) = min_W ||A_S W - T||^2 + r ||W - W0_S||^2,      F(S) = J({}) - J(S).

With the removed units' penalty r ||W0||^2 added, J is least squares on the rows [A; sqrt(r) I] with the targets
[T; sqrt(r) W0]: so F = f - c with f of the form above (G + r I for G, C + r W0 for C), monotone and weakly submodular,
and c(S) = r ||W0_S||^2 a sum over units. While no gain is negative, greedy selection then reaches
(1 - exp(-gamma)) F(best) - r ||W0||^2, gamma the ratio of f, which the ridge raises. With r = 0 that is the paper's.

Everything follows from the streamed moments: a block Cholesky factorisation grows by one unit a step, and the Schur
complements of all candidates are updated together, so a step costs O(columns * kept columns * unit columns) and nothing
is refitted. All sums in float64. Up to `LOOKED_AT` candidates are all looked at in each step, in one batched solve. Of
more, those that gain most are, until one that was left out had a larger gain when it was last seen; then all catch up
at once. While gains only fall, as those of a submodular function do, that is greedy selection itself; those of a weakly
submodular one may grow, and a step can then miss a candidate that grew since.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ...compiler.support import tally
from ..solve.closed_form import EIGH_CUBES, ridge_level
from ..solve.moments import Moments
from .factors import EXPLAINED, Elimination, definite_cholesky, growing_squares

#: Where units are chosen: thousands of small decisions in turn, for each of which a device would be waited for.
HERE = torch.device("cpu")
#: So many candidates are looked at in each step, or one in so many of all, until another may gain more.
LOOKED_AT, LOOKED_AT_SHARE = 512, 8
#: Gains that differ by less, relative to the target's energy, are the same.
NOTHING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One consumer's part of F: `gram` (groups, columns, columns), `cross` (groups, columns, outputs), `energy` the
    target's sum of squares, and `units` (units, columns a unit) the columns of each unit, -1 where it has fewer.

    `always` are columns that stay whatever is chosen (the bias, channels of other groups). `old` (as `cross`) are the
    weights W0 and `penalty` (groups, columns) the ridge of each column; without them there is none. `held` is the part
    of the rows that predictions of the error are made on, by weights fitted to the others.
    """

    gram: torch.Tensor = field(repr=False)
    cross: torch.Tensor = field(repr=False)
    energy: float
    units: torch.Tensor
    always: torch.Tensor
    old: torch.Tensor | None = field(default=None, repr=False)
    penalty: torch.Tensor | None = field(default=None, repr=False)
    held: Objective | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        moments: Moments,
        weight: torch.Tensor,
        units: torch.Tensor,
        *,
        bias: bool,
        gain: torch.Tensor | None = None,
        ridge: float = 0.0,
    ) -> Objective:
        """From the moments of the residual R = T - A W^T, the weights (groups, out, columns) and the units' columns.

        T = R + A W^T, so C = A^T R + G W^T. With `bias` the column of ones is always kept. `gain` (groups, out) weighs
        the outputs' errors: what each is multiplied by behind the layer. `ridge` is that of the solve, relative to the
        mean diagonal of the Gram matrix. What is chosen from is on the CPU, wherever the moments are.
        """
        moments, weight = moments.to(HERE), weight.to(HERE)
        gain = None if gain is None else gain.to(HERE)
        groups, size, _ = moments.gram.shape
        full = torch.zeros(groups, size, weight.shape[1], dtype=torch.float64)
        full[:, :-1] = weight.double().transpose(1, 2)
        image = moments.gram @ full
        tally.count(tally.ALGEBRA, image.numel() * size)
        cross = moments.cross + image
        energies = moments.energy + 2 * (full * moments.cross).sum(1) + (full * image).sum(1)
        if gain is not None:
            cross, full, energies = cross * gain.unsqueeze(1), full * gain.unsqueeze(1), energies * gain.square()
        columns = torch.arange(size if bias else size - 1)
        always = columns[~torch.isin(columns, units)]
        penalty = torch.zeros(groups, size, dtype=torch.float64)
        penalty[:, :-1] = ridge * ridge_level(moments)
        return cls(
            gram=moments.gram,
            cross=cross,
            energy=float(energies.sum()),
            units=units,
            always=always,
            old=full,
            penalty=penalty,
        )

    def solved_gram(self, spare: int = 0) -> torch.Tensor:
        """G + r I, the Gram matrix of the solve; with so many empty columns behind it."""
        groups, size, _ = self.gram.shape
        whole = self.gram.new_zeros(groups, size + spare, size + spare)
        whole[:, :size, :size] = self.gram
        if self.penalty is not None:
            torch.diagonal(whole, dim1=1, dim2=2)[:, :size] += self.penalty
        return whole

    @property
    def own(self) -> torch.Tensor:
        """(groups, columns): the energy of each column and its ridge, before another has explained any of it."""
        energy = torch.diagonal(self.gram, dim1=1, dim2=2)
        return energy if self.penalty is None else energy + self.penalty

    @property
    def explained(self) -> float:
        """What F is before any unit, but for `always`."""
        return 0.0

    @property
    def predicts(self) -> bool:
        """Whether errors are predicted on rows that the fit has not seen."""
        return self.held is not None and self.held.energy > 0

    def predicted(self, order: torch.Tensor) -> torch.Tensor:
        """The relative error on the held-out rows with the first 0, 1, 2 ... units of `order` kept, of the weights that
        the solve finds on the other rows.

        The columns stand in the order in which they are kept, so one Cholesky factor L of the fit serves every count:
        with Y = L^-1 C and N = L^-1 H L^-T, the first s columns' weights err by E - 2 tr(Y_s^T Z_s) +
        tr(Y_s^T N_ss Y_s), where H, Z = L^-1 C' and E are of the held-out rows. That costs a few products of the kept
        columns' square matrices.
        """
        assert self.held is not None
        taken = self.units[order]
        columns = torch.cat([self.always, taken[taken >= 0]])
        ends = len(self.always) + torch.cat([taken.new_zeros(1), (taken >= 0).sum(1).cumsum(0)])
        fitted, wanted = self.fit(columns)
        lower = definite_cholesky(fitted)
        both = torch.linalg.solve_triangular(lower, torch.cat([wanted, self.held.cross[:, columns]], 2), upper=False)
        fit, met = both.chunk(2, 2)
        change = growing_squares(lower, self.held.gram[:, columns][:, :, columns], fit)
        change = change - 2 * (fit * met).sum((0, 2)).cumsum(0)
        return (1 + torch.cat([change.new_zeros(1), change])[ends] / self.held.energy).clamp(min=0)

    def fit(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(Gram matrix with the ridge, cross moments) of the rows that are not held out, of some columns."""
        assert self.held is not None
        fitted = (self.gram - self.held.gram)[:, columns][:, :, columns]
        if self.penalty is not None:
            fitted = fitted + torch.diag_embed(self.penalty[:, columns])
        return fitted, (self.solved_cross - self.held.cross)[:, columns]

    @cached_property
    def solved_cross(self) -> torch.Tensor:
        """C + r W0, the cross moments of the solve."""
        if self.penalty is None or self.old is None:
            return self.cross
        return self.cross + self.penalty.unsqueeze(2) * self.old

    @cached_property
    def owed(self) -> torch.Tensor:
        """(groups, columns): what the removal of each column would pay in penalty, r ||W0_j||^2."""
        if self.penalty is None or self.old is None:
            return self.gram.new_zeros(self.gram.shape[:2])
        return self.penalty * self.old.square().sum(2)

    @property
    def quiet(self) -> torch.Tensor:
        """(columns,): those without a signal beyond what the bias can stand for."""
        energy = torch.diagonal(self.gram, dim1=1, dim2=2)
        size = self.gram.shape[1]
        left = energy
        if bool((self.always == size - 1).any()):
            constant = self.gram[:, -1]
            left = energy - constant.square() / constant[:, -1:].clamp(min=torch.finfo(energy.dtype).tiny)
        return (left <= EXPLAINED * energy).all(0)

    @cached_property
    def silent(self) -> torch.Tensor:
        """(units,): those without a signal beyond what the bias can stand for: dead channels, and constant ones."""
        return torch.cat([self.quiet, torch.tensor([True])])[self.units].all(1)

    @cached_property
    def unread(self) -> torch.Tensor:
        """(units,): those that the layer's weights take nothing from."""
        if self.old is None:
            return torch.zeros(len(self.units), dtype=torch.bool)
        idle = torch.cat([(self.old == 0).all(2).all(0), torch.tensor([True])])
        return idle[self.units].all(1)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Units in the order chosen, and the relative error left after each: `errors[k]` with the first k units kept.

    `errors[0]` is that of no unit at all. Where rows were held out, the errors are those on them, with weights fitted
    to the other rows, and may grow with k; elsewhere they are the objective's, J relative to ||T||^2. `ratio_bound` is
    a lower bound of the submodularity ratio, from the extreme eigenvalues of the normalised Gram matrices, and
    `guarantee` = 1 - exp(-ratio_bound) the share of the best possible F that greedy selection is sure to reach, less
    the penalty of all weights where there is a ridge; both None where they were not asked for.
    """

    order: torch.Tensor
    errors: torch.Tensor
    ratio_bound: float | None = None

    def first(self, count: int) -> Selection:
        """The selection of so many units: the first ones, of which nothing is guaranteed."""
        return Selection(order=self.order[:count], errors=self.errors[: count + 1])

    @property
    def guarantee(self) -> float | None:
        return None if self.ratio_bound is None else -math.expm1(-self.ratio_bound)


def select_units(objectives: Sequence[Objective], count: int, *, bound: bool = False) -> Selection:
    """Choose `count` units greedily for the sum of the consumers' relative objectives.

    Ties go to the unit that comes first. Units that no consumer gets a signal from (dead channels, and those that a
    bias can stand for) come last and never disturb the factorisation. So do those that no consumer reads, where all
    others can stay: what goes then goes for nothing.
    """
    total = len(objectives[0].units)
    parts = [o for o in objectives if o.energy > 0]
    states = [Elimination(o, count) for o in parts]
    free = torch.ones(total, dtype=torch.bool)
    silent = torch.stack([o.silent for o in parts]).all(0) if parts else ~free
    unread = torch.stack([o.unread | o.silent for o in parts]).all(0) if parts else ~free
    last = unread if int((~unread).sum()) <= count else silent
    order: list[int] = []
    errors = [_mean([s.error for s in states])]
    while len(order) < count:
        gains = _gains(states, silent)
        candidates = next(mask for mask in (free & ~last, free & ~silent, free) if bool(mask.any()))
        looked = _most_gaining(gains, candidates)
        beyond = float(gains[candidates & ~looked].max()) if bool((candidates & ~looked).any()) else -math.inf
        few = [s.among(looked) for s in states]
        for step in range(count - len(order)):
            if step:
                gains = _gains(few, silent)
            gains = gains.masked_fill(~(looked & free), -math.inf)
            best = int(gains.argmax())
            if float(gains[best]) == -math.inf or (step and float(gains[best]) < beyond - NOTHING):
                break
            order.append(best)
            free[best] = False
            for state in few:
                state.take(best)
            errors.append(_mean([s.error for s in few]))
        for state, other in zip(states, few, strict=True):
            state.follow(other)
    chosen = torch.tensor(order, dtype=torch.long)
    found = torch.tensor(errors, dtype=torch.float64)
    if parts and all(o.predicts for o in parts):
        found = torch.stack([o.predicted(chosen) for o in parts]).mean(0)
    return Selection(
        order=chosen,
        errors=found,
        ratio_bound=min((submodularity_bound(o) for o in objectives), default=1.0) if bound else None,
    )


def submodularity_bound(objective: Objective) -> float:
    """Lower bound of the submodularity ratio: least over largest eigenvalue of the Gram matrix with unit diagonal.

    Directions without energy (dead channels) are left out. Zero when channels are linearly dependent: then the
    bound says nothing, though the greedy choice is usually far better than it.
    """
    whole = objective.solved_gram()
    diagonal = torch.diagonal(whole, dim1=1, dim2=2)
    # what the kept columns leave of the others has its eigenvalues within those of all together
    columns = torch.cat([objective.units[objective.units >= 0], objective.always])
    least = 1.0
    for gram, energy in zip(whole, diagonal, strict=True):
        alive = columns[energy[columns] > 0]
        if not len(alive):
            continue
        scale = energy[alive].rsqrt()
        tally.count(tally.ALGEBRA, len(alive) ** 3 * EIGH_CUBES / 3)
        values = torch.linalg.eigvalsh(gram[alive][:, alive] * scale * scale.unsqueeze(1))
        least = min(least, float(values[0].clamp(min=0) / values[-1]))
    return least


def _gains(states: Sequence[Elimination], silent: torch.Tensor) -> torch.Tensor:
    return sum((s.gains() for s in states), torch.zeros(len(silent), dtype=torch.float64)).masked_fill(silent, 0.0)


def _most_gaining(gains: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """A mask of the candidates to look at: all where they are few, else those that gain most now."""
    few = max(LOOKED_AT, int(candidates.sum()) // LOOKED_AT_SHARE)
    if int(candidates.sum()) <= few:
        return candidates.clone()
    looked = torch.zeros_like(candidates)
    looked[gains.masked_fill(~candidates, -math.inf).topk(few).indices] = True
    return looked


def _mean(errors: Sequence[float]) -> float:
    return sum(errors) / len(errors) if errors else 0.0
