"""Small ONNX models that onnx_fuzz.py damages: one per family of operators, with weights of a few kilobytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Dims = Sequence[int | str]


class _Writer:
    """Collects nodes and seeded weights; `save` makes the model of them."""

    def __init__(self, opset: int = 17) -> None:
        self.opset, self.nodes, self.weights = opset, list[Any](), list[Any]()
        self._rng = np.random.default_rng(len("foldcut"))

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; returns the name of its output, or the names."""
        name = f"{op.lower()}_{len(self.nodes)}"
        names = [f"{name}.{i}" if i else name for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"node_{name}", **attributes))
        return names[0] if outputs == 1 else names

    def weight(self, *shape: int, low: float | None = None) -> str:
        """A random weight: N(0, 1 / fan-in), or uniform in (low, low + 1)."""
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 4
        array = self._rng.standard_normal(shape) / fan_in**0.5
        if low is not None:
            array = self._rng.uniform(low, low + 1, shape)
        return self.constant(array.astype(np.float32), "weight")

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64), "sizes")

    def index(self, value: int) -> str:
        return self.constant(np.array(value, np.int64), "index")

    def constant(self, array: Any, kind: str = "constant") -> str:
        name = f"layer{len(self.weights)}.{kind}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def save(self, inputs: dict[str, Dims], outputs: dict[str, str], **types: int) -> onnx.ModelProto:
        """`outputs`: name in the interface -> the inner value; `types` where a value is not float32."""
        nodes = [*self.nodes, *(helper.make_node("Identity", [v], [k]) for k, v in outputs.items())]
        graph = helper.make_graph(
            nodes,
            "fuzzed",
            [helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), list(d)) for n, d in inputs.items()],
            [helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), None) for n in outputs],
            self.weights,
        )
        model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", self.opset)])
        inferred = onnx.shape_inference.infer_shapes(model)
        onnx.checker.check_model(inferred)
        return inferred


def _norm(w: _Writer, x: str, channels: int) -> str:
    statistics = w.weight(channels, low=0.5), w.weight(channels), w.weight(channels), w.weight(channels, low=0.5)
    return str(w.add("BatchNormalization", x, *statistics, epsilon=1e-5))


def convolutions() -> onnx.ModelProto:
    w = _Writer()
    x = w.add("Conv", "image", w.weight(8, 3, 3, 3), w.weight(8), pads=[1, 1, 1, 1])
    x = w.add("Relu", _norm(w, x, 8))
    x = w.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = w.add("Conv", x, w.weight(8, 1, 3, 3), group=8, auto_pad="SAME_UPPER", strides=[2, 2])
    x = w.add("AveragePool", w.add("HardSwish", x), kernel_shape=[2, 2])
    x = w.add("Gemm", w.add("Flatten", x), w.weight(5, 72), w.weight(5), transB=1)
    return w.save({"image": ["batch", 3, 16, 16]}, {"classes": w.add("Softmax", x)})


def residual() -> onnx.ModelProto:
    """A fixed batch, a squeeze-and-excitation gate and two residual additions."""
    w = _Writer(13)
    x = w.add("Conv", "image", w.weight(8, 3, 3, 3), pads=[1, 1, 1, 1])
    for _ in range(2):
        y = w.add("Relu", _norm(w, w.add("Conv", x, w.weight(8, 8, 1, 1)), 8))
        gate = w.add("Conv", w.add("GlobalAveragePool", y), w.weight(8, 8, 1, 1))
        x = w.add("Add", x, w.add("Mul", y, w.add("Sigmoid", gate)))
    x = w.add("ReduceMean", x, axes=[2, 3], keepdims=0)
    return w.save({"image": [1, 3, 8, 8]}, {"scores": w.add("Gemm", x, w.weight(8, 4), w.weight(4))})


