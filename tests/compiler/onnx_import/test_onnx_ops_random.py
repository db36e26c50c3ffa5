"""Operators that move data, with attributes drawn at random, against ONNX Runtime."""

from typing import Any

import numpy as np
import onnx
import torch
from foldcut.compiler.onnx.file import opset, read_onnx
from foldcut.compiler.onnx.normalise import normalised
from foldcut.compiler.onnx.session import reference_session, run_reference
from foldcut.compiler.onnx_import.module import OnnxModule
from foldcut.compiler.support.errors import CaptureError
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
few = settings(max_examples=60)


def node_model(op: str, x: Array, *constants: Any, outputs: int = 1, version: int = 18, **attributes: Any) -> bytes:
    """A model of one node on the data `x`; further inputs are initializers, None for one that is left out."""
    names = ["x", *("" if c is None else f"c{i}" for i, c in enumerate(constants))]
    weights = [numpy_helper.from_array(np.asarray(c), f"c{i}") for i, c in enumerate(constants) if c is not None]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], name="node", **attributes)
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [onnx.ValueInfoProto(name=f"y{i}") for i in range(outputs)],
        weights,
    )
    for value in graph.output:
        value.type.tensor_type.elem_type = kind
    opsets = [helper.make_opsetid("", version)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def assert_agrees(model: bytes, x: Array) -> None:
    """The importer computes what ONNX Runtime computes; what that refuses is nobody's concern."""
    try:
        expected = run_reference(reference_session(model), {"x": x})
    except CaptureError:
        assume(False)
    proto = read_onnx(model)
    with torch.no_grad():
        results = OnnxModule(normalised(proto), opset(proto))(torch.from_numpy(x))
    results = results if isinstance(results, tuple) else (results,)
    for result, wanted in zip(results, expected, strict=True):
        assert result.numpy().shape == wanted.shape
        np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-4, atol=1e-5)


def data(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)
int64s = np.int64


@given(st.permutations([2, 3, 4]), st.permutations([0, -1, 6, 2, 1, 12, 24]), st.integers(1, 4), st.booleans())
@few
def test_reshape(shape: list[int], target: list[int], rank: int, whole: bool) -> None:
    x = data(*shape)
    assert_agrees(node_model("Reshape", x, np.array(target[:rank], int64s)), x)


bounds = st.integers(-7, 7) | st.sampled_from([2**31 - 1, -(2**31), 2**63 - 1, -(2**63)])


@given(shapes, st.data(), st.sampled_from([9, 18]))
@few
def test_slice(shape: list[int], draw: st.DataObject, opset: int) -> None:
    """Bounds far outside mean up to the end, as exporters write them; steps may go backwards."""
    x = data(*shape)
    axes = draw.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    starts, ends = ([draw.draw(bounds) for _ in axes] for _ in range(2))
    if opset == 9:
        assert_agrees(node_model("Slice", x, version=9, starts=starts, ends=ends, axes=axes), x)
        return
    steps = [draw.draw(st.integers(-3, 3).filter(bool)) for _ in axes]
    signed = [a - len(shape) if draw.draw(st.booleans()) else a for a in axes]
    assert_agrees(node_model("Slice", x, *(np.array(v, int64s) for v in (starts, ends, signed, steps))), x)


@given(shapes, st.data())
@few
def test_gather(shape: list[int], draw: st.DataObject) -> None:
    x = data(*shape)
    axis = draw.draw(st.integers(-len(shape), len(shape) - 1))
    rank = draw.draw(st.integers(0, 2))
    size = shape[axis]
    picked = st.integers(-size, size - 1)
    indices = np.array([draw.draw(picked) for _ in range(2**rank)], int64s).reshape([2] * rank)
    assert_agrees(node_model("Gather", x, indices, axis=axis), x)


@given(shapes, st.data())
@few
def test_concat_with_constants(shape: list[int], draw: st.DataObject) -> None:
    x = data(*shape)
    axis = draw.draw(st.integers(-len(shape), len(shape) - 1))
    other = list(shape)
    other[axis] = draw.draw(st.integers(0, 3))
    assert_agrees(node_model("Concat", x, data(*other), x, axis=axis), x)


@given(shapes, st.data(), st.sampled_from([9, 13, 18]))
@few
def test_split(shape: list[int], draw: st.DataObject, opset: int) -> None:
    """Sizes that are given, and equal parts where the last may be smaller since opset 18."""
    axis = draw.draw(st.integers(-len(shape) if opset > 10 else 0, len(shape) - 1))
    parts = draw.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    equal = draw.draw(st.booleans())
    shape[axis] = draw.draw(st.integers(len(parts), 7)) if equal else sum(parts)
    x = data(*shape)
    attributes: dict[str, Any] = {"axis": axis, "outputs": len(parts), "version": opset}
    if equal and opset == 18:
        attributes["num_outputs"] = len(parts)
    elif not equal and opset == 9:
        attributes["split"] = parts
    inputs = () if equal or opset == 9 else (np.array(parts, int64s),)
    assert_agrees(node_model("Split", x, *inputs, **attributes), x)


@given(st.lists(st.integers(2, 4), min_size=2, max_size=4), st.data(), st.sampled_from([9, 13, 18]))
@few
def test_pad(shape: list[int], draw: st.DataObject, opset: int) -> None:
    """All modes, negative pads (which crop) among them, and axes since opset 18."""
    x = data(*shape)
    modes = ["constant", "reflect", "edge", *(["wrap"] if opset > 18 else [])]
    mode = draw.draw(st.sampled_from(modes))
    axes = draw.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    axes = axes if opset == 18 else list(range(len(shape)))
    sizes = [draw.draw(st.integers(-1, 3)) if mode == "constant" else draw.draw(st.integers(0, 1)) for _ in axes * 2]
    if opset == 9:
        assert_agrees(node_model("Pad", x, version=9, pads=sizes, mode=mode, value=1.5), x)
        return
    value = np.float32(1.5) if mode == "constant" else None
    inputs = [np.array(sizes, int64s), value, *([np.array(axes, int64s)] if opset == 18 else [])]
    assert_agrees(node_model("Pad", x, *inputs, version=opset, mode=mode), x)


