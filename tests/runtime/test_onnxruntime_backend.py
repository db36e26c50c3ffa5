"""ONNX Runtime's runner: right outputs, buffers of its own, and clear refusals."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from foldcut.compiler.errors import BackendError
from foldcut.runtime.backend import Array, Runner
from foldcut.runtime.onnxruntime import OnnxRuntimeBackend, create_session, random_inputs
from onnx import TensorProto, helper, numpy_helper

BACKEND = OnnxRuntimeBackend()


def serialise(nodes: Sequence[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], **weights: Array) -> bytes:
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(list(nodes), "net", inputs, [output], initializers)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    return model.SerializeToString()


def conv_weights() -> dict[str, Array]:
    generator = np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (4, 8, 1, 1)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def conv_net() -> bytes:
    return serialise(
        [
            helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1], strides=[2, 2]),
            helper.make_node("Relu", ["c1"], ["r1"]),
            helper.make_node("Conv", ["r1", "w2"], ["c2"]),
            helper.make_node("GlobalAveragePool", ["c2"], ["out"]),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "height", 16])],
        **conv_weights(),
    )


def conv_net_in_torch(x: Array) -> Array:
    weights = {name: torch.from_numpy(array) for name, array in conv_weights().items()}
    hidden = torch.conv2d(torch.from_numpy(x), weights["w1"], weights["b1"], stride=2, padding=1).relu()
    return torch.conv2d(hidden, weights["w2"]).mean((2, 3), keepdim=True).numpy()


def relu(shape: list[str | int | None] | None, element: int = TensorProto.FLOAT) -> bytes:
    casts = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Relu", ["f"], ["out"]),
    ]
    return serialise(casts, [helper.make_tensor_value_info("x", element, shape)])


@pytest.mark.parametrize(("threads", "clock"), [(1, "thread_cpu"), (2, "wall")])
def test_outputs_equal_torch(conv_net: bytes, threads: int, clock: str) -> None:
    inputs = random_inputs(conv_net, batch=2, sizes={"height": 16})
    runner = BACKEND.load(BACKEND.build(conv_net), inputs, threads=threads)
    assert isinstance(runner, Runner)
    assert runner.clock == clock
    runner.run()
    (output,) = runner.outputs()
    np.testing.assert_allclose(output, conv_net_in_torch(inputs["x"]), rtol=1e-4, atol=1e-5)


def test_runner_keeps_its_own_inputs_and_gives_copies_of_outputs(conv_net: bytes) -> None:
    inputs = random_inputs(conv_net, sizes={"height": 16})
    expected = conv_net_in_torch(inputs["x"])
    runner = BACKEND.load(conv_net, inputs)
    inputs["x"][:] = 0
    runner.outputs()[0][:] = 7
    runner.run()
    np.testing.assert_allclose(runner.outputs()[0], expected, rtol=1e-4, atol=1e-5)


def test_input_that_is_not_contiguous(conv_net: bytes) -> None:
    x = random_inputs(conv_net, batch=4, sizes={"height": 16})["x"][::2]
    runner = BACKEND.load(conv_net, {"x": x})
    np.testing.assert_allclose(runner.outputs()[0], conv_net_in_torch(x.copy()), rtol=1e-4, atol=1e-5)


def test_output_shape_that_depends_on_the_data() -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["i"]),
        helper.make_node("Cast", ["i"], ["out"], to=TensorProto.FLOAT),
    ]
    model = serialise(nodes, [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])])
    runner = BACKEND.load(model, {"x": np.array([0, 1, 0, 1], dtype=np.float32)})
    runner.run()
    np.testing.assert_array_equal(runner.outputs()[0], [[1, 3]])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the OS does not list its threads")
def test_one_thread_starts_no_other(conv_net: bytes) -> None:
    # thread_cpu counts the calling thread only, so nothing may compute elsewhere.
    before = set(Path("/proc/self/task").iterdir())
    runner = BACKEND.load(conv_net, random_inputs(conv_net, sizes={"height": 16}))
    runner.run()
    assert set(Path("/proc/self/task").iterdir()) <= before


def test_closed_runner(conv_net: bytes) -> None:
    runner = BACKEND.load(conv_net, random_inputs(conv_net, sizes={"height": 16}))
    runner.close()
    runner.close()
    for call in (runner.run, runner.outputs):
        with pytest.raises(BackendError, match="closed"):
            call()


def test_refused_model_quotes_one_line_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match=r"refused the model: .*INVALID_PROTOBUF"):
        BACKEND.load(b"not a model", {})
    assert capfd.readouterr() == ("", "")


def test_unknown_operator_is_refused() -> None:
    model = serialise(
        [helper.make_node("NoSuchOp", ["x"], ["out"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
    )
    with pytest.raises(BackendError, match="NoSuchOp"):
        BACKEND.load(model, {"x": np.zeros(1, np.float32)})


@pytest.mark.parametrize("model", ["net.onnx", None, 3])
def test_engine_that_is_not_bytes(model: object) -> None:
    with pytest.raises(BackendError, match="bytes of an ONNX file"):
        BACKEND.load(model, {})
    with pytest.raises(BackendError, match="bytes of an ONNX file"):
        BACKEND.build(model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "names"),
        ({"y": np.zeros((1, 3, 16, 16), np.float32)}, "names"),
        ({"x": np.zeros((1, 3, 16, 16), np.float64)}, "dtype"),
        ({"x": np.zeros((1, 4, 16, 16), np.float32)}, "shape"),
        ({"x": np.zeros((1, 3, 16), np.float32)}, "shape"),
        ({"x": [[1.0]]}, "numpy array"),
    ],
)
def test_inputs_that_do_not_fit(conv_net: bytes, inputs: dict[str, Array], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        BACKEND.load(conv_net, inputs)


def test_sizes_that_do_not_fit_each_other_show_at_load(capfd: pytest.CaptureFixture[str]) -> None:
    names = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [name]) for name in ("a", "b")]
    model = serialise([helper.make_node("Add", ["a", "b"], ["out"])], names)
    with pytest.raises(BackendError, match="could not run"):
        BACKEND.load(model, {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)})
    assert capfd.readouterr() == ("", "")


def test_random_inputs_repeat_with_their_seed(conv_net: bytes) -> None:
    first, again, other = (random_inputs(conv_net, 3, seed, sizes={"height": 8})["x"] for seed in (1, 1, 2))
    assert first.shape == (3, 3, 8, 16)
    assert first.dtype == np.float32
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_random_inputs_from_a_session(conv_net: bytes) -> None:
    assert random_inputs(create_session(conv_net), sizes={"x.2": 8})["x"].shape == (1, 3, 8, 16)


def test_random_inputs_ask_for_the_size_by_name(conv_net: bytes) -> None:
    with pytest.raises(BackendError, match=r"dimension 2 \('height'\) of the input 'x'") as caught:
        random_inputs(conv_net)
    assert "sizes={'height': ...}" in str(caught.value)
    with pytest.raises(BackendError, match="cannot have the size 0"):
        random_inputs(conv_net, sizes={"height": 0})


def test_random_inputs_name_a_nameless_dimension() -> None:
    model = relu([None, None])
    with pytest.raises(BackendError, match=r"dimension 1 \('x\.1'\)"):
        random_inputs(model)
    assert random_inputs(model, batch=2, sizes={"x.1": 5})["x"].shape == (2, 5)
    assert random_inputs(model, batch=2, sizes={"x.0": 3, "x.1": 5})["x"].shape == (3, 5)


@pytest.mark.parametrize(
    ("element", "values"),
    [(TensorProto.INT64, {0, 1}), (TensorProto.UINT8, {0, 1}), (TensorProto.BOOL, {True})],
)
def test_random_integers_are_legal_indices_and_masks(element: int, values: set[int]) -> None:
    model = relu([64], element)
    inputs = random_inputs(model, batch=9)
    assert set(inputs["x"].tolist()) == values
    BACKEND.load(model, inputs)


def test_random_inputs_of_a_type_without_numpy_dtype() -> None:
    with pytest.raises(BackendError, match="bfloat16"):
        random_inputs(relu([4], TensorProto.BFLOAT16))


def test_unknown_rank_is_left_to_the_first_run() -> None:
    runner = BACKEND.load(relu(None), {"x": np.array([[-1, 2]], dtype=np.float32)})
    np.testing.assert_array_equal(runner.outputs()[0], [[0, 2]])


def test_environment_names_the_versions() -> None:
    environment = BACKEND.environment()
    assert environment["backend"] == "onnxruntime"
    assert {"cpu", "cpus_available", "onnxruntime", "load_1min", "python"} <= set(environment)
    assert all(isinstance(value, (str, int)) for value in environment.values())
