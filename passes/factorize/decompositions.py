"""One layer's weight decomposed, ready to be cut at any rank: the numerics behind `low_rank`, whose notation this is.

Sums and decompositions in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch

from ...compiler.devices.precision import in_float64
from ...compiler.ir.program import Program
from ...compiler.support import tally
from ..solve.closed_form import EIGH_CUBES
from ..solve.layers import Layer
from ..solve.moments import Moments

Ranks = tuple[int, ...]
Matrices = tuple[torch.Tensor, ...]
#: Outputs of less gain than this share of the largest are compared as if they had it: a silenced output has no say, but
#: its weights must stay finite.
LEAST_GAIN = 1e-4
#: Relative errors below this are those of the sums, not of the approximation.
ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a layer, per group: `outputs`, `inputs`, `kernel`; `positions` is the number of output positions at
    batch 1, `middle` that behind a vertical k x 1 convolution alone, `source` that of the input; `dims` 0 for a linear
    layer, else 1 or 2."""

    groups: int
    outputs: int
    inputs: int
    kernel: tuple[int, int]
    positions: int
    middle: int
    source: int
    dims: int

    @property
    def weights(self) -> int:
        """Values of the layer's weight."""
        return self.groups * self.outputs * self.inputs * self.kernel[0] * self.kernel[1]

    @classmethod
    def of(cls, program: Program, layer: Layer) -> Geometry:
        weight = program.module.get_parameter(layer.weight)
        node, source = program.nodes[layer.node], program.nodes[layer.input]
        result, given = program.shape(node), program.shape(source)
        outputs = weight.shape[0] // layer.groups
        if layer.window is None:
            rows = math.prod(result) // weight.shape[0]
            return cls(
                groups=1,
                outputs=outputs,
                inputs=int(weight.shape[1]),
                kernel=(1, 1),
                positions=rows,
                middle=rows,
                source=rows,
                dims=0,
            )
        dims = weight.dim() - 2
        height = result[-2] if dims == 2 else 1
        return cls(
            groups=layer.groups,
            outputs=outputs,
            inputs=int(weight.shape[1]),
            kernel=layer.kernel(program),
            positions=height * result[-1],
            middle=height * given[-1],
            source=math.prod(given[-dims:]),
            dims=dims,
        )

    @property
    def columns(self) -> int:
        """Columns of A: inputs * kh * kw."""
        return self.inputs * math.prod(self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole layer for one sample."""
        return self.groups * self.outputs * self.columns * self.positions


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What an approximation is good for: `gram` (groups, columns, columns), positive definite, None for the identity;
    and `mean` (groups, columns) of the inputs where a bias takes it over, else None."""

    gram: torch.Tensor | None = field(repr=False, default=None)
    mean: torch.Tensor | None = field(repr=False, default=None)

    @classmethod
    def of(cls, moments: Moments, *, ridge: float, centred: bool) -> Metric:
        """From streamed moments; `ridge` relative to the mean diagonal keeps columns in sight that were zero on all
        samples, and makes the metric definite."""
        gram, sums = moments.gram[:, :-1, :-1], moments.gram[:, :-1, -1]
        level = torch.diagonal(gram, dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        mean = sums / moments.rows if centred else None
        if mean is not None:
            gram = gram - sums.unsqueeze(2) * mean.unsqueeze(1)
        return cls(gram=gram + _scaled_identity(max(ridge, 1e-9) * level, gram.shape[1]), mean=mean)

    def full(self, weight: torch.Tensor) -> torch.Tensor:
        """The Gram matrix for a weight (groups, outputs, columns), also where it is the identity."""
        if self.gram is not None:
            return self.gram
        return _scaled_identity(weight.new_ones(len(weight)), weight.shape[2])


#: No data: the error of the weight itself.
PLAIN = Metric()


class Decomposition(ABC):
    """One layer's weight under one scheme, ready to be cut at any rank; or at any up to `most`, for less work."""

    def __init__(
        self,
        geometry: Geometry,
        weight: torch.Tensor,
        metric: Metric,
        gain: torch.Tensor | None,
        most: Ranks | None = None,
    ) -> None:
        self.geometry = geometry
        self.weight = in_float64(weight.detach()).reshape(geometry.groups, geometry.outputs, geometry.columns)
        self.metric = metric
        gain = self.weight.new_ones(geometry.groups, geometry.outputs) if gain is None else in_float64(gain)
        self.gain = gain.clamp(min=max(LEAST_GAIN * float(gain.max()), 1e-30))
        weighed = self.gain.unsqueeze(2) * self.weight
        self.image = self.weight if metric.gram is None else self.weight @ metric.gram  # W G
        self.total = float(((self.gain.unsqueeze(2) * self.image) * weighed).sum())
        self._prepare(most)

    def error(self, ranks: Ranks) -> float:
        """The relative error left, from 0 at full rank to 1; what rounding leaves of an exact one is 0."""
        left = 1 - self.explained(ranks) / self.total if self.total > 0 else 0.0
        return left if left > ROUNDING else 0.0

    def shift(self, ranks: Ranks) -> torch.Tensor | None:
        """What the bias has to take over, (groups * outputs,); None without a mean."""
        if self.metric.mean is None:
            return None
        change = self.weight - self.dense(ranks)
        return (change @ self.metric.mean.unsqueeze(2)).reshape(-1)

    @abstractmethod
    def _prepare(self, most: Ranks | None) -> None:
        """What all ranks share."""

    @abstractmethod
    def explained(self, ranks: Ranks) -> float:
        """How much of `total` the approximation accounts for."""

    @abstractmethod
    def matrices(self, ranks: Ranks) -> Matrices:
        """The factors in the order of application, each (groups, out, in, kh, kw)."""

    @abstractmethod
    def dense(self, ranks: Ranks) -> torch.Tensor:
        """The weight that the factors stand for, (groups, outputs, columns)."""


class ChannelDecomposition(Decomposition):
    """See `Channel`."""

    def _prepare(self, most: Ranks | None) -> None:
        del most  # one eigendecomposition serves all
        self.values, self.vectors = _leading(self._gained(self.image @ self.weight.transpose(1, 2)))

    def _gained(self, square: torch.Tensor) -> torch.Tensor:
        return self.gain.unsqueeze(2) * square * self.gain.unsqueeze(1)

    def explained(self, ranks: Ranks) -> float:
        return float(self.values[:, : ranks[0]].sum())

    def _factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        basis = self.vectors[:, :, :rank]
        first = basis.transpose(1, 2) @ (self.gain.unsqueeze(2) * self.weight)
        return first, basis / self.gain.unsqueeze(2)

    def matrices(self, ranks: Ranks) -> Matrices:
        first, last = self._factors(ranks[0])
        size = self.geometry
        return first.view(size.groups, ranks[0], size.inputs, *size.kernel), last[..., None, None]

    def dense(self, ranks: Ranks) -> torch.Tensor:
        first, last = self._factors(ranks[0])
        return last @ first


class SpatialDecomposition(Decomposition):
    """See `Spatial`. The columns (input, y, x) of A are seen as (input * y, x)."""

    def _prepare(self, most: Ranks | None) -> None:
        geometry, metric = self.geometry, self.metric
        groups, tall, wide = geometry.groups, geometry.inputs * geometry.kernel[0], geometry.kernel[1]
        gram = metric.full(self.weight).view(groups, tall, wide, tall, wide)
        matrix = (self.gain.unsqueeze(2) * self.weight).view(groups, geometry.outputs, tall, wide)
        matrix = matrix.permute(0, 2, 1, 3).reshape(groups, tall, -1)
        self.basis = _whitened_basis(matrix, torch.einsum("gaxbx->gab", gram), most[0] if most else None)
        self.second = _Second(self, self.basis, gram)

    def explained(self, ranks: Ranks) -> float:
        return self.second.explained(ranks[0])

    def matrices(self, ranks: Ranks) -> Matrices:
        size, rank = self.geometry, ranks[0]
        first = self.basis[:, :, :rank].transpose(1, 2).reshape(size.groups, rank, size.inputs, size.kernel[0], 1)
        last = self.second.solution(rank).permute(0, 3, 1, 2)
        return first, last.unsqueeze(3)

    def dense(self, ranks: Ranks) -> torch.Tensor:
        solution = self.second.solution(ranks[0])
        full = torch.einsum("gar,grxo->goax", self.basis[:, :, : ranks[0]], solution)
        return full.reshape(self.weight.shape)


class TuckerDecomposition(Decomposition):
    """See `Tucker`. The columns (input, y, x) of A are seen as (input, y * x)."""

    def _prepare(self, most: Ranks | None) -> None:
        geometry, metric = self.geometry, self.metric
        groups, inputs, taps = geometry.groups, geometry.inputs, math.prod(geometry.kernel)
        gram = metric.full(self.weight).view(groups, inputs, taps, inputs, taps)
        matrix = (self.gain.unsqueeze(2) * self.weight).view(groups, geometry.outputs, inputs, taps)
        matrix = matrix.permute(0, 2, 1, 3).reshape(groups, inputs, -1)
        self.basis = _whitened_basis(matrix, torch.einsum("gaxbx->gab", gram), most[0] if most else None)
        self.second = _Second(self, self.basis, gram)
        self._sides: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _side(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and vectors of the output side, given the input side of that rank."""
        if rank not in self._sides:
            self._sides[rank] = _leading(self.second.output_gram(rank))
        return self._sides[rank]

    def explained(self, ranks: Ranks) -> float:
        return float(self._side(ranks[0])[0][:, : ranks[1]].sum())

    def _factors(self, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
        """Core (groups, r2, r1, taps) and output side (groups, outputs, r2)."""
        vectors = self._side(ranks[0])[1][:, :, : ranks[1]]
        weighed = self.second.solution(ranks[0]) * self.gain.view(self.geometry.groups, 1, 1, -1)
        core = torch.einsum("gok,grxo->gkrx", vectors, weighed)
        return core, vectors / self.gain.unsqueeze(2)

    def matrices(self, ranks: Ranks) -> Matrices:
        core, last = self._factors(ranks)
        first = self.basis[:, :, : ranks[0]].transpose(1, 2)
        return first[..., None, None], core.reshape(*core.shape[:3], *self.geometry.kernel), last[..., None, None]

    def dense(self, ranks: Ranks) -> torch.Tensor:
        core, last = self._factors(ranks)
        full = torch.einsum("gok,gkrx,gar->goax", last, core, self.basis[:, :, : ranks[0]])
        return full.reshape(self.weight.shape)


class _Second:
    """The best second factor for a first one of any rank: with B = basis (x) I the features of A that the first factor
    makes, H = argmin ||A (B H - W^T)||_F^2 in the metric, so (B^T G B) H = B^T G W^T. Bases of smaller rank are the
    first columns of larger ones, so one product serves all ranks."""

    def __init__(self, owner: Decomposition, basis: torch.Tensor, gram: torch.Tensor) -> None:
        self.gain = owner.gain
        half = torch.einsum("gar,gaxby->grxby", basis, gram)
        self.gram = torch.einsum("grxby,gbs->grxsy", half, basis)
        image = owner.image.view(gram.shape[0], -1, *gram.shape[1:3])
        self.cross = torch.einsum("gar,goax->grxo", basis, image)
        self._solved: dict[int, torch.Tensor] = {}

    def solution(self, rank: int) -> torch.Tensor:
        """(groups, rank, taps, outputs)."""
        if rank not in self._solved:
            gram, cross = self.gram[:, :rank, :, :rank], self.cross[:, :rank]
            size = rank * gram.shape[2]
            factor = torch.linalg.cholesky(gram.reshape(len(gram), size, size))
            found = torch.cholesky_solve(cross.reshape(len(gram), size, -1), factor)
            self._solved[rank] = found.view(cross.shape)
        return self._solved[rank]

    def explained(self, rank: int) -> float:
        per_output = (self.cross[:, :rank] * self.solution(rank)).sum((1, 2))
        return float((per_output * self.gain.square()).sum())

    def output_gram(self, rank: int) -> torch.Tensor:
        """D H^T B^T G B H D, (groups, outputs, outputs): the second moments of the outputs, weighed."""
        square = torch.einsum("grxo,grxp->gop", self.solution(rank), self.cross[:, :rank])
        square = (square + square.transpose(1, 2)) / 2
        return self.gain.unsqueeze(2) * square * self.gain.unsqueeze(1)


def _whitened_basis(matrix: torch.Tensor, gram: torch.Tensor, most: int | None = None) -> torch.Tensor:
    """Orthonormal columns (groups, rows, min(rows, columns)), or the first `most`, the first r of which span the best r
    features of A for the weight `matrix` (groups, rows, columns) in the metric `gram` (groups, rows, rows)."""
    factor = torch.linalg.cholesky(gram)
    white = factor.transpose(1, 2) @ matrix
    if matrix.shape[1] <= matrix.shape[2]:
        _, vectors = _leading(white @ white.transpose(1, 2))
        spanning = torch.linalg.solve_triangular(factor.transpose(1, 2), vectors, upper=True)
    else:
        _, vectors = _leading(white.transpose(1, 2) @ white)
        spanning = matrix @ vectors
    return torch.linalg.qr(spanning[:, :, :most])[0]


def _leading(square: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, largest first and none below zero, and eigenvectors of symmetric matrices."""
    tally.count(tally.ALGEBRA, EIGH_CUBES * len(square) * square.shape[-1] ** 3)
    values, vectors = torch.linalg.eigh(square)
    return values.flip(1).clamp(min=0), vectors.flip(2)


def _scaled_identity(levels: torch.Tensor, size: int) -> torch.Tensor:
    return torch.diag_embed(levels.unsqueeze(1).expand(-1, size))
