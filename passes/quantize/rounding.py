"""Weights on an integer grid: scales, and rounding that makes up for itself.

For a layer with inputs A (a last column of ones stands for the bias), Gram matrix ``G = A^T A`` and weights W, rounding
to Q loses

    ||A (W - Q)^T||_F^2 = tr (W - Q) G (W - Q)^T.

Columns are rounded one after another; what one loses is taken over by those that are still free, in the way that is
best for the least squares that are left (Frantar et al., GPTQ, ICLR 2023, arXiv 2210.17323, equation 3). The bias is
the last column and is not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...compiler.support import tally

#: Added to the diagonal of a Gram matrix, relative to its mean: columns that are never active are rounded plainly.
DAMPING = 0.01
#: Scales from so many steps below the largest weight are compared; the last is at this share of it.
SHRINKINGS, LEAST_SHRINKING = 24, 0.6
#: So many columns are rounded before what they lose is handed to all that come after them.
_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A weight on its grid: ``values * scales`` with one scale for each output; and what the bias takes over."""

    values: torch.Tensor
    scales: torch.Tensor
    shift: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """What is read back, as (groups, outputs, columns) in float64."""
        return self.values.double() * self.scales


def weight_scales(
    weight: torch.Tensor, importance: torch.Tensor, limit: int, least: torch.Tensor | None = None
) -> torch.Tensor:
    """One scale for each output of a weight (groups, outputs, columns): that of least squared error of rounding, each
    column weighed by its `importance` (groups, columns), the diagonal of G; not below `least`. As (groups, outputs,
    1)."""
    most = weight.abs().amax(2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * limit)
    best, scales = torch.full_like(most, torch.inf), most / limit
    for share in torch.linspace(1.0, LEAST_SHRINKING, SHRINKINGS, dtype=weight.dtype):
        scale = share * most / limit if least is None else torch.maximum(share * most / limit, least)
        error = (weight - _nearest(weight, scale, limit)).square()
        lost = (error * importance.unsqueeze(1)).sum(2, keepdim=True)
        scales = torch.where(lost < best, scale, scales)
        best = torch.minimum(lost, best)
    return scales.float().to(weight.dtype)  # as they are stored


def rounded(weight: torch.Tensor, gram: torch.Tensor, limit: int, least: torch.Tensor | None = None) -> Rounded:
    """Round a weight (groups, outputs, columns) to integers from -limit to limit, by its Gram matrix (groups, columns +
    1, columns + 1), the ones last. In float64. Scales are not below `least` (groups, outputs, 1).

    Never worse than rounding each value to the nearest: where an output would be, it is rounded so.
    """
    groups, outputs, columns = weight.shape
    weight = weight.to(gram.device).double()
    diagonal = torch.diagonal(gram, dim1=1, dim2=2)
    scales = weight_scales(weight, diagonal[:, :-1], limit, least)
    nearest = _nearest(weight, scales, limit)
    level = diagonal[:, :-1].mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    order = diagonal[:, :-1].mean(0).argsort(descending=True)
    order = torch.cat([order, order.new_full((1,), columns)])
    damped = gram[:, order][:, :, order] + DAMPING * torch.diag_embed(level.unsqueeze(1).expand(groups, columns + 1))
    tally.count(tally.ALGEBRA, rounding_macs(weight))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    open_ = torch.cat([weight, weight.new_zeros(groups, outputs, 1)], 2)[:, :, order]
    closed = _in_turn(open_, factor, scales, limit)
    fitted = torch.empty_like(closed)
    fitted[:, :, order] = closed
    better = (_loss(weight, fitted, gram) < _loss(weight, _with_bias(weight, nearest, gram), gram)).unsqueeze(2)
    chosen = torch.where(better, fitted, _with_bias(weight, nearest, gram))
    values = torch.round(chosen[:, :, :-1] / scales)
    return Rounded(values=values.to(torch.int8), scales=scales, shift=chosen[:, :, -1])


def rounding_macs(weight: torch.Tensor) -> float:
    """Multiply-accumulates of rounding a weight (groups, outputs, columns): three factors, the columns in turn, and two
    losses."""
    groups, outputs, size = weight.shape[0], weight.shape[1], weight.shape[2] + 1
    return groups * (2 / 3 * size**3 + size**2 * outputs / 2 + 2 * size**2 * outputs)


def _in_turn(open_: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, limit: int) -> torch.Tensor:
    """Columns rounded one after another, the last one left as it then is."""
    closed, columns = open_.clone(), open_.shape[2] - 1
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        lost = torch.zeros_like(closed[:, :, start:stop])
        for place in range(start, stop):
            now = closed[:, :, place]
            exact = _nearest(now.unsqueeze(2), scales, limit).squeeze(2)
            each = (now - exact) / factor[:, place, place].unsqueeze(1)
            closed[:, :, place:stop] -= each.unsqueeze(2) * factor[:, place, place:stop].unsqueeze(1)
            closed[:, :, place] = exact
            lost[:, :, place - start] = each
        closed[:, :, stop:] -= lost @ factor[:, start:stop, stop:]
    return closed


def _nearest(weight: torch.Tensor, scales: torch.Tensor, limit: int) -> torch.Tensor:
    return (weight / scales).round().clamp(-limit, limit) * scales


def _with_bias(weight: torch.Tensor, nearest: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Rounded weights and the bias that then is best: what they lose on average, it gives back."""
    count = gram[:, -1, -1].clamp(min=1).reshape(-1, 1, 1)
    mean = gram[:, :-1, -1:] / count
    return torch.cat([nearest, (weight - nearest) @ mean], 2)


def _loss(weight: torch.Tensor, found: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """||A (W - Q)^T||^2 of each output."""
    change = torch.cat([weight, weight.new_zeros(*weight.shape[:2], 1)], 2) - found
    return ((change @ gram) * change).sum(2)
