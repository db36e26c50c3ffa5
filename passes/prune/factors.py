"""Factors of Gram matrices, many small ones or one that grows, whose directions may have nothing of their own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from ...compiler.support import tally

if TYPE_CHECKING:
    from .submodular import Objective

#: Rows are left out when so many of the units are still there, as a share of those that have rows.
FEWER = 0.8

#: Directions whose unexplained part is below this share of their own energy count as explained: products of float32
#: activations leave noise of about 1e-7, which must not be divided by.
EXPLAINED = 1e-6


def whitener(blocks: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """M with M^T B M = 1 for each block B, and zero columns for directions that are explained already.

    By Cholesky where all directions of a block have enough left (M = L^-T), by eigendecomposition of the others.
    """
    if blocks.shape[-1] == 1:
        left = blocks.squeeze(-1)
        return torch.where(left > EXPLAINED * energy, left.clamp(min=0).rsqrt(), torch.zeros_like(left)).unsqueeze(-1)
    factor, info = torch.linalg.cholesky_ex(blocks)
    pivots = torch.diagonal(factor, dim1=-2, dim2=-1).square()
    sound = (info == 0) & (pivots > EXPLAINED * energy).all(-1)
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    safe = torch.where(sound[..., None, None], factor, identity)
    found = torch.linalg.solve_triangular(safe, identity.expand_as(safe), upper=False).transpose(-1, -2)
    if bool(sound.all()):
        return found
    found = found.clone()
    found[~sound] = _truncated(blocks[~sound], energy[~sound])
    return found


def _truncated(blocks: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """The whiteners of blocks with explained directions, in units of each column's own energy."""
    scale = energy.rsqrt()
    values, vectors = torch.linalg.eigh(blocks * scale.unsqueeze(-1) * scale.unsqueeze(-2))
    inverse = torch.where(values > EXPLAINED, values.clamp(min=EXPLAINED).rsqrt(), torch.zeros_like(values))
    return scale.unsqueeze(-1) * vectors * inverse.unsqueeze(-2)


def with_few_outputs(cross: torch.Tensor) -> torch.Tensor:
    """The same C C^T with at most as many outputs as columns: gains depend on nothing else."""
    if cross.shape[2] <= cross.shape[1]:
        return cross.clone()
    _, upper = torch.linalg.qr(cross.transpose(1, 2), mode="r")
    return upper.transpose(1, 2).contiguous()


def definite_cholesky(gram: torch.Tensor) -> torch.Tensor:
    """The factor of a Gram matrix, its diagonal raised by as little as makes it definite where the ridge does not: what
    float32 products resolve of each column, or a power of ten of that."""
    own = torch.diagonal(gram, dim1=1, dim2=2)
    lift = EXPLAINED * torch.where(own > 0, own, torch.ones_like(own))
    factor, info = torch.linalg.cholesky_ex(gram)
    for power in range(7):
        if not bool(info.any()):
            break
        factor, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(10.0**power * lift))
    return factor


