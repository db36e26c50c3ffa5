"""What foldcut asks of a backend: build an engine from ONNX bytes, and run one inference at a time.

A backend of your own is any class or object with the methods of `Backend`; pass it where a backend's name is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ...compiler.onnx.model_file import OnnxModel
from ...compiler.support.errors import BackendError, first_line
from .regime import Regime as Regime

Array = npt.NDArray[Any]

Clock = Literal["thread_cpu", "wall", "cuda"]
"""How a runner's inferences must be timed: CPU time of the calling thread (other processes do not count),
elapsed time, or the device's own events (`TimedRunner`)."""


@dataclass(frozen=True, kw_only=True)
class Availability:
    """Whether a backend can be used here; `reason` says what to install or change, if anything."""

    can_build: bool
    can_run: bool
    reason: str


@runtime_checkable
class Runner(Protocol):
    """One loaded network with its inputs bound. Not safe to share between threads."""

    @property
    def clock(self) -> Clock:
        """The clock that times this runner."""
        ...

    def run(self) -> None:
        """Run one inference on the bound inputs, without copies. On a CPU clock it waits for the end."""
        ...

    def outputs(self) -> tuple[Array, ...]:
        """Copy out the outputs of the last run, in the model's order."""
        ...

    def close(self) -> None:
        """Free the network. May be called twice; any other call after it raises BackendError."""
        ...


@runtime_checkable
class TimedRunner(Runner, Protocol):
    """A runner that times itself, needed for the clock ``cuda``."""

    def elapsed_ms(self) -> float:
        """Wait for the last `run` and return its device time in milliseconds, transfers excluded."""
        ...


@runtime_checkable
class EvictingRunner(Runner, Protocol):
    """A runner that can empty the caches of its own device. Where the CPU computes none has to: its caches are emptied
    by streaming through memory. Needed for the regime ``cold`` everywhere else."""

    def evict_caches(self) -> None:
        """Leave nothing of the network in the device's caches. Not timed. Raises BackendError where it cannot."""
        ...


@runtime_checkable
class Backend(Protocol):
    """Something that runs networks. All methods but `available` may raise BackendError."""

    @property
    def name(self) -> str:
        """The name that reports show and that `resolve_backend` takes."""
        ...

    def available(self) -> Availability:
        """Say whether this backend can build and run here. Never raises."""
        ...

    def build(self, model: OnnxModel, inputs: Mapping[str, Array] | None = None) -> object:
        """Turn an ONNX model, its bytes or above 2 GB an `OnnxFile`, into this backend's engine, to be given to `load`.

        `inputs`, when known, are what it will be loaded with: a backend that builds for shapes (optimisation profiles)
        builds for those, any other may ignore them.
        """
        ...

    def load(self, engine: object, inputs: Mapping[str, Array], *, threads: int = 1) -> Runner:
        """Load an engine with `inputs` bound by name. `threads` is ignored by accelerators."""
        ...

    def environment(self) -> dict[str, str | int]:
        """Describe what the latency depends on: versions, device, CPUs available, load."""
        ...


@dataclass(frozen=True, kw_only=True)
class NodeTime:
    """One node as a runtime runs it, after its own fusing: the median of its time. `names` are those by which the model
    may know it: the values that it makes, and its own."""

    names: tuple[str, ...]
    kind: str
    ms: float


@runtime_checkable
class ProfilingBackend(Backend, Protocol):
    """A backend that can say where the time goes."""

    def profile(self, model: OnnxModel, inputs: Mapping[str, Array], *, threads: int = 1) -> tuple[NodeTime, ...]:
        """Time each node of the model in the order in which they run.

        Timing single nodes costs time itself: only the shares count. Raises BackendError where it cannot.
        """
        ...


#: Name -> (module of this package, class): naming a backend does not import the others.
_BUILTIN: dict[str, tuple[str, str]] = {
    "onnxruntime": ("..onnxruntime.backend", "OnnxRuntimeBackend"),
    "onnxruntime-cuda": ("..onnxruntime.backend", "OnnxRuntimeCudaBackend"),
    "onnxruntime-tensorrt": ("..onnxruntime.backend", "OnnxRuntimeTensorRTBackend"),
    "openvino": ("..openvino.backend", "OpenVinoBackend"),
    "tensorrt": ("..tensorrt.backend", "TensorRTBackend"),
    "torch": ("..torch_eager.backend", "TorchBackend"),
}


def backend_names() -> tuple[str, ...]:
    """List the names that `resolve_backend` knows, whether or not they are installed."""
    return tuple(sorted(_BUILTIN))


def resolve_backend(backend: str | Backend | type[Backend], *, to_run: bool = True) -> Backend:
    """Return the backend with this name, an instance of this class, or the backend object itself, once it says that it
    is available.

    With ``to_run=False`` it only has to build engines (for a device that is elsewhere).
    Raises BackendError: the name is unknown, the class wants arguments, the object lacks methods of `Backend`, or it is
    not available.
    """
    resolved = _by_name(backend) if isinstance(backend, str) else _checked(backend)
    availability = resolved.available()
    if not availability.can_build or (to_run and not availability.can_run):
        verb = "run networks" if availability.can_build else "build engines"
        raise BackendError(f"the backend '{resolved.name}' cannot {verb} here", hint=availability.reason)
    return resolved


def _by_name(name: str) -> Backend:
    if name not in _BUILTIN:
        raise BackendError(
            f"there is no backend named '{name}'",
            expected=" or ".join(backend_names()),
            actual=name,
            hint="use one of these names, or pass an object with the methods of runtime.backend.Backend",
        )
    module, kind = _BUILTIN[name]
    made: Backend = getattr(import_module(module, __package__), kind)()
    return made


def _checked(backend: object) -> Backend:
    if isinstance(backend, type):
        backend = _made(backend)
    if not isinstance(backend, Backend):
        wanted = ("name", "available", "build", "load", "environment")
        missing = [member for member in wanted if not hasattr(backend, member)]
        raise BackendError(
            f"an object of type {type(backend).__name__} is not a backend: it lacks {', '.join(missing)}",
            hint="pass a backend's name, or an object with the methods of foldcut.runtime.measure.backend.Backend",
        )
    return backend


def _made(kind: type) -> object:
    try:
        return kind()
    except TypeError as cause:
        raise BackendError(
            f"the class {kind.__name__} cannot be made without arguments: {first_line(cause)}",
            hint=f"pass an instance: {kind.__name__}(...)",
        ) from cause


def closed_runner() -> BackendError:
    """The error of a runner that is used after `close`."""
    return BackendError("the runner was closed", hint="load the engine again")


def run_once(runner: Runner) -> None:
    """Run a runner that is being made, so that faults show here; one that fails is closed, for nobody else could: the
    error's traceback would keep the network in memory."""
    try:
        runner.run()
    except BaseException:
        runner.close()
        raise


def check_threads(threads: int) -> None:
    """Raise BackendError unless `threads` is a whole number from 1 up."""
    if not isinstance(threads, (int, np.integer)) or isinstance(threads, bool) or threads < 1:
        raise BackendError(
            "the number of threads must be a whole number from 1 up",
            actual=threads,
            hint="1 measures most repeatably",
        )
