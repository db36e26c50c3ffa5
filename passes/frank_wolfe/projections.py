"""Projections in closed form, row by row on stacks (batch, n) in float64."""

from __future__ import annotations

import torch

from .ordering import signs


def onto_capped_l1(x: torch.Tensor, total: float) -> torch.Tensor:
    """The nearest points with sum |x_i| <= total and |x_i| <= 1.

    It is sign(x) * clip(|x| - tau, 0, 1) with the least tau >= 0 for which the sum is at most `total`. The sum falls
    piecewise linearly in tau and bends at |x_i| and |x_i| - 1, so after one sort tau is read off: O(n log n). With
    total = 1 the cap never binds and this is the projection onto the L1 ball (Duchi et al., ICML 2008).
    """
    a = x.abs()
    capped = a.clamp(max=1)
    bends, order = torch.cat([a, a - 1], 1).sort(1, descending=True)
    # going down in tau an entry begins to count at |x_i| and stops growing at |x_i| - 1
    count = torch.where(order < a.shape[1], 1.0, -1.0).to(x.dtype).cumsum(1)
    grown = count[:, :-1] * (bends[:, :-1] - bends[:, 1:])
    sums = torch.cat([torch.zeros_like(bends[:, :1]), grown.cumsum(1)], 1)
    # the last bend at which the sum is still within the total; the rest of the way is one straight line
    last = ((sums <= total).sum(1, keepdim=True) - 1).clamp(max=a.shape[1] * 2 - 2)
    slope = count.gather(1, last).clamp(min=1)
    tau = bends.gather(1, last) - (total - sums.gather(1, last)) / slope
    inside = capped.sum(1, keepdim=True) <= total
    return signs(x) * torch.where(inside, capped, (a - tau.clamp(min=0)).clamp(0, 1))


def onto_l2(x: torch.Tensor) -> torch.Tensor:
    """The nearest points of L2 norm at most 1."""
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1)
