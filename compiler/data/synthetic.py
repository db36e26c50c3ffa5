"""Calibration samples that were made from the network alone, and what is known of how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .calibration_set import CalibrationSet


@dataclass(frozen=True, kw_only=True, eq=False)
class SyntheticSet(CalibrationSet):
    """A `CalibrationSet` that no data went into. What a compile makes of it says so in its report.

    Arguments:
        made: How the samples were made, as plain data: ``how`` in words, ``count``, ``norms`` (batch norms whose
            statistics they match), ``distance`` (from those statistics, before and after), ``seconds``, ``weak`` (why
            they say little, or None).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> settings = foldcut.SynthesisSettings(count=8, input_shape=(3, 16, 16), iterations=2)
        >>> samples = foldcut.synthesise(net, settings, progress=False, cache=False)
        >>> len(samples), samples.made["norms"]
        (8, 1)
    """

    made: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_leaves(
        cls, batch: Sequence[torch.Tensor] | Mapping[str, torch.Tensor], made: Mapping[str, Any]
    ) -> SyntheticSet:
        """One tensor for each input, by position or by name, with the samples along dimension 0."""
        one = next(iter(batch)) if not isinstance(batch, Mapping) and len(batch) == 1 else None
        whole: Any = one if one is not None else dict(batch) if isinstance(batch, Mapping) else tuple(batch)
        leaves, spec = pytree.tree_flatten(whole)
        return cls(leaves=tuple(leaves), spec=spec, bound=True, made=made)


def said_of(samples: CalibrationSet) -> Mapping[str, Any] | None:
    """How the samples were made, where they are no data; None where they are."""
    return samples.made if isinstance(samples, SyntheticSet) else None
