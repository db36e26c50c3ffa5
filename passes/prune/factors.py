"""Factors of Gram matrices, many small ones or one that grows, whose directions may have nothing of their own."""

from __future__ import annotations

import torch

from ...compiler.support import tally

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
