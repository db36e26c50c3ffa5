"""Two ONNX files side by side: do they have one interface, and do they compute the same?"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.calibration_set import CalibrationSet
from ..ir.compare import Difference, compare
from ..ir.program import as_arguments, dtype_name
from ..support.errors import CaptureError
from ..support.strict_json import finite
from .call import DTYPES
from .file import read_onnx
from .session import reference_session, run_reference
from .signature import OnnxSignature, OnnxValue


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What tells two files apart. `interface` names every difference of inputs, outputs, opset and metadata that a
    caller would notice; `outputs` holds the worst difference of each output over all samples, by name."""

    interface: tuple[str, ...]
    outputs: Mapping[str, Difference]
    samples: int

    @property
    def relative(self) -> float:
        """The worst relative difference of any output."""
        return max((d.relative for d in self.outputs.values()), default=0.0)

    def same(self, tolerance: float) -> bool:
        """Whether the interface is the same and every output within `tolerance` of its largest entry. Where no output
        was compared, nothing is known to be the same."""
        compared = self.outputs.values()
        near = all(d.same_structure and d.relative <= tolerance for d in compared)
        return not self.interface and bool(compared) and near

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a figure that is not finite is None."""
        return {
            "interface": list(self.interface),
            "samples": self.samples,
            "outputs": {name: finite(asdict(d)) for name, d in self.outputs.items()},
        }


def compare_onnx(
    before: str | Path, after: str | Path, samples: CalibrationSet, *, batch: int | None = None
) -> Comparison:
    """Run both files in ONNX Runtime on the same samples and compare outputs by name, and by position where the names
    differ. Inputs likewise: where one file has other names than the samples, its inputs get the samples in their order,
    as far as types and ranks allow.

    `batch` samples go in at once (the files' own batch where one is fixed, else 32 by default); samples that do not
    fill a fixed batch are left out. Differences are in float64: max |a - b|, that over max |a|, and the cosine.

    Raises CaptureError for files or samples that do not fit, and for a batch below 1.
    """
    if batch is not None and batch < 1:
        raise CaptureError("batch starts at 1", actual=batch, hint="leave it out for the files' own batch, or 32")
    paths = [Path(p) for p in (before, after)]
    signatures = [OnnxSignature.of(read_onnx(path, mapped={})) for path in paths]
    sessions = [
        reference_session(str(path), optimise=not signature.quantised)
        for path, signature in zip(paths, signatures, strict=True)
    ]
    size = _batch_size(signatures, batch)
    worst: dict[str, Difference] = {}
    fixed = any(s.fixed_batch is not None for s in signatures)
    count = len(samples) // size * size if fixed else len(samples)
    if count == 0:
        raise CaptureError(
            "there are fewer samples than the files' fixed batch", expected=f"at least {size}", actual=len(samples)
        )
    for start in range(0, count, size):
        piece = samples.take(slice(start, min(start + size, count)))
        first, second = (
            _outputs(session, signature, other, piece)
            for session, signature, other in zip(sessions, signatures, reversed(signatures), strict=True)
        )
        for name, a, b in _paired(signatures, first, second):
            worst[name] = _worse(worst.get(name), compare([a], [b]))
    return Comparison(interface=tuple(_interface(*signatures)), outputs=worst, samples=count)


def random_samples(path: str | Path, count: int, seed: int) -> CalibrationSet:
    """Made-up samples for a file whose only dynamic dimension is the batch: floats from N(0, 1), integers 0 or 1.
    Raises CaptureError when other dimensions are dynamic."""
    signature = OnnxSignature.of(read_onnx(path, mapped={}))
    generator = np.random.default_rng(seed)
    arrays = {}
    for value in signature.inputs:
        shape = value.shape or ()
        if any(not isinstance(d, int) for d in shape[1:]) or value.element_type not in DTYPES:
            raise CaptureError(
                f"the input {value.name!r} cannot be made up", actual=shape, hint="pass samples with --inputs DATA"
            )
        drawn = generator.standard_normal((count, *shape[1:]))  # type: ignore[arg-type]
        dtype = DTYPES[value.element_type]
        if not dtype.is_floating_point:
            drawn = generator.integers(0, 2, size=(count, *shape[1:])).astype(np.float64)  # type: ignore[arg-type]
        arrays[value.name] = torch.from_numpy(drawn).to(dtype)
    return CalibrationSet.of(arrays)


def _batch_size(signatures: Sequence[OnnxSignature], batch: int | None) -> int:
    fixed = {s.fixed_batch for s in signatures if s.fixed_batch is not None}
    if len(fixed) > 1 or (batch is not None and fixed and batch not in fixed):
        raise CaptureError("the files fix different batch sizes", actual=sorted(fixed), hint="compare them one by one")
    return next(iter(fixed), batch or 32)


def _outputs(session: Any, signature: OnnxSignature, other: OnnxSignature, piece: CalibrationSet) -> list[torch.Tensor]:
    args, kwargs = as_arguments(piece.batch(slice(None)))
    names = [v.name for v in signature.inputs]
    given = [kwargs[n] for n in _sources(signature, other, kwargs) if n in kwargs] if kwargs else list(args)
    if len(given) != len(names):
        raise CaptureError(
            "the samples do not have the file's inputs",
            expected=", ".join(map(_named, signature.inputs)),
            actual=", ".join(kwargs) if kwargs else f"{len(given)} inputs",
            hint="an .npz with one array for each input, under the inputs' names; where the files name them "
            "differently, number, types and ranks of the inputs have to agree",
        )
    feeds = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
    return [torch.from_numpy(np.asarray(o, order="C")) for o in run_reference(session, feeds)]


def _sources(signature: OnnxSignature, other: OnnxSignature, samples: Collection[str]) -> list[str]:
    """Under which name the samples hold each input of a file: under its own, or under that of an input which only the
    other file has. Of those the first stands for the first, where all may stand for each other."""
    own = [v.name for v in signature.inputs]
    unknown = [v for v in signature.inputs if v.name not in samples]
    left = [v for v in other.inputs if v.name in samples and v.name not in own]
    if len(unknown) != len(left) or not all(map(_interchangeable, unknown, left)):
        return own
    found = {a.name: b.name for a, b in zip(unknown, left, strict=True)}
    return [found.get(name, name) for name in own]


def _interchangeable(a: OnnxValue, b: OnnxValue) -> bool:
    """Whether the same samples may go into both: one type, and one rank where both declare theirs."""
    ranks = {len(v.shape) for v in (a, b) if v.shape is not None}
    return a.element_type == b.element_type and len(ranks) <= 1


def _paired(
    signatures: Sequence[OnnxSignature], first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    left, right = ([v.name for v in s.outputs] for s in signatures)
    if set(left) == set(right):
        by_name = dict(zip(right, second, strict=True))
        return [(name, value, by_name[name]) for name, value in zip(left, first, strict=True)]
    return list(zip(left, first, second, strict=False))


def _worse(a: Difference | None, b: Difference) -> Difference:
    if a is None:
        return b
    return Difference(
        absolute=max(a.absolute, b.absolute),
        relative=max(a.relative, b.relative),
        cosine=min(a.cosine, b.cosine),
        same_structure=a.same_structure and b.same_structure,
    )


def _interface(before: OnnxSignature, after: OnnxSignature) -> list[str]:
    found = []
    for kind, left, right in (("input", before.inputs, after.inputs), ("output", before.outputs, after.outputs)):
        names = [v.name for v in left], [v.name for v in right]
        if names[0] != names[1]:
            found.append(f"{kind}s: {', '.join(names[0])} became {', '.join(names[1])}")
            continue
        found += [f"{kind} {_named(a)} became {_text(b)}" for a, b in zip(left, right, strict=True) if _differs(a, b)]
    if before.opset != after.opset:
        found.append(f"opset: {before.opset} became {after.opset}")
    if before.metadata != after.metadata:
        found.append("the model's metadata differ")
    return found


def _differs(a: OnnxValue, b: OnnxValue) -> bool:
    return a.element_type != b.element_type or a.shape != b.shape


def _named(value: OnnxValue) -> str:
    return f"{value.name}: {_text(value)}"


def _text(value: OnnxValue) -> str:
    dtype = DTYPES.get(value.element_type)
    kind = dtype_name(dtype) if dtype is not None else f"type {value.element_type}"
    dims = "?" if value.shape is None else ", ".join("?" if d is None else str(d) for d in value.shape)
    return f"{kind}[{dims}]"
