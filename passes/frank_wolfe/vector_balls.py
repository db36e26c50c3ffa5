"""Sets of vectors: Lp balls, the K-sparse polytope, the k-support norm ball, and the last over conv filters.

All but the last see a weight as one vector of its entries, whatever its shape. Their norms depend on magnitudes only,
so a relative rounding of entries is at most the same relative change of the norm. Radii are those of the gauge.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .constraints import Constraint, Vertices, check_k
from .errors import FrankWolfeError
from .ordering import k_support_norms, largest, normalised, signs, working
from .projections import onto_capped_l1, onto_l2


@dataclass(frozen=True, kw_only=True)
class VectorBall(Constraint):
    """A set that sees a tensor as the vector of its entries; subclasses say it for rows (batch, n)."""

    def check_shape(self, shape: Sequence[int]) -> None:
        """Every shape will do."""

    def unit_vertices(self, stack: torch.Tensor, _bases: torch.Tensor | None = None, /) -> Vertices:
        rows = normalised(working(stack)).reshape(len(stack), -1)
        return Vertices(points=-self._highest(rows).view(stack.shape))

    def gauges(self, stack: torch.Tensor) -> torch.Tensor:
        return self._gauges(stack.reshape(len(stack), -1).double().abs())

    def dual_norms(self, stack: torch.Tensor) -> torch.Tensor:
        return self._duals(stack.reshape(len(stack), -1).double().abs())

    def unit_projections(self, stack: torch.Tensor, /) -> torch.Tensor:
        return self._nearest(stack.reshape(len(stack), -1)).view(stack.shape)

    @abstractmethod
    def _highest(self, rows: torch.Tensor) -> torch.Tensor:
        """argmax <m, u> over the unit set for normalised rows."""

    @abstractmethod
    def _gauges(self, magnitudes: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _duals(self, magnitudes: torch.Tensor) -> torch.Tensor: ...

    def _nearest(self, rows: torch.Tensor) -> torch.Tensor:
        return super().unit_projections(rows)


@dataclass(frozen=True, kw_only=True)
class LpBall(VectorBall):
    """{w : ||w||_p <= radius}, p in [1, inf].

    Oracle, with 1/p + 1/q = 1: v_i = -radius * sign(m_i) |m_i|^(q-1) / ||m||_q^(q-1); for p = 1 one entry, the first
    of the largest magnitude; for p = inf all signs. O(n). The dual norm is ||m||_q. Projection: p = 1, 2, inf.
    Diameter: 2 * radius for p <= 2, also between 1 and 2 (the unit vectors are in every ball and the L2 ball holds it),
    and 2 * radius * n^(1/2 - 1/p) above. Source: Pokutta, Spiegel & Zimmer, arXiv 2010.07243.
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.p, (int, float)) and self.p >= 1):
            raise FrankWolfeError("LpBall: p is out of range", expected="1 <= p <= inf", actual=self.p)

    @property
    def q(self) -> float:
        """The exponent of the dual norm."""
        if self.p == 1:
            return math.inf
        return 1.0 if math.isinf(self.p) else self.p / (self.p - 1)

    def half_width(self, shape: Sequence[int], /) -> float:
        return 1.0 if self.p <= 2 else float(math.prod(shape)) ** (0.5 - 1 / self.p)

    def _highest(self, rows: torch.Tensor) -> torch.Tensor:
        if self.p == 1:
            return signs(rows) * largest(rows.abs(), 1)
        if math.isinf(self.p):
            return signs(rows)
        # (q - 1) p = q; the largest magnitude is 1, so neither power overflows, and what underflows does not count
        powers = rows.abs() ** (self.q - 1)
        return signs(rows) * powers / powers.pow(self.p).sum(1, keepdim=True) ** (1 / self.p)

    def _gauges(self, magnitudes: torch.Tensor) -> torch.Tensor:
        return _p_norms(magnitudes, self.p)

    def _duals(self, magnitudes: torch.Tensor) -> torch.Tensor:
        return _p_norms(magnitudes, self.q)

    def _nearest(self, rows: torch.Tensor) -> torch.Tensor:
        if self.p == 1:
            return onto_capped_l1(rows, 1.0)
        if self.p == 2:
            return onto_l2(rows)
        return rows.clamp(-1, 1) if math.isinf(self.p) else super()._nearest(rows)


@dataclass(frozen=True, kw_only=True)
class SparseBall(VectorBall):
    """What the sets with a number of entries `k` share: its range, 1 .. entries of the tensor."""

    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self, self.k, None, "")

    def check_shape(self, shape: Sequence[int]) -> None:
        check_k(self, self.k, math.prod(shape), "entries of the tensor")


