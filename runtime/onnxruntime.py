"""ONNX Runtime on the CPU, set up so that latency repeats: one thread, no spinning, bound buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compiler.errors import BackendError, first_line
from .backend import Array, Availability, Clock, Runner, check_threads
from .environment import host_environment
from .inputs import InputSpec, check_inputs, session_specs

if TYPE_CHECKING:
    import onnxruntime

_FATAL_ONLY = 4  # refusals reach the caller as exceptions, so nothing needs printing


class OnnxRuntimeBackend:
    """ONNX Runtime's CPU provider. Its engine is the ONNX bytes: ORT optimises them as it loads."""

    @property
    def name(self) -> str:
        """``onnxruntime``."""
        return "onnxruntime"

    def available(self) -> Availability:
        """Say whether `onnxruntime` imports here."""
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            reason = f"pip install onnxruntime ({first_line(error)})"
            return Availability(can_build=False, can_run=False, reason=reason)
        return Availability(can_build=True, can_run=True, reason="")

    def build(self, model: bytes, inputs: Mapping[str, Array] | None = None) -> bytes:  # noqa: ARG002 - shapes do not matter
        """Return `model` unchanged, for ORT reads it in `load`. Raises BackendError if it is not bytes."""
        return _model_bytes(model)

    def load(self, engine: object, inputs: Mapping[str, Array], *, threads: int = 1) -> Runner:
        """Optimise the model, copy and bind `inputs`, and run it once, so that faults show here.

        Raises BackendError: ORT refuses the model, the inputs' names, dtypes or shapes are not the
        model's, or the first inference fails. Models with external data or above 2 GB are refused by ORT.
        """
        check_threads(threads)
        session = create_session(_model_bytes(engine), threads=threads)
        check_inputs(session_specs(session), inputs)
        return OnnxRuntimeRunner(session, inputs, clock="thread_cpu" if threads == 1 else "wall")

    def environment(self) -> dict[str, str | int]:
        """Describe the host, and ORT's version and provider."""
        import onnxruntime

        return {
            **host_environment(),
            "backend": self.name,
            "onnxruntime": onnxruntime.__version__,
            "provider": "CPUExecutionProvider",
        }


class OnnxRuntimeRunner:
    """A session with inputs and outputs bound. Made by `OnnxRuntimeBackend.load`; runs once when made."""

    def __init__(self, session: onnxruntime.InferenceSession, inputs: Mapping[str, Array], *, clock: Clock) -> None:
        import onnxruntime

        self._clock = clock
        self._session: Any = session
        # ORT reads a CPU array in place, so it gets a copy of its own that the caller cannot change.
        self._values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(array, order="C", copy=True))
            for name, array in inputs.items()
        }
        self._binding: Any = session.io_binding()
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            # Bound by device: the first run finds the shape, and later runs write the same buffer.
            self._binding.bind_output(output.name, "cpu")
        self.run()

    @property
    def clock(self) -> Clock:
        """``thread_cpu`` on one thread, where ORT computes on the calling thread, else ``wall``."""
        return self._clock

    def run(self) -> None:
        """Run one inference. Raises BackendError if ORT fails or the runner was closed."""
        session, binding = self._session, self._binding
        if session is None:
            raise _closed()
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime could not run the model: {first_line(error)}",
                hint="check that the inputs' sizes fit each other and the model",
            ) from error

    def outputs(self) -> tuple[Array, ...]:
        """Copy out the outputs of the last run, in the model's order. Raises BackendError after `close`."""
        if self._session is None:
            raise _closed()
        return tuple(np.array(array, copy=True) for array in self._binding.copy_outputs_to_cpu())

    def close(self) -> None:
        """Free the session and its buffers."""
        self._binding = None
        self._session = None
        self._values = {}


def create_session(model: bytes, *, threads: int = 1) -> onnxruntime.InferenceSession:
    """Load ONNX bytes into a silent CPU session, fully optimised. Raises BackendError if ORT refuses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # ALL, not EXTENDED: only ALL has the NCHWc layout, which halves the time of convolutions.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _FATAL_ONLY
    # Idle threads that spin would take CPU time from whatever is measured next to them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} refused the model: {first_line(error)}",
            hint="check the file with onnx.checker; a newer opset or IR version needs a newer onnxruntime",
        ) from error


def random_inputs(
    model: bytes | bytearray | onnxruntime.InferenceSession,
    batch: int = 1,
    seed: int = 0,
    *,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Make inputs for a model: floats from N(0, 1), integers 0 or 1, booleans true.

    0 and 1 are legal both as indices and as masks. A dynamic first dimension becomes `batch`, and so does
    every dimension of that name; a fixed one stays. Other dynamic dimensions are looked up in `sizes` by
    name (``"height"``) or as ``"input.axis"`` (``"x.2"``), which also overrides `batch`. Latency can depend
    on values (denormals, data-dependent shapes): prefer real inputs.
    Raises BackendError: a size is missing or below 1, a dtype is not numeric, or ORT refuses the model.
    """
    session = create_session(bytes(model)) if isinstance(model, (bytes, bytearray)) else model
    specs = session_specs(session)
    known = {**_batch_sizes(specs, batch), **(sizes or {})}
    generator = np.random.default_rng(seed)
    return {spec.name: spec.random(generator, known) for spec in specs}


def _batch_sizes(specs: tuple[InputSpec, ...], batch: int) -> dict[str, int]:
    firsts = [spec.dimension_name(0) for spec in specs if spec.shape and not isinstance(spec.shape[0], int)]
    return dict.fromkeys(firsts, batch)


def _model_bytes(model: object) -> bytes:
    if not isinstance(model, (bytes, bytearray, memoryview)):
        raise BackendError(
            "ONNX Runtime builds from the bytes of an ONNX file",
            expected="bytes",
            actual=type(model).__name__,
            hint="pass Path(file).read_bytes() or model_proto.SerializeToString()",
        )
    return bytes(model)


def _closed() -> BackendError:
    return BackendError("the runner was closed", hint="load the engine again")
