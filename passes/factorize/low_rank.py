"""Low-rank schemes: how one layer's weight becomes two or three thinner ones, best for the inputs that it really gets.

With W (outputs, columns) the weight as a matrix, A the layer's inputs (rows of patches, see `Layer`), G = A^T A their
Gram matrix and D the gains of the outputs behind the layer, a scheme looks for the factorisable W' with the least

    ||A (W - W')^T D||_F^2 = tr D (W - W') G (W - W')^T D.

With G = I this is the plain, data-free approximation of the weight. Where the layer, or a batch norm behind it, has a
bias, G is that of A without its mean: the bias takes over (W - W') mean(A).

- `Channel`: k x k to r channels, then 1 x 1 (1 x 1 convolutions and linear layers: two factors). W' = D^-1 U U^T D W,
  U the leading eigenvectors of D W G W^T D: the optimum (Eckart and Young in the metric G).
- `Spatial`: k x 1 to r channels, then 1 x k (Jaderberg et al., BMVC 2014). The first factor from the whitened weight,
  leading left singular vectors of L^T M with M (inputs * k, outputs * k) and L L^T = sum of G's diagonal blocks over
  the horizontal positions; the second solved in closed form given the first, in the full metric G.
- `Tucker`: 1 x 1 to r1 channels, k x k to r2, 1 x 1 (Kim et al., ICLR 2016). The input side whitened likewise, core and
  output side as the best approximation of rank r2 of the solution given it.

At full rank every scheme gives W back up to rounding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from .decompositions import (
    ChannelDecomposition,
    Decomposition,
    Geometry,
    Ranks,
    SpatialDecomposition,
    TuckerDecomposition,
)


@dataclass(frozen=True)
class Scheme(ABC):
    """One way of factorising a layer: which layers it suits, its ranks, and what they cost."""

    name: str
    decomposition: type[Decomposition]

    @abstractmethod
    def suits(self, size: Geometry, /) -> bool:
        """Whether the scheme has something to offer for a layer of that size."""

    @abstractmethod
    def full(self, size: Geometry) -> Ranks:
        """The ranks, per group, at which the scheme is exact."""

    @abstractmethod
    def macs(self, size: Geometry, ranks: Ranks) -> int:
        """Multiply-accumulates of the factors for one sample."""

    @abstractmethod
    def shapes(self, size: Geometry, ranks: Ranks) -> list[tuple[int, ...]]:
        """Those of the factors: (groups, out, in, kh, kw) each."""


class Channel(Scheme):
    """k x k to r channels, then 1 x 1."""

    def suits(self, _size: Geometry, /) -> bool:
        return True

    def full(self, size: Geometry) -> Ranks:
        return (min(size.outputs, size.columns),)

    def macs(self, size: Geometry, ranks: Ranks) -> int:
        return size.groups * size.positions * ranks[0] * (size.columns + size.outputs)

    def shapes(self, size: Geometry, ranks: Ranks) -> list[tuple[int, ...]]:
        first = (size.groups, ranks[0], size.inputs, *size.kernel)
        return [first, (size.groups, size.outputs, ranks[0], 1, 1)]


class Spatial(Scheme):
    """k x 1 to r channels, then 1 x k."""

    def suits(self, size: Geometry, /) -> bool:
        return size.kernel[1] > 1

    def full(self, size: Geometry) -> Ranks:
        return (min(size.inputs * size.kernel[0], size.outputs * size.kernel[1]),)

    def macs(self, size: Geometry, ranks: Ranks) -> int:
        first = size.middle * size.inputs * size.kernel[0]
        return size.groups * ranks[0] * (first + size.positions * size.outputs * size.kernel[1])

    def shapes(self, size: Geometry, ranks: Ranks) -> list[tuple[int, ...]]:
        first = (size.groups, ranks[0], size.inputs, size.kernel[0], 1)
        return [first, (size.groups, size.outputs, ranks[0], 1, size.kernel[1])]


class Tucker(Scheme):
    """1 x 1 to r1 channels, k x k to r2 channels, then 1 x 1."""

    def suits(self, size: Geometry, /) -> bool:
        return math.prod(size.kernel) > 1

    def full(self, size: Geometry) -> Ranks:
        taps = math.prod(size.kernel)
        return min(size.inputs, size.outputs * taps), min(size.outputs, size.inputs * taps)

    def macs(self, size: Geometry, ranks: Ranks) -> int:
        first = size.source * size.inputs * ranks[0]
        core = size.positions * math.prod(size.kernel) * ranks[0] * ranks[1]
        return size.groups * (first + core + size.positions * ranks[1] * size.outputs)

    def shapes(self, size: Geometry, ranks: Ranks) -> list[tuple[int, ...]]:
        core = (size.groups, ranks[1], ranks[0], *size.kernel)
        return [(size.groups, ranks[0], size.inputs, 1, 1), core, (size.groups, size.outputs, ranks[1], 1, 1)]


SCHEMES: dict[str, Scheme] = {
    "channel": Channel("channel", ChannelDecomposition),
    "spatial": Spatial("spatial", SpatialDecomposition),
    "tucker": Tucker("tucker", TuckerDecomposition),
}


def suitable(size: Geometry, names: Sequence[str]) -> list[Scheme]:
    """The schemes among the named ones that suit a layer."""
    return [SCHEMES[name] for name in names if SCHEMES[name].suits(size)]
