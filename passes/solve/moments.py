"""Streamed second moments of the layers' inputs: all that the closed forms need, in memory that does not grow with
the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.devices.precision import WideSum, exact_products, totals, widest
from ...compiler.devices.triangle import mirrored
from ...compiler.ir.execute import bind, run_until
from ...compiler.ir.program import Program
from ...compiler.processes.sharing import in_batches, own
from ...compiler.support import tally
from ...compiler.support.errors import CalibrationError
from .layers import Layer


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Second moments of one layer, in float64, on the device of its inputs.

    With A the layer's inputs (rows of patches, and a last column of ones for the bias) and R the residual to correct,
    per group: `gram` = A^T A, (groups, columns + 1, columns + 1), symmetric bit for bit; `cross` = A^T R, (groups,
    columns + 1, out/groups); `energy` = sum of R^2 per output, (groups, out/groups); `rows` the number of rows. Moments
    of disjoint shards add up: ``a + b``.

    On a device that has no float64 the moments of a batch are in float32, and `MomentSum` gives those of all batches in
    float64 on the CPU.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: torch.Tensor
    rows: int

    def to(self, device: torch.device) -> Moments:
        """These moments on another device."""
        return Moments(
            gram=self.gram.to(device), cross=self.cross.to(device), energy=self.energy.to(device), rows=self.rows
        )

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            gram=self.gram + other.gram,
            cross=self.cross + other.cross,
            energy=self.energy + other.energy,
            rows=self.rows + other.rows,
        )

    def __sub__(self, other: Moments) -> Moments:
        """The moments of the rows that are not among the other's, which are a part of these."""
        return Moments(
            gram=self.gram - other.gram,
            cross=self.cross - other.cross,
            energy=self.energy - other.energy,
            rows=self.rows - other.rows,
        )

    def without_residual(self) -> Moments:
        """With the layer's own output as the target: nothing is left over before a cut."""
        return self.of_outputs(self.cross.shape[2])

    def of_outputs(self, count: int) -> Moments:
        """`without_residual`, of so many outputs in each group."""
        groups, columns, _ = self.gram.shape
        zeros = self.gram.new_zeros(groups, columns, count)
        return replace(self, cross=zeros, energy=zeros[:, 0].clone())

    def toward_own_output(self, weight: torch.Tensor) -> Moments:
        """With the layer's output without bias as what is to be reached, R = A W^T, `weight` as (groups, out/groups,
        columns): the Gram matrix has all of it, A^T R = G W^T."""
        w = weight.to(self.gram.device).to(self.gram.dtype).transpose(1, 2)
        tally.count(tally.ALGEBRA, w.numel() * self.gram.shape[1])
        cross = self.gram[:, :, :-1] @ w
        return replace(self, cross=cross, energy=(w * cross[:, :-1]).sum(1).clamp(min=0))

    def error(self) -> float:
        """Sum of squared residuals before any correction."""
        return float(self.energy.sum())

    def error_after(self, delta: torch.Tensor) -> torch.Tensor:
        """Sum of squared residuals per output when the weights change by `delta` (groups, columns + 1, out/groups)."""
        tally.count(tally.ALGEBRA, delta.numel() * delta.shape[1])
        return self.energy - 2 * (delta * self.cross).sum(1) + (delta * (self.gram @ delta)).sum(1)

    @classmethod
    def of(cls, rows: torch.Tensor, residual: torch.Tensor) -> Moments:
        """Moments of one batch from A as (groups, columns, rows) and R as (groups, out/groups, rows).

        Products in float32 (float64 inputs stay float64; never in TF32), sums in the most exact dtype of the device.
        """
        with exact_products(rows.device):
            return cls._of(rows, residual)

    @classmethod
    def _of(cls, rows: torch.Tensor, residual: torch.Tensor) -> Moments:
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        a, r = rows.to(dtype), residual.to(dtype)
        ones = a.new_ones(1, 1, a.shape[2])
        groups, columns, count = a.shape
        wide = widest(a.device)
        gram = a.new_zeros(groups, columns + 1, columns + 1, dtype=wide)
        self_products(a, gram[:, :columns, :columns])
        sums = torch.bmm(a, ones.expand(groups, 1, count).transpose(1, 2))
        gram[:, :columns, columns:] = sums
        gram[:, columns:, :columns] = sums.transpose(1, 2)
        gram[:, columns, columns] = count
        tally.count(tally.MOMENTS, groups * columns * r.shape[1] * count)
        cross = torch.cat([torch.bmm(a, r.transpose(1, 2)), r.sum(2).unsqueeze(1)], dim=1)
        return cls(gram=gram, cross=cross.to(wide), energy=r.square().sum(2).to(wide), rows=count)


