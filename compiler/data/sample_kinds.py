"""What can hold calibration samples at all, told by its type: before anything is read or computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..support.errors import CalibrationError

#: What to pass instead of something else.
_HINT = (
    "pass a tensor, an array, a tuple or dict of them, a DataLoader or a generator of batches (or a list), with the "
    "samples along dimension 0"
)


def check_samples(data: object) -> None:
    """Raise CalibrationError for what holds no samples, whatever is in it: a path, a number, a network, settings."""
    if isinstance(data, (str, Path)):
        raise CalibrationError(
            "a path was given where data is expected",
            actual=str(data),
            hint="read it with foldcut.read_calibration(path)",
        )
    if _holds_samples(data):
        return
    name = data.__name__ if isinstance(data, type) else type(data).__name__
    article = "the class" if isinstance(data, type) else "an" if name[0].lower() in "aeiou" else "a"
    raise CalibrationError(f"cannot read calibration samples from {article} {name}", hint=_HINT)


def _holds_samples(data: Any) -> bool:
    if isinstance(data, (type, bytes, bytearray, nn.Module)):  # a module can be gone through, layer by layer
        return False
    if isinstance(data, Mapping) or not is_dataclass(data):
        return isinstance(data, Iterable) or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))
    return any(map(_is_field, (getattr(data, part.name) for part in fields(data))))


def _is_field(value: Any) -> bool:
    """A field of a batch: arrays or lists. Settings have numbers, and tuples of them."""
    parts = value if isinstance(value, tuple) else (value,)
    return any(isinstance(part, list) or hasattr(part, "__array__") for part in parts)
