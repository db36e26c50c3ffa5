"""Objectives of unit groups that one layer reads together, from one factorisation of its Gram matrix.

A layer behind a concatenation has columns of many groups, and each group is chosen with all other columns kept. With
K = G + r I, P = K^-1 and W = P C of all columns, those g of a group and the others a,

    K_gg - K_ga K_aa^-1 K_ag = P_gg^-1 = S,                  C_g - K_ga K_aa^-1 C_a = S W_g,
    tr(C_a^T K_aa^-1 C_a) = tr(C^T W) - tr(W_g^T S W_g),

so one inverse serves all groups, and a group is chosen on matrices of its own columns alone. The weights without the
columns T are W - P_:T P_TT^-1 W_T, which gives the errors on held-out rows for every number of units in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...compiler.support import tally
from .factors import definite_cholesky, growing_squares
from .submodular import Objective

#: Pivots of a factorisation below this share of their column's energy are rounding, not what is left of the column.
ROUNDING = 1e-8


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What the errors on held-out rows become without some of a group's columns, from those with all columns.

    With P and W of the fit to the other rows, H, C' and E of the held-out ones: `inverse` = P_gg, `weights` = W_g,
    `linear` = (P (C' - H W))_g and `square` = (P H P)_gg; `base` the error with all columns, `energy` = E.
    """

    inverse: torch.Tensor = field(repr=False)
    weights: torch.Tensor = field(repr=False)
    linear: torch.Tensor = field(repr=False)
    square: torch.Tensor = field(repr=False)
    base: float
    energy: float

    def errors(self, units: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """The relative error with the first 0, 1, 2 ... units of `order` kept."""
        never = torch.ones(len(units), dtype=torch.bool)
        never[order] = False
        # as they go: the units that are never kept, then the others from the last chosen to the first
        leaving = units[torch.cat([never.nonzero().reshape(-1), order.flip(0)])]
        columns = leaving[leaving >= 0]
        lower = definite_cholesky(self.inverse[:, columns][:, :, columns])
        both = torch.linalg.solve_triangular(lower, torch.cat([self.weights, self.linear], 2)[:, columns], upper=False)
        weights, linear = both.chunk(2, 2)
        change = growing_squares(lower, self.square[:, columns][:, :, columns], weights)
        change = change + 2 * (weights * linear).sum((0, 2)).cumsum(0)
        ends = torch.cat([order.new_zeros(1), (leaving >= 0).sum(1).cumsum(0)])[len(units) - len(order) :].flip(0)
        return ((self.base + torch.cat([change.new_zeros(1), change])[ends]) / self.energy).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class CondensedObjective(Objective):
    """The objective of one group's columns, with all other columns kept and eliminated.

    `gram` and `cross` are what the others leave, `energies` those of the columns before, `others_explain` what the
    others explain less what they pay, `lost` the columns without a signal on their own, and `removal` predicts errors.
    """

    energies: torch.Tensor = field(repr=False)
    others_explain: float
    lost: torch.Tensor = field(repr=False)
    removal: Removal | None = field(default=None, repr=False)

    @property
    def own(self) -> torch.Tensor:
        """(groups, columns): the energy of each column and its ridge, before the others explained theirs."""
        return self.energies

    @property
    def explained(self) -> float:
        """F of the other columns."""
        return self.others_explain

    @property
    def quiet(self) -> torch.Tensor:
        """(columns,): those without a signal, as they were before the others explained theirs."""
        return self.lost

    @property
    def predicts(self) -> bool:
        """Whether errors are predicted on rows that the fit has not seen."""
        return self.removal is not None

    def predicted(self, order: torch.Tensor) -> torch.Tensor:
        """As `Objective.predicted`, all other columns kept."""
        assert self.removal is not None
        return self.removal.errors(self.units, order)


class _Fitted:
    """K^-1 and the weights of a fit with all columns."""

    def __init__(self, gram: torch.Tensor, cross: torch.Tensor) -> None:
        groups, columns, outputs = cross.shape
        tally.count(tally.ALGEBRA, groups * columns**2 * (columns / 2 + outputs))
        lower, info = torch.linalg.cholesky_ex(gram)
        pivots = torch.diagonal(lower, dim1=1, dim2=2).square()
        self.sound = not bool(info.any()) and bool((pivots > ROUNDING * torch.diagonal(gram, dim1=1, dim2=2)).all())
        if self.sound:
            self.inverse = torch.cholesky_inverse(lower)
            self.weights = torch.cholesky_solve(cross, lower)


class _Judged:
    """A fit to the other rows, and what it leaves of the held-out ones: `residual` = C' - H W, `base` the error."""

    def __init__(self, fit: _Fitted, held: Objective, columns: torch.Tensor) -> None:
        cross = held.cross[:, columns]
        self.fit, self.energy = fit, held.energy
        self.gram = held.gram[:, columns][:, :, columns]
        image = self.gram @ fit.weights
        tally.count(tally.ALGEBRA, image.numel() * len(columns))
        self.residual = cross - image
        self.base = held.energy - 2 * float((fit.weights * cross).sum()) + float((fit.weights * image).sum())

    def removal(self, at: torch.Tensor) -> Removal:
        """Without columns at such places."""
        rows = self.fit.inverse[:, at]
        tally.count(tally.ALGEBRA, rows.numel() * (rows.shape[2] + rows.shape[1] + self.residual.shape[2]))
        return Removal(
            inverse=rows[:, :, at],
            weights=self.fit.weights[:, at],
            linear=rows @ self.residual,
            square=rows @ self.gram @ rows.transpose(1, 2),
            base=self.base,
            energy=self.energy,
        )


class SharedColumns:
    """A layer's moments, factorised once for all groups whose units it reads."""

    def __init__(self, whole: Objective) -> None:
        """`whole` is the objective of the layer with all its columns in `always`, and no unit."""
        self.whole, self.columns = whole, whole.always
        self.place = torch.full((whole.gram.shape[1] + 1,), -1)
        self.place[self.columns] = torch.arange(len(self.columns))
        self.cross = whole.solved_cross[:, self.columns]
        self.fitted = _Fitted(whole.solved_gram()[:, self.columns][:, :, self.columns], self.cross)
        self.sound = self.fitted.sound
        self.judged: _Judged | None = None
        if self.sound and whole.held is not None and whole.held.energy > 0:
            fit = _Fitted(*whole.fit(self.columns))
            self.sound = fit.sound
            self.judged = _Judged(fit, whole.held, self.columns) if fit.sound else None
        if self.sound:
            self.explained = (self.cross * self.fitted.weights).sum()

    def objective(self, units: torch.Tensor) -> Objective | None:
        """The objective of the units with such columns, -1 where one has fewer than others; None where the columns
        depend on each other so far that their inverse says nothing."""
        if not self.sound:
            return None
        whole, mine = self.whole, units[units >= 0]
        at = self.place[mine]
        weights = self.fitted.weights[:, at]
        left = torch.linalg.inv(self.fitted.inverse[:, at][:, :, at])
        left = (left + left.transpose(1, 2)) / 2
        cross = left @ weights
        explained = float(self.explained - (weights * cross).sum())
        penalty = torch.zeros_like(whole.own) if whole.penalty is None else whole.penalty
        others = torch.ones(whole.gram.shape[1], dtype=torch.bool)
        others[mine] = False
        others = others[self.columns]
        paid = float(whole.owed[:, self.columns][:, others].sum())
        old = None if whole.old is None else whole.old[:, mine]
        own_ridge = penalty[:, mine]
        return CondensedObjective(
            gram=left - torch.diag_embed(own_ridge),
            cross=cross if old is None else cross - own_ridge.unsqueeze(2) * old,
            energy=whole.energy,
            units=_renumbered(units),
            always=mine[:0],
            old=old,
            penalty=own_ridge,
            energies=whole.own[:, mine],
            others_explain=explained - paid,
            lost=whole.quiet[mine],
            removal=None if self.judged is None else self.judged.removal(at),
        )


def _renumbered(units: torch.Tensor) -> torch.Tensor:
    """The columns of each unit in a matrix that has the columns of these units alone, in their order."""
    there = units >= 0
    return torch.where(there, there.reshape(-1).cumsum(0).reshape(units.shape) - 1, units)
