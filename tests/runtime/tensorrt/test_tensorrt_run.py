"""The run path against a MADE-UP TensorRT and a MADE-UP device: its order of calls and its errors, nothing else.

No engine runs here and no time is measured. What a GPU does with these calls has not been seen (docs/tensorrt.md).
"""

import ctypes
import json
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from foldcut.compiler.support.errors import BackendError
from foldcut.runtime.measure.backend import Array, TimedRunner, resolve_backend
from foldcut.runtime.measure.measure import measure_pair
from foldcut.runtime.measure.timing import Timing, Until
from foldcut.runtime.tensorrt import backend as tensorrt
from foldcut.runtime.tensorrt import device as tensorrt_device
from foldcut.runtime.tensorrt.backend import TensorRTBackend
from foldcut.runtime.tensorrt.device import Gpu, visible_gpu, why_no_device
from foldcut.runtime.tensorrt.engine import EngineInfo, TensorRTEngine, sha256
from foldcut.runtime.tensorrt.latency import measure_latency
from foldcut.runtime.tensorrt.library import FULL, RTX, Library
from foldcut.runtime.tensorrt.profile import Profile, TensorInfo

GPU = Gpu(name="a card", target="sm89", driver_cuda="13.0")
X = np.arange(6, dtype=np.float32).reshape(2, 3)


class MadeUpDevice:
    """MADE UP: memory is a list of arrays, the queue runs at once, and the clock counts inferences."""

    stream = 77

    def __init__(self, calls: list[str], *, captures: bool = True) -> None:
        self.calls, self.captures = calls, captures
        self.memory: list[Array] = []

    def upload(self, array: Array, *, host: bool) -> int:
        self.memory.append(np.array(array))
        return len(self.memory) - 1

    def empty(self, shape: Sequence[int], dtype: str, *, host: bool) -> int:
        return self.upload(np.zeros(shape, dtype), host=host)

    def address(self, buffer: int) -> int:
        return 1000 + buffer

    def download(self, buffer: int) -> Array:
        return self.memory[buffer].copy()

    def wait(self) -> None:
        self.calls.append("wait")

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        self.calls.append("capture")
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        enqueue()
        return lambda: (self.calls.append("replay"), enqueue())[0]

    def timer(self) -> Any:
        def mark(name: str) -> Callable[[], None]:
            return lambda: self.calls.append(name)

        return SimpleNamespace(start=mark("start"), stop=mark("stop"), elapsed_ms=lambda: 0.5)


class MadeUpContext:
    """MADE UP: the engine computes 2 x."""

    profiler: Any = None
    nvtx_verbosity: Any = None

    def __init__(self, trt: "MadeUpTensorRT") -> None:
        self.trt, self.addresses = trt, dict[str, int]()
        self.shape: tuple[int, ...] = (-1, 3)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.trt.calls.append(f"shape {name} {shape}")
        self.shape = shape
        return "shape" not in self.trt.refuses

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3) if "output size" in self.trt.refuses else self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.trt.calls.append(f"address {name}")
        self.addresses[name] = address - 1000
        return "address" not in self.trt.refuses

    def infer_shapes(self) -> list[str]:
        return ["x"] if "infer" in self.trt.refuses else []

    def is_stream_capturable(self, stream: int) -> bool:
        return "capturable" not in self.trt.refuses

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == MadeUpDevice.stream
        self.trt.calls.append("execute")
        memory = self.trt.device.memory
        memory[self.addresses["out"]][:] = 2 * memory[self.addresses["x"]]
        if self.profiler is not None:
            self.profiler.report_layer_time("fused", 0.25)
        return "execute" not in self.trt.refuses


