"""ONNX operators that put values on integer grids: QuantizeLinear and DequantizeLinear as torch's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators

from ..onnx.call import Constant, OnnxCall, Unsupported, builds

quantized: Any = torch.ops.quantized_decomposed
Array = np.ndarray[Any, Any]

#: Integers that a value may be stored as, with where they end.
_BOUNDS = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int16: (-(2**15), 2**15 - 1)}
#: And what else is read back: biases.
_READ_BOUNDS = {**_BOUNDS, torch.int32: (-(2**31), 2**31 - 1)}


@builds("QuantizeLinear")
def _quantize(call: OnnxCall) -> torch.Tensor:
    if call.attr("saturate", 1) != 1 or call.attr("block_size", 0) or call.attr("precision", 0):
        raise Unsupported("only whole tensors and channels, saturating")
    scales, zeros, dtype = _grid(call)
    bounds = _bounds(_BOUNDS, dtype)
    value = _single_precision(call)
    if scales.size == 1:
        grid = (float(scales.reshape(())), int(zeros.reshape(())), *bounds, dtype)
        return quantized.quantize_per_tensor(value, *grid)
    if not call.has(2):
        raise Unsupported("channels without zero points")
    axis = _axis(call, value)
    return quantized.quantize_per_channel(value, call.tensor(1), call.tensor(2).to(torch.int64), axis, *bounds, dtype)


@builds("DequantizeLinear")
def _dequantize(call: OnnxCall) -> torch.Tensor:
    if call.attr("block_size", 0):
        raise Unsupported("only whole tensors and channels")
    scales, zeros, _ = _grid(call)
    value = call.tensor(0)
    bounds = _bounds(_READ_BOUNDS, value.dtype)
    if scales.size == 1:
        whole = (float(scales.reshape(())), int(zeros.reshape(())), *bounds, value.dtype)
        return quantized.dequantize_per_tensor(value, *whole)
    # the difference is taken in the type of the zero points: that of the values would overflow
    offsets = call.tensor(2).to(torch.int64) if zeros.any() else None
    grid = (call.tensor(1), offsets, _axis(call, value), *bounds, value.dtype)
    return quantized.dequantize_per_channel(value, *grid)


def _grid(call: OnnxCall) -> tuple[Array, Array, torch.dtype]:
    """Scales in float32, zero points in int64, both of one shape, and the zero points' type."""
    scale = call.value(1)
    if not isinstance(scale, Constant) or scale.array.dtype != np.float32 or scale.array.ndim > 1:
        raise Unsupported("its scale is not a constant in single precision")
    scales = np.ascontiguousarray(scale.array)
    if not bool(((scales > 0) & np.isfinite(scales)).all()):
        raise Unsupported("its scale is not a number above 0")
    if not call.has(2):
        dtype = {2: torch.uint8, 3: torch.int8, 5: torch.int16}.get(call.attr("output_dtype", 0) or 2)
        if dtype is None:
            raise Unsupported("integers of another type")
        return scales, np.zeros(scales.shape, np.int64), dtype
    zero = call.value(2)
    if not isinstance(zero, Constant) or zero.array.size != scales.size:
        raise Unsupported("its zero point is not a constant")
    return scales, np.ascontiguousarray(zero.array.astype(np.int64)).reshape(scales.shape), call.dtype(2)


def _bounds(known: dict[torch.dtype, tuple[int, int]], dtype: torch.dtype) -> tuple[int, int]:
    if dtype not in known:
        raise Unsupported(f"values of {dtype}")
    return known[dtype]


def _single_precision(call: OnnxCall) -> torch.Tensor:
    value = call.tensor(0)
    if value.dtype != torch.float32:
        raise Unsupported(f"values of {value.dtype}")
    return value


def _axis(call: OnnxCall, value: torch.Tensor) -> int:
    axis = int(call.attr("axis", 1))
    return axis % value.dim() if value.dim() else 0
