"""Shape arithmetic: Shape, Gather, Concat and what exporters compute with them, on numbers known while tracing.

Nothing of it reaches the graph except through the Reshape, Expand or Slice that reads the result.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch

from ..onnx.call import OnnxCall, Sizes, Unsupported, axes_of, builds, builds_sizes, slices_of, torch_dtype
from .shape_operators import backwards

#: Types in which Python's own numbers compute what ONNX does, for numbers of the size of dimensions.
_EXACT = {torch.bool, torch.int32, torch.int64, torch.float32, torch.float64}
Array = np.ndarray[Any, np.dtype[np.object_]]


@builds("Shape")
def _shape(call: OnnxCall) -> Sizes:
    value = call.value(0)
    sizes = list(value.values.shape) if isinstance(value, Sizes) else list(call.tensor(0).shape)
    rank = len(sizes)
    start, end = call.attr("start", 0), call.attr("end", rank)
    start, end = (min(max(i + rank if i < 0 else i, 0), rank) for i in (start, end))
    return Sizes.of(sizes[start:end])


@builds("Size")
def _size(call: OnnxCall) -> Sizes:
    return Sizes.of(reduce(operator.mul, call.tensor(0).shape, 1))


def _elementwise(operation: Callable[[Any, Any], Any]) -> Callable[[OnnxCall], Sizes]:
    def build(call: OnnxCall) -> Sizes:
        arrays = [call.known(i) for i in range(len(call.inputs))]
        result = reduce(lambda a, b: _map(operation, a, b), arrays)
        return Sizes(result, call.dtype(0))

    return build


def _map(operation: Callable[..., Any], *arrays: Array) -> Array:
    """Elementwise with broadcasting; numpy's own functions would try to look into symbolic numbers."""
    wide = np.broadcast_arrays(*arrays) if len(arrays) > 1 else arrays
    result = np.empty(wide[0].shape, dtype=object)
    for index in np.ndindex(result.shape):
        result[index] = operation(*(a[index] for a in wide))
    return result


def _integral(*values: Any) -> bool:
    return all(isinstance(v, (int, torch.SymInt)) for v in values)


def _divide(a: Any, b: Any) -> Any:
    """ONNX divides integers toward zero; sizes are not negative, so the floor is the same wherever symbols occur."""
    if not _integral(a, b):
        return a / b
    if b == 0:
        raise Unsupported("a size is divided by zero")
    if isinstance(a, int) and isinstance(b, int):
        quotient = abs(a) // abs(b)
        return quotient if (a < 0) == (b < 0) else -quotient
    return a // b


for _op, _operation in {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": _divide,
    "Min": torch.sym_min,
    "Max": torch.sym_max,
}.items():
    builds_sizes(_op)(_elementwise(_operation))


@builds_sizes("Mod")
def _modulo(call: OnnxCall) -> Sizes:
    """The remainder has the sign of the divisor, or with `fmod` that of the dividend."""
    cut, divisors = call.attr("fmod", 0), list(call.known(1).reshape(-1))
    if any(isinstance(v, (int, float)) and v == 0 for v in divisors):
        raise Unsupported("a size is divided by zero")
    if cut and not all(isinstance(v, (int, float)) for v in (*call.known(0).reshape(-1), *divisors)):
        raise Unsupported("a remainder of symbolic sizes that keeps the sign of the dividend")
    operation = math.fmod if cut else operator.mod
    return Sizes(_map(operation, call.known(0), call.known(1)), call.dtype(0))


def _comparison(operation: Callable[[Any, Any], Any]) -> Callable[[OnnxCall], Sizes]:
    def build(call: OnnxCall) -> Sizes:
        return Sizes(_map(lambda a, b: bool(operation(a, b)), call.known(0), call.known(1)), torch.bool)

    return build


for _op, _operation in {
    "Equal": operator.eq,
    "Greater": operator.gt,
    "Less": operator.lt,
    "GreaterOrEqual": operator.ge,
    "LessOrEqual": operator.le,
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
}.items():
    builds_sizes(_op)(_comparison(_operation))


def _unary(operation: Callable[[Any], Any]) -> Callable[[OnnxCall], Sizes]:
    def build(call: OnnxCall) -> Sizes:
        return Sizes(_map(operation, call.known(0)), call.dtype(0))

    return build


for _op, _unary_operation in {
    "Neg": operator.neg,
    "Identity": lambda a: a,
    "Floor": lambda a: a if _integral(a) else float(math.floor(a)) if isinstance(a, float) else math.floor(a),
    "Ceil": lambda a: a if _integral(a) else float(math.ceil(a)) if isinstance(a, float) else math.ceil(a),
}.items():
    builds_sizes(_op)(_unary(_unary_operation))


@builds_sizes("Not")
def _negation(call: OnnxCall) -> Sizes:
    return Sizes(_map(lambda a: not a, call.known(0)), torch.bool)


@builds_sizes("Where")
def _where(call: OnnxCall) -> Sizes:
    chosen = _map(lambda c, a, b: a if c else b, call.known(0), call.known(1), call.known(2))
    return Sizes(chosen, call.dtype(1))