class MadeUpTensorRT(ModuleType):
    """MADE UP: so much of the bindings as the run path calls; `refuses` names the steps that fail."""

    def __init__(self, *refuses: str, captures: bool = True, described: object = None) -> None:
        super().__init__("made_up_tensorrt")
        self.calls: list[str] = []
        self.refuses, self.described = refuses, described
        self.device = MadeUpDevice(self.calls, captures=captures)
        self.ILogger = type("ILogger", (), {"__init__": lambda self: None})
        self.IProfiler = type("IProfiler", (), {"__init__": lambda self: None})
        self.ProfilingVerbosity = SimpleNamespace(NONE="none")
        self.TensorLocation = SimpleNamespace(HOST="host", DEVICE="device")
        self.LayerInformationFormat = SimpleNamespace(JSON="json")
        self.EngineValidity = SimpleNamespace(VALID=0, INVALID=2)
        self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
        self.runtime_config = SimpleNamespace()

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 - TensorRT's own name
        def deserialize(plan: bytes) -> Any:
            if "deserialise" in self.refuses:
                logger.log(SimpleNamespace(name="ERROR"), "the magic tag does not match")
                return None
            return self.cuda_engine()

        validity = 2 if "validity" in self.refuses else 0
        return SimpleNamespace(
            get_engine_validity=lambda plan: (validity, 4),
            deserialize_cuda_engine=deserialize,
        )

    def cuda_engine(self) -> Any:
        inspector = SimpleNamespace(execution_context=None, get_engine_information=lambda kind: self.described)

        def create_context(runtime_config: Any = None) -> Any:
            return None if "context" in self.refuses else MadeUpContext(self)

        return SimpleNamespace(
            create_runtime_config=lambda: self.runtime_config,
            create_execution_context=create_context,
            create_engine_inspector=lambda: inspector,
            get_tensor_location=lambda name: "device",
        )


ENGINE = TensorRTEngine(
    plan=b"plan",
    info=EngineInfo(
        model_sha256=sha256(b"model"),
        flavour=RTX,
        version="1.7",
        precision="fp32",
        targets=("sm80+",),
        device="",
        profiles={"x": Profile(min=(1, 3), opt=(2, 3), max=(4, 3))},
        inputs=(TensorInfo(name="x", dtype="float32", shape=(-1, 3)),),
        outputs=(TensorInfo(name="out", dtype="float32", shape=(-1, 3)),),
        network_layers=1,
    ),
)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[MadeUpTensorRT], MadeUpTensorRT]:
    def install(trt: MadeUpTensorRT) -> MadeUpTensorRT:
        library = Library(trt=trt, flavour=RTX, version="1.7")
        monkeypatch.setattr(tensorrt, "find_library", lambda: library)
        monkeypatch.setattr(tensorrt, "visible_gpu", lambda: GPU)
        monkeypatch.setattr(tensorrt, "why_no_device", lambda: "")
        monkeypatch.setattr(tensorrt, "open_device", lambda: trt.device)
        return trt

    return install


Use = Callable[[MadeUpTensorRT], MadeUpTensorRT]


def test_order_of_calls_made_up(use: Use) -> None:
    trt = use(MadeUpTensorRT())
    runner = TensorRTBackend().load(ENGINE, {"x": X})
    prepared = ["shape x (2, 3)", "address x", "address out", "execute", "wait", "capture", "execute"]
    timed = ["replay", "execute", "start", "replay", "execute", "stop"]
    assert trt.calls == prepared + timed
    assert trt.runtime_config.dynamic_shapes_kernel_specialization_strategy == "eager"
    np.testing.assert_array_equal(runner.outputs()[0], 2 * X)


def test_a_timed_runner_made_up(use: Use) -> None:
    use(MadeUpTensorRT())
    runner = TensorRTBackend().load(ENGINE, {"x": X})
    assert isinstance(runner, TimedRunner)
    assert runner.clock == "cuda"
    runner.run()
    assert runner.elapsed_ms() == 0.5
    latency = measure_latency(runner, seconds=0, warmup_ms=0)
    assert (latency.clock, latency.count, latency.median_ms, latency.p99_ms) == ("cuda", 10, 0.5, 0.5)
    with pytest.raises(ValueError, match="negative"):
        measure_latency(runner, seconds=-1)
    other = TensorRTBackend().load(ENGINE, {"x": X})
    assert (
        measure_pair(runner, other, Timing(min_block_ms=1, warmup_ms=0), until=Until(min_pairs=6, max_pairs=6)).ratio
        == 1
    )


