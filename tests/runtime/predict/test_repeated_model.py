"""Copies of one model in one model: behind each other or side by side, each with weights of its own."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from foldcut.runtime.predict.repeated_model import repeated
from onnx import numpy_helper, parser


def model(text: str, weights: dict[str, tuple[int, ...]] | None = None) -> onnx.ModelProto:
    found = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> net {text}')
    generator = np.random.default_rng(0)
    for name, shape in (weights or {}).items():
        array = generator.normal(0, 0.5, shape).astype(np.float32)
        found.graph.initializer.append(numpy_helper.from_array(array, name))
    return found


def run(source: onnx.ModelProto, **inputs: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(source, full_check=True)
    return onnxruntime.InferenceSession(source.SerializeToString()).run(None, inputs)


X = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
SQUARE = model("(float[2, 4] x) => (float[2, 4] y) { a = MatMul (x, w) y = Tanh (a) }", {"w": (4, 4)})
NARROW = model("(float[2, 4] x) => (float[2, 3] y) { a = MatMul (x, w) y = Tanh (a) }", {"w": (4, 3)})


def test_one_copy_is_the_model() -> None:
    np.testing.assert_array_equal(run(repeated(SQUARE, 1), x=X)[0], run(SQUARE, x=X)[0])


def test_same_shapes_go_behind_each_other() -> None:
    expected = X
    for _ in range(3):
        expected = run(SQUARE, x=expected)[0]
    np.testing.assert_allclose(run(repeated(SQUARE, 3), x=X)[0], expected, rtol=1e-2)


def test_other_shapes_go_side_by_side_and_one_entry_of_each_goes_out() -> None:
    found = run(repeated(NARROW, 3), x=X)
    assert len(found) == 3
    for value in found:
        np.testing.assert_allclose(value, run(NARROW, x=X)[0][:1, :1], rtol=1e-2)


def test_of_maps_the_means_go_out() -> None:
    source = model("(float[1, 2, 4, 4] x) => (float[1, 3, 4, 4] y) { y = Conv (x, w) }", {"w": (3, 2, 1, 1)})
    image = np.random.default_rng(2).standard_normal((1, 2, 4, 4)).astype(np.float32)
    expected = run(source, x=image)[0].mean((2, 3), keepdims=True)
    for value in run(repeated(source, 2), x=image):
        np.testing.assert_allclose(value, expected, rtol=1e-2, atol=1e-4)


def test_every_output_of_every_copy_stays() -> None:
    source = model(
        "(float[2, 4] x, float[2, 4] m) => (float[2, 3] y, int64[2] k, float s) "
        "{ p = Mul (x, m) y = MatMul (p, w) k = ArgMax <axis = 1, keepdims = 0> (y) s = ReduceSum <keepdims = 0> (y) }",
        {"w": (4, 3)},
    )
    found = run(repeated(source, 3), x=X, m=np.ones_like(X))
    assert [(v.dtype, v.shape) for v in found] == 3 * [(np.float32, (1, 1)), (np.int64, (1,)), (np.float32, ())]


def test_no_two_copies_can_share_weights() -> None:
    weights = [numpy_helper.to_array(t) for t in repeated(SQUARE, 4).graph.initializer]
    assert len(weights) == 4
    assert len({w.tobytes() for w in weights}) == 4
    for w in weights[1:]:
        np.testing.assert_allclose(w, weights[0], rtol=2e-3)


def test_nothing_is_computed_once_for_all(tmp_path: Path) -> None:
    """ONNX Runtime leaves every product of every copy in its optimised graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(repeated(NARROW, 3).SerializeToString(), options)
    optimised = onnx.load(options.optimized_model_filepath)
    assert sum("MatMul" in node.op_type or node.op_type == "Gemm" for node in optimised.graph.node) == 3


def test_the_model_itself_is_left_alone() -> None:
    before = SQUARE.SerializeToString()
    repeated(SQUARE, 2)
    assert SQUARE.SerializeToString() == before
