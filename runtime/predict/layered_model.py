"""Small ONNX models that are only there to be timed: layers of one operator with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

    from .integer_kernels import IntegerKernels

_STEP = 0.05  # of values on a grid of integers
#: The shape of a layer's weights, and its attributes.
Layer = tuple[Sequence[int], dict[str, Any]]


def layered_model(
    op: str,
    layers: Sequence[Layer],
    shape: Sequence[int],
    *,
    deviation: float,
    last_relu: bool,
    integers: IntegerKernels | None = None,
) -> onnx.ModelProto:
    """Layers of the operator `op` in a row on the input ``x`` of that shape, with a ReLU behind each; behind the last
    one only with `last_relu`. Weights are drawn from N(0, deviation^2), always the same. With `integers`, the layers
    are computed in them."""
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    nodes: list[Any] = []
    weights: list[Any] = []
    value = "x"
    if integers is not None:
        value = _rounded(value, integers, nodes, weights)
    for place, (size, settings) in enumerate(layers):
        array = generator.normal(0, deviation, size).astype(np.float32)
        if integers is None:
            weights.append(numpy_helper.from_array(array, f"w{place}"))
        else:
            _integer_weight(array, f"w{place}", integers, nodes, weights)
        nodes.append(helper.make_node(op, [value, f"w{place}"], [f"v{place}"], **settings))
        value = f"v{place}"
        clipped = last_relu or place < len(layers) - 1
        if clipped:
            nodes.append(helper.make_node("Relu", [value], [f"r{place}"]))
            value = f"r{place}"
        if integers is not None:
            value = _rounded(value, integers, nodes, weights, positive=clipped)
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)],
        weights,
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def _rounded(
    value: str, integers: IntegerKernels, nodes: list[Any], tensors: list[Any], *, positive: bool = False
) -> str:
    """The value on a grid of integers, dequantized; adds what that takes. Behind a ReLU zero is the least of them where
    it may be anywhere, as in real networks: runtimes then leave the ReLU out."""
    from onnx import helper, numpy_helper

    names = [f"{value}_scale", f"{value}_zero"]
    limits = np.iinfo(integers.values)
    middle = (int(limits.min) + int(limits.max) + 1) // 2
    zero = int(limits.min) if positive and not integers.symmetric else middle
    grid = (np.asarray(_STEP, np.float32), np.asarray(zero, integers.values))
    tensors += [numpy_helper.from_array(array, name) for name, array in zip(names, grid, strict=True)]
    nodes.append(helper.make_node("QuantizeLinear", [value, *names], [f"{value}_q"]))
    nodes.append(helper.make_node("DequantizeLinear", [f"{value}_q", *names], [f"{value}_d"]))
    return f"{value}_d"


def _integer_weight(
    array: np.ndarray[Any, Any], name: str, integers: IntegerKernels, nodes: list[Any], tensors: list[Any]
) -> None:
    """A weight stored in int8 and dequantized as `name`; adds what that takes."""
    from onnx import helper, numpy_helper

    scale = np.float32(np.abs(array).max() / integers.weight_limit)
    rounded = np.rint(array / scale).astype(np.int8)
    stored: list[np.ndarray[Any, Any]] = [rounded, np.asarray(scale), np.asarray(0, np.int8)]
    names = [f"{name}_q", f"{name}_scale", f"{name}_zero"]
    tensors += [numpy_helper.from_array(part, name) for name, part in zip(names, stored, strict=True)]
    nodes.append(helper.make_node("DequantizeLinear", names, [name]))
