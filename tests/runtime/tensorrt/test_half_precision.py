"""ONNX in half precision: what overflows stays float32, the model stays legal, and the reported error is real."""

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from foldcut.compiler.support.errors import BackendError
from foldcut.runtime.measure.backend import Array
from foldcut.runtime.onnxruntime.backend import create_session
from foldcut.runtime.tensorrt.half_precision import _difference, _Rewriter, _TypedModel, half_slots, to_half_precision
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

RNG = np.random.default_rng(0)
X = RNG.standard_normal((20, 8)).astype(np.float32)


def value(name: str, shape: Sequence[int | str] | None, element: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


def serialise(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
    opset: int = 18,
    **weights: Array,
) -> bytes:
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(
        list(nodes), "net", list(inputs) or [value("x", ["n", 8])], list(outputs) or [value("out", None)], initializers
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)]).SerializeToString()


def run(model: bytes, **inputs: Array) -> list[Array]:
    outputs: list[Array] = create_session(model).run(None, inputs)
    return outputs


def types_of(model: bytes) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(model), strict_mode=True).graph
    return {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}


def check_legal(model: bytes) -> onnx.ModelProto:
    proto = onnx.load_from_string(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def eye(scale: float) -> Array:
    return (np.eye(8) * scale).astype(np.float32)


def mlp() -> bytes:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["out"], name="last"),
    ]
    weights = {"w1": (8, 16), "w2": (16, 4), "b2": (4,)}
    return serialise(nodes, **{name: RNG.standard_normal(shape).astype(np.float32) for name, shape in weights.items()})


def test_everything_is_converted_where_nothing_is_large() -> None:
    model = mlp()
    half = to_half_precision(model, {"x": X})
    assert (half.kept, half.converted) == ({}, 3)
    assert 0 < half.error < 0.002
    proto = check_legal(half.model)
    assert {weight.data_type for weight in proto.graph.initializer} == {TensorProto.FLOAT16}
    assert [node.op_type for node in proto.graph.node] == ["Cast", "MatMul", "Relu", "Gemm", "Cast"]
    types = types_of(half.model)
    assert (types["x"], types["out"]) == (TensorProto.FLOAT, TensorProto.FLOAT)
    for batch in (1, 5):
        (actual,), (expected,) = run(half.model, x=X[:batch]), run(model, x=X[:batch])
        np.testing.assert_allclose(actual, expected, atol=0.01 * np.abs(expected).max())


def overflowing() -> bytes:
    """A value of about 100,000 in the middle, and two readers of it: float16 ends at 65,504."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "up"], ["large"], name="up"),
        helper.make_node("MatMul", ["large", "down"], ["a"], name="down"),
        helper.make_node("MatMul", ["large", "down"], ["b"], name="down_too"),
        helper.make_node("Add", ["a", "b"], ["out"], name="add"),
    ]
    return serialise(nodes, up=eye(5e4), down=eye(2e-5))


def test_what_overflows_stays_float32_and_the_outputs_are_right() -> None:
    model = overflowing()
    half = to_half_precision(model, {"x": X})
    assert set(half.kept) == {"up", "down", "down_too"}
    assert "'large' reaches" in half.kept["down"]
    assert half.error < 0.002
    check_legal(half.model)
    types = types_of(half.model)
    assert types["large"] == TensorProto.FLOAT
    np.testing.assert_allclose(run(half.model, x=X)[0], run(model, x=X)[0], atol=0.01)


def test_without_the_fallback_the_check_sees_an_infinite_error() -> None:
    """Running the converted model would not show it: ONNX Runtime on a CPU computes it in float32."""
    model = onnx.load_from_string(overflowing())
    del model.graph.node[3:]
    model.graph.node[2].output[0] = "out"
    expected = [run(model.SerializeToString(), x=X)]
    graph = _TypedModel(model.SerializeToString())
    assert _difference(graph, {}, [{"x": X}], expected) == np.inf
    unchecked = _Rewriter(graph, {}, rounded_only=False).model()
    assert np.isfinite(run(unchecked, x=X)[0]).all()


def test_a_value_between_two_kept_operators_never_becomes_float16() -> None:
    """ONNX Runtime's own converter hands it through float16, which is the overflow that they are kept for."""
    proto = check_legal(to_half_precision(overflowing(), {"x": X}).model)
    casts = {node.input[0] for node in proto.graph.node if node.op_type == "Cast"}
    assert "large" not in casts


