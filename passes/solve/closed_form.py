"""The closed form: re-solve layers so that a rewritten network reproduces the original.

For a layer with inputs A (a last column of ones stands for the bias), weights W0 and residual R = T - A W0^T,

    D* = argmin_D  ||A D - R||_F^2 + ridge * sum_j d_j ||D_j||^2,      W' = W0 + D*^T,
    (G + ridge * diag(d)) D* = A^T R,        G = A^T A,  d_j = mean diagonal of G

so the ridge pulls toward the old weights, and a network without residual keeps them exactly. The source of the
idea is the reweighting step of El Halabi et al., NeurIPS 2022 (arXiv 2203.04940, section 3), here with
the asymmetric target and a correction instead of a refit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...compiler.processes.sharing import in_turn
from ...compiler.support import tally
from .moments import Moments, SplitMoments

#: Ridges that are judged, times the one that is asked for: two, then one between them or those beyond.
COARSE, BETWEEN, BEYOND = (1.0, 10.0), 3.0, (30.0, 100.0)
#: Multiply-accumulates of an eigendecomposition with vectors, in cubes of its size: Householder, QR sweeps, back again.
EIGH_CUBES = 4.5
#: The share of the error on held-out rows that another ridge than the one asked for has to lose less.
MARGIN = 0.1


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What a solve changes: `weight` as (groups, out/groups, columns), `bias` as (out,) or None, errors before and
    after (sums of squares)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    before: float
    after: float


def ridge_level(moments: Moments) -> torch.Tensor:
    """(groups, 1): the mean diagonal of the Gram matrix, which a ridge is relative to; the column of ones aside."""
    return torch.diagonal(moments.gram, dim1=1, dim2=2)[:, :-1].mean(1, keepdim=True)


def solve(moments: Moments, *, ridge: float, bias: bool, level: torch.Tensor | None = None) -> Correction:
    """Solve for the change of one layer's weights, in float64.

    `ridge` is relative to `level`, that of `ridge_level`; columns that are zero throughout get no change. With
    `bias` the column of ones takes part, unpenalised. Rank-deficient Grams (few samples, dead channels) are handled:
    the ridge makes the system definite, and with ridge 0 the least-norm solution is taken. An output whose error
    would not fall keeps its weights, so `after` never exceeds `before`.
    """
    size = moments.gram.shape[1] - (0 if bias else 1)
    gram, cross = moments.gram[:, :size, :size], moments.cross[:, :size]
    delta = torch.zeros_like(moments.cross)
    level = ridge_level(moments) if level is None else level
    weights = _ridges(gram, ridge, level, penalised=moments.gram.shape[1] - 1)
    found, exact = _ridge_solve(gram, cross, ridge, weights)
    delta[:, :size] = found
    if exact:  # G D = C - w D: the error is known without another product with G
        after = moments.energy - (found * cross).sum(1) - (weights.unsqueeze(2) * found.square()).sum(1)
    else:
        after = moments.error_after(delta)
    better = (after < moments.energy) & after.isfinite()
    delta = torch.where(better.unsqueeze(1), delta, torch.zeros_like(delta))
    after = torch.where(better, after.clamp(min=0), moments.energy)
    before_sum, after_sum = torch.stack([moments.energy.sum(), after.sum()]).tolist()
    return Correction(
        weight=delta[:, :-1].transpose(1, 2),
        bias=delta[:, -1].reshape(-1) if bias else None,
        before=before_sum,
        after=after_sum,
    )


def judged_solve(moments: SplitMoments, *, ridge: float, bias: bool, margin: float = MARGIN) -> Correction:
    """`solve` with the ridge that loses least on rows held out: the one asked for, a larger one, or no change at all.

    A correction that only fits the samples at hand is worth nothing: the last layers of a network see few positions of
    each sample, and those of one sample are much alike. Each ridge is judged by its correction from the other rows.
    Another than the one asked for has to lose a share of `margin` less: what each layer leaves undone adds up over the
    network, what it fits too closely does where samples are few. With no rows held out this is `solve`.
    """
    held = moments.held
    if held is None or ridge == 0:
        return in_turn(solving_macs(moments.whole), lambda: solve(moments.whole, ridge=ridge, bias=bias))

    def judged() -> Correction:
        best = _best_factor(moments.whole - held, held, ridge, bias, margin)
        return solve(moments.whole, ridge=best * ridge, bias=bias) if best > 0 else _nothing(moments.whole, bias)

    return in_turn((1 + len(COARSE)) * solving_macs(moments.whole), judged)


def solving_macs(moments: Moments) -> float:
    """Multiply-accumulates of one solve."""
    return _solve_macs(moments.cross)


def _best_factor(fit: Moments, held: Moments, ridge: float, bias: bool, margin: float) -> float:
    """What to multiply a ridge by: `COARSE`, then what lies beside the better of these; 0 where nothing is better."""
    size, level = fit.gram.shape[1] - (0 if bias else 1), ridge_level(fit)
    lost = {0.0: held.error()}

    def judge(factor: float) -> float:
        delta = torch.zeros_like(fit.cross)
        gram, cross = fit.gram[:, :size, :size], fit.cross[:, :size]
        weights = _ridges(gram, factor * ridge, level, penalised=fit.gram.shape[1] - 1)
        delta[:, :size], _ = _ridge_solve(gram, cross, factor * ridge, weights)
        lost[factor] = float(held.error_after(delta).sum())
        return lost[factor]

    small, large = COARSE
    if judge(large) >= judge(small):
        if margin == 0:  # with one, hardly any ridge between is so much better as to be taken
            judge(BETWEEN)
    elif judge(BEYOND[0]) < lost[large]:
        judge(BEYOND[1])
    best = min(lost, key=lambda factor: lost[factor])
    return best if lost[best] < (1 - margin) * lost[small] else small


def _nothing(moments: Moments, bias: bool) -> Correction:
    """The correction that changes no weight."""
    columns, before = moments.gram.shape[1] - 1, moments.error()
    weight = moments.energy.new_zeros(*moments.energy.shape, columns)
    shift = moments.energy.new_zeros(moments.energy.numel()) if bias else None
    return Correction(weight=weight, bias=shift, before=before, after=before)


def solve_without(
    moments: Moments, weight: torch.Tensor, gone: torch.Tensor, *, ridge: float, bias: bool
) -> Correction:
    """Solve with some columns removed: their weights become zero and the others take over what they can.

    `weight` (groups, out/groups, columns) as it stands, `gone` a mask over columns. The change of the removed columns
    is fixed at -W, so the others solve (G_kk + ridge) X = C_k + G_kr W_r. The ridge is relative to the mean diagonal of
    all columns, so that it is the same whatever goes, as in `submodular`. `before` is the error of plain slicing, which
    `after` never exceeds. With no column gone this is `solve`.
    """
    columns = moments.gram.shape[1]
    lost = torch.cat([gone, gone.new_zeros(columns - len(gone))])
    stay, out = (~lost).nonzero().reshape(-1), lost.nonzero().reshape(-1)
    old = weight.to(moments.gram.device).double().transpose(1, 2)[:, out]
    gram, cross = moments.gram, moments.cross
    energy = moments.energy + 2 * (old * cross[:, out]).sum(1) + (old * (gram[:, out][:, :, out] @ old)).sum(1)
    rest = Moments(
        gram=gram[:, stay][:, :, stay],
        cross=cross[:, stay] + gram[:, stay][:, :, out] @ old,
        energy=energy,
        rows=moments.rows,
    )
    found = solve(rest, ridge=ridge, bias=bias, level=ridge_level(moments))
    change = torch.zeros_like(weight, dtype=torch.float64, device=moments.gram.device)
    change[:, :, stay[:-1]] = found.weight
    change[:, :, out] = -old.transpose(1, 2)
    return Correction(weight=change, bias=found.bias, before=found.before, after=found.after)


def _ridges(gram: torch.Tensor, ridge: float, level: torch.Tensor, *, penalised: int) -> torch.Tensor:
    """What a solve adds to the diagonal of each group's Gram matrix: ridge * level, `level` (groups, 1); nothing to the
    columns from `penalised` on."""
    diagonal = torch.diagonal(gram, dim1=1, dim2=2)
    weights = torch.zeros_like(diagonal)
    weights[:, :penalised] = ridge * level
    # a column that is zero on all data has no say: the unit diagonal keeps the system definite and its change at zero
    return torch.where(diagonal == 0, torch.ones_like(weights), weights)


def _ridge_solve(
    gram: torch.Tensor, cross: torch.Tensor, ridge: float, weights: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """(G + diag(weights)) X = C per group, and whether X solves it to the last digits: not so the least-norm solution
    of a system without a ridge, or of one that is not definite."""
    system = gram + torch.diag_embed(weights)
    if ridge > 0:
        tally.count(tally.ALGEBRA, _solve_macs(cross))
        factor, info = torch.linalg.cholesky_ex(system)
        if not bool(info.any()):
            return torch.cholesky_solve(cross, factor), True
    return _least_norm(system, cross), False


def _solve_macs(cross: torch.Tensor) -> float:
    """Of a Cholesky factorisation and of the two triangular solves with it."""
    groups, columns, outputs = cross.shape
    return groups * (columns**3 / 6 + columns**2 * outputs)


def _least_norm(system: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """Pseudo-inverse solution by eigendecomposition: directions below the noise of float64 sums are left alone."""
    tally.count(tally.ALGEBRA, EIGH_CUBES * len(system) * system.shape[1] ** 3 + _solve_macs(cross))
    values, vectors = torch.linalg.eigh(system)
    floor = values[:, -1:].clamp(min=0) * system.shape[1] * 1e-12
    inverse = torch.where(
        values > floor, 1 / values.clamp(min=torch.finfo(values.dtype).tiny), torch.zeros_like(values)
    )
    return vectors @ (inverse.unsqueeze(2) * (vectors.transpose(1, 2) @ cross))
