"""OpenVINO's runner beside ONNX Runtime's, and its refusals."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from foldcut.compiler.support.errors import BackendError
from foldcut.runtime.measure.backend import Array, Runner, resolve_backend
from foldcut.runtime.onnxruntime.backend import OnnxRuntimeBackend, random_inputs
from foldcut.runtime.openvino import backend as module
from foldcut.runtime.openvino.backend import OpenVinoBackend
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("openvino")

BACKEND, REFERENCE = OpenVinoBackend(), OnnxRuntimeBackend()
node, value = helper.make_node, helper.make_tensor_value_info


def proto(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str] = ("out",),
    element: int = TensorProto.FLOAT,
    **weights: Array,
) -> onnx.ModelProto:
    results = [value(name, element, None) for name in outputs]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(list(nodes), "net", list(inputs), results, tensors)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])


def model(*arguments: Any, **options: Any) -> bytes:
    return proto(*arguments, **options).SerializeToString()


def same_as_onnxruntime(content: bytes, inputs: dict[str, Array], *, threads: int = 1) -> None:
    runner = BACKEND.load(BACKEND.build(content, inputs), inputs, threads=threads)
    reference = REFERENCE.load(content, inputs)
    runner.run()
    found, wanted = runner.outputs(), reference.outputs()
    assert [(a.shape, a.dtype) for a in found] == [(a.shape, a.dtype) for a in wanted]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def conv_net() -> bytes:
    generator = np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (4, 8, 1, 1)}
    return model(
        [
            node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1], strides=[2, 2]),
            node("Relu", ["c1"], ["r1"]),
            node("Conv", ["r1", "w2"], ["c2"]),
            node("GlobalAveragePool", ["c2"], ["out"]),
        ],
        [value("x", TensorProto.FLOAT, ["batch", 3, "height", 16])],
        **{name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
    )


@pytest.mark.parametrize(("threads", "clock"), [(1, "thread_cpu"), (2, "wall")])
def test_outputs_and_clock(conv_net: bytes, threads: int, clock: str) -> None:
    inputs = random_inputs(conv_net, batch=2, sizes={"height": 16})
    same_as_onnxruntime(conv_net, inputs, threads=threads)
    runner = BACKEND.load(BACKEND.build(conv_net), inputs, threads=threads)
    assert isinstance(runner, Runner)
    assert runner.clock == clock


def test_one_engine_serves_other_shapes_and_threads(conv_net: bytes) -> None:
    engine = BACKEND.build(conv_net)
    small, large = (random_inputs(conv_net, batch=n, sizes={"height": 8 * n}) for n in (1, 3))
    runners = [BACKEND.load(engine, inputs, threads=n) for n, inputs in ((1, small), (2, large), (1, small))]
    shapes = [runner.outputs()[0].shape for runner in runners]
    assert shapes == [(1, 4, 1, 1), (3, 4, 1, 1), (1, 4, 1, 1)]
    assert np.array_equal(runners[0].outputs()[0], runners[2].outputs()[0])


def test_runner_keeps_its_own_inputs_and_gives_copies_of_outputs(conv_net: bytes) -> None:
    inputs = random_inputs(conv_net, sizes={"height": 16})
    runner = BACKEND.load(BACKEND.build(conv_net), inputs)
    (expected,) = runner.outputs()
    inputs["x"][:] = 0
    runner.outputs()[0][:] = 7
    runner.run()
    np.testing.assert_array_equal(runner.outputs()[0], expected)
    assert expected.any()


def test_input_that_is_not_contiguous(conv_net: bytes) -> None:
    same_as_onnxruntime(conv_net, {"x": random_inputs(conv_net, batch=4, sizes={"height": 16})["x"][::2]})


def test_several_inputs_and_outputs_in_the_files_order() -> None:
    content = model(
        [
            node("Add", ["a", "b"], ["sum"]),
            node("ReduceSum", ["sum"], ["total"], keepdims=0),
            node("Identity", ["total"], ["again"]),
            node("Neg", ["a"], ["minus"]),
        ],
        [value("b", TensorProto.FLOAT, ["n", 3]), value("a", TensorProto.FLOAT, [None, 3])],
        outputs=("minus", "total", "a", "again", "sum"),
    )
    generator = np.random.default_rng(0)
    same_as_onnxruntime(content, {n: generator.standard_normal((2, 3)).astype(np.float32) for n in "ab"})


def test_input_that_nothing_reads_is_still_one() -> None:
    inputs = [value("x", TensorProto.FLOAT, ["n"]), value("idle", TensorProto.INT64, ["n", 2])]
    content = model([node("Neg", ["x"], ["out"])], inputs)
    x = np.ones(3, np.float32)
    same_as_onnxruntime(content, {"x": x, "idle": np.zeros((3, 2), np.int64)})
    engine = BACKEND.build(content)
    with pytest.raises(BackendError, match="names"):
        BACKEND.load(engine, {"x": x})
    with pytest.raises(BackendError, match="wrong shape"):
        BACKEND.load(engine, {"x": x, "idle": np.zeros((3, 3), np.int64)})


def test_weight_that_is_listed_as_an_input_is_none() -> None:
    inputs = [value("x", TensorProto.FLOAT, ["n"]), value("w", TensorProto.FLOAT, [2])]
    content = model([node("Add", ["x", "w"], ["out"])], inputs, w=np.ones(2, np.float32))
    same_as_onnxruntime(content, {"x": np.zeros(2, np.float32)})


@pytest.mark.parametrize(
    "dtype",
    [
        *(np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64),
        *(np.uint8, np.uint16, np.uint32, np.uint64, np.bool_),
    ],
)
def test_dtypes(dtype: Any) -> None:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    content = model([node("Identity", ["x"], ["out"])], [value("x", element, ["n"])], element=element)
    same_as_onnxruntime(content, {"x": np.array([0, 1, 1], dtype)})


def test_scalar_input_takes_a_scalar_only() -> None:
    content = model([node("Neg", ["x"], ["out"])], [value("x", TensorProto.FLOAT, [])])
    same_as_onnxruntime(content, {"x": np.array(3, np.float32)})
    with pytest.raises(BackendError, match="wrong shape"):
        BACKEND.load(BACKEND.build(content), {"x": np.zeros(2, np.float32)})


def test_unknown_rank_takes_any() -> None:
    content = model([node("Relu", ["x"], ["out"])], [value("x", TensorProto.FLOAT, None)])
    same_as_onnxruntime(content, {"x": np.array([[-1, 2]], np.float32)})


def test_output_shape_that_depends_on_the_data() -> None:
    content = model(
        [node("NonZero", ["x"], ["out"])], [value("x", TensorProto.FLOAT, ["n"])], element=TensorProto.INT64
    )
    same_as_onnxruntime(content, {"x": np.array([0, 1, 0, 1], np.float32)})


def test_model_without_inputs() -> None:
    constant = numpy_helper.from_array(np.ones(2, np.float32))
    same_as_onnxruntime(model([node("Constant", [], ["out"], value=constant)], []), {})


def test_closed_runner(conv_net: bytes) -> None:
    runner = BACKEND.load(BACKEND.build(conv_net), random_inputs(conv_net, sizes={"height": 16}))
    runner.close()
    runner.close()
    for call in (runner.run, runner.outputs):
        with pytest.raises(BackendError, match="closed"):
            call()


@pytest.mark.parametrize("content", [b"not a model", b"", b"\x08\x0a"])
def test_bytes_that_are_no_model(content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match="not an ONNX model"):
        BACKEND.build(content)
    assert capfd.readouterr() == ("", "")


def test_unknown_operator_is_named_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    content = model([node("NoSuchOp", ["x"], ["out"])], [value("x", TensorProto.FLOAT, [1])])
    with pytest.raises(BackendError, match=r"cannot read the model: No conversion rule found .*NoSuchOp") as caught:
        BACKEND.build(content)
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def external(tmp_path: Path, *, in_function: bool) -> bytes:
    """A model that points at an existing file outside itself, which OpenVINO would read."""
    np.ones(2, np.float32).tofile(tmp_path / "secret.bin")
    weight = numpy_helper.from_array(np.ones(2, np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=str(tmp_path / "secret.bin"))
    constant, add = node("Constant", [], ["w"]), node("Add", ["x", "w"], ["out"])
    constant.attribute.append(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=weight))
    inputs = [value("x", TensorProto.FLOAT, ["n"])]
    if not in_function:
        return model([constant, add], inputs)
    whole = proto([node("Load", ["x"], ["out"], domain="own")], inputs)
    whole.opset_import.append(helper.make_opsetid("own", 1))
    opsets = [helper.make_opsetid("", 18)]
    whole.functions.append(helper.make_function("own", "Load", ["x"], ["out"], [constant, add], opsets))
    return whole.SerializeToString()


@pytest.mark.parametrize("in_function", [False, True])
def test_weights_in_other_files_are_not_read(tmp_path: Path, in_function: bool) -> None:
    with pytest.raises(BackendError, match="weights of 'w' lie outside the model"):
        BACKEND.build(external(tmp_path, in_function=in_function))


@pytest.mark.parametrize("content", ["net.onnx", None, 3])
def test_model_that_is_not_bytes(content: Any) -> None:
    with pytest.raises(BackendError, match="OpenVINO builds from the bytes of an ONNX file"):
        BACKEND.build(content)


def test_engine_of_another_backend(conv_net: bytes) -> None:
    with pytest.raises(BackendError, match=r"what OpenVinoBackend\.build returned"):
        BACKEND.load(conv_net, {})


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
        BACKEND.load(BACKEND.build(conv_net), inputs)
    with pytest.raises(BackendError, match=message):
        BACKEND.build(conv_net, inputs)


def test_sizes_that_do_not_fit_each_other(capfd: pytest.CaptureFixture[str]) -> None:
    content = model([node("Add", ["a", "b"], ["out"])], [value(n, TensorProto.FLOAT, [n]) for n in "ab"])
    with pytest.raises(BackendError, match=r"cannot compile the model for these shapes: .*inconsistent") as caught:
        BACKEND.load(BACKEND.build(content), {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)})
    assert caught.value.actual == "a (2,), b (3,)"
    assert capfd.readouterr() == ("", "")


def test_types_that_numpy_does_not_have() -> None:
    cast = node("Cast", ["x"], ["out"], to=TensorProto.BFLOAT16)
    content = model([cast], [value("x", TensorProto.FLOAT, ["n"])], element=TensorProto.BFLOAT16)
    with pytest.raises(BackendError, match="an output has the type bf16"):
        BACKEND.build(content)
    cast = node("Cast", ["x"], ["out"], to=TensorProto.FLOAT)
    engine = BACKEND.build(model([cast], [value("x", TensorProto.BFLOAT16, ["n"])]))
    with pytest.raises(BackendError, match="wrong dtype") as caught:
        BACKEND.load(engine, {"x": np.zeros(2, np.float16)})
    assert caught.value.expected == "tensor(bfloat16)"


@pytest.mark.parametrize("threads", [0, True, 1.5])
def test_number_of_threads_is_checked(conv_net: bytes, threads: Any) -> None:
    with pytest.raises(BackendError, match="whole number"):
        BACKEND.load(BACKEND.build(conv_net), random_inputs(conv_net, sizes={"height": 16}), threads=threads)


def test_failing_inference_is_a_backend_error(conv_net: bytes) -> None:
    runner: Any = BACKEND.load(BACKEND.build(conv_net), random_inputs(conv_net, sizes={"height": 16}))

    def infer() -> None:
        raise RuntimeError("Exception from src/x.cpp:1:\nout of memory\n")

    runner._request = SimpleNamespace(infer=infer)
    with pytest.raises(BackendError, match="could not run the model: out of memory"):
        runner.run()


@pytest.fixture
def other_core() -> Iterator[None]:
    """The one Core is made again before and after."""
    module._core.cache_clear()
    yield
    module._core.cache_clear()


def test_missing_openvino_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    availability = BACKEND.available()
    assert not availability.can_build
    assert not availability.can_run
    with pytest.raises(BackendError, match="cannot build engines here") as caught:
        resolve_backend("openvino")
    assert "pip install 'foldcut[openvino]'" in str(caught.value.hint)


@pytest.mark.parametrize("fake", [{"Core": object, "__version__": "2024.6.0-1-x"}, {"__version__": "2026.4.1"}])
def test_old_openvino_says_what_to_install(monkeypatch: pytest.MonkeyPatch, fake: dict[str, Any]) -> None:
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(**fake))
    availability = BACKEND.available()
    assert (availability.can_build, availability.can_run) == (False, False)
    assert "too old: pip install 'openvino>=2025.0'" in availability.reason


@pytest.mark.usefixtures("other_core")
def test_openvino_without_a_plugin_builds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(__version__="2026.4.1", Core=lambda: SimpleNamespace(available_devices=["GPU"]))
    monkeypatch.setitem(sys.modules, "openvino", fake)
    availability = BACKEND.available()
    assert (availability.can_build, availability.can_run) == (True, False)
    assert "it finds: GPU" in availability.reason


@pytest.mark.usefixtures("other_core")
def test_openvino_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def core() -> None:
        raise RuntimeError("Exception from src/core.cpp:1:\nCannot load library plugins.xml\n")

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(__version__="2026.4.1", Core=core))
    assert BACKEND.available().reason == "openvino does not start: Cannot load library plugins.xml"
    assert not BACKEND.available().can_build


def test_available_here() -> None:
    assert BACKEND.available().can_run
    assert resolve_backend("openvino").name == "openvino"


def test_environment_names_the_versions() -> None:
    environment = BACKEND.environment()
    assert environment["backend"] == "openvino"
    assert str(environment["openvino"])[:2] == "20"
    assert {"cpu", "cpus_available", "load_1min", "python"} <= set(environment)
    assert all(isinstance(entry, (str, int)) for entry in environment.values())


def test_importing_the_backend_does_not_import_openvino() -> None:
    code = (
        "import sys, foldcut.runtime.openvino.backend\n"
        "assert not {'openvino', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
