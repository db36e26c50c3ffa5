"""What the inputs of a network are: images, other numbers, or indices into a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import fx

from ..ir.program import Program, TensorSpec, dtype_name, is_call, is_constant
from ..support.errors import CalibrationError
from .natural_images import ImageForm, dead_leaves

aten = torch.ops.aten

#: An input with so many channels at most, and at least so many pixels a side, is taken for an image.
_MOST_CHANNELS, _LEAST_SIDE = 4, 8
#: What an index may go through before it is looked up.
_PASSED_ON = (aten.to, aten._to_copy, aten.clamp, aten.view, aten.reshape, aten.unsqueeze, aten.squeeze, aten.expand)


class Kind(StrEnum):
    """What an input holds."""

    IMAGE = "images"
    NUMBERS = "numbers"
    INDICES = "indices"


@dataclass(frozen=True, kw_only=True)
class InputKind:
    """One input: its sizes without the batch; for an image whether the channels come last, for indices the number of
    rows of the table that they are looked up in."""

    name: str
    kind: Kind
    sizes: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False
    rows: int = 0

    def drawn(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """So many samples, as far as nothing more is known than the shape: images of dead leaves, Gaussian noise, and
        uniform indices."""
        if self.kind is Kind.INDICES:
            return torch.randint(self.rows, (count, *self.sizes), generator=generator).to(self.dtype)
        if self.kind is Kind.NUMBERS:
            return torch.randn(count, *self.sizes, generator=generator, dtype=torch.float32).to(self.dtype)
        channels, height, width = self.sizes if not self.channels_last else (self.sizes[2], *self.sizes[:2])
        images = dead_leaves(count, ImageForm(channels, height, width), generator)
        return (images.permute(0, 2, 3, 1) if self.channels_last else images).contiguous().to(self.dtype)


def input_kinds(program: Program) -> tuple[InputKind, ...]:
    """What the inputs of a program are, in their order. Raises CalibrationError where nobody could say what to put
    there: integers that are looked up in no table, truth values, complex numbers."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    return tuple(_kind(program, node, spec) for node, spec in zip(placeholders, program.inputs, strict=True))


def _kind(program: Program, node: fx.Node, spec: TensorSpec) -> InputKind:
    name, dtype, sizes = spec.name, spec.dtype, program.shape(node)[1:]
    if dtype.is_floating_point:
        kind = Kind.IMAGE if _is_image(sizes) or _is_image(sizes[::-1]) else Kind.NUMBERS
        return InputKind(name=name, kind=kind, sizes=sizes, dtype=dtype, channels_last=not _is_image(sizes))
    rows = _rows(program, node) if dtype in (torch.int32, torch.int64) else 0
    if not rows:
        raise CalibrationError(
            f"input {name!r} cannot be made up: nothing says which values its {dtype_name(dtype)} numbers take",
            expected="images, other floating-point numbers, or indices of an embedding",
            actual=spec,
            hint="pass a calibration set",
        )
    return InputKind(name=name, kind=Kind.INDICES, sizes=sizes, dtype=dtype, rows=rows)


def _is_image(sizes: Sequence[int]) -> bool:
    """Whether sizes are those of channels, height and width."""
    return len(sizes) == 3 and sizes[0] <= _MOST_CHANNELS and min(sizes[1:]) >= _LEAST_SIDE


def _rows(program: Program, node: fx.Node) -> int:
    """The number of rows of the smallest table that an input is looked up in; 0 where it is looked up in none."""
    found: list[int] = []
    ways = [node]
    while ways:
        value = ways.pop()
        for user in value.users:
            if is_call(user, aten.embedding) and user.args[1] is value and is_constant(user.args[0]):
                found.append(program.constant(user.args[0]).shape[0])  # type: ignore[arg-type]
            elif is_call(user, *_PASSED_ON) and user.args[0] is value:
                ways.append(user)
    return min(found, default=0)
