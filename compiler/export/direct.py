"""The export without decompositions: operators that torch.onnx takes as they are, and some that it could."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators

from ..ir.graph_copy import copied

aten = torch.ops.aten
quantized = torch.ops.quantized_decomposed


def as_it_is(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A copy that the exporter does not decompose.

    Decomposing traces the network twice more and takes half of an export. The exporter only takes apart operators that
    it has no translation for; where there are none the model is the same, and where there are it says so.
    """
    same = copy.copy(exported)
    same._graph_module = copied(exported.graph_module)  # the exporter puts in casts of its own
    same.run_decompositions = lambda *_args, **_options: same
    return same


def direct_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operators that decomposing would turn into others, put into these at once."""
    return {aten.adaptive_avg_pool2d.default: _pooled_to_one}


def _pooled_to_one(value: Any, output_size: Sequence[int]) -> Any:
    """The mean over height and width, which is what pooling to one position is. Other sizes are not translated."""
    from onnxscript import opset18

    if list(output_size) != [1, 1]:
        raise NotImplementedError(f"pooling to {list(output_size)} positions")
    axes: Any = opset18.Constant(value_ints=[-1, -2])
    return opset18.ReduceMean(value, axes, keepdims=1)


def integer_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """QuantizeLinear saturates at the ends of its type: torch.onnx's own translation forgets narrower bounds of a whole
    tensor's grid (those of a channel's it keeps)."""
    return {quantized.quantize_per_tensor.default: _stored}


def _stored(value: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int) -> Any:
    from onnxscript import opset18
    from onnxscript.function_libs.torch_lib.ops.common import constant

    operators: Any = opset18
    stored = operators.QuantizeLinear(value, scale, constant(zero_point, dtype=dtype))
    if (quant_min, quant_max) == _ends(dtype):
        return stored
    return operators.Clip(stored, constant(quant_min, dtype=dtype), constant(quant_max, dtype=dtype))


def _ends(dtype: int) -> tuple[int, int]:
    """The least and the largest integer of an ONNX type."""
    from onnx.helper import tensor_dtype_to_np_dtype

    info = np.iinfo(tensor_dtype_to_np_dtype(dtype))
    return int(info.min), int(info.max)