@dataclass(frozen=True, kw_only=True)
class KSparse(SparseBall):
    """The K-sparse polytope: ||w||_1 <= k * radius and ||w||_inf <= radius, the hull of k-sparse vectors of +-radius.

    norm(w) = max(||w||_1 / k, ||w||_inf). Oracle: -radius * sign(m) on the k largest magnitudes, O(n + k log k). The
    dual norm is their sum. Diameter 2 * radius * sqrt(k). Projection: `onto_capped_l1`, O(n log n).
    k = 1 is the L1 ball, k = n the Linf ball. Source: Pokutta, Spiegel & Zimmer, arXiv 2010.07243.
    """

    def half_width(self, _shape: Sequence[int], /) -> float:
        return math.sqrt(self.k)

    def _highest(self, rows: torch.Tensor) -> torch.Tensor:
        return signs(rows) * largest(rows.abs(), self.k)

    def _gauges(self, magnitudes: torch.Tensor) -> torch.Tensor:
        return torch.maximum(magnitudes.sum(1) / self.k, magnitudes.amax(1))

    def _duals(self, magnitudes: torch.Tensor) -> torch.Tensor:
        return magnitudes.topk(self.k, dim=1).values.sum(1)

    def _nearest(self, rows: torch.Tensor) -> torch.Tensor:
        return onto_capped_l1(rows, float(self.k))


@dataclass(frozen=True, kw_only=True)
class KSupport(SparseBall):
    """The k-support norm ball: the hull of {w : ||w||_2 <= radius, at most k entries not zero}.

    norm(w): see `ordering.k_support_norms`, O(n log n). Oracle: -radius * m_k / ||m_k||_2 with m_k the k entries of
    largest magnitude, O(n + k log k). The dual norm is ||m_k||_2. Diameter 2 * radius. k = 1 is the L1 ball, k = n the
    L2 ball; only there is the projection a closed form. Source: Argyriou, Foygel & Srebro, NIPS 2012, arXiv 1204.5043.
    """

    def half_width(self, _shape: Sequence[int], /) -> float:
        return 1.0

    def _highest(self, rows: torch.Tensor) -> torch.Tensor:
        kept = rows * largest(rows.abs(), self.k)
        return kept / torch.linalg.vector_norm(kept, dim=1, keepdim=True)

    def _gauges(self, magnitudes: torch.Tensor) -> torch.Tensor:
        return k_support_norms(magnitudes, self.k)

    def _duals(self, magnitudes: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(magnitudes.topk(self.k, dim=1).values, dim=1)

    def _nearest(self, rows: torch.Tensor) -> torch.Tensor:
        if self.k == 1:
            return onto_capped_l1(rows, 1.0)
        return onto_l2(rows) if self.k == rows.shape[1] else super()._nearest(rows)


@dataclass(frozen=True, kw_only=True)
class GroupKSupport(Constraint):
    """The k-support norm ball over filters: the hull of {w : ||w||_F <= radius, at most k filters not zero}.

    A filter is a slice along dimension 0, an output channel of a conv or linear; of a 1-D tensor each entry. norm(w) is
    the k-support norm of the filters' L2 norms. Oracle: -radius * m_k / ||m_k||_F with m_k the k filters of largest
    norm, O(n). The dual norm is ||m_k||_F. Diameter 2 * radius. k = filters is the L2 ball, k = 1 the group-lasso ball;
    only there is the projection a closed form. Source: Zimmer, Spiegel & Pokutta, arXiv 2205.11921.
    """

    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self, self.k, None, "")

    def check_shape(self, shape: Sequence[int]) -> None:
        check_k(self, self.k, shape[0] if shape else 1, "filters")

    def unit_vertices(self, stack: torch.Tensor, _bases: torch.Tensor | None = None, /) -> Vertices:
        m = _filters(normalised(working(stack)))
        kept = m * largest(torch.linalg.vector_norm(m, dim=2), self.k).unsqueeze(2)
        return Vertices(points=-onto_sphere(kept).view(stack.shape))

    def gauges(self, stack: torch.Tensor) -> torch.Tensor:
        return k_support_norms(_filter_norms(stack), self.k)

    def dual_norms(self, stack: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(_filter_norms(stack).topk(self.k, dim=1).values, dim=1)

    def half_width(self, _shape: Sequence[int], /) -> float:
        return 1.0

    def unit_projections(self, stack: torch.Tensor, /) -> torch.Tensor:
        norms = _filter_norms(stack)
        if self.k not in (1, norms.shape[1]):
            return super().unit_projections(stack)
        nearest = onto_capped_l1(norms, 1.0) if self.k == 1 else onto_l2(norms)
        share = nearest / torch.where(norms > 0, norms, 1)
        return (_filters(stack) * share.unsqueeze(2)).view(stack.shape)


def onto_sphere(stack: torch.Tensor) -> torch.Tensor:
    """Members (batch, ...), none of them zero, scaled to L2 norm 1."""
    norms = torch.linalg.vector_norm(stack.flatten(1), dim=1)
    return stack / norms.view(-1, *[1] * (stack.dim() - 1))


def _filters(stack: torch.Tensor) -> torch.Tensor:
    """(batch, filters, entries of each)."""
    return stack.reshape(len(stack), stack.shape[1] if stack.dim() > 1 else 1, -1)


def _filter_norms(stack: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(_filters(stack).double(), dim=2)


def _p_norms(magnitudes: torch.Tensor, p: float) -> torch.Tensor:
    """Over the largest magnitude first: high powers of small numbers are zero."""
    peak = magnitudes.amax(1)
    scaled = magnitudes / torch.where(peak > 0, peak, 1).unsqueeze(1)
    return torch.linalg.vector_norm(scaled, ord=p, dim=1) * peak
