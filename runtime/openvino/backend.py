"""OpenVINO on the CPU, set up so that latency repeats: fixed shapes, one stream, float32, the request's own buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ...compiler.onnx.model_file import OnnxModel, readable
from ...compiler.support.errors import BackendError, first_line
from ..measure.backend import Array, Availability, Clock, Runner, check_threads, closed_runner, run_once
from ..measure.environment import host_environment, version_tuple
from ..measure.inputs import InputSpec, check_inputs, model_specs, onnx_model

_LEAST_VERSION = (2025, 0)
_INSTALL = "pip install 'foldcut[openvino]'"
#: OpenVINO's names of the output types that numpy has. It maps others to a type of equal size, with wrong values.
_NUMPY_TYPES = frozenset(("f16", "f32", "f64", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "boolean"))
#: Lines of OpenVINO's messages that tell where in its source it stood, not what is wrong.
_NO_NEWS = ("Exception from ", "Check '", "FrontEnd API failed", "Model wasn't fully converted", "Summary:", "To facil")


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenVinoEngine:
    """A model that OpenVINO has read: an `openvino.Model`, compiled for shapes and threads when loaded."""

    model: Any
    specs: tuple[InputSpec, ...]


class OpenVinoBackend:
    """OpenVINO's CPU plugin. It computes in float32, double precision included, and in 32-bit integers."""

    @property
    def name(self) -> str:
        """``openvino``."""
        return "openvino"

    def available(self) -> Availability:
        """Say whether `openvino` imports here, is new enough, and runs on this CPU."""
        try:
            import openvino

            version, core = openvino.__version__, getattr(openvino, "Core", None)
        except Exception as error:  # an ImportError, or an OSError from one of its libraries
            reason = f"{_INSTALL} ({first_line(error)})"
            return Availability(can_build=False, can_run=False, reason=reason)
        if core is None or version_tuple(version) < _LEAST_VERSION:
            reason = f"openvino {version} is too old: pip install 'openvino>={_LEAST_VERSION[0]}.{_LEAST_VERSION[1]}'"
            return Availability(can_build=False, can_run=False, reason=reason)
        try:
            devices = _core().available_devices
        except Exception as error:
            reason = f"openvino does not start: {_said(error)}"
            return Availability(can_build=False, can_run=False, reason=reason)
        if "CPU" not in devices:
            reason = f"openvino has no plugin for this CPU (it finds: {', '.join(devices) or 'no device'})"
            return Availability(can_build=True, can_run=False, reason=reason)
        return Availability(can_build=True, can_run=True, reason="")

    def build(self, model: OnnxModel, inputs: Mapping[str, Array] | None = None) -> OpenVinoEngine:
        """Read an ONNX model, and check `inputs` where given. Raises BackendError if OpenVINO cannot read them."""
        content = onnx_model(model, "OpenVINO")
        specs = model_specs(content)
        if inputs is not None:
            check_inputs(specs, inputs)
        try:
            read = _core().read_model(readable(content))
        except Exception as error:
            raise BackendError(
                f"OpenVINO {_version()} cannot read the model: {_said(error)}",
                hint="leave the operator that it names out of the export, or use the backend onnxruntime",
            ) from error
        for output in read.outputs:
            kind = output.element_type.get_type_name()
            if kind not in _NUMPY_TYPES:
                raise BackendError(
                    f"an output has the type {kind}, which numpy does not have",
                    node=", ".join(sorted(output.names)) or None,
                    hint="let the model cast its output",
                )
        return OpenVinoEngine(model=read, specs=specs)

    def load(self, engine: object, inputs: Mapping[str, Array], *, threads: int = 1) -> Runner:
        """Compile for the shapes of `inputs` and `threads` threads, copy `inputs` in, and run once.

        Raises BackendError: the engine is not one of `build`, the inputs' names, dtypes or shapes are not the
        model's, OpenVINO cannot compile it, or the first inference fails.
        """
        check_threads(threads)
        if not isinstance(engine, OpenVinoEngine):
            raise BackendError(
                "OpenVINO loads what OpenVinoBackend.build returned",
                expected="OpenVinoEngine",
                actual=type(engine).__name__,
                hint="load(build(model), inputs)",
            )
        check_inputs(engine.specs, inputs)
        compiled = _compiled(engine.model, inputs, threads)
        return OpenVinoRunner(compiled, inputs, clock="thread_cpu" if threads == 1 else "wall")

    def environment(self) -> dict[str, str | int]:
        """Describe the host, and OpenVINO's version and device."""
        return {**host_environment(), "backend": self.name, "openvino": _version(), "device": "CPU"}


