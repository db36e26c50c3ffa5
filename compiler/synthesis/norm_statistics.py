"""What batch norms remember of the data that a network was trained on: mean and deviation of every channel of their
inputs; and how far the statistics of a batch are from those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..ir.norms import batch_norm_of
from ..ir.program import Program

#: A channel whose deviation is below this share of the layer's median counts as if it were that: what hardly varies
#: says little, and dividing by it would say much.
_LEAST_DEVIATION = 0.05


@dataclass(frozen=True, kw_only=True)
class NormTarget:
    """The input of a batch norm by its node, and what its channels should have on average: float32, (C,)."""

    norm: str
    source: str
    mean: torch.Tensor
    deviation: torch.Tensor


def norm_targets(program: Program) -> tuple[NormTarget, ...]:
    """The statistics of all batch norms in eval mode, in topological order."""
    found = []
    for name, node in program.nodes.items():
        norm = batch_norm_of(program, node) if node.op == "call_function" else None
        if norm is None or norm.node != name:
            continue
        source = str(node.args[0])
        deviation = norm.deviation.float()
        found.append(
            NormTarget(
                norm=name,
                source=source,
                mean=norm.mean.float(),
                deviation=deviation.clamp_min(_LEAST_DEVIATION * float(deviation.median())),
            )
        )
    return tuple(found)


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
