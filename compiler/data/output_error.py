"""How far the outputs of two networks are apart on a set of samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from weakref import WeakKeyDictionary

import torch

from ..devices.precision import WideSums
from ..ir.compare import flatten_outputs, squared_distance
from ..ir.program import Batch, Program
from ..processes.sharing import in_batches, own
from ..processes.team import team
from ..support.memory import at_most, samples_at_once
from .calibration_set import CalibrationSet
from .kept import kept_for
from .live_bytes import live_bytes

#: What a network whose outputs are no longer finite counts as.
BROKEN = 1e6
#: Outputs of a network are kept for those who compare with it again where they take at most so many bytes, fewer
#: where memory is short.
KEPT_BYTES = 64 << 20


def output_error(teacher: Program, student: Program, samples: CalibrationSet, batch_size: int = 32) -> float:
    """Relative mean squared error of the outputs over the samples: sum ||S - T||^2 / sum ||T||^2, in float64. Of the
    same two networks on the same samples it is worked out once."""
    known = kept_for(student, samples).setdefault(("errors", batch_size, team().size), WeakKeyDictionary())
    if teacher not in known:
        known[teacher] = _output_error(teacher, student, samples, batch_size)
    return float(known[teacher])


def _output_error(teacher: Program, student: Program, samples: CalibrationSet, batch_size: int) -> float:
    sums = WideSums()
    for batch, theirs in with_outputs(teacher, samples, batch_size):
        for t, s in zip(theirs, flatten_outputs(student(batch)), strict=True):
            part, norm = squared_distance(t, s)
            sums.add("error", part)
            sums.add("energy", norm)
    return relative_to(sums.floats(), "error", "energy")


def relative_to(sums: Mapping[str, float], error: str, energy: str) -> float:
    """One sum over another, or itself where that is zero; 0 for a sum of nothing."""
    part, whole = sums.get(error, 0.0), sums.get(energy, 0.0)
    return part / whole if whole > 0 else part


def with_outputs(
    teacher: Program, samples: CalibrationSet, batch_size: int
) -> Iterator[tuple[Batch, list[torch.Tensor]]]:
    """Each batch of the samples with the outputs of a network that is compared with: many students are, and the teacher
    runs on the samples once, where its outputs are small. Batches are of `batch_size` samples, of fewer where memory is
    limited; of several processes each gets its own."""
    batch_size = samples_at_once(2 * live_bytes(teacher).most, in_batches(len(samples), batch_size))
    most_kept = at_most(KEPT_BYTES)
    batches = (batch for _, batch in own(samples.batches(batch_size)))
    kept, key = kept_for(teacher, samples), ("outputs", batch_size, team().size)
    if key in kept:
        yield from zip(batches, kept[key], strict=True)
        return
    found: list[list[torch.Tensor]] = []
    taken = 0
    for batch in batches:
        outputs = flatten_outputs(teacher(batch))
        taken += sum(output.numel() * output.element_size() for output in outputs)
        found = [*found, outputs] if taken <= most_kept else []
        yield batch, outputs
    if taken <= most_kept:
        kept[key] = found


def no_worse(error: float, before: float) -> bool:
    """Whether an error is at most the one before; one that is not finite is worse than any that is."""
    return error <= before or not math.isfinite(before)


def errors_by_output(
    teacher: Program, student: Program, samples: CalibrationSet, batch_size: int = 32
) -> dict[str, float]:
    """The relative mean squared error of each output over the samples, by the output's name."""
    names = [spec.name for spec in teacher.outputs]
    sums = WideSums()
    for batch, theirs in with_outputs(teacher, samples, batch_size):
        for index, (t, s) in enumerate(zip(theirs, flatten_outputs(student(batch)), strict=True)):
            part, norm = squared_distance(t, s)
            sums.add(f"error {index}", part)
            sums.add(f"energy {index}", norm)
    found = sums.floats()
    return {name: relative_to(found, f"error {index}", f"energy {index}") for index, name in enumerate(names)}


def bounded(error: float) -> float:
    """An error that a search can reckon with: `BROKEN` at most, and where it is not finite."""
    return min(error, BROKEN) if math.isfinite(error) else BROKEN
