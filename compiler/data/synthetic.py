"""Calibration samples that were made from the network alone, and what is known of how."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from .calibration_set import CalibrationSet

#: How the comment of an .npz file begins that says how its samples were made.
_MARK = b"foldcut made "


@dataclass(frozen=True, kw_only=True, eq=False)
class SyntheticSet(CalibrationSet):
    """A `CalibrationSet` that no data went into. What a compile makes of it says so in its report.

    Arguments:
        leaves: As in `CalibrationSet`.
        spec: As in `CalibrationSet`.
        sources: As in `CalibrationSet`.
        ignored: As in `CalibrationSet`.
        bound: As in `CalibrationSet`.
        made: How the samples were made, as plain data: ``how`` in words, ``count``, ``norms`` (batch norms whose
            statistics they match), ``distance`` (from those statistics, before and after), ``disagreement`` (of the
            network that they were made against, before and after: 0 for none, 1 for all that there can be), ``range``
            of images, ``seconds`` of CPU time, ``weak`` (why they say little, or None), and the names of the
            ``inputs``.

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
        whole: Any = dict(batch) if isinstance(batch, Mapping) else batch[0] if len(batch) == 1 else tuple(batch)
        leaves, spec = pytree.tree_flatten(whole)
        return cls(leaves=tuple(leaves), spec=spec, bound=True, made=made)


def said_of(samples: CalibrationSet) -> Mapping[str, Any] | None:
    """How the samples were made, where they are no data; None where they are."""
    return samples.made if isinstance(samples, SyntheticSet) else None


def as_npz(samples: SyntheticSet, names: Sequence[str]) -> bytes:
    """The samples as an .npz file, one array for each input, with what is known of how they were made: `marked` reads
    it back."""
    content = io.BytesIO()
    arrays: dict[str, Any] = {name: leaf.numpy() for name, leaf in zip(names, samples.leaves, strict=True)}
    np.savez(content, **arrays)
    with zipfile.ZipFile(content, "a") as archive:
        archive.comment = _MARK + json.dumps(dict(samples.made)).encode()
    return content.getvalue()


def marked(samples: CalibrationSet, path: Path) -> CalibrationSet:
    """Samples that were read from a file as what they are: a `SyntheticSet` where the file says that they were made."""
    if path.suffix != ".npz":
        return samples
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment
    if not comment.startswith(_MARK):
        return samples
    try:
        made = json.loads(comment.removeprefix(_MARK))
    except ValueError:
        made = {}
    own = {part.name: getattr(samples, part.name) for part in fields(samples)}
    return SyntheticSet(**own, made=made if isinstance(made, dict) else {})
