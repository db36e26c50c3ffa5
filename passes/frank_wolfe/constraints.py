"""Feasible sets of compression-aware training: what every set can do.

A set is C = {w : norm(w) <= radius}, where `norm` is the gauge of the set with radius 1, a norm on the weight tensor.
All that the optimizer asks for follows from the unit set U = {norm <= 1}:

    lmo(m)       = argmin_{v in C} <m, v> = radius * argmin_{u in U} <m, u>
    dual_norm(m) = max_{u in U} <m, u>,   so  <m, lmo(m)> = -radius * dual_norm(m)
    diameter     = 2 * radius * max_{u in U} ||u||_2

(Jaggi, ICML 2013; for networks Pokutta, Spiegel & Zimmer, arXiv 2010.07243, and Zimmer, Spiegel & Pokutta, arXiv
2205.11921.) A set does not know the shape of its weights: one set may serve many tensors, and `k` is compared with the
shape when it meets one. The sets themselves are in `vector_balls` and `spectral_balls`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from ...compiler.devices.precision import in_float64
from .errors import FrankWolfeError
from .ordering import where_exact


@dataclass(frozen=True, kw_only=True)
class Vertices:
    """Vertices of the unit set for a stack of tensors: `points` in the stack's shape (float32 for half precisions).

    `bases` is what a warm-started oracle wants to see again at the next call, (batch, small side, columns); else None.
    """

    points: torch.Tensor
    bases: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Constraint(ABC):
    """A set {w : norm(w) <= radius}; sets are equal when their class and fields are.

    Methods on single tensors (`lmo`, `norm`, ...) take a weight or gradient of any floating dtype and shape that the
    set understands. The abstract ones work on stacks (batch, *shape) of equal-shaped tensors and on the unit set.

    Raises `FrankWolfeError` when `radius` is not a positive finite number or a tensor does not fit the set.
    """

    radius: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.radius, (int, float)) and math.isfinite(self.radius) and self.radius > 0):
            raise FrankWolfeError(
                f"{type(self).__name__}: the radius is out of range",
                expected="a finite number > 0",
                actual=self.radius,
                hint="initial_radius(weight) gives one that suits the layer",
            )

    def lmo(self, m: torch.Tensor) -> torch.Tensor:
        """A vertex of the set that minimises <m, v>: shape and dtype of `m`. A zero `m` gives a vertex too."""
        self.check(m)
        if not bool(torch.isfinite(m).all()):
            raise FrankWolfeError("the oracle was given values that are not finite", hint="check the gradient first")
        exact = where_exact(m.detach())
        return (self.unit_vertices(exact.unsqueeze(0)).points[0] * self.radius).to(m.device, m.dtype)

    def norm(self, w: torch.Tensor) -> float:
        """The gauge of the unit set, computed in float64: `w` is in the set where it is at most `radius`."""
        self.check(w)
        return float(self.gauges(where_exact(w.detach()).unsqueeze(0)))

    def dual_norm(self, m: torch.Tensor) -> float:
        """max <m, u> over the unit set, in float64."""
        self.check(m)
        return float(self.dual_norms(where_exact(m.detach()).unsqueeze(0)))

    def contains(self, w: torch.Tensor, *, tolerance: float | None = None) -> bool:
        """Whether norm(w) <= radius * (1 + tolerance); by default 8 units of the dtype's rounding."""
        slack = rounding_slack(w) if tolerance is None else tolerance
        return self.norm(w) <= self.radius * (1 + slack)

    def project(self, w: torch.Tensor) -> torch.Tensor:
        """The nearest point of the set in the L2 norm, up to rounding; `w` itself when it is in the set.

        Raises `FrankWolfeError` where there is no closed form: `pull_in` works for every set.
        """
        if self.norm(w) <= self.radius:
            return w
        stack = in_float64(w.detach()).unsqueeze(0) / self.radius
        return (self.unit_projections(stack)[0] * self.radius).to(w.device, w.dtype)

    def pull_in(self, w: torch.Tensor) -> torch.Tensor:
        """`w` scaled down to the boundary, up to rounding; `w` itself when it is in the set."""
        norm = self.norm(w)
        return w if norm <= self.radius else w.detach() * (self.radius / norm)

    def duality_gap(self, w: torch.Tensor, m: torch.Tensor) -> float:
        """<m, w - lmo(m)>, in float64: bounds f(w) - min f over the set when m is the gradient of a convex f at w."""
        return float((in_float64(m.detach()) * in_float64(w.detach())).sum()) + self.radius * self.dual_norm(m)

    def oracle_gap(self, m: torch.Tensor, v: torch.Tensor) -> float:
        """How far <m, v> stays behind the optimum: 1 - <m, v> / <m, lmo(m)>; 0 is exact. 0 where m is zero."""
        best = self.radius * self.dual_norm(m)
        return 1 + float((in_float64(m.detach()) * in_float64(v.detach())).sum()) / best if best else 0.0

    def diameter(self, w: torch.Tensor) -> float:
        """The largest L2 distance of two points of the set, for tensors of the shape of `w`."""
        self.check(w)
        return 2 * self.radius * self.half_width(w.shape)

    def initial_radius(self, weight: torch.Tensor, factor: float = 10.0, *, norm: float | None = None) -> float:
        """The radius at which the set's diameter is 2 * factor * E||W_init||_F (the rule of arXiv 2205.11921).

        `norm` is E||W_init||_F where it is known; else the weight is taken as a draw of its initialisation.
        """
        self.check(weight)
        scale = float(torch.linalg.vector_norm(in_float64(weight.detach()))) if norm is None else norm
        if not (math.isfinite(factor) and factor > 0 and math.isfinite(scale) and scale > 0):
            raise FrankWolfeError(
                "no radius follows from this initialisation",
                expected="factor > 0 and an initialisation that is not zero",
                actual=f"factor {factor}, norm {scale}",
                hint="give the constraint a radius",
            )
        return factor * scale / self.half_width(weight.shape)

    def with_radius(self, radius: float) -> Self:
        """The same set with another radius."""
        return replace(self, radius=radius)

    def check(self, w: torch.Tensor) -> None:
        """Raise `FrankWolfeError` unless the tensor is of a floating dtype and of a shape that the set understands."""
        if not w.is_floating_point() or w.layout != torch.strided or not w.numel():
            raise FrankWolfeError(
                f"{type(self).__name__} takes dense floating-point tensors that are not empty",
                actual=f"{w.dtype}, {w.layout}, shape {tuple(w.shape)}",
            )
        self.check_shape(w.shape)

    @abstractmethod
    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise `FrankWolfeError` unless the set is defined for tensors of this shape."""

    @abstractmethod
    def unit_vertices(self, stack: torch.Tensor, bases: torch.Tensor | None = None, /) -> Vertices:
        """argmin <m, u> over the unit set for each member; `bases` is what the call before returned."""

    @abstractmethod
    def gauges(self, stack: torch.Tensor) -> torch.Tensor:
        """`norm` of each member, float64 (batch,)."""

    @abstractmethod
    def dual_norms(self, stack: torch.Tensor) -> torch.Tensor:
        """`dual_norm` of each member, float64 (batch,)."""

    @abstractmethod
    def half_width(self, shape: Sequence[int], /) -> float:
        """The largest L2 norm of a point of the unit set."""

    def unit_projections(self, _stack: torch.Tensor, /) -> torch.Tensor:
        """The nearest points of the unit set, for members outside of it."""
        raise FrankWolfeError(
            f"{self} has no projection in closed form", hint="use pull_in, which scales down to the boundary"
        )

    def rounding_growth(self, _shape: Sequence[int], /) -> float:
        """How far outside, over u * radius, a point of the set can get when each entry changes by a factor 1 + u.

        It is 1 where the norm sees magnitudes only, as it does on vectors.
        """
        return 1.0


def check_k(constraint: Constraint, k: int, total: int | None, of: str) -> None:
    """Raise unless 1 <= k <= total; `of` names what is counted. A `total` of None is not known yet."""
    whole = isinstance(k, int) and not isinstance(k, bool)
    if not whole or k < 1 or (total is not None and k > total):
        raise FrankWolfeError(
            f"{type(constraint).__name__}: k is out of range",
            expected="a whole number >= 1" if total is None else f"1 <= k <= {total} ({of})",
            actual=k,
        )


def rounding_slack(w: torch.Tensor) -> float:
    """8 units of rounding of the tensor's dtype: how far outside a point may lie that was meant to be inside."""
    return 8 * torch.finfo(w.dtype).eps
