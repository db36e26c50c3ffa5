"""What a builder of the ONNX table sees of one node, and the table itself: ONNX operator and opset -> builder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from ..onnx_import.module import OnnxModule

Size = int | torch.SymInt

#: ONNX data types (TensorProto.DataType) that torch has.
DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    14: torch.complex64,
    15: torch.complex128,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    19: torch.float8_e5m2,
}
ELEMENT_TYPES = {dtype: number for number, dtype in DTYPES.items()}
#: Types that numpy borrows from ml_dtypes, by numpy's name.
BORROWED = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


class Unsupported(Exception):  # noqa: N818 - not an error of the user: the node becomes an opaque one
    """A builder does not cover this use of the operator; the message says which part."""


@dataclass(frozen=True, eq=False)
class Sizes:
    """Numbers that are known while tracing, symbolic dimensions among them: what Shape, Gather, Concat and the
    arithmetic between them compute before a Reshape. `values` is an object array of any rank."""

    values: np.ndarray[Any, np.dtype[np.object_]]
    dtype: torch.dtype = torch.int64

    @staticmethod
    def of(values: Sequence[Any] | Any, dtype: torch.dtype = torch.int64) -> Sizes:
        """From a list (rank 1) or a single number (rank 0). numpy would look into SymInts: they are set one by one."""
        if isinstance(values, (list, tuple)):
            array = np.empty(len(values), dtype=object)
            for index, value in enumerate(values):
                array[index] = value
        else:
            array = np.empty((), dtype=object)
            array[()] = values
        return Sizes(array, dtype)

    def tensor(self) -> torch.Tensor:
        """The same numbers as a tensor of the graph."""
        flat = list(self.values.reshape(-1))
        if all(isinstance(v, (int, float, bool)) for v in flat):
            return torch.tensor(flat, dtype=self.dtype).reshape(self.values.shape)
        parts = [torch.scalar_tensor(v, dtype=self.dtype) for v in flat]
        return torch.stack(parts).reshape(self.values.shape) if self.values.ndim else parts[0]


@dataclass(frozen=True, eq=False)
class Constant:
    """An initializer: its values, and the parameter or buffer that stands for it in the traced module."""

    name: str
    array: np.ndarray[Any, Any]
    module: OnnxModule
    transposed: bool = False

    def tensor(self) -> torch.Tensor:
        """As ONNX has it."""
        value = self.module.weight(self.name)
        return value.t() if self.transposed else value

    def stored(self) -> torch.Tensor:
        """As the module stores it: a matrix that only multiplies from the right is stored as `linear` wants it."""
        return self.module.weight(self.name)


Value = torch.Tensor | Sizes | Constant


@dataclass(frozen=True, eq=False)
class OnnxCall:
    """One node with the values of its inputs. An input that was left out is None."""

    node: gs.Node
    inputs: tuple[Value | None, ...]
    opset: int
    #: Size of the batch that the file fixes but the import makes dynamic; None where the file's own is dynamic.
    fixed_batch: int | None = None
    #: The symbolic batch size, where the batch is dynamic.
    batch: Size | None = None
    #: The outputs that somebody reads.
    used: tuple[int, ...] = (0,)

    @property
    def outputs(self) -> int:
        """How many outputs the node declares."""
        return len(self.node.outputs)

    def has(self, index: int) -> bool:
        """Whether the input is given."""
        return len(self.inputs) > index and self.inputs[index] is not None

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute, or the default."""
        return self.node.attrs.get(name, default)

    def value(self, index: int) -> Value:
        """The input as it is. Raises Unsupported when it was left out."""
        if not self.has(index):
            raise Unsupported(f"input {index} is missing")
        value = self.inputs[index]
        assert value is not None
        return value

    def tensor(self, index: int) -> torch.Tensor:
        """The input as a tensor of the graph."""
        value = self.value(index)
        return value if isinstance(value, torch.Tensor) else value.tensor()

    def tensors(self) -> list[torch.Tensor]:
        """All inputs that are given, as tensors."""
        return [self.tensor(i) for i in range(len(self.inputs)) if self.has(i)]

    def optional(self, index: int) -> torch.Tensor | None:
        """The input as a tensor, None where it was left out."""
        return self.tensor(index) if self.has(index) else None

    def operand(self, index: int, rank: int) -> Any:
        """A number for a constant of one element that broadcasts into tensors of that rank, else the tensor."""
        value = self.value(index)
        if isinstance(value, Constant) and value.array.size == 1 and value.array.ndim <= rank:
            return value.array.reshape(()).item()
        if isinstance(value, Sizes) and value.values.size == 1 and value.values.ndim <= rank:
            return value.values.reshape(-1)[0]
        return self.tensor(index)

    def number(self, index: int, default: Any = None) -> Any:
        """The single element of a constant input. Raises Unsupported when data computes it."""
        if not self.has(index):
            return default
        values = self.known(index)
        if values.size != 1:
            raise Unsupported(f"input {index} is not a single number")
        return values.reshape(-1)[0]

    def sizes(self, index: int) -> list[Size]:
        """The elements of a constant or symbolic input of rank 1. Raises Unsupported when data computes them."""
        return list(self.known(index).reshape(-1))

    def known(self, index: int) -> np.ndarray[Any, np.dtype[np.object_]]:
        """The elements of a constant or symbolic input. Raises Unsupported when data computes them."""
        value = self.value(index)
        if isinstance(value, Sizes):
            return value.values
        if isinstance(value, Constant):
            return value.array.astype(object)
        raise Unsupported(f"input {index} is computed from the data")

    def dtype(self, index: int = 0) -> torch.dtype:
        """The data type of an input."""
        value = self.value(index)
        return value.dtype if isinstance(value, Sizes) else self.tensor(index).dtype


