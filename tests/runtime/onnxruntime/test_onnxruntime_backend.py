"""ONNX Runtime's runner: right outputs, buffers of its own, and clear refusals."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from foldcut.compiler.support.errors import BackendError
from foldcut.runtime.measure.backend import Array, Runner, resolve_backend
from foldcut.runtime.measure.environment import version_tuple
from foldcut.runtime.measure.inputs import model_specs, session_specs
from foldcut.runtime.onnxruntime import backend as onnxruntime_module
from foldcut.runtime.onnxruntime import provider as provider_module
from foldcut.runtime.onnxruntime.backend import OnnxRuntimeBackend, create_session, random_inputs
from foldcut.runtime.onnxruntime.provider import Provider
from onnx import TensorProto, helper, numpy_helper, parser

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


class FakeSession:
    """Notes what it is asked for. It shows which calls are made and in what order, not that a GPU would accept them."""

    def __init__(self, model: bytes, options: Any, *, providers: list[str], enable_fallback: int) -> None:
        self.providers, self.enable_fallback = providers, enable_fallback
        self.real = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.calls: list[tuple[Any, ...]] = []

    def get_providers(self) -> list[str]:
        return self.providers

    def get_inputs(self) -> Any:
        return self.real.get_inputs()

    def get_outputs(self) -> Any:
        return self.real.get_outputs()

    def io_binding(self) -> Any:
        def note(name: str) -> Any:
            return lambda *arguments: self.calls.append((name, *arguments))

        names = ("bind_ortvalue_input", "bind_output", "synchronize_outputs")
        return SimpleNamespace(**{name: note(name) for name in names})

    def run_with_iobinding(self, binding: Any) -> None:
        self.calls.append(("run",))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An onnxruntime that believes it has a GPU; the test may change what it finds."""
    every = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    fake = {name: getattr(onnxruntime, name) for name in ("SessionOptions", "ExecutionMode", "GraphOptimizationLevel")}
    fake |= {"__version__": "1.22.0", "InferenceSession": FakeSession, "get_available_providers": lambda: every}
    values = SimpleNamespace(ortvalue_from_numpy=lambda array, device, index: (array.shape, device, index))
    fake |= {"OrtValue": values, "preload_dlls": lambda: print("loaded")}
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(**fake))
    monkeypatch.setattr(provider_module, "cuda_devices", lambda: ("Fake GPU",))
    monkeypatch.setattr(onnxruntime_module, "cuda_devices", lambda: ("Fake GPU",))
    return vars(sys.modules["onnxruntime"])


@pytest.mark.parametrize(
    ("provider", "asked"),
    [
        ("cuda", ["CUDAExecutionProvider", "CPUExecutionProvider"]),
        ("tensorrt", ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]),
    ],
)
def test_buffers_are_bound_on_the_device_and_runs_waited_for(
    conv_net: bytes, gpu: dict[str, Any], provider: Provider, asked: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    backend = OnnxRuntimeBackend(provider)
    inputs = {"x": np.zeros((1, 3, 16, 16), np.float32)}
    runner: Any = backend.load(backend.build(conv_net), inputs)
    session = runner._session
    assert (session.providers, session.enable_fallback) == (asked, 0)
    assert runner.clock == "wall"
    assert session.calls == [
        ("bind_ortvalue_input", "x", ((1, 3, 16, 16), "cuda", 0)),
        ("bind_output", "out", "cuda", 0),
        ("run",),
        ("synchronize_outputs",),
    ]
    assert capfd.readouterr() == ("", "")
    environment = backend.environment()
    assert (environment["backend"], environment["gpu"]) == (f"onnxruntime-{provider}", "Fake GPU")


def test_silent_fallback_to_the_cpu_is_an_error(
    conv_net: bytes, gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    backend = OnnxRuntimeBackend("cuda")
    with pytest.raises(BackendError, match="did not start CUDAExecutionProvider") as caught:
        backend.load(conv_net, {"x": np.zeros((1, 3, 16, 16), np.float32)})
    assert caught.value.actual == "CPUExecutionProvider"
    assert "onnxruntime-gpu[cuda,cudnn]" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_gpu_providers_have_names(name: str, gpu: dict[str, Any]) -> None:
    assert resolve_backend(name).name == name


def test_wheel_without_the_provider_names_the_one_that_has_it() -> None:
    """The onnxruntime that the tests run with is built for the CPU."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is built for CUDA")
    availability = OnnxRuntimeBackend("cuda").available()
    assert (availability.can_build, availability.can_run) == (False, False)
    assert "has no CUDAExecutionProvider (it has" in availability.reason
    assert "pip install onnxruntime-gpu" in availability.reason
    with pytest.raises(BackendError):
        resolve_backend("onnxruntime-tensorrt", to_run=False)


def test_wheel_with_the_provider_but_no_gpu_builds_only(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider_module, "cuda_devices", lambda: ())
    availability = OnnxRuntimeBackend("cuda").available()
    assert (availability.can_build, availability.can_run) == (True, False)
    assert "no NVIDIA GPU was found" in availability.reason


@pytest.mark.parametrize(("change", "reason"), [({"__version__": "1.19.2"}, "too old"), ({}, "in part")])
def test_unusable_onnxruntime(
    gpu: dict[str, Any], change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.update(change)
    if not change:
        del gpu["InferenceSession"]
    for backend, package in ((OnnxRuntimeBackend(), "onnxruntime"), (OnnxRuntimeBackend("cuda"), "onnxruntime-gpu")):
        availability = backend.available()
        assert not availability.can_build
        assert reason in availability.reason
        assert package in availability.reason


def test_no_devices_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert provider_module.cuda_devices() == ()


@pytest.mark.parametrize("failing", ["cuInit", "cuDeviceGetCount"])
def test_no_devices_when_the_driver_refuses(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    calls = {name: lambda *_: 0 for name in ("cuInit", "cuDeviceGetCount")}
    monkeypatch.setattr("ctypes.CDLL", lambda _name: SimpleNamespace(**{**calls, failing: lambda *_: 100}))
    assert provider_module.cuda_devices() == ()


def test_unknown_provider() -> None:
    with pytest.raises(BackendError, match="not used with the provider 'metal'") as caught:
        OnnxRuntimeBackend("metal")  # type: ignore[arg-type]
    assert caught.value.expected == "cpu or cuda or tensorrt"


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("1.22.0", (1, 22)), ("2026.4.1-22982-e213a147257", (2026, 4)), ("1.9rc1", (1,)), ("", ())],
)
def test_versions_compare_as_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert version_tuple(version) == numbers


def test_declared_inputs_are_the_sessions(conv_net: bytes) -> None:
    """What is read from the file agrees with what ONNX Runtime says."""
    for content in (conv_net, relu([3, None, "n"], TensorProto.INT64), relu(None), relu([4], TensorProto.BFLOAT16)):
        assert model_specs(content) == session_specs(create_session(content))


def test_file_knows_a_scalar_from_an_unknown_rank() -> None:
    assert [spec.scalar for spec in model_specs(relu([]))] == [True]
    assert [spec.scalar for spec in model_specs(relu(None))] == [False]


def test_an_output_that_a_graph_returns_twice() -> None:
    twice = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[2] x) => (float[2] y, float[2] z, float[2] y)'
        " { y = Neg (x) z = Abs (x) }"
    )
    runner = OnnxRuntimeBackend().load(twice.SerializeToString(), {"x": np.array([1, -2], np.float32)})
    assert [value.tolist() for value in runner.outputs()] == [[-1, 2], [1, 2], [-1, 2]]
