"""Calibration samples that were made from the network alone, and what is known of how."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..support.errors import CalibrationError
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

    def with_more(self, more: SyntheticSet) -> SyntheticSet:
        """These samples, and others that were made for the same network.

        Arguments:
            more: The others, such as some that were made against the result of these.

        Returns:
            All of them, in this order. `made` says of each part how it was made, with figures averaged over samples.

        Raises:
            CalibrationError: If the others are for other inputs.
        """
        shapes = [[(leaf.dtype, leaf.shape[1:]) for leaf in part.leaves] for part in (self, more)]
        if self.spec != more.spec or shapes[0] != shapes[1] or self.sources is not None or more.sources is not None:
            raise CalibrationError(
                "the samples are not for the same inputs",
                expected=", ".join(f"{list(leaf.shape[1:])}" for leaf in self.leaves),
                actual=", ".join(f"{list(leaf.shape[1:])}" for leaf in more.leaves),
                hint="make both from the same network, and add views when all are together",
            )
        leaves = tuple(torch.cat(pair) for pair in zip(self.leaves, more.leaves, strict=True))
        return replace(self, leaves=leaves, made=_made_together((self, more)))


def _made_together(parts: Sequence[SyntheticSet]) -> dict[str, Any]:
    """How the parts of a set were made, in the form of one."""
    said = [part.made for part in parts]
    sizes = [len(part) for part in parts]
    hows = dict.fromkeys(str(one.get("how")) for one in said)
    ranges = dict.fromkeys(one["range"] for one in said if one.get("range"))
    return {
        "inputs": said[0].get("inputs", []),
        "count": sum(sizes),
        "how": "; ".join(hows),
        "norms": max(int(one.get("norms", 0)) for one in said),
        "distance": _mean([one.get("distance", {}) for one in said], sizes),
        "disagreement": _mean([one.get("disagreement", {}) for one in said], sizes),
        "range": " and ".join(ranges) or None,
        "seconds": round(sum(one.get("seconds", 0.0) for one in said), 1),
        "weak": next((one["weak"] for one in said if one.get("weak")), None),
    }


def _mean(figures: Sequence[Mapping[str, float]], sizes: Sequence[int]) -> dict[str, float]:
    """Over the samples of those parts that have figures."""
    known = [(figure, size) for figure, size in zip(figures, sizes, strict=True) if figure]
    total = sum(size for _, size in known)
    return {side: sum(f[side] * size for f, size in known) / total for side in ("before", "after") if known}


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