@pytest.mark.parametrize(
    ("trt", "reason"),
    [(MadeUpTensorRT("capturable"), "cannot be captured"), (MadeUpTensorRT(captures=False), "not permitted")],
)
def test_without_a_graph_it_runs_layer_by_layer_and_says_so_made_up(use: Use, trt: MadeUpTensorRT, reason: str) -> None:
    use(trt)
    runner = TensorRTBackend().load(ENGINE, {"x": X})
    assert reason in str(getattr(runner, "graph_problem", None))
    trt.calls.clear()
    runner.run()
    assert trt.calls == ["execute", "start", "execute", "stop"]
    np.testing.assert_array_equal(runner.outputs()[0], 2 * X)


def test_closed_made_up(use: Use) -> None:
    use(MadeUpTensorRT())
    runner = TensorRTBackend().load(ENGINE, {"x": X})
    assert isinstance(runner, TimedRunner)
    runner.close()
    runner.close()
    for call in (runner.run, runner.outputs, runner.elapsed_ms):
        with pytest.raises(BackendError, match="closed"):
            call()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("validity", r"not valid here \(diagnostics 4\)"),
        ("deserialise", "cannot load the engine: the magic tag does not match"),
        ("context", "no memory"),
        ("shape", r"refused the shape \(2, 3\) of 'x'"),
        ("address", "refused the memory of 'x'"),
        ("infer", "lacks sizes for x"),
        ("output size", "depends on the data"),
        ("execute", "could not run"),
    ],
)
def test_each_step_that_fails_is_one_error_made_up(use: Use, step: str, message: str) -> None:
    use(MadeUpTensorRT(step))
    with pytest.raises(BackendError, match=message) as caught:
        TensorRTBackend().load(ENGINE, {"x": X})
    assert caught.value.hint


def test_checks_come_before_the_engine_is_loaded_made_up(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = use(MadeUpTensorRT())
    backend = TensorRTBackend()
    with pytest.raises(BackendError, match="outside of the sizes"):
        backend.load(ENGINE, {"x": np.zeros((5, 3), np.float32)})
    with pytest.raises(BackendError, match="engines, not models"):
        backend.load(b"onnx", {"x": X})
    with pytest.raises(BackendError, match="threads"):
        backend.load(ENGINE, {"x": X}, threads=0)
    monkeypatch.setattr(tensorrt, "visible_gpu", lambda: Gpu(name="an old card", target="sm75", driver_cuda="12.9"))
    with pytest.raises(BackendError, match="another GPU"):
        backend.load(ENGINE, {"x": X})
    monkeypatch.setattr(tensorrt, "find_library", lambda: Library(trt=trt, flavour=FULL, version="11.4"))
    with pytest.raises(BackendError, match="another TensorRT"):
        backend.load(ENGINE, {"x": X})
    assert trt.calls == []


def test_layers_made_up(use: Use) -> None:
    described = {
        "Layers": [
            {
                "Name": "fused",
                "LayerType": "kgen",
                "Metadata": "[ONNX Layer: node_conv]\x1e[ONNX Layer: node_relu]",
                "Outputs": [{"Name": "out", "Format/Datatype": "Row major linear FP32"}],
            },
            "a bare name",
        ]
    }
    use(MadeUpTensorRT(described=json.dumps(described)))
    fused, bare = TensorRTBackend().layers(ENGINE, {"x": X}, runs=3)
    assert (fused.name, fused.kind, fused.ms) == ("fused", "kgen", 0.25)
    assert fused.onnx_nodes == ("node_conv", "node_relu")
    assert fused.outputs == ("out: Row major linear FP32",)
    assert (bare.name, bare.ms, bare.onnx_nodes) == ("a bare name", None, ())
    with pytest.raises(ValueError, match="runs"):
        TensorRTBackend().layers(ENGINE, {"x": X}, runs=0)


@pytest.mark.parametrize("described", ["not json", "[]", None])
def test_layers_that_are_not_described_made_up(use: Use, described: object) -> None:
    use(MadeUpTensorRT(described=described))
    with pytest.raises(BackendError, match="does not describe"):
        TensorRTBackend().layers(ENGINE, {"x": X})


def library_of(flavour: str) -> Callable[[], Library]:
    return lambda: Library(trt=None, flavour=flavour, version="11.4")


def unavailable() -> Library:
    raise BackendError("TensorRT is not installed", hint="pip install it")


def test_available_says_apart_what_can_be_done_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "find_library", library_of(RTX))
    monkeypatch.setattr(tensorrt, "why_no_device", lambda: "get a GPU")
    monkeypatch.setattr(tensorrt, "visible_gpu", lambda: None)
    here = TensorRTBackend().available()
    assert (here.can_build, here.can_run) == (True, False)
    assert here.reason == "TensorRT-RTX 11.4 builds here; get a GPU"
    monkeypatch.setattr(tensorrt, "find_library", library_of(FULL))
    here = TensorRTBackend().available()
    assert (here.can_build, here.can_run, here.reason) == (False, False, "get a GPU")
    monkeypatch.setattr(tensorrt, "why_no_device", lambda: "torch has no CUDA")
    monkeypatch.setattr(tensorrt, "visible_gpu", lambda: GPU)
    here = TensorRTBackend().available()
    assert (here.can_build, here.can_run, here.reason) == (True, False, "torch has no CUDA")
    monkeypatch.setattr(tensorrt, "why_no_device", lambda: "")
    here = TensorRTBackend().available()
    assert (here.can_build, here.can_run, here.reason) == (True, True, "")
    monkeypatch.setattr(tensorrt, "find_library", unavailable)
    here = TensorRTBackend().available()
    assert (here.can_build, here.can_run) == (False, False)
    assert here.reason == "TensorRT is not installed: pip install it"


