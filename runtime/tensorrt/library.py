"""TensorRT's Python bindings: which are installed, whether they have what foldcut uses, and what they say at work.

Names differ between TensorRT 10, TensorRT 11 and TensorRT-RTX. Everything that the backend takes from the bindings is
listed here, so that a version without one of the names is refused at once, by name.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import FrameType
from typing import Any

from ...compiler.support.errors import BackendError, named_first_line
from ..measure.environment import version_tuple

FULL, RTX = "TensorRT", "TensorRT-RTX"
INSTALL = (
    "pip install tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings (builds without a GPU), "
    "or pip install tensorrt from NVIDIA's own package index"
)
_MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
_LEAST = {FULL: (10, 0), RTX: (1, 0)}
_KEPT_SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING")

#: Class -> the names of it that the backend uses. Every supported version has them.
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "Builder": (
        "create_network",
        "create_builder_config",
        "create_optimization_profile",
        "build_serialized_network",
    ),
    "IBuilderConfig": (
        "add_optimization_profile",
        "builder_optimization_level",
        "profiling_verbosity",
        "progress_monitor",
        "set_memory_pool_limit",
    ),
    "INetworkDefinition": ("num_inputs", "num_outputs", "num_layers", "get_input", "get_output"),
    "ITensor": ("name", "shape", "dtype", "is_shape_tensor"),
    "IOptimizationProfile": ("set_shape",),
    "OnnxParser": ("parse", "parse_from_file", "num_errors", "get_error"),
    "ParserError": ("desc",),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "ProfilingVerbosity": ("DETAILED", "NONE"),
    "MemoryPoolType": ("WORKSPACE",),
    "ILogger": ("log",),
    "IProgressMonitor": ("phase_start", "phase_finish", "step_complete"),
    "IProfiler": ("report_layer_time",),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": ("create_execution_context", "create_engine_inspector", "get_tensor_location"),
    "IExecutionContext": (
        "set_input_shape",
        "get_tensor_shape",
        "set_tensor_address",
        "infer_shapes",
        "execute_async_v3",
        "profiler",
    ),
    "EngineInspector": ("execution_context", "get_engine_information"),
    "LayerInformationFormat": ("JSON",),
    "TensorLocation": ("HOST",),
}

#: The same for what only some versions have; the code asks for each before it uses it.
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "ParserError": ("node_name", "node_operator"),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    "ComputeCapability": ("__members__",),
    "Runtime": ("get_engine_validity",),
    "EngineValidity": ("INVALID",),
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeConfig": ("dynamic_shapes_kernel_specialization_strategy",),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER",),
    "IExecutionContext": ("is_stream_capturable", "nvtx_verbosity"),
}


@dataclass(frozen=True, kw_only=True)
class Library:
    """The bindings in use: the module `trt`, its `flavour` (TensorRT or TensorRT-RTX) and full `version`."""

    trt: Any
    flavour: str
    version: str

    @property
    def title(self) -> str:
        """As messages name it: ``TensorRT-RTX 1.7.1.116``."""
        return f"{self.flavour} {self.version}"


def find_library() -> Library:
    """Import the first bindings that are installed: tensorrt, tensorrt_rtx, tensorrt_rtx_bindings.

    Raises BackendError: none imports, or the one that does is too old or lacks a name that foldcut uses.
    """
    failures = []
    for module in _MODULES:
        try:
            trt: Any = import_module(module)
        except Exception as cause:  # a missing shared library is an OSError or worse
            failures.append(f"{module}: {named_first_line(cause)}")
        else:
            return _checked(trt, RTX if "rtx" in module else FULL)
    raise BackendError("TensorRT is not installed", actual="; ".join(failures), hint=INSTALL)


def missing_names(trt: Any) -> tuple[str, ...]:
    """List what `REQUIRED` names and `trt` does not have, as ``Class.name``."""
    return tuple(
        f"{kind}.{name}"
        for kind, names in REQUIRED.items()
        for name in names
        if not hasattr(getattr(trt, kind, None), name)
    )


def _checked(trt: Any, flavour: str) -> Library:
    library = Library(trt=trt, flavour=flavour, version=str(getattr(trt, "__version__", "0")))
    least = _LEAST[flavour]
    if version_tuple(library.version) < least:
        raise BackendError(
            f"the installed {flavour} is too old",
            expected=f"{least[0]}.{least[1]} or newer",
            actual=library.version,
            hint=INSTALL,
        )
    missing = missing_names(trt)
    if missing:
        raise BackendError(
            f"{library.title} lacks what foldcut uses: {', '.join(missing)}",
            hint="install a version that docs/tensorrt.md lists, and report this one",
        )
    return library


class Messages:
    """What TensorRT said during one piece of work: (severity, text), in order."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def first_error(self) -> str:
        """The first error: the later ones are consequences. Empty when there is none."""
        return next((text for severity, text in self.lines if severity != "WARNING"), "")


_collecting: Messages | None = None
_one_at_a_time = threading.RLock()


@cache
def logger_of(trt: Any) -> Any:
    """The process's one logger: TensorRT keeps the first that it is given, whoever passes another later."""

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages = _collecting
            if messages is not None and severity.name in _KEPT_SEVERITIES:
                messages.lines.append((severity.name, message.strip()))

    return Collector()


@contextmanager
def collected_messages() -> Iterator[Messages]:
    """Collect what TensorRT says meanwhile. One piece of work at a time, since there is one logger."""
    global _collecting
    with _one_at_a_time:
        outer, _collecting = _collecting, Messages()
        try:
            yield _collecting
        finally:
            _collecting = outer


class Interrupt:
    """Whether Ctrl-C was pressed during work that cannot raise KeyboardInterrupt itself."""

    pressed = False


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Hold Ctrl-C back while TensorRT works, and raise KeyboardInterrupt at the end.

    TensorRT calls back into Python, and swallows what is raised there: an interrupt would be lost. Outside the main
    thread, and where a program handles SIGINT by itself outside Python, nothing is changed.
    """
    interrupt = Interrupt()
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield interrupt
        return

    def note(_signal: int, _frame: FrameType | None) -> None:
        interrupt.pressed = True

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
        if interrupt.pressed:
            previous(signal.SIGINT, None)