def test_a_weight_that_float16_cannot_hold() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["m"], name="mul"),
        helper.make_node("Div", ["m", "w"], ["out"], name="div"),
    ]
    half = to_half_precision(serialise(nodes, w=np.full(8, 1e6, np.float32)), {"x": X * 1e-6})
    assert half.kept == {"mul": "'w' reaches 1e+06", "div": "'w' reaches 1e+06"}


def test_infinite_masks_stay_float32() -> None:
    mask = np.where(np.arange(8) < 4, 0, -np.inf).astype(np.float32)
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["masked"], name="mask"),
        helper.make_node("Softmax", ["masked"], ["s"], name="softmax"),
        helper.make_node("MatMul", ["s", "w"], ["out"], name="product"),
    ]
    half = to_half_precision(serialise(nodes, mask=mask, w=eye(1)), {"x": X})
    assert set(half.kept) == {"mask", "softmax"}
    assert half.error < 0.002


def test_reductions_and_powers_stay_float32_when_the_tolerance_asks_for_it() -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["e"], name="exp"),
        helper.make_node("ReduceSum", ["e"], ["s"], name="sum"),
        helper.make_node("Div", ["e", "s"], ["out"], name="div"),
    ]
    model = serialise(nodes)
    assert to_half_precision(model, {"x": X}).kept == {}
    strict = to_half_precision(model, {"x": X}, tolerance=1e-5)
    assert set(strict.kept) == {"exp", "sum", "div"}
    assert strict.error < 1e-5


def test_a_tolerance_that_cannot_be_held_says_by_how_much() -> None:
    with pytest.raises(BackendError, match="within the tolerance") as caught:
        to_half_precision(mlp(), {"x": X}, tolerance=1e-6)
    assert "1e-06" in str(caught.value.expected)
    assert all(float(part.split()[0]) > 1e-6 for part in str(caught.value.actual).split("; "))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(["Mul", "Add", "Sub"]), st.integers(-6, 6)), min_size=1, max_size=6))
def test_the_error_is_that_of_rounding_every_value(steps: list[tuple[str, int]]) -> None:
    """Against numpy, whose float16 arithmetic rounds each result once."""
    functions = {"Mul": np.multiply, "Add": np.add, "Sub": np.subtract}
    weights = {f"w{i}": np.full(8, 1.1 * 2.0**power, np.float32) for i, (_, power) in enumerate(steps)}
    names = ["x", *(f"v{i}" for i in range(len(steps) - 1)), "out"]
    nodes = [helper.make_node(op, [names[i], f"w{i}"], [names[i + 1]]) for i, (op, _) in enumerate(steps)]
    half, single = X.astype(np.float16), X
    with np.errstate(over="ignore"):
        for i, (op, _) in enumerate(steps):
            half = functions[op](half, weights[f"w{i}"].astype(np.float16))
            single = functions[op](single, weights[f"w{i}"])
    converted = to_half_precision(serialise(nodes, **weights), {"x": X}, tolerance=np.inf, headroom=1)
    if not converted.kept:
        expected = np.abs(half.astype(np.float64) - single).max() / np.abs(single).max()
        assert converted.error == pytest.approx(expected, rel=1e-3, abs=1e-9)
    check_legal(converted.model)


def test_operators_without_a_half_precision_form() -> None:
    nodes = [
        helper.make_node("Cast", ["ids"], ["f"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "f"], ["sum"], name="add"),
        helper.make_node("Shape", ["sum"], ["size"], name="shape"),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"], name="zeros"),
        helper.make_node("Add", ["sum", "zeros"], ["out"], name="again"),
    ]
    model = serialise(nodes, [value("x", ["n", 8]), value("ids", ["n", 8], TensorProto.INT64)])
    ids = np.arange(160).reshape(20, 8)
    half = to_half_precision(model, {"x": X, "ids": ids})
    assert set(half.kept) == {"cast", "zeros"}
    check_legal(half.model)
    np.testing.assert_allclose(run(half.model, x=X, ids=ids)[0], X + ids, atol=0.2)


def test_inputs_that_an_operator_wants_in_float32_stay_so() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["m"], name="mul"),
        helper.make_node("Resize", ["m", "", "scales"], ["out"], name="resize"),
    ]
    weights = {"w": np.ones(1, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)}
    model = serialise(nodes, [value("x", ["n", 2, 4, 4])], **weights)
    images = RNG.standard_normal((2, 2, 4, 4)).astype(np.float32)
    half = to_half_precision(model, {"x": images})
    proto = check_legal(half.model)
    stored = {weight.name: weight.data_type for weight in proto.graph.initializer}
    assert half.kept == {}
    assert stored["scales"] == TensorProto.FLOAT
    assert half_slots({"": 18}, onnx.load_from_string(model).graph.node[1]) == {0, 1}


