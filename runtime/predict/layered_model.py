"""Small ONNX models that are only there to be timed: layers of one operator with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

#: The shape of a layer's weights, and its attributes.
Layer = tuple[Sequence[int], dict[str, Any]]


def layered_model(
    op: str, layers: Sequence[Layer], shape: Sequence[int], *, deviation: float, last_relu: bool
) -> onnx.ModelProto:
    """Layers of the operator `op` in a row on the input ``x`` of that shape, with a ReLU behind each; behind the last
    one only with `last_relu`. Weights are drawn from N(0, deviation^2), always the same."""
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for place, (size, settings) in enumerate(layers):
        array = generator.normal(0, deviation, size).astype(np.float32)
        weights.append(numpy_helper.from_array(array, f"w{place}"))
        nodes.append(helper.make_node(op, [value, f"w{place}"], [f"v{place}"], **settings))
        value = f"v{place}"
        if last_relu or place < len(layers) - 1:
            nodes.append(helper.make_node("Relu", [value], [f"r{place}"]))
            value = f"r{place}"
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)],
        weights,
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
