"""The k leading left singular vectors of matrices, two ways: exact from the Gram matrix, or by subspace iteration.

Both work on stacks (batch, rows, columns) with rows <= columns and return an orthonormal `left` (batch, rows, k) and
`image` = left^T M. Whatever orthonormal vectors these are, the vertices made of them lie in their sets, so an inexact
basis costs optimality (`Constraint.oracle_gap`) but never feasibility.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .errors import FrankWolfeError


@dataclass(frozen=True, kw_only=True)
class Leading:
    """`left` (batch, rows, k) orthonormal, `image` = left^T M (batch, k, columns), and the basis to start from next
    time (batch, rows, columns of the basis), None where the oracle does not look back."""

    left: torch.Tensor
    image: torch.Tensor
    basis: torch.Tensor | None = None


class SpectralOracle(Protocol):
    """Finds leading left singular vectors; frozen, so that sets can be compared."""

    def leading(self, matrices: torch.Tensor, k: int, basis: torch.Tensor | None, /) -> Leading:
        """For matrices (batch, rows, columns), rows <= columns, of which none is zero."""
        ...


@dataclass(frozen=True, kw_only=True)
class Gram:
    """Exact: eigenvectors of M M^T, product and decomposition in float64 whatever the dtype of M.

    Squaring halves the digits: of float32 products, singular values below 3e-4 of the largest would be noise; of
    float64 ones they are as exact as float32 input is. O(rows^2 columns + rows^3) for each matrix.
    """

    def leading(self, matrices: torch.Tensor, k: int, _basis: torch.Tensor | None, /) -> Leading:
        m = matrices.double()
        left = _leading_eigenvectors(m @ m.mT, k)
        return Leading(left=left, image=left.mT @ m)


@dataclass(frozen=True, kw_only=True)
class Subspace:
    """Subspace iteration from the basis of the call before: momentum turns slowly, so two sweeps go a long way.

    Each sweep is Q <- orth(M M^T Q); then the k best directions inside the span of Q are taken (Rayleigh-Ritz). Q has
    `oversampling` columns more than k: the angle falls by (s_{l+1} / s_k)^2 a sweep, l = k + oversampling. Without a
    basis the start is exact, by `Gram`; so is every call when l reaches the rows.
    O(rows columns (2 sweeps + 2) l) for each matrix, in float32 for float32 input.
    """

    sweeps: int = 2
    oversampling: int = 4

    def __post_init__(self) -> None:
        if self.sweeps < 1 or self.oversampling < 0:
            raise FrankWolfeError(
                "Subspace: settings out of range",
                expected="sweeps >= 1 and oversampling >= 0",
                actual=f"sweeps {self.sweeps}, oversampling {self.oversampling}",
            )

    def leading(self, matrices: torch.Tensor, k: int, basis: torch.Tensor | None, /) -> Leading:
        width = k + self.oversampling
        if width >= matrices.shape[1]:
            return Gram().leading(matrices, k, None)
        if basis is None:
            q = _leading_eigenvectors(matrices.double() @ matrices.double().mT, width).to(matrices.dtype)
        else:
            q = basis.to(matrices.dtype)
            for _ in range(self.sweeps):
                q = torch.linalg.qr(matrices @ (q.mT @ matrices).mT).Q
        image = q.mT @ matrices
        turn = _leading_eigenvectors(image.double() @ image.double().mT, k).to(q.dtype)
        return Leading(left=q @ turn, image=turn.mT @ image, basis=q)


def polar_factors(image: torch.Tensor) -> torch.Tensor:
    """The nearest matrices with orthonormal rows, of (batch, k, columns), k <= columns.

    By QR and a k x k SVD, so that rows of (nearly) zero length get a direction too: dividing each row by its length
    would not. O(columns k^2).
    """
    q, r = torch.linalg.qr(image.mT)
    u, _, vh = torch.linalg.svd(r.mT)
    return u @ vh @ q.mT


def _leading_eigenvectors(gram: torch.Tensor, k: int) -> torch.Tensor:
    return torch.linalg.eigh(gram).eigenvectors[..., -k:].flip(-1)