def attention() -> onnx.ModelProto:
    """Token ids to logits: embedding, one block of attention with a mask, layer norm, an MLP with Gelu by Erf."""
    w = _Writer()
    x = w.add("Gather", w.weight(11, 16), "ids")
    x = w.add("Add", x, w.weight(1, 6, 16))
    y = w.add("LayerNormalization", x, w.weight(16, low=0.5), w.weight(16), axis=-1)
    heads = []
    for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        part = w.add("Add", w.add("MatMul", y, w.weight(16, 16)), w.weight(16))
        part = w.add("Reshape", part, w.ints(0, -1, 2, 8))
        heads.append(w.add("Transpose", part, perm=order))
    scores = w.add("Div", w.add("MatMul", heads[0], heads[1]), w.constant(np.float32(8**0.5)))
    mask = w.constant(np.tril(np.ones((6, 6), bool)))
    scores = w.add("Where", mask, scores, w.constant(np.float32(-1e4)))
    y = w.add("MatMul", w.add("Softmax", scores, axis=-1), heads[2])
    y = w.add("Reshape", w.add("Transpose", y, perm=[0, 2, 1, 3]), w.ints(0, 6, 16))
    x = w.add("Add", x, w.add("MatMul", y, w.weight(16, 16)))
    y = w.add("Add", w.add("MatMul", x, w.weight(16, 32)), w.weight(32))
    erf = w.add("Erf", w.add("Mul", y, w.constant(np.float32(0.5**0.5))))
    y = w.add("Mul", w.add("Mul", y, w.add("Add", erf, w.constant(np.float32(1)))), w.constant(np.float32(0.5)))
    x = w.add("Add", x, w.add("MatMul", y, w.weight(32, 16)))
    return w.save({"ids": ["batch", 6]}, {"logits": w.add("MatMul", x, w.weight(16, 11))}, ids=TensorProto.INT64)


def shapes() -> onnx.ModelProto:
    """Shape arithmetic before Reshape, Expand, ConstantOfShape, Range, Tile and Slice."""
    w = _Writer(15)
    size = w.add("Shape", "x")
    batch = w.add("Unsqueeze", w.add("Gather", size, w.index(0)), w.ints(0))
    rest = w.add("ReduceProd", w.add("Slice", size, w.ints(1), w.ints(9)), keepdims=1)
    flat = w.add("Reshape", "x", w.add("Concat", batch, rest, axis=0))
    token = w.add("Expand", w.weight(1, 1, 4), w.add("Concat", batch, w.ints(1, 4), axis=0))
    x = w.add("Concat", token, w.add("Reshape", flat, w.add("Concat", batch, w.ints(-1, 4), axis=0)), axis=1)
    fill = np.array([0.5], np.float32)
    zeros = w.add("ConstantOfShape", w.add("Shape", x), value=numpy_helper.from_array(fill))
    count = w.add("Gather", w.add("Shape", x), w.index(1))
    steps = w.add("Cast", w.add("Range", w.index(0), count, w.index(1)), to=TensorProto.FLOAT)
    x = w.add("Add", w.add("Add", x, zeros), w.add("Unsqueeze", steps, w.ints(1)))
    x = w.add("Tile", x, w.ints(1, 2, 1))
    half = w.add("Div", w.add("Gather", w.add("Shape", x), w.index(1)), w.index(2))
    x = w.add("Slice", x, w.ints(0), w.add("Unsqueeze", half, w.ints(0)), w.ints(1), w.ints(1))
    return w.save({"x": ["n", 3, 4]}, {"y": w.add("MatMul", x, w.weight(4, 3)), "sizes": size}, sizes=TensorProto.INT64)


