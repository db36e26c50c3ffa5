"""ONNX Runtime, set up so that latency repeats: one thread, no spinning, buffers bound on the device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...compiler.onnx.model_file import OnnxFile, OnnxModel, readable
from ...compiler.support.errors import BackendError, first_line
from ..measure.backend import Array, Availability, Clock, NodeTime, Runner, check_threads, closed_runner, run_once
from ..measure.environment import host_environment
from ..measure.inputs import check_inputs, draw_inputs, onnx_model, session_specs
from .provider import Provider, check_used, cuda_devices, provider_availability, provider_libraries, setup_of

if TYPE_CHECKING:
    import onnxruntime

#: The name of the file that a traced session writes its optimised model to.
OPTIMISED = "optimised.onnx"
_WEIGHTS_OF_OPTIMISED = "session.optimized_model_external_initializers_file_name"
_FATAL_ONLY = 4  # refusals reach the caller as exceptions, so nothing needs printing


class OnnxRuntimeBackend:
    """ONNX Runtime on the CPU, or with its CUDA or TensorRT provider. Its engine is the ONNX model: ORT optimises it
    as it loads. The GPU providers have not been run yet."""

    def __init__(self, provider: Provider = "cpu") -> None:
        self._provider: Provider = provider
        self._setup = setup_of(provider)

    @property
    def name(self) -> str:
        """``onnxruntime``, ``onnxruntime-cuda`` or ``onnxruntime-tensorrt``."""
        return self._setup.backend

    def available(self) -> Availability:
        """Say whether `onnxruntime` imports here, has the provider, and finds its device."""
        return provider_availability(self._setup)

    def build(self, model: OnnxModel, inputs: Mapping[str, Array] | None = None) -> OnnxModel:  # noqa: ARG002 - shapes do not matter
        """Return `model` unchanged, for ORT reads it in `load`. Raises BackendError if it is no model."""
        return onnx_model(model, "ONNX Runtime")

    def load(self, engine: object, inputs: Mapping[str, Array], *, threads: int = 1) -> Runner:
        """Optimise the model, copy and bind `inputs`, and run it once, so that faults show here.

        Raises BackendError: ORT refuses the model or falls back to another provider, the inputs' names, dtypes or
        shapes are not the model's, or the first inference fails. Bytes with external data are refused by ORT.
        """
        check_threads(threads)
        session = create_session(onnx_model(engine, "ONNX Runtime"), threads=threads, provider=self._provider)
        check_inputs(session_specs(session), inputs)
        # A GPU is waited for in run(), which takes the calling thread next to no CPU time.
        on_thread = threads == 1 and self._setup.device == "cpu"
        clock: Clock = "thread_cpu" if on_thread else "wall"
        return OnnxRuntimeRunner(session, inputs, clock=clock, device=self._setup.device)

    def profile(self, model: OnnxModel, inputs: Mapping[str, Array], *, threads: int = 1) -> tuple[NodeTime, ...]:
        """Time each node on the CPU. Raises BackendError for another provider (its nodes only start work), and where
        ORT refuses the model or gives no profile."""
        from .profile import profile_model

        if self._setup.device != "cpu":
            raise BackendError(f"{self.name} does not time single nodes", hint="profile on the backend onnxruntime")
        check_threads(threads)
        return profile_model(onnx_model(model, "ONNX Runtime"), inputs, threads=threads)

    def environment(self) -> dict[str, str | int]:
        """Describe the host, ORT's version and provider, and the GPU where it uses one."""
        import onnxruntime

        gpu = {"gpu": ", ".join(cuda_devices()[:1])} if self._setup.device == "cuda" else {}
        return {
            **host_environment(),
            "backend": self.name,
            "onnxruntime": onnxruntime.__version__,
            "provider": self._setup.provider,
            **gpu,
        }


class OnnxRuntimeCudaBackend(OnnxRuntimeBackend):
    """ONNX Runtime with the CUDA provider."""

    def __init__(self) -> None:
        super().__init__("cuda")


