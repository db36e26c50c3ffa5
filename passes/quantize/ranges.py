"""Ranges of values on a calibration set, from streamed histograms, and the integer grids that they give."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.data.kept import kept_for
from ...compiler.data.live_bytes import live_bytes, value_bytes
from ...compiler.devices.precision import WideSum, totals, widest
from ...compiler.ir.execute import bind, run_until
from ...compiler.ir.program import Program
from ...compiler.processes.sharing import in_batches, largest, own
from ...compiler.support.errors import CalibrationError, RewriteError
from ...compiler.support.memory import samples_at_once
from .edit_quantize import LEAST_SCALE, ValueGrid

#: Bins of a histogram, over the whole range of a value.
BINS = 2048
#: Ranges from so many steps of clipping are compared.
CLIPPINGS = 64
#: Share of the values that `percentile` keeps at either end.
PERCENTILE = 0.9999


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How often values of a tensor lie where: `counts` of equal bins from `low` to `high`, in float64."""

    low: float
    high: float
    counts: torch.Tensor = field(repr=False)

    @cached_property
    def centres(self) -> torch.Tensor:
        """The middle of each bin."""
        edges = torch.linspace(self.low, self.high, len(self.counts) + 1, dtype=torch.float64)
        return (edges[1:] + edges[:-1]) / 2


def histograms(
    program: Program, names: Sequence[str], samples: CalibrationSet, *, batch_size: int
) -> dict[str, Histogram]:
    """Histograms of the values of some nodes, in two streamed passes: ranges first, then counts. Those of a network on
    a set of samples are kept for as long as both are there: plans that are compared ask for the same ones.

    Warns where there is a single sample. Raises CalibrationError when a value is not finite.
    """
    if len(samples) < 2:
        warnings.warn(
            "the ranges of int8 values are those of a single sample, and what others have beyond them is cut off: give "
            "a few hundred samples",
            stacklevel=2,
        )
    known: dict[str, Histogram] = kept_for(program, samples).setdefault("histograms", {})
    known |= _found(program, [name for name in names if name not in known], samples, batch_size)
    return {name: known[name] for name in names}


def _found(program: Program, names: Sequence[str], samples: CalibrationSet, batch_size: int) -> dict[str, Histogram]:
    """Histograms that are not known yet."""
    if not names:
        return {}
    low, high = _ends(program, names, samples, batch_size)
    counts = {name: WideSum() for name in names}
    for values in _batches(program, names, samples, batch_size):
        for name, value in values.items():
            if high[name] > low[name]:
                counts[name].add(torch.histc(value.float(), BINS, low[name], high[name]))
            else:
                first = torch.arange(BINS, device=value.device) == 0
                counts[name].add(first * float(value.numel()))
    found = zip(names, totals([counts[name] for name in names]), strict=True)
    return {
        name: Histogram(low=low[name], high=high[name], counts=total.cpu())
        for name, total in found
        if total is not None
    }