def detector() -> onnx.ModelProto:
    """Two scales and several outputs, decoded boxes and TopK."""
    w = _Writer(18)
    y = w.add("Conv", "image", w.weight(8, 3, 3, 3), strides=[2, 2], pads=[1] * 4)
    x = w.add("Mul", y, w.add("Sigmoid", y))
    low = w.add("Relu", w.add("Conv", x, w.weight(8, 8, 3, 3), strides=[2, 2], pads=[1] * 4))
    up = w.add("Resize", low, "", w.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    x = w.add("Concat", up, x, axis=1)
    linear = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    small = w.add("Resize", x, "", "", w.ints(1, 16, 4, 4), **linear)
    x = w.add("Conv", w.add("Pad", x, w.ints(0, 0, 1, 1, 0, 0, 1, 1)), w.weight(12, 16, 3, 3), w.weight(12))
    x = w.add("Reshape", x, w.ints(1, 2, 6, 64))
    x = w.add("Reshape", w.add("Transpose", x, perm=[0, 1, 3, 2]), w.ints(1, -1, 6))
    centre, size, scores = w.add("Split", x, w.ints(2, 2, 2), axis=2, outputs=3)
    centre = w.add("Mul", w.add("Sigmoid", centre), w.constant(np.float32(16)))
    size = w.add("Exp", w.add("Clip", size, "", w.constant(np.float32(4))))
    boxes = w.add("Concat", w.add("Sub", centre, size), w.add("Add", centre, size), axis=2)
    first = w.add("Slice", scores, w.ints(0), w.ints(1), w.ints(2))
    values, places = w.add("TopK", w.add("Squeeze", first, w.ints(2)), w.ints(5), axis=1, outputs=2)
    outputs = {"boxes": boxes, "scores": values, "places": places, "features": small}
    return w.save({"image": [1, 3, 16, 16]}, outputs, places=TensorProto.INT64)


def quantised() -> onnx.ModelProto:
    """Activations and per-channel weights through QuantizeLinear and DequantizeLinear."""
    w = _Writer()
    zero, point = w.constant(np.int8(0)), w.constant(np.uint8(128))
    step = w.constant(np.float32(0.05))
    rng = np.random.default_rng(1)
    stored = w.constant(rng.integers(-90, 90, (8, 3, 3, 3)).astype(np.int8), "weight")
    steps = w.constant(rng.uniform(0.001, 0.01, 8).astype(np.float32), "scale")
    zeros = w.constant(np.zeros(8, np.int8), "zero_point")
    x = w.add("DequantizeLinear", w.add("QuantizeLinear", "image", step, point), step, point)
    x = w.add("Conv", x, w.add("DequantizeLinear", stored, steps, zeros, axis=0), w.weight(8))
    x = w.add("QuantizeLinear", w.add("Relu", x), step, zero)
    x = w.add("Flatten", w.add("DequantizeLinear", x, step, zero))
    return w.save({"image": ["batch", 3, 6, 6]}, {"y": w.add("Gemm", x, w.weight(128, 4), w.weight(4))})


def recurrent() -> onnx.ModelProto:
    """Operators that run opaque: LSTM, CumSum, Einsum beside a plain linear layer."""
    w = _Writer(14)
    x = w.add("Transpose", "x", perm=[1, 0, 2])
    y, last, _ = w.add("LSTM", x, w.weight(1, 24, 5), w.weight(1, 24, 6), w.weight(1, 48), hidden_size=6, outputs=3)
    x = w.add("Transpose", w.add("Squeeze", y, w.ints(1)), perm=[1, 0, 2])
    x = w.add("CumSum", x, w.index(1))
    x = w.add("Einsum", x, w.weight(6, 6), equation="bti,io->bto")
    y = w.add("Gemm", w.add("Squeeze", last, w.ints(0)), w.weight(6, 3), w.weight(3))
    return w.save({"x": ["batch", 4, 5]}, {"states": x, "y": y})


def oldest() -> onnx.ModelProto:
    """Opset 9, where axes, bounds, pads and scales are attributes; ArgMax and OneHot."""
    w = _Writer(9)
    x = w.add("Pad", "image", pads=[0, 0, 1, 1, 0, 0, 1, 1], mode="constant", value=0.25)
    x = w.add("Clip", w.add("Conv", x, w.weight(4, 3, 3, 3)), min=0.0, max=6.0)
    x = w.add("Upsample", x, w.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    x = w.add("Slice", x, axes=[2, 3], starts=[1, 1], ends=[9, -1])
    left, right = w.add("Split", x, axis=1, split=[1, 3], outputs=2)
    x = w.add("InstanceNormalization", w.add("Concat", right, left, axis=1), w.weight(4, low=0.5), w.weight(4))
    x = w.add("Unsqueeze", w.add("ReduceSum", x, axes=[2, 3], keepdims=0), axes=[2])
    x = w.add("Squeeze", w.add("PRelu", x, w.weight(1, 1)), axes=[2])
    x = w.add("Softmax", w.add("Gemm", x, w.weight(3, 4), w.weight(3), transB=1), axis=1)
    best = w.add("ArgMax", x, axis=1, keepdims=0)
    hot = w.add("OneHot", best, w.ints(3), w.constant(np.array([0, 1], np.float32)), axis=-1)
    return w.save({"image": ["batch", 3, 6, 6]}, {"scores": x, "hot": hot})


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    f.__name__: f for f in (convolutions, residual, attention, shapes, detector, quantised, recurrent, oldest)
}
