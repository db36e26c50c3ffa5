"""What batch norms remember of the data that a network was trained on: mean and deviation of every channel of their
inputs; and how far the statistics of a batch are from those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..data.data_distance import kept_by_norms
from ..ir.program import Program


@dataclass(frozen=True, kw_only=True)
class NormTarget:
    """The input of a batch norm by its node, and what its channels should have on average: float32, (C,)."""

    source: str
    mean: torch.Tensor
    deviation: torch.Tensor


def norm_targets(program: Program) -> tuple[NormTarget, ...]:
    """The statistics of all batch norms, in topological order."""
    return tuple(
        NormTarget(source=source, mean=kept.mean.float(), deviation=kept.at_least.float())
        for source, kept in kept_by_norms(program).items()
    )


def statistics_distance(targets: Sequence[NormTarget], values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """How far the statistics of a batch are from those of the batch norms, averaged over channels and layers: for each
    channel the squared difference of the means in deviations, and that of the deviations, relative. 0 for a batch that
    is like the data; differentiable."""
    return torch.stack([_of_layer(target, values[target.source]) for target in targets]).mean()


def _of_layer(target: NormTarget, value: torch.Tensor) -> torch.Tensor:
    others = [dim for dim in range(value.dim()) if dim != 1]
    variance, mean = torch.var_mean(value, others, correction=0)
    apart = (mean - target.mean) / target.deviation
    wider = (variance + 1e-8 * target.deviation.square()).sqrt() / target.deviation - 1
    return (apart.square() + wider.square()).mean()