class OpenVinoRunner:
    """A compiled model with its inputs in place. Made by `OpenVinoBackend.load`; runs once when made."""

    def __init__(self, compiled: Any, inputs: Mapping[str, Array], *, clock: Clock) -> None:
        self._clock = clock
        self._compiled: Any = compiled
        self._request: Any = compiled.create_infer_request()
        for port in compiled.inputs:
            # The request's own tensor: the plugin reads it in place, and the caller cannot change it.
            self._request.get_tensor(port).data[...] = inputs[_input_name(port, inputs)]
        run_once(self)

    @property
    def clock(self) -> Clock:
        """``thread_cpu`` on one thread, where OpenVINO computes on the calling thread, else ``wall``."""
        return self._clock

    def run(self) -> None:
        """Run one inference. Raises BackendError if OpenVINO fails or the runner was closed."""
        request = self._request
        if request is None:
            raise closed_runner()
        try:
            request.infer()
        except Exception as error:
            raise BackendError(
                f"OpenVINO could not run the model: {_said(error)}",
                hint="check that the inputs' sizes and values fit each other and the model",
            ) from error

    def outputs(self) -> tuple[Array, ...]:
        """Copy out the outputs of the last run, in the model's order. Raises BackendError after `close`."""
        if self._request is None:
            raise closed_runner()
        count = len(self._compiled.outputs)
        return tuple(np.array(self._request.get_output_tensor(index).data, copy=True) for index in range(count))

    def close(self) -> None:
        """Free the compiled model and its buffers."""
        self._request = None
        self._compiled = None


def _compiled(model: Any, inputs: Mapping[str, Array], threads: int) -> Any:
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # Where the CPU has bfloat16 or float16 units it would round to them unasked.
        "INFERENCE_PRECISION_HINT": "f32",
        # Two runners that are timed in turns must not be tied to one and the same core.
        "ENABLE_CPU_PINNING": False,
    }
    fixed = model.clone()
    try:
        # An input that nothing reads is not among the model's own any more.
        fixed.reshape({port: list(inputs[_input_name(port, inputs)].shape) for port in fixed.inputs})
        return _core().compile_model(fixed, "CPU", settings)
    except Exception as error:
        raise BackendError(
            f"OpenVINO cannot compile the model for these shapes: {_said(error)}",
            actual=", ".join(f"{name} {array.shape}" for name, array in inputs.items()),
            hint="check that the inputs' sizes fit each other and the model",
        ) from error


def _input_name(port: Any, inputs: Mapping[str, Array]) -> str:
    """The input's name in the file: a tensor may have several once OpenVINO has folded what copies it."""
    return next(name for name in sorted(port.names) if name in inputs)


@cache
def _core() -> Any:
    """One for the process: each loads its plugins anew."""
    import openvino

    return openvino.Core()


def _version() -> str:
    import openvino

    return str(openvino.__version__).split("-")[0]


def _said(error: BaseException) -> str:
    """What OpenVINO's message says, in one line, without where in its source it stood."""
    lines = [line.strip().removeprefix("-- ") for line in str(error).splitlines() if line.strip()]
    news = [line for line in lines if not line.startswith(_NO_NEWS)]
    return " ".join(news)[:300] if news else first_line(error)