Built = Value | Sequence[Value | None]
Builder = Callable[[OnnxCall], Built]


@dataclass(frozen=True)
class _Row:
    since: int
    until: int
    build: Builder


_TABLE: dict[str, list[_Row]] = {}
_SIZES: dict[str, Builder] = {}


def builds(*ops: str, since: int = 1, until: int = 10_000) -> Callable[[Builder], Builder]:
    """Enter a builder for standard operators, from opset `since` up to and including `until`."""

    def enter(function: Builder) -> Builder:
        for op in ops:
            _TABLE.setdefault(op, []).append(_Row(since, until, function))
        return function

    return enter


def builds_sizes(*ops: str) -> Callable[[Builder], Builder]:
    """Enter a rule for operators whose inputs are all known while tracing."""

    def enter(function: Builder) -> Builder:
        for op in ops:
            _SIZES[op] = function
        return function

    return enter


def builder_of(op: str, opset: int) -> Builder | None:
    """The builder of a standard operator at an opset, None when the table has none."""
    return next((row.build for row in _TABLE.get(op, ()) if row.since <= opset <= row.until), None)


def sizes_builder_of(op: str) -> Builder | None:
    """The rule for known numbers, None when the table has none."""
    return _SIZES.get(op)


def table() -> dict[str, tuple[tuple[int, int], ...]]:
    """The operators that are covered, with their opset ranges."""
    return {op: tuple((row.since, row.until) for row in rows) for op, rows in sorted(_TABLE.items())}


def torch_dtype(number: int) -> torch.dtype:
    """torch's type for an ONNX element type. Raises Unsupported where it has none (strings, four-bit integers)."""
    if number not in DTYPES:
        raise Unsupported(f"torch has no data type for ONNX type {number}")
    return DTYPES[number]


def slices_of(call: OnnxCall) -> list[tuple[Any, Any, int, Any]]:
    """(start, end, axis, step) of a Slice, from inputs or, before opset 10, attributes."""
    if call.has(1):
        starts, ends = call.sizes(1), call.sizes(2)
        axes = call.sizes(3) if call.has(3) else range(len(starts))
        steps = call.sizes(4) if call.has(4) else [1] * len(starts)
    else:
        starts, ends = call.attr("starts"), call.attr("ends")
        axes, steps = call.attr("axes") or range(len(starts)), [1] * len(starts)
    return [(start, end, int(axis), step) for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)]


def axes_of(call: OnnxCall, rank: int, index: int = 1) -> list[int] | None:
    """Axes from the attribute (older opsets) or an input, made non-negative; None when neither is given."""
    axes = call.attr("axes")
    if axes is None and call.has(index):
        axes = [int(a) for a in call.sizes(index)]
    return None if axes is None else [int(a) % rank if rank else 0 for a in axes]
