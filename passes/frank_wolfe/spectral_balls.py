"""Sets of matrices given by their singular values: nuclear norm ball, spectral-k-sparse, spectral-k-support.

A conv weight (out, in, kh, kw) is the matrix (out, in * kh * kw), a vector the matrix (1, n). The oracles need only the
leading singular vectors, by `Gram` (exact) or `Subspace` (warm-started), chosen with `oracle`; norms need all singular
values (float64, a full `svdvals`), which is why the optimizer asks for them as rarely as it can.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .constraints import Constraint, Vertices, check_k
from .ordering import k_support_norms, normalised, working
from .projections import onto_capped_l1, onto_l2
from .spectral_oracles import Gram, Leading, SpectralOracle, polar_factors
from .vector_balls import onto_sphere


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of the matrix that a weight is to the spectral sets."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


@dataclass(frozen=True, kw_only=True)
class SpectralBall(Constraint):
    """A set of matrices whose norm is one of the singular values; subclasses say it for rows of those."""

    oracle: SpectralOracle = field(default_factory=Gram)

    def check_shape(self, shape: Sequence[int]) -> None:
        check_k(self, self._count, min(matrix_shape(shape)), "full rank of the matrix")

    def unit_vertices(self, stack: torch.Tensor, bases: torch.Tensor | None = None, /) -> Vertices:
        m = _matrices(normalised(working(stack)))
        tall = m.shape[1] > m.shape[2]
        found = self.oracle.leading(m.mT if tall else m, self._count, bases)
        highest = self._combine(found)
        points = (highest.mT if tall else highest).reshape(stack.shape)
        return Vertices(points=-points.to(m.dtype), bases=found.basis)

    def gauges(self, stack: torch.Tensor) -> torch.Tensor:
        return self._gauges(_singular_values(stack))

    def dual_norms(self, stack: torch.Tensor) -> torch.Tensor:
        return self._duals(_singular_values(stack))

    def unit_projections(self, stack: torch.Tensor, /) -> torch.Tensor:
        """Of the singular values, which is that of the matrix (Lewis, 1995): the cost of a full SVD."""
        u, values, vh = torch.linalg.svd(_matrices(stack), full_matrices=False)
        return (u * self._nearest(values).unsqueeze(1) @ vh).reshape(stack.shape)

    @property
    @abstractmethod
    def _count(self) -> int:
        """How many singular vectors the oracle needs."""

    @abstractmethod
    def _combine(self, found: Leading) -> torch.Tensor:
        """argmax <m, u> over the unit set."""

    @abstractmethod
    def _gauges(self, values: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _duals(self, values: torch.Tensor) -> torch.Tensor: ...

    def _nearest(self, values: torch.Tensor) -> torch.Tensor:
        return super().unit_projections(values)


@dataclass(frozen=True, kw_only=True)
class NuclearBall(SpectralBall):
    """{W : sum of singular values <= radius}, the hull of rank-1 matrices of Frobenius norm `radius`.

    Oracle: -radius * u_1 v_1^T. The dual norm is the largest singular value. Diameter 2 * radius. Projection: singular
    values onto the L1 ball. Source: Jaggi, ICML 2013; for networks Zimmer, Spiegel & Pokutta, arXiv 2205.11921.
    """

    def half_width(self, _shape: Sequence[int], /) -> float:
        return 1.0

    def rounding_growth(self, shape: Sequence[int], /) -> float:
        return math.sqrt(min(matrix_shape(shape)))

    @property
    def _count(self) -> int:
        return 1

    def _combine(self, found: Leading) -> torch.Tensor:
        return found.left @ onto_sphere(found.image)

    def _gauges(self, values: torch.Tensor) -> torch.Tensor:
        return values.sum(1)

    def _duals(self, values: torch.Tensor) -> torch.Tensor:
        return values[:, 0]

    def _nearest(self, values: torch.Tensor) -> torch.Tensor:
        return onto_capped_l1(values, 1.0)


@dataclass(frozen=True, kw_only=True)
class RankBall(SpectralBall):
    """What the sets with a rank `k` share: its range, 1 .. min(rows, columns)."""

    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self, self.k, None, "")

    @property
    def _count(self) -> int:
        return self.k


@dataclass(frozen=True, kw_only=True)
class SpectralKSparse(RankBall):
    """The K-sparse polytope of singular values: nuclear norm <= k * radius and largest singular value <= radius.

    norm(W) = max(sum s_i / k, s_1). Oracle: -radius * U_k V_k^T. The dual norm is s_1 + ... + s_k (Ky Fan). Diameter
    2 * radius * sqrt(k). Projection: singular values as `KSparse`. k = 1 is the nuclear norm ball, k = full rank that
    of the spectral norm. Source: Zimmer, Spiegel & Pokutta, arXiv 2205.11921.
    """

    def half_width(self, _shape: Sequence[int], /) -> float:
        return math.sqrt(self.k)

    def rounding_growth(self, shape: Sequence[int], /) -> float:
        return max(math.sqrt(min(matrix_shape(shape)) / self.k), math.sqrt(self.k))

    def _combine(self, found: Leading) -> torch.Tensor:
        return found.left @ polar_factors(found.image)

    def _gauges(self, values: torch.Tensor) -> torch.Tensor:
        return torch.maximum(values.sum(1) / self.k, values[:, 0])

    def _duals(self, values: torch.Tensor) -> torch.Tensor:
        return values[:, : self.k].sum(1)

    def _nearest(self, values: torch.Tensor) -> torch.Tensor:
        return onto_capped_l1(values, float(self.k))


@dataclass(frozen=True, kw_only=True)
class SpectralKSupport(RankBall):
    """The spectral k-support norm ball: the hull of {W : ||W||_F <= radius, rank W <= k}.

    norm(W) is the k-support norm of the singular values. Oracle: -radius * U_k S_k V_k^T / ||s_1 .. s_k||_2, which is
    -radius * Q Q^T M / ||Q^T M||_F with Q = U_k, so that no right singular vector is ever computed. The dual norm is
    ||s_1 .. s_k||_2. Diameter 2 * radius. k = 1 is the nuclear norm ball, k = full rank the Frobenius ball; only there
    is the projection a closed form. Source: McDonald, Pontil & Stamos, arXiv 1512.08204; for networks Zimmer, Spiegel
    & Pokutta, arXiv 2205.11921.
    """

    def half_width(self, _shape: Sequence[int], /) -> float:
        return 1.0

    def rounding_growth(self, shape: Sequence[int], /) -> float:
        # the singular values in blocks of k: the norm is at most the sum of the blocks' L2 norms
        return math.sqrt(math.ceil(min(matrix_shape(shape)) / self.k))

    def _combine(self, found: Leading) -> torch.Tensor:
        return found.left @ onto_sphere(found.image)

    def _gauges(self, values: torch.Tensor) -> torch.Tensor:
        return k_support_norms(values, self.k)

    def _duals(self, values: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(values[:, : self.k], dim=1)

    def _nearest(self, values: torch.Tensor) -> torch.Tensor:
        if self.k == 1:
            return onto_capped_l1(values, 1.0)
        return onto_l2(values) if self.k == values.shape[1] else super()._nearest(values)


def _matrices(stack: torch.Tensor) -> torch.Tensor:
    return stack.reshape(len(stack), *matrix_shape(stack.shape[1:]))


def _singular_values(stack: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(_matrices(stack).double())