#: A Gram matrix of so many columns at least is made in so many strips, which takes (STRIPS + 1) / (2 STRIPS) of the
#: products.
LEAST_STRIPPED, STRIPS = 128, 6


def self_products(rows: torch.Tensor, into: torch.Tensor) -> None:
    """A^T A from A as (groups, columns, rows), strip by strip: what lies beyond the diagonal is what lies before it,
    bit for bit."""
    columns = rows.shape[1]
    width = -(-columns // STRIPS) if columns >= LEAST_STRIPPED else columns
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        tally.count(tally.MOMENTS, len(rows) * (stop - start) * stop * rows.shape[2])
        strip = torch.bmm(rows[:, start:stop], rows[:, :stop].transpose(1, 2))
        into[:, start:stop, :start] = strip[:, :, :start]
        into[:, start:stop, start:stop] = mirrored(strip[:, :, start:])
        into[:, :start, start:stop] = strip[:, :, :start].transpose(1, 2)


class MomentSum:
    """The moments of more and more batches, added up where they are: each of their sums is a `WideSum`. Of several
    processes each adds its own batches."""

    def __init__(self) -> None:
        self._gram = WideSum(symmetric=True)
        self._cross, self._energy, self._rows = WideSum(), WideSum(), WideSum()

    def add(self, part: Moments) -> None:
        """Those of one more batch."""
        self._gram.add(part.gram)
        self._cross.add(part.cross)
        self._energy.add(part.energy)
        self._rows.add(torch.tensor(part.rows, dtype=torch.float64, device="cpu"))

    def moments(self) -> Moments:
        """Those of all batches of all processes, in float64."""
        (found,) = self.together([self])
        if found is None:
            raise ValueError("there are no moments of no batches")
        return found

    @staticmethod
    def together(sums: Sequence[MomentSum]) -> list[Moments | None]:
        """The moments of several sums, in one exchange of the processes; None where there were no batches."""
        found = iter(totals([part for s in sums for part in (s._gram, s._cross, s._energy, s._rows)]))
        moments: list[Moments | None] = []
        for gram, cross, energy, rows in zip(found, found, found, found, strict=True):
            if gram is None or cross is None or energy is None or rows is None:
                moments.append(None)
            else:
                moments.append(Moments(gram=gram, cross=cross, energy=energy, rows=int(rows)))
        # sums of batches that only other processes have come on the CPU
        device = next((m.gram.device for m in moments if m is not None and m.gram.device.type != "cpu"), None)
        return moments if device is None else [None if m is None else m.to(device) for m in moments]


#: Of so many batches the last is held out of what predicts errors.
HOLD_OUT = 4


@dataclass(frozen=True, kw_only=True)
class SplitMoments:
    """Moments of all batches, and of the held-out ones among them, which judge what is fitted to the others; None where
    there are too few."""

    whole: Moments
    held: Moments | None = None

    @classmethod
    def of(cls, parts: Iterable[tuple[int, Moments]]) -> SplitMoments:
        """From the moments of each batch of this process, with its place among those of all; there is one at least."""
        total = _SplitSum()
        for index, part in parts:
            total.add(index, part)
        return total.moments()

    def without_residual(self) -> SplitMoments:
        """With the layer's own output as the target."""
        held = None if self.held is None else self.held.without_residual()
        return SplitMoments(whole=self.whole.without_residual(), held=held)

    def of_outputs(self, count: int) -> SplitMoments:
        """`without_residual`, of so many outputs in each group."""
        held = None if self.held is None else self.held.of_outputs(count)
        return SplitMoments(whole=self.whole.of_outputs(count), held=held)


class _SplitSum:
    """`MomentSum` of all batches, and of those that are held out."""

    def __init__(self) -> None:
        self._whole, self._held = MomentSum(), MomentSum()

    def add(self, batch: int, part: Moments) -> None:
        self._whole.add(part)
        if batch % HOLD_OUT == HOLD_OUT - 1:
            self._held.add(part)

    def moments(self) -> SplitMoments:
        whole, held = MomentSum.together([self._whole, self._held])
        if whole is None:
            raise ValueError("there are no moments of no batches")
        return SplitMoments(whole=whole, held=held)


def split_batch_size(calibration: CalibrationSet, most: int) -> int:
    """Samples per batch, about so many at most, such that batches are held out wherever there are samples for that and
    the views of a sample share its batch."""
    size = in_batches(len(calibration), most)
    views = calibration.most_views
    return max(views, size // views * views)


def collect_moments(
    program: Program,
    layers: Mapping[str, Layer],
    calibration: CalibrationSet,
    *,
    batch_size: int = 32,
    names: Iterable[str] | None = None,
    rows_per_column: int | None = None,
) -> dict[str, Moments]:
    """One streamed pass over the calibration set: the input moments of a set of layers.

    `cross` and `energy` are those of the layer's own output without bias (R = A W^T), so that `gram` and `cross`
    describe the layer as it is. `rows_per_column` caps the rows that are read, relative to a layer's columns (None:
    all). Memory: one batch of activations plus the moments. Raises CalibrationError when a layer's input is not finite.
    """
    chosen = {name: layers[name] for name in names or layers}
    sums = {name: MomentSum() for name in chosen}
    for _, name, part in _batch_parts(program, chosen, calibration, batch_size, rows_per_column):
        sums[name].add(part)
    found = {name: total.moments() for name, total in sums.items()}
    for name, moments in found.items():
        check_finite(moments, program, name)
    return {name: moments.toward_own_output(_matrix(program, layers[name])) for name, moments in found.items()}


def collect_split_moments(
    program: Program,
    layers: Mapping[str, Layer],
    calibration: CalibrationSet,
    *,
    batch_size: int,
    rows_per_column: int | None = None,
) -> dict[str, SplitMoments]:
    """`collect_moments` without a residual, those of the held-out batches beside those of all."""
    sums = {name: _SplitSum() for name in layers}
    for index, name, part in _batch_parts(program, layers, calibration, batch_size, rows_per_column):
        sums[name].add(index, part)
    found = {name: total.moments() for name, total in sums.items()}
    for name, moments in found.items():
        check_finite(moments.whole, program, name)
    return {name: moments.of_outputs(_matrix(program, layers[name]).shape[1]) for name, moments in found.items()}


def _matrix(program: Program, layer: Layer) -> torch.Tensor:
    """A layer's weight as (groups, out/groups, columns)."""
    return layer.matrix(program.module.get_parameter(layer.weight).detach())


def _batch_parts(
    program: Program,
    layers: Mapping[str, Layer],
    calibration: CalibrationSet,
    batch_size: int,
    rows_per_column: int | None,
) -> Iterator[tuple[int, str, Moments]]:
    """(batch, layer, moments) for each batch of the calibration set that is this process's, and each layer. Of the
    inputs alone: their residual has no outputs."""
    if not layers:
        return
    batches = -(-len(calibration) // batch_size)
    inputs = sorted({layer.input for layer in layers.values()}, key=program.order.__getitem__)
    for index, batch in own(calibration.batches(batch_size)):
        with torch.no_grad():
            values = run_until(program, inputs, bind(program, batch))
            for name, layer in layers.items():
                columns, count = layer.extent(program, values[layer.input])
                every = thinning(count * batches, columns, rows_per_column)
                rows = layer.rows(program, values[layer.input], every)
                yield index, name, Moments.of(rows, rows[:, :0])


def gram_bytes(program: Program, layer: Layer) -> int:
    """What the moments of a layer take."""
    weight = program.module.get_parameter(layer.weight)
    columns = weight[0].numel()
    return 8 * layer.groups * columns * (columns + weight.shape[0] // layer.groups)


def thinning(rows: int, columns: int, rows_per_column: int | None) -> int:
    """Take every so-many-th row to keep about `rows_per_column` rows per column; odd, so that it does not run along
    an image's columns."""
    if rows_per_column is None:
        return 1
    return max(1, rows // (rows_per_column * columns)) // 2 * 2 + 1 if rows > 2 * rows_per_column * columns else 1


def check_finite(moments: Moments, program: Program, node: str) -> None:
    """Raise CalibrationError when the activations of a layer overflowed or hold NaN."""
    if not bool(moments.gram.isfinite().all() & moments.cross.isfinite().all()):
        raise CalibrationError(
            "activations are not finite",
            node=node,
            excerpt=program.excerpt(program.nodes[node]),
            hint="the network overflows on the calibration set: check its normalisation, or run the network in float32",
        )
