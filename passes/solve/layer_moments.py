"""Second moments of many layers within a bound of memory: read together where they fit, else in turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.ir.program import Program
from ...compiler.processes.sharing import in_batches
from ...compiler.support.memory import at_most
from .layers import Layer
from .moments import Moments, collect_moments, gram_bytes
from .resolve_network import batch_size_for

#: What the moments of layers may take together, in bytes, where there is plenty of memory.
MEMORY_BYTES = 2 << 30


class LayerMoments:
    """The input moments (`collect_moments`) of a program's layers on a calibration set, for whoever asks again.

    Each pass over the data collects as many layers as `MEMORY_BYTES` hold; what fits beside the rest is kept for the
    next time. `rows_per_column` caps the rows that are read, relative to a layer's columns (None: all).
    """

    def __init__(
        self,
        program: Program,
        layers: Mapping[str, Layer],
        calibration: CalibrationSet,
        *,
        rows_per_column: int | None = None,
    ) -> None:
        self.program, self.layers, self.calibration = program, layers, calibration
        self._rows_per_column, self._memory_bytes = rows_per_column, at_most(MEMORY_BYTES)
        self._kept: dict[str, Moments] = {}
        # of all layers: sums are then added up alike, whichever of them are collected together
        self._batch_size = in_batches(len(calibration), batch_size_for(program, layers.values()))

    def __call__(self, names: Sequence[str]) -> Iterator[tuple[str, Moments]]:
        """Each of the named layers once, those in memory first. Raises CalibrationError when activations are not
        finite."""
        for name in names:
            if name in self._kept:
                yield name, self._kept[name]
        batch: list[str] = []
        for name in [n for n in names if n not in self._kept]:
            if batch and sum(map(self._bytes, [*batch, name])) > self._memory_bytes:
                yield from self._collected(batch)
                batch = []
            batch.append(name)
        if batch:
            yield from self._collected(batch)

    def _collected(self, names: Sequence[str]) -> Iterator[tuple[str, Moments]]:
        layers = {name: self.layers[name] for name in names}
        moments = collect_moments(
            self.program,
            layers,
            self.calibration,
            batch_size=self._batch_size,
            rows_per_column=self._rows_per_column,
        )
        for name in names:
            found = moments.pop(name)  # not held here while it is worked on, unless there is room
            if sum(map(self._bytes, [*self._kept, name])) <= self._memory_bytes:
                self._kept[name] = found
            yield name, found

    def _bytes(self, name: str) -> int:
        return gram_bytes(self.program, self.layers[name])
