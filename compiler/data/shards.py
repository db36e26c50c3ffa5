"""Samples that come in parts: files of one folder, and what each of several processes holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..processes.team import team
from ..support.errors import CalibrationError
from .calibration_set import CalibrationSet
from .input_binding import ForwardInputs
from .sample_files import check_limit
from .sample_kinds import check_samples


@dataclass(frozen=True)
class Sharded:
    """This process's part of the calibration samples: each of several processes reads its own, and nobody reads all.

    `compile`, `sweep` and `apply` take it in the place of samples. The parts are handed round before anything is
    computed and sorted by their contents, so that the result does not depend on who has read what, nor on the number of
    processes. Samples that several processes have, as a `DistributedSampler` repeats some to make parts equal, count
    once. A single process may pass it too: its part is then all there is.

    Arguments:
        data: Samples in any form that `compile` takes, such as a DataLoader with a sampler of its own or the shards of
            this process; None where it has none.
        limit: So many of the samples of all processes are kept, chosen at random by their contents. All if None.
        once: Whether samples that several processes have count once.

    Raises:
        CalibrationError: If the data hold no samples, or `limit` is no number of them.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> options = {"progress": False, "cache": False, "mimic": False}
        >>> part = foldcut.Sharded(torch.randn(40, 8))
        >>> out = foldcut.compile(net, part, goal=foldcut.Channels(0.5), **options)
        >>> out.report.calibration["samples"]
        40
    """

    data: Any
    limit: int | None = None
    once: bool = True

    def __post_init__(self) -> None:
        check_limit(self.limit)
        if self.data is not None:
            check_samples(self.data)


def read_parts(data: Any, inputs: ForwardInputs | int | Sequence[str] | None) -> CalibrationSet:
    """All samples, whether this process has all of them or a part (`Sharded`).

    Arguments:
        data: The samples.
        inputs: The inputs of the network, as for `CalibrationSet.of`.

    Raises:
        CalibrationError: As there, and where the parts do not fit together or hold nothing.
    """
    if not isinstance(data, Sharded):
        return CalibrationSet.of(data, inputs=inputs)
    own = None if data.data is None else CalibrationSet.of(data.data, inputs=inputs)
    parts = [part for part in team().objects(own) if part is not None]
    if not parts:
        raise CalibrationError(
            "no process has any samples", hint="give at least one of them a part: foldcut.Sharded(samples)"
        )
    first = parts[0]
    for part in parts[1:]:
        if part.spec != first.spec or _kinds(part) != _kinds(first):
            raise CalibrationError(
                "the processes' samples differ in their inputs",
                expected=_kinds(first),
                actual=_kinds(part),
                hint="read and normalise them in the same way in every process",
            )
    leaves = tuple(torch.cat(column) for column in zip(*(part.leaves for part in parts), strict=True))
    whole = replace(first, leaves=leaves)
    whole = whole.take(_once(parts) if data.once else whole.content_order)
    return whole if data.limit is None else whole.drawn(data.limit, 0)


def _kinds(samples: CalibrationSet) -> list[str]:
    return [f"{leaf.dtype} {list(leaf.shape[1:])}" for leaf in samples.leaves]


def _once(parts: Sequence[CalibrationSet]) -> torch.Tensor:
    """Places of the samples of all parts one behind the other, sorted by content; what several have, as often as the
    one does that has it most often."""
    most: Counter[bytes] = Counter()
    for part in parts:
        most |= Counter(part.digests)
    digests = [digest for part in parts for digest in part.digests]
    places = []
    for place in sorted(range(len(digests)), key=digests.__getitem__):
        if most[digests[place]] > 0:
            most[digests[place]] -= 1
            places.append(place)
    return torch.tensor(places, dtype=torch.long)