def test_full_tensorrt_builds_for_its_own_gpu_only_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from foldcut.runtime.tensorrt import build as tensorrt_build

    monkeypatch.setattr(tensorrt, "find_library", library_of(FULL))
    monkeypatch.setattr(tensorrt_build, "visible_gpu", lambda: None)
    with pytest.raises(BackendError, match="builds on the GPU that it builds for"):
        TensorRTBackend().build(b"model")
    monkeypatch.setattr(tensorrt_build, "visible_gpu", lambda: GPU)
    with pytest.raises(BackendError, match="GPU that it runs on only") as caught:
        TensorRTBackend(device="sm90").build(b"model")
    assert (caught.value.expected, caught.value.actual) == ("sm89", "sm90")


def test_where_there_is_no_gpu_the_reason_is_one_to_act_on() -> None:
    if visible_gpu() is not None:
        pytest.skip("there is a GPU here")
    assert "needs an NVIDIA GPU" in why_no_device()
    with pytest.raises(BackendError, match="cannot run here"):
        tensorrt_device.open_device()
    if TensorRTBackend().available().can_build:
        with pytest.raises(BackendError, match="cannot run networks here"):
            resolve_backend("tensorrt")


class MadeUpDriver:
    """MADE UP: libcuda with one card of compute capability 12.0."""

    def __init__(self, *, devices: int = 1, error: int = 0) -> None:
        self.devices, self.error = devices, error

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's own name
        return self.error

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.devices
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = b"NVIDIA Made Up"
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13010
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: 12, 76: 0}[attribute]
        return 0


def test_the_driver_is_asked_for_the_first_gpu_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: MadeUpDriver())
    assert visible_gpu() == Gpu(name="NVIDIA Made Up", target="sm120", driver_cuda="13.1")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: MadeUpDriver(devices=0))
    assert visible_gpu() is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: MadeUpDriver(error=100))
    assert visible_gpu() is None


def test_environment_names_the_library_and_the_gpu_made_up(use: Use) -> None:
    use(MadeUpTensorRT())
    environment = TensorRTBackend(precision="fp16").environment()
    assert environment["tensorrt"] == "TensorRT-RTX 1.7"
    assert environment["gpu"] == "a card (sm89)"
    assert (environment["backend"], environment["precision"]) == ("tensorrt", "fp16")