@builds_sizes("Cast")
def _cast(call: OnnxCall) -> Sizes:
    dtype = torch_dtype(call.attr("to"))
    if dtype not in _EXACT:
        raise Unsupported(f"numbers of type {dtype}, which rounds or wraps around")

    def convert(value: Any) -> Any:
        if dtype == torch.bool:
            return bool(value)
        if dtype.is_floating_point:
            return torch.sym_float(value)
        return int(value) if isinstance(value, (float, bool)) else torch.sym_int(value)

    return Sizes(_map(convert, call.known(0)), dtype)


@builds_sizes("Gather")
def _gather(call: OnnxCall) -> Sizes:
    data, indices = call.known(0), call.known(1)
    try:
        picked = np.take(data, indices.astype(np.int64), axis=call.attr("axis", 0))
    except (IndexError, ValueError, TypeError) as cause:
        raise Unsupported(f"Gather of sizes: {cause}") from cause
    return Sizes(np.asarray(picked, dtype=object).reshape(np.shape(picked)), call.dtype(0))


@builds_sizes("Concat")
def _concat(call: OnnxCall) -> Sizes:
    parts = [call.known(i) for i in range(len(call.inputs))]
    return Sizes(np.concatenate(parts, axis=call.attr("axis", 0)), call.dtype(0))


@builds_sizes("Unsqueeze")
def _unsqueeze(call: OnnxCall) -> Sizes:
    values = call.known(0)
    axes = call.attr("axes") or [int(a) for a in call.sizes(1)]
    rank = values.ndim + len(axes)
    return Sizes(np.expand_dims(values, tuple(int(a) % rank for a in axes)), call.dtype(0))


@builds_sizes("Squeeze")
def _squeeze(call: OnnxCall) -> Sizes:
    values = call.known(0)
    axes = axes_of(call, values.ndim)
    squeezed = np.squeeze(values, None if axes is None else tuple(axes))
    return Sizes(np.asarray(squeezed, dtype=object).reshape(np.shape(squeezed)), call.dtype(0))


@builds_sizes("Transpose")
def _transpose(call: OnnxCall) -> Sizes:
    return Sizes(np.transpose(call.known(0), call.attr("perm")), call.dtype(0))


@builds_sizes("Reshape")
def _reshape(call: OnnxCall) -> Sizes:
    values, target = call.known(0), [int(s) for s in call.sizes(1)]
    if not call.attr("allowzero", 0):
        target = [values.shape[i] if s == 0 else s for i, s in enumerate(target)]
    return Sizes(values.reshape(target), call.dtype(0))


@builds_sizes("Slice")
def _slice(call: OnnxCall) -> Sizes:
    values = call.known(0)
    for first, last, axis, stride in slices_of(call):
        start, end, step = int(first), int(last), int(stride)
        length = values.shape[axis]
        index = backwards(length, start, end, step) if step < 0 else list(range(length))[start:end:step]
        values = np.take(values, np.array(index, np.int64), axis)
    return Sizes(values, call.dtype(0))


@builds_sizes("Split")
def _split(call: OnnxCall) -> list[Sizes]:
    values, axis = call.known(0), call.attr("axis", 0)
    length = values.shape[axis]
    sizes = call.attr("split") or (call.sizes(1) if call.has(1) else None)
    if sizes is None:
        chunk = -(-length // call.outputs)
        sizes = [min(chunk, length - i * chunk) for i in range(call.outputs)]
    cuts = np.cumsum([int(s) for s in sizes])[:-1]
    return [Sizes(part, call.dtype(0)) for part in np.split(values, cuts, axis)]


@builds_sizes("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin")
def _reduction(call: OnnxCall) -> Sizes:
    operation: Any = {
        "ReduceProd": operator.mul,
        "ReduceSum": operator.add,
        "ReduceMax": torch.sym_max,
        "ReduceMin": torch.sym_min,
    }[call.node.op]
    values = call.known(0)
    if values.ndim > 1 or values.size == 0:
        raise Unsupported("a reduction of sizes of rank above 1")
    result = reduce(operation, values.reshape(-1))
    return Sizes.of([result] if call.attr("keepdims", 1) and values.ndim else result, call.dtype(0))


@builds_sizes("Range")
def _range(call: OnnxCall) -> Sizes:
    start, limit, delta = (call.number(i) for i in range(3))
    if not all(isinstance(v, int) for v in (start, limit, delta)) or abs(limit - start) > 4096 * abs(delta):
        raise Unsupported("a range of unknown or large extent")
    return Sizes.of(list(range(start, limit, delta)), call.dtype(0))


@builds_sizes("ConstantOfShape")
def _constant_of_shape(call: OnnxCall) -> Sizes:
    shape = call.sizes(0)
    value = call.attr("value")
    fill = 0.0 if value is None else value.values.reshape(-1)[0].item()
    if not all(isinstance(s, int) for s in shape) or len(shape) > 1 or math.prod(shape) > 64 or isinstance(fill, float):
        raise Unsupported("not a vector of sizes")
    dtype = torch.int64 if value is None else torch.from_numpy(np.asarray(value.values)).dtype
    return Sizes.of([fill] * math.prod(shape) if shape else fill, dtype)