class OnnxRuntimeTensorRTBackend(OnnxRuntimeBackend):
    """ONNX Runtime with the TensorRT provider."""

    def __init__(self) -> None:
        super().__init__("tensorrt")


class OnnxRuntimeRunner:
    """A session with inputs and outputs bound. Made by `OnnxRuntimeBackend.load`; runs once when made."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        inputs: Mapping[str, Array],
        *,
        clock: Clock,
        device: str = "cpu",
    ) -> None:
        import onnxruntime

        self._clock = clock
        self._device = device
        self._session: Any = session
        # ORT reads a CPU array in place, so it gets a copy of its own that the caller cannot change.
        self._values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(array, order="C", copy=True), device, 0)
            for name, array in inputs.items()
        }
        self._binding: Any = session.io_binding()
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        self._names = [output.name for output in session.get_outputs()]
        for name in dict.fromkeys(self._names):  # a graph may return one value twice
            # Bound by device: the first run finds the shape, and later runs write the same buffer.
            self._binding.bind_output(name, device, 0)
        run_once(self)

    @property
    def clock(self) -> Clock:
        """``thread_cpu`` on one CPU thread, where ORT computes on the calling thread, else ``wall``."""
        return self._clock

    def run(self) -> None:
        """Run one inference and wait for its end. Raises BackendError if ORT fails or the runner was closed."""
        session, binding = self._session, self._binding
        if session is None:
            raise closed_runner()
        try:
            session.run_with_iobinding(binding)
            if self._device != "cpu":
                binding.synchronize_outputs()
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime could not run the model: {first_line(error)}",
                hint="check that the inputs' sizes fit each other and the model",
            ) from error

    def outputs(self) -> tuple[Array, ...]:
        """Copy out the outputs of the last run, in the model's order. Raises BackendError after `close`."""
        if self._session is None:
            raise closed_runner()
        arrays = dict(zip(dict.fromkeys(self._names), self._binding.copy_outputs_to_cpu(), strict=True))
        return tuple(np.array(arrays[name], copy=True) for name in self._names)

    def close(self) -> None:
        """Free the session and its buffers."""
        self._binding = None
        self._session = None
        self._values = {}


def create_session(
    model: OnnxModel, *, threads: int = 1, provider: Provider = "cpu", traced: Path | None = None
) -> onnxruntime.InferenceSession:
    """Load a model into a silent session, fully optimised. `traced` is a folder that the optimised model goes to,
    and a profile when the session ends it.

    Raises BackendError if ORT refuses, or does not use the provider.
    """
    import onnxruntime

    setup = setup_of(provider)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # ALL, not EXTENDED: only ALL has the NCHWc layout, which halves the time of convolutions.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _FATAL_ONLY
    if traced is not None:
        options.optimized_model_filepath = str(traced / OPTIMISED)
        options.profile_file_prefix = str(traced / "profile")
        options.enable_profiling = True
        if isinstance(model, OnnxFile):  # the optimised one is too large for a message, too
            options.add_session_config_entry(_WEIGHTS_OF_OPTIMISED, f"{OPTIMISED}.data")
    # Idle threads that spin would take CPU time from whatever is measured next to them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        with provider_libraries(setup):
            session = onnxruntime.InferenceSession(
                readable(model), options, providers=list(setup.providers), enable_fallback=0
            )
    except Exception as error:
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} refused the model: {first_line(error)}",
            hint="check the file with onnx.checker; a newer opset or IR version needs a newer onnxruntime",
        ) from error
    check_used(session, setup)
    return session


def random_inputs(
    model: bytes | bytearray | onnxruntime.InferenceSession,
    batch: int = 1,
    seed: int = 0,
    *,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Make inputs for a model as `inputs.draw_inputs` does.

    0 and 1 are legal both as indices and as masks. Latency can depend on values (denormals, data-dependent shapes):
    prefer real inputs. Raises BackendError: a size is missing or below 1, a dtype is not numeric, or ORT refuses the
    model.
    """
    session = create_session(bytes(model)) if isinstance(model, (bytes, bytearray)) else model
    return draw_inputs(session_specs(session), batch, seed, sizes=sizes)
