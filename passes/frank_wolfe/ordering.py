"""What all oracles share: dtypes, scale, which entries are the largest, and the k-support norm of sorted magnitudes.

Everything here works on stacks (batch, n), row by row, and is deterministic: of equal magnitudes the first comes first.
"""

from __future__ import annotations

import torch

from ...compiler.devices.precision import widest


def where_exact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy on the CPU where its device has no float64: norms that bound where a weight is, and
    eigenvectors of a matrix times its transpose, are nothing in float32."""
    return tensor if widest(tensor.device) == torch.float64 else tensor.cpu()


def working(stack: torch.Tensor) -> torch.Tensor:
    """The stack in the precision that oracles compute in: float32 for half precisions, else as it is."""
    return stack.float() if stack.dtype in (torch.float16, torch.bfloat16) else stack


def normalised(stack: torch.Tensor) -> torch.Tensor:
    """Each member (batch, ...) over its largest magnitude, so that no square or power under- or overflows.

    An oracle's answer does not depend on the scale. A member that is zero becomes the first unit vector: any point of
    the set is then optimal, and this makes every oracle return the same vertex each time.
    """
    flat = stack.reshape(len(stack), -1)
    peak = flat.abs().amax(1, keepdim=True)
    first = torch.zeros_like(flat)
    first[:, 0] = 1
    scaled = torch.where(peak > 0, flat / torch.where(peak > 0, peak, 1), first)
    return scaled.view(stack.shape)


def signs(stack: torch.Tensor) -> torch.Tensor:
    """-1 where negative and +1 elsewhere: a vertex has no zero where the set asks for a sign."""
    return torch.where(stack < 0, -torch.ones_like(stack), torch.ones_like(stack))


def largest(magnitudes: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the k largest of each row, exactly k, of equal ones the first.

    `topk` alone may take any of equal values; here it only finds the threshold. O(n + k log k).
    """
    threshold = magnitudes.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above = magnitudes > threshold
    equal = magnitudes == threshold
    left = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= left))


def k_support_norms(magnitudes: torch.Tensor, k: int) -> torch.Tensor:
    """k-support norm of each row of `magnitudes` (batch, n), non-negative, 1 <= k <= n; float64 (batch,).

    With x sorted, largest first, and T_r the sum of x_{k-r} ... x_n,

        ||x||^2 = sum_{i < k-r} x_i^2 + T_r^2 / (r + 1)    for the r in 0 .. k-1 with x_{k-r-1} > T_r / (r+1) >= x_{k-r}

    (Argyriou, Foygel & Srebro, NIPS 2012, arXiv 1204.5043, proposition 2.1; x_0 is infinite, which is what makes k = 1
    the L1 norm). Rounding can leave no r that meets both inequalities, or two. Each r that meets the second gives a
    feasible theta of the variational form min sum_i x_i^2 / theta_i (0 <= theta <= 1, sum theta <= k), so the smallest
    value among them is the norm, and r = 0 always is one of them. O(n log n).
    """
    peak = magnitudes.double().amax(1, keepdim=True)
    x = (magnitudes.double() / torch.where(peak > 0, peak, 1)).sort(1, descending=True).values
    # column j stands for r = k - 1 - j: the j largest count by themselves, all others as one
    head = torch.cat([torch.zeros_like(peak), x[:, : k - 1].square().cumsum(1)], 1)
    tail = x.flip(1).cumsum(1).flip(1)[:, :k]
    share = torch.arange(k, 0, -1, dtype=torch.float64, device=x.device)
    values = head + tail.square() / share
    allowed = tail / share >= x[:, :k]
    allowed[:, -1] = True
    best = values.masked_fill(~allowed, torch.inf).amin(1)
    return best.sqrt() * peak.squeeze(1)
