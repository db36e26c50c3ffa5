"""What the Frank-Wolfe paper compares with: SGD whose weights a penalty, not a set, draws toward few entries, few
filters or low rank.

    prox_l1     after each step, every weight shrunk toward zero by lr * penalty (soft threshold): L1 norm
    prox_group  the same with the L2 norm of each filter: group lasso by its proximal operator
    filter      penalty * sum of the filters' L2 norms, as a part of the loss
    nuclear     penalty * sum of the singular values, as a part of the loss; U V^T from a full SVD is its subgradient
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

PENALTIES = ("prox_l1", "prox_group", "filter", "nuclear")
#: A filter of less is zero: its norm has no gradient there.
NOTHING = 1e-12


class PenalisedSGD(torch.optim.SGD):
    """SGD with momentum, and a penalty on all weights of two dimensions or more: biases and norms have none."""

    def __init__(
        self, parameters: Iterable[torch.Tensor], *, lr: float, momentum: float, kind: str, penalty: float
    ) -> None:
        if kind not in PENALTIES:
            raise ValueError(f"{kind!r} is no penalty: one of {', '.join(PENALTIES)}")
        super().__init__(parameters, lr=lr, momentum=momentum)
        self.kind, self.penalty = kind, penalty

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """A step of SGD, with the penalty in its gradient or its proximal operator behind it."""
        if self.kind in ("filter", "nuclear"):
            for _, weight in self._weights():
                if weight.grad is not None:
                    weight.grad.add_(subgradient(weight, self.kind), alpha=self.penalty)
        loss = super().step(closure)
        if self.kind in ("prox_l1", "prox_group"):
            for lr, weight in self._weights():
                weight.copy_(shrunk(weight, lr * self.penalty, by_filter=self.kind == "prox_group"))
        return loss

    def _weights(self) -> Iterable[tuple[float, torch.Tensor]]:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.dim() > 1:
                    yield group["lr"], weight


def shrunk(weight: torch.Tensor, by: float, *, by_filter: bool) -> torch.Tensor:
    """The proximal operator of `by` times the L1 norm, or times the sum of the filters' L2 norms."""
    if not by_filter:
        return weight.sign() * (weight.abs() - by).clamp(min=0)
    norms = weight.flatten(1).norm(dim=1)
    left = (1 - by / norms.clamp(min=NOTHING)).clamp(min=0)
    return weight * left.view(-1, *[1] * (weight.dim() - 1))


def subgradient(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Of the sum of the filters' L2 norms, or of the nuclear norm of the weight as a matrix (out, the rest)."""
    matrix = weight.flatten(1)
    if kind == "filter":
        return (matrix / matrix.norm(dim=1, keepdim=True).clamp(min=NOTHING)).view_as(weight)
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    alive = (values > NOTHING).to(matrix.dtype)
    return ((u * alive) @ vh).view_as(weight)