def test_constants_shared_values_and_nodes_without_names() -> None:
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.full(8, 3e5, np.float32)))
    nodes = [
        constant,
        helper.make_node("Mul", ["x", "c"], ["large"]),
        helper.make_node("Div", ["large", "c"], ["back"]),
        helper.make_node("Relu", ["back"], ["r"]),
        helper.make_node("Add", ["r", "small"], ["out"]),
    ]
    model = serialise(nodes, outputs=[value("out", None), value("back", None), value("r", None)], small=eye(1)[0])
    half = to_half_precision(model, {"x": X})
    assert len(half.kept) == 2
    assert half.converted == 2
    check_legal(half.model)
    for actual, expected in zip(run(half.model, x=X), run(model, x=X), strict=True):
        np.testing.assert_allclose(actual, expected, atol=0.01)


def test_an_output_that_is_an_input_or_read_again() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Add", ["r", "x"], ["out"])]
    model = serialise(nodes, outputs=[value("r", None), value("out", None)])
    half = to_half_precision(model, {"x": X})
    assert [output.name for output in onnx.load_from_string(half.model).graph.output] == ["r", "out"]
    np.testing.assert_allclose(run(half.model, x=X)[1], run(model, x=X)[1], atol=0.01)


def test_names_that_the_converter_would_choose_are_taken() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["x_float16"]),
        helper.make_node("Neg", ["x_float16"], ["x_float16_float16"]),
        helper.make_node("Add", ["x_float16_float16", "x"], ["out"]),
    ]
    check_legal(to_half_precision(serialise(nodes), {"x": X}).model)


def test_a_fixed_batch_is_fed_whole() -> None:
    seen = X.copy()
    seen[13] = 1e5  # in the second run of 8; the last 4 samples do not fill a batch
    model = serialise([helper.make_node("Relu", ["x"], ["out"], name="relu")], [value("x", [8, 8])])
    assert set(to_half_precision(model, {"x": seen}).kept) == {"relu"}
    with pytest.raises(BackendError, match="shape"):
        to_half_precision(model, {"x": X[:3]})


def test_all_rows_are_looked_at() -> None:
    loud = X.copy()
    loud[-1] = 1e5
    model = serialise([helper.make_node("Relu", ["x"], ["out"], name="relu")])
    assert set(to_half_precision(model, {"x": loud}).kept) == {"relu"}
    assert to_half_precision(model, {"x": X}).kept == {}


def test_values_that_are_not_numbers_stay_float32() -> None:
    nodes = [helper.make_node("Log", ["x"], ["l"], name="log"), helper.make_node("Relu", ["x"], ["out"])]
    model = serialise(nodes, outputs=[value("out", None), value("l", None)])
    assert set(to_half_precision(model, {"x": X}).kept) == {"log"}


def test_control_flow_is_refused_with_its_node() -> None:
    then = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "then", [], [value("y", None)])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "else", [], [value("y", None)])
    branch = helper.make_node("If", ["flag"], ["out"], name="branch", then_branch=then, else_branch=other)
    model = serialise([branch], [value("x", ["n", 8]), value("flag", [], TensorProto.BOOL)])
    with pytest.raises(BackendError, match="control flow") as caught:
        to_half_precision(model, {"x": X, "flag": np.array(True)})
    assert caught.value.node == "branch"


@pytest.mark.parametrize(
    ("samples", "message"),
    [({}, "names"), ({"y": X}, "names"), ({"x": X.astype(np.float64)}, "dtype"), ({"x": X[:, :4]}, "shape")],
)
def test_samples_that_do_not_fit(samples: dict[str, Array], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        to_half_precision(mlp(), samples)


def test_bytes_that_are_no_model() -> None:
    with pytest.raises(BackendError, match="cannot be read"):
        to_half_precision(b"not a model", {"x": X})


def test_a_model_above_2_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx.checker, "MAXIMUM_PROTOBUF", 100)
    with pytest.raises(BackendError, match="2 GB"):
        to_half_precision(mlp(), {"x": X})


@pytest.mark.parametrize("options", [{"tolerance": 0}, {"tolerance": float("nan")}, {"headroom": 0.5}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        to_half_precision(mlp(), {"x": X}, **options)
