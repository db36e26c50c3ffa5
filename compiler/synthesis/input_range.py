"""In which range of numbers a network takes its images, found out by what it makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..ir.program import argument, is_call, is_constant
from .descent import Aim, Descent
from .input_kinds import Kind

aten = torch.ops.aten

#: Of so many convolutions, the first ones, it is looked at how what they compute compares with their biases.
_LOOKED_AT = 3


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """Mean and deviation of the numbers in an image, and what they are usually called."""

    name: str
    mean: float
    deviation: float

    def of(self, images: torch.Tensor) -> torch.Tensor:
        """Images of mean 0 and deviation 1 in this range."""
        return images * self.deviation + self.mean


#: The first is taken where nothing speaks for another.
RANGES = (
    InputRange(name="mean 0, deviation 1", mean=0.0, deviation=1.0),
    InputRange(name="0 to 1", mean=0.45, deviation=0.25),
    InputRange(name="-1 to 1", mean=-0.1, deviation=0.5),
    InputRange(name="0 to 255", mean=115.0, deviation=64.0),
    InputRange(name="-128 to 127", mean=0.0, deviation=64.0),
)


def found_range(aim: Aim, leaves: Sequence[torch.Tensor]) -> InputRange:
    """The range in which the batch norms find what they remember best. Without any, the one in which what the first
    convolutions compute is about as large as their biases: a batch norm that was folded into one leaves it so, for its
    bias and its scale are of one size; in a range that is too large by a factor, biases do not count, and in one that
    is too small nothing else does. The first where neither is there."""
    if not any(kind.kind is Kind.IMAGE for kind in aim.kinds):
        return RANGES[0]
    biased = [node for node in aim.program.graph.nodes if _biased(node)][:_LOOKED_AT]
    if not aim.targets and not biased:
        return RANGES[0]
    return min(RANGES, key=lambda one: _doubt(aim, biased, in_range(aim, leaves, one)))


def in_range(aim: Aim, leaves: Sequence[torch.Tensor], found: InputRange) -> list[torch.Tensor]:
    """The samples, images in the range that was found."""
    return [found.of(leaf) if kind.kind is Kind.IMAGE else leaf for leaf, kind in zip(leaves, aim.kinds, strict=True)]


def _doubt(aim: Aim, biased: Sequence[fx.Node], leaves: Sequence[torch.Tensor]) -> float:
    """How little speaks for it that the network takes such samples."""
    descent = Descent(aim, leaves, seed=0)
    doubt = descent.distance() if aim.targets else _imbalance(aim, biased, descent)
    return doubt if math.isfinite(doubt) else math.inf


def _imbalance(aim: Aim, biased: Sequence[fx.Node], descent: Descent) -> float:
    """How far apart the deviation of each channel and its bias are, in logarithms: the median of the channels, averaged
    over convolutions."""
    values = descent.values([node.name for node in biased])
    found = []
    for node in biased:
        value = values[node.name]
        bias = aim.program.constant(argument(node, 2, "bias")).detach().abs()
        deviation = value.std([dim for dim in range(value.dim()) if dim != 1])
        least = 1e-3 * float(bias.max()) + 1e-12
        found.append(float((deviation / bias.clamp_min(least)).clamp_min(1e-12).log().median().abs()))
    return sum(found) / len(found)


def _biased(node: fx.Node) -> bool:
    """Whether it is a convolution with a bias."""
    return is_call(node, aten.conv2d) and is_constant(argument(node, 2, "bias"))