def growing_squares(lower: torch.Tensor, gram: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """tr(Y_s^T N_ss Y_s) with N = L^-1 G L^-T, for the first 1, 2 ... columns s: what weights L_ss^-T Y_s make of G."""
    groups, columns, outputs = weights.shape
    tally.count(tally.ALGEBRA, groups * columns**2 * (7 / 6 * columns + outputs))
    half = torch.linalg.solve_triangular(lower, gram, upper=False).transpose(1, 2)
    whole = torch.linalg.solve_triangular(lower, half, upper=False)
    return (whole * (weights @ weights.transpose(1, 2))).sum(0).cumsum(0).cumsum(1).diagonal()


class Elimination:
    """One consumer while units are taken, and what the taken columns leave unexplained of each candidate.

    `blocks` (groups, candidates, b, b) are the candidates' Schur complements B = K_uu - L_u L_u^T and `images` as many
    N = C_u C_u^T of what is left of their cross moments, so that a unit gains tr(B^-1 N). `factor` (groups, columns,
    taken columns) holds the rows L of the Cholesky factor and `weights` (groups, taken columns, outputs) those of
    L^-1 C. The cross moments themselves stay as they are: a step reads C and L once, and writes neither. Rows of units
    that were taken are left out now and then.

    Where many are there, units are taken `among` a few of them, and all others `follow` at once: one product of
    matrices in the place of many with vectors, each of which reads all of L and C.
    """

    def __init__(self, objective: Objective, count: int) -> None:
        groups, size, _ = objective.gram.shape
        self.energy = objective.energy
        # f and c of F = f - c: what the taken columns explain of the rows and the old weights, and their part of these
        self.explained, self.paid = objective.explained, 0.0
        self.owed = torch.cat([objective.owed.sum(0), objective.gram.new_zeros(1)])
        # an empty column at the end stands for what a narrower unit lacks
        gram = objective.solved_gram(spare=1)
        cross = objective.cross.new_zeros(groups, size + 1, objective.cross.shape[2])
        cross[:, :size] = objective.solved_cross
        self.gram, self.cross = gram, with_few_outputs(cross)
        own = torch.cat([objective.own, gram.new_zeros(groups, 1)], 1)
        self.floor = torch.where(own > 0, own, torch.ones_like(own))
        most = len(objective.always) + count * objective.units.shape[1]
        self.factor = gram.new_zeros(groups, size + 1, most)
        self.weights = gram.new_zeros(groups, most, self.cross.shape[2])
        self.taken = 0
        #: The columns of all units; the units that are still there and theirs; which columns have a row, and which.
        self.there = torch.arange(len(objective.units))
        self.all_columns = self.columns = torch.where(objective.units < 0, size, objective.units)
        self.rows = self.place = torch.arange(size + 1)
        self.blocks = gram[:, self.columns.unsqueeze(2), self.columns.unsqueeze(1)].clone()
        own_cross = self.cross[:, self.columns]
        self.images = own_cross @ own_cross.transpose(2, 3)
        self.gone = torch.zeros(len(self.all_columns), dtype=torch.bool)
        #: Of one that takes units among a few: what it took, and with which whiteners.
        self.steps: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        if len(objective.always):
            self._take(objective.always)

    @property
    def error(self) -> float:
        return max(0.0, 1 - (self.explained - self.paid) / self.energy)

    def gains(self) -> torch.Tensor:
        """By how much each unit would lower J, relative to the target's energy; 0 of those that are not there."""
        whitening = whitener(self.blocks, self.floor[:, self.columns])
        explained = ((self.images @ whitening) * whitening).sum((2, 3)).clamp(min=0).sum(0)
        found = torch.zeros(len(self.all_columns), dtype=torch.float64)
        found[self.there] = (explained - self.owed[self.columns].sum(1)) / self.energy
        return found

    def take(self, unit: int) -> None:
        """Take one unit."""
        self._take(self.all_columns[unit])
        self.gone[unit] = True
        if self.steps is None:
            self._leave_out_taken()

    def among(self, units: torch.Tensor) -> Elimination:
        """One that takes units among these alone (a mask); itself, where all that are there are among them."""
        self._leave_out_taken()
        chosen = units[self.there]
        if bool((chosen | self.gone[self.there]).all()):
            return self
        few = copy.copy(self)
        few.steps = []
        few._leave_out(chosen)
        return few

    def follow(self, few: Elimination) -> None:
        """Take what one `among` a few has taken."""
        if not few.steps:  # itself
            return
        columns = torch.cat([taken for taken, _ in few.steps])
        new = slice(self.taken, self.taken + len(columns))
        known = few.factor[:, few.place[columns], new]
        # with D = K_:T - L L_T^T of all columns T together, the new columns of L are D M: block by block,
        # (D_s - (D M)_<s (L_T)_s,<s^T) w_s
        whitening = torch.zeros_like(known)
        at = 0
        for taken, own in few.steps:
            end = at + len(taken)
            whitening[:, :at, at:end] = -whitening[:, :at, :at] @ (known[:, at:end, :at].transpose(1, 2) @ own)
            whitening[:, at:end, at:end] = own
            at = end
        self.explained, self.paid = few.explained, few.paid
        self._eliminate(columns, whitening, few.weights[:, new])

    def _take(self, columns: torch.Tensor) -> None:
        done, weights, at = self.factor[:, :, : self.taken], self.weights[:, : self.taken], self.place[columns]
        mine = done[:, at]
        block = self.gram[:, columns][:, :, columns] - mine @ mine.transpose(1, 2)
        whitening = whitener(block, self.floor[:, columns])
        fresh = whitening.transpose(1, 2) @ (self.cross[:, at] - mine @ weights)
        self.explained += float(fresh.square().sum())
        self.paid += float(self.owed[columns].sum())
        self._eliminate(columns, whitening, fresh)
        if self.steps is not None:
            self.steps.append((columns, whitening))

    def _eliminate(self, columns: torch.Tensor, whitening: torch.Tensor, fresh: torch.Tensor) -> None:
        """What columns leave of all others, with the whitener of what is left of them and their rows of L^-1 C."""
        groups, size, outputs = self.cross.shape
        tally.count(tally.ALGEBRA, groups * size * len(columns) * (2 * self.taken + 2 * len(columns) + outputs))
        done, weights = self.factor[:, :, : self.taken], self.weights[:, : self.taken]
        mine = done[:, self.place[columns]]
        # <what is left of C, the new weights> and the new columns of L, from one pass over those that there are
        both = done @ torch.cat([mine.transpose(1, 2), weights @ fresh.transpose(1, 2)], 2)
        left, known = both.chunk(2, 2)
        rows = (self.gram[:, columns][:, :, self.rows].transpose(1, 2) - left) @ whitening
        inner = self.cross @ fresh.transpose(1, 2) - known
        new = slice(self.taken, self.taken + len(columns))
        self.factor[:, :, new], self.weights[:, new] = rows, fresh
        self.taken += len(columns)
        places = self.place[self.columns]
        parts = rows[:, places]
        turned = parts.transpose(2, 3)
        mixed = (inner[:, places] - parts @ (fresh @ fresh.transpose(1, 2)).unsqueeze(1) / 2) @ turned
        self.blocks = self.blocks - parts @ turned
        self.images = self.images - (mixed + mixed.transpose(2, 3))

    def _leave_out_taken(self) -> None:
        left = ~self.gone[self.there]
        if int(left.sum()) < FEWER * len(left):
            self._leave_out(left)

    def _leave_out(self, left: torch.Tensor) -> None:
        """Go on with these of the units that are there, and with the rows that they need."""
        self.there, self.columns = self.there[left], self.columns[left]
        self.blocks, self.images = self.blocks[:, left], self.images[:, left]
        needed = torch.zeros(len(self.place), dtype=torch.bool)
        needed[self.columns] = True
        needed[-1] = True  # the empty one
        kept = needed[self.rows]
        self.rows = self.rows[kept]
        self.cross, self.factor = self.cross[:, kept], self.factor[:, kept]
        self.place = torch.full_like(self.place, -1)
        self.place[self.rows] = torch.arange(len(self.rows))
