"""In which range of numbers a network takes its images, found out by what it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .descent import Aim, Descent
from .input_kinds import Kind


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
    """The range in which the batch norms find what they remember best; without any, that in which a classifier is most
    sure of classes that differ from sample to sample; else the first."""
    if not any(kind.kind is Kind.IMAGE for kind in aim.kinds):
        return RANGES[0]
    if not aim.targets and aim.classes is None:
        return RANGES[0]
    return min(RANGES, key=lambda one: _doubt(aim, in_range(aim, leaves, one)))


def in_range(aim: Aim, leaves: Sequence[torch.Tensor], found: InputRange) -> list[torch.Tensor]:
    """The samples, images in the range that was found."""
    return [found.of(leaf) if kind.kind is Kind.IMAGE else leaf for leaf, kind in zip(leaves, aim.kinds, strict=True)]


def _doubt(aim: Aim, leaves: Sequence[torch.Tensor]) -> float:
    """How little speaks for it that the network takes such samples."""
    if aim.targets:
        return Descent(aim, leaves, seed=0).distance()
    assert aim.classes is not None
    logits = Descent(aim, leaves, seed=0).outputs()
    return -information(logits)


def information(logits: torch.Tensor) -> float:
    """What the classes say about the samples, in nats: 0 where all are alike or every one is unsure."""
    logarithms = logits.double().log_softmax(1)
    shares = logarithms.exp()
    mean = shares.mean(0)
    each = -(shares * logarithms).sum(1).mean()
    together = -(mean * mean.clamp_min(1e-300).log()).sum()
    return float(together - each)