def _ends(
    program: Program, names: Sequence[str], samples: CalibrationSet, batch_size: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The least and the largest of each value, read once all batches have run."""
    ends: dict[str, torch.Tensor] = {}
    for values in _batches(program, names, samples, batch_size):
        for name, value in values.items():
            least, most = torch.aminmax(value)
            both = torch.stack([-least, most]).to(widest(value.device))
            ends[name] = torch.maximum(ends[name], both) if name in ends else both  # NaN stays NaN
    low, high = {}, {}
    ends = largest(ends, names)
    for name, (least, most) in zip(ends, torch.stack(list(ends.values())).tolist(), strict=True):
        if not (math.isfinite(least) and math.isfinite(most)):
            raise CalibrationError(
                "activations are not finite",
                node=name,
                excerpt=program.excerpt(program.nodes[name]),
                hint="the network overflows on the calibration set: check its normalisation",
            )
        low[name], high[name] = -least, most
    return low, high


def _batches(
    program: Program, names: Sequence[str], samples: CalibrationSet, batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    held = sum(value_bytes(program, program.nodes[name]) for name in names)
    size = in_batches(len(samples), batch_size)
    for _, batch in own(samples.batches(samples_at_once(held + live_bytes(program).most, size))):
        with torch.no_grad():
            found = run_until(program, list(names), bind(program, batch))
        yield {name: found[name] for name in names}


@dataclass(frozen=True, kw_only=True)
class GridKind:
    """The integers that a backend wants for values: `dtype`, and whether zero is in the middle."""

    dtype: torch.dtype = torch.uint8
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.symmetric and torch.iinfo(self.dtype).min == 0:
            raise RewriteError("zero is in the middle of no unsigned integers", hint="symmetric values are int8")

    def over(self, low: float, high: float) -> ValueGrid:
        """The grid over a range, which is widened to hold zero: then zeros (padding, ReLU) are exact."""
        low, high = min(low, 0.0), max(high, 0.0)
        info = torch.iinfo(self.dtype)
        if self.symmetric:
            return ValueGrid(scale=_step(max(-low, high), info.max), zero_point=0, dtype=self.dtype)
        scale = _step(high - low, info.max - info.min)
        zero = round(info.min - low / scale)
        return ValueGrid(scale=scale, zero_point=min(max(zero, info.min), info.max), dtype=self.dtype)


def _step(width: float, count: int) -> float:
    """The step of so many that cover a width. One that is always zero has any."""
    return max(width / count, LEAST_SCALE) if width else 1.0 / count


def minmax(found: Histogram, kind: GridKind) -> ValueGrid:
    """The whole range."""
    return kind.over(found.low, found.high)


def percentile(found: Histogram, kind: GridKind) -> ValueGrid:
    """The range without the outermost values at either end."""
    share = found.counts.cumsum(0) / found.counts.sum()
    edges = torch.linspace(found.low, found.high, len(share) + 1, dtype=torch.float64)
    inside = ((share >= 1 - PERCENTILE) & (share <= PERCENTILE)).nonzero().reshape(-1)
    if not len(inside):
        return minmax(found, kind)
    return kind.over(float(edges[inside[0]]), float(edges[min(int(inside[-1]) + 2, len(share))]))


def squared_error(found: Histogram, kind: GridKind) -> ValueGrid:
    """The range of least mean squared error of what is read back: the high end first, then the low end."""

    def lost(grid: ValueGrid) -> float:
        stored = (found.centres / grid.scale).round().clamp(grid.low - grid.zero_point, grid.high - grid.zero_point)
        return float((found.counts * (stored * grid.scale - found.centres).square()).sum())

    return _clipped(found, kind, lost)


def entropy(found: Histogram, kind: GridKind) -> ValueGrid:
    """The range of least Kullback-Leibler divergence of what is read back from the values inside the range and, at its
    ends, those beyond (the calibration of TensorRT): each integer's values count as spread evenly over the bins that it
    stands for and that hold any."""
    held = found.counts > 0

    def lost(grid: ValueGrid) -> float:
        stored = (found.centres / grid.scale).round() + grid.zero_point
        places = (stored.clamp(grid.low, grid.high) - grid.low).long()
        inside = held & (stored >= grid.low) & (stored <= grid.high)
        if not bool(inside.any()):
            return float("inf")
        ends = inside.nonzero()[[0, -1]].reshape(-1)
        true = torch.where(inside, found.counts, found.counts.new_zeros(()))
        wanted = true.clone()
        wanted[ends[0]] += found.counts[: ends[0]].sum()
        wanted[ends[1]] += found.counts[ends[1] + 1 :].sum()
        sizes = (grid.high - grid.low + 1,)
        sums, bins = (torch.zeros(sizes, dtype=torch.float64).index_add(0, places, v) for v in (true, inside.double()))
        spread = (sums / bins.clamp(min=1))[places]
        p, q = wanted[inside] / wanted.sum(), spread[inside] / true.sum()
        return float((p * (p / q).log()).sum())

    return _clipped(found, kind, lost)


def _clipped(found: Histogram, kind: GridKind, lost: Callable[[ValueGrid], float]) -> ValueGrid:
    """The best of the ranges with the high end moved in, then of those with the low end."""
    steps = [1 - step / (CLIPPINGS + CLIPPINGS // 4) for step in range(CLIPPINGS)]
    low, high = found.low, found.high
    high = min((s * high for s in steps), key=lambda most: lost(kind.over(low, most))) if high > 0 else high
    low = min((s * low for s in steps), key=lambda least: lost(kind.over(least, high))) if low < 0 else low
    return kind.over(low, high)


#: Ways to a range, by name.
RANGES: dict[str, Callable[[Histogram, GridKind], ValueGrid]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": squared_error,
    "entropy": entropy,
}
