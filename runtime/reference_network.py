"""The network that times are told in: a measurement taken today and one taken next week are compared through it."""

from __future__ import annotations

from functools import cache

import numpy as np

_CHANNELS, _SIZE, _LAYERS = 64, 28, 3


@cache
def reference_network() -> bytes:
    """Three 3x3 convolutions of 64 channels on 28x28 values, batch 1: 87 million multiply-accumulates.

    What slows the machine (another process, a lower clock) slows it like the network beside it, so times as
    multiples of its time repeat where milliseconds do not.
    """
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for layer in range(_LAYERS):
        kernel = generator.normal(0, 0.04, (_CHANNELS, _CHANNELS, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"w{layer}"))
        nodes.append(helper.make_node("Conv", [value, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        value = f"r{layer}"
    shape = [1, _CHANNELS, _SIZE, _SIZE]
    graph = helper.make_graph(
        nodes,
        "reference",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return bytes(model.SerializeToString())