wheres = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
roundings = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.sampled_from(["nearest", "linear", "cubic"]),
    st.sampled_from(wheres),
    st.sampled_from(roundings),
    st.sampled_from(["sizes", "scales", "sizes of axes"]),
)
@settings(max_examples=150)
def test_resize(source: int, target: int, mode: str, where: str, rounding: str, by: str) -> None:
    x = data(1, 2, source, 4)
    sizes = np.array([1, 2, target, 6], int64s)
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": where}
    if mode == "nearest":
        attributes["nearest_mode"] = rounding
    if by == "scales":
        scales = np.array([1, 1, target / source, 1.5], np.float32)
        assert_agrees(node_model("Resize", x, None, scales, **attributes), x)
    elif by == "sizes":
        assert_agrees(node_model("Resize", x, None, None, sizes, **attributes), x)
    else:
        assert_agrees(node_model("Resize", x, None, None, sizes[2:], axes=[2, 3], **attributes), x)


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    st.sampled_from(["Conv", "MaxPool", "AveragePool", "counted"]),
    st.booleans(),
)
@settings(max_examples=150)
def test_windows(
    kernel: int, stride: int, dilation: int, pads: list[int], automatic: str, op: str, partial: bool
) -> None:
    """Kernels, strides, dilations and paddings of convolutions and pooling, uneven ones among them."""
    x = data(1, 2, 7, 6)
    attributes: dict[str, Any] = {"strides": [stride, 1], "dilations": [dilation, 1], "auto_pad": automatic}
    if automatic == "NOTSET":
        attributes["pads"] = pads
    if op == "Conv":
        assert_agrees(node_model("Conv", x, data(3, 2, kernel, 2), data(3), **attributes), x)
        return
    attributes |= {"kernel_shape": [kernel, 2], "ceil_mode": int(partial)}
    if op == "counted":
        attributes["count_include_pad"] = 1
    if op != "MaxPool":
        del attributes["dilations"]
    assert_agrees(node_model("MaxPool" if op == "MaxPool" else "AveragePool", x, **attributes), x)


def link(draw: st.DrawFn, number: int, weights: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
    """One step of shape arithmetic from the vector v{number} to the vector v{number + 1}."""
    before, after = f"v{number}", f"v{number + 1}"

    def constant(*values: int) -> str:
        weights.append(numpy_helper.from_array(np.array(values, int64s), f"{after}_c{len(weights)}"))
        return str(weights[-1].name)

    few_numbers = st.lists(st.integers(-2, 1), min_size=1, max_size=3)
    op = draw(st.sampled_from(["Slice", "Gather", "Concat", "arithmetic", "Reduce", "Where", "float"]))
    if op == "Slice":
        start, end, step = draw(st.integers(-3, 3)), draw(st.integers(-3, 9)), draw(st.sampled_from([-2, -1, 1, 2]))
        return [helper.make_node(op, [before, constant(start), constant(end), constant(0), constant(step)], [after])]
    if op == "Gather":
        return [helper.make_node(op, [before, constant(*draw(few_numbers))], [after])]
    if op == "Concat":
        return [helper.make_node(op, [before, constant(*draw(few_numbers))], [after], axis=0)]
    if op == "arithmetic":
        name = draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "Mod", "Min", "Max"]))
        other = constant(draw(st.sampled_from([-3, -1, 2, 5])))
        inputs = draw(st.permutations([before, other])) if name in {"Add", "Sub", "Min"} else [before, other]
        return [helper.make_node(name, inputs, [after])]
    if op == "Reduce":
        name = draw(st.sampled_from(["ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin"]))
        return [helper.make_node(name, [before], [after], keepdims=1)]
    if op == "Where":
        mask = f"{after}_mask"
        compared = helper.make_node(draw(st.sampled_from(["Equal", "Less"])), [before, constant(2)], [mask])
        return [compared, helper.make_node("Where", [mask, before, constant(draw(st.integers(-1, 3)))], [after])]
    names = [f"{after}_{i}" for i in range(3)]
    scale = numpy_helper.from_array(np.array([draw(st.sampled_from([0.5, 1.5, 2.0]))], np.float32), f"{after}_scale")
    weights.append(scale)
    return [
        helper.make_node("Cast", [before], [names[0]], to=TensorProto.FLOAT),
        helper.make_node("Mul", [names[0], scale.name], [names[1]]),
        helper.make_node(draw(st.sampled_from(["Floor", "Ceil"])), [names[1]], [names[2]]),
        helper.make_node("Cast", [names[2]], [after], to=TensorProto.INT64),
    ]


@st.composite
def shape_arithmetic(draw: st.DrawFn) -> bytes:
    """A model that computes with the shape of its input, as exporters do before a Reshape."""
    weights: list[onnx.TensorProto] = []
    count = draw(st.integers(1, 5))
    nodes = [helper.make_node("Shape", ["x"], ["v0"])]
    for number in range(count):
        nodes += link(draw, number, weights)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "c", 3])]
    outputs = [helper.make_tensor_value_info(f"v{count}", TensorProto.INT64, [None])]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@given(shape_arithmetic(), st.permutations([1, 2, 5]))
@settings(max_examples=200)
def test_shape_arithmetic(model: bytes, shape: list[int]) -> None:
    assert_agrees(model, data(shape[0], shape[1], 3))
