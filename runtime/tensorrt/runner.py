"""Running an engine: inputs bound, one inference as one CUDA graph, timed on the GPU by events.

None of this has run on a GPU yet (docs/tensorrt.md): the tests go through it with a made-up TensorRT and device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...compiler.support.errors import BackendError, first_line
from ..measure.backend import Array, Clock, closed_runner
from .device import Device
from .engine import TensorRTEngine
from .library import Library, Messages, collected_messages, logger_of


class EngineSession:
    """An engine on the GPU with its inputs and outputs bound. Raises BackendError where TensorRT refuses any of it."""

    def __init__(self, library: Library, engine: TensorRTEngine, inputs: Mapping[str, Array], device: Device) -> None:
        self.title = library.title
        self._trt, self._device = library.trt, device
        self._memory: dict[str, Any] = {}
        self._output_names = [tensor.name for tensor in engine.info.outputs]
        self.cuda_engine: Any = None
        self.context: Any = None
        try:
            self._prepare(engine, inputs)
        except BaseException:
            self.close()
            raise

    def _prepare(self, engine: TensorRTEngine, inputs: Mapping[str, Array]) -> None:
        with collected_messages() as messages:
            self.cuda_engine = self._deserialise(engine.plan, messages)
            self.context = self._new_context(messages)
            for tensor in engine.info.inputs:
                self._bind_input(tensor.name, inputs[tensor.name], messages)
            lacking = self.context.infer_shapes()
            if lacking:
                raise self._refused(f"lacks sizes for {', '.join(lacking)}", messages)
            for tensor in engine.info.outputs:
                self._bind_output(tensor.name, tensor.dtype, messages)
            self.enqueue()
            self._device.wait()

    def enqueue(self) -> None:
        """Put one inference on the device's queue. Raises BackendError if TensorRT cannot."""
        if not self.context.execute_async_v3(self._device.stream):
            raise BackendError(f"{self.title} could not run the engine", hint="see whether the GPU has memory left")

    def outputs(self) -> tuple[Array, ...]:
        """Wait for the device, and copy out the outputs in the model's order."""
        self._device.wait()
        return tuple(self._device.download(self._memory[name]) for name in self._output_names)

    def close(self) -> None:
        """Free the context, the engine and the buffers, in this order, once the device is done with them."""
        self._device.wait()
        self.context = None
        self.cuda_engine = None
        self._memory = {}

    def _deserialise(self, plan: bytes, messages: Messages) -> Any:
        self._runtime = runtime = self._trt.Runtime(logger_of(self._trt))
        if hasattr(runtime, "get_engine_validity"):
            validity, diagnostics = runtime.get_engine_validity(plan)
            if validity == self._trt.EngineValidity.INVALID:
                raise self._refused(f"says that the engine is not valid here (diagnostics {diagnostics})", messages)
        cuda_engine = runtime.deserialize_cuda_engine(plan)
        if cuda_engine is None:
            raise self._refused("cannot load the engine", messages)
        return cuda_engine

    def _new_context(self, messages: Messages) -> Any:
        trt, cuda_engine = self._trt, self.cuda_engine
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # TensorRT-RTX swaps kernels for specialised ones while it runs; a measurement must see the final ones
            runtime_config = cuda_engine.create_runtime_config()
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            runtime_config.dynamic_shapes_kernel_specialization_strategy = eager
            context = cuda_engine.create_execution_context(runtime_config)
        else:
            context = cuda_engine.create_execution_context()
        if context is None:
            raise self._refused("has no memory for the engine", messages)
        if hasattr(context, "nvtx_verbosity"):
            context.nvtx_verbosity = trt.ProfilingVerbosity.NONE  # annotations of each layer would cost time
        return context

    def _bind_input(self, name: str, array: Array, messages: Messages) -> None:
        if not self.context.set_input_shape(name, tuple(array.shape)):
            raise self._refused(f"refused the shape {array.shape} of '{name}'", messages)
        self._bind(name, self._device.upload(array, host=self._on_host(name)), messages)

    def _bind_output(self, name: str, dtype: str, messages: Messages) -> None:
        shape = tuple(int(size) for size in self.context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise BackendError(
                f"the size of the output '{name}' depends on the data",
                actual=shape,
                hint="leave such operators (NonZero, non-maximum suppression) outside of the exported model",
            )
        self._bind(name, self._device.empty(shape, dtype, host=self._on_host(name)), messages)

    def _bind(self, name: str, buffer: Any, messages: Messages) -> None:
        self._memory[name] = buffer
        if not self.context.set_tensor_address(name, self._device.address(buffer)):
            raise self._refused(f"refused the memory of '{name}'", messages)

    def _on_host(self, name: str) -> bool:
        return bool(self.cuda_engine.get_tensor_location(name) == self._trt.TensorLocation.HOST)

    def _refused(self, problem: str, messages: Messages) -> BackendError:
        said = messages.first_error()
        return BackendError(
            f"{self.title} {problem}" + (f": {said}" if said else ""),
            hint="build the engine again on this machine; if that fails too, see whether the GPU has memory left",
        )


class TensorRTRunner:
    """One engine with its inputs bound, timed by the GPU. Made by `TensorRTBackend.load`; runs once when made.

    `graph_problem` says why inferences are queued layer by layer in place of one CUDA graph; None when they are not.
    """

    def __init__(self, session: EngineSession, device: Device) -> None:
        self._session: EngineSession | None = session
        self._device = device
        self._timer = device.timer()
        self._once, self.graph_problem = _captured(session, device)
        self.run()

    @property
    def clock(self) -> Clock:
        """``cuda``: events on the GPU."""
        return "cuda"

    def run(self) -> None:
        """Queue two inferences and time the second. Raises BackendError after `close`.

        The first keeps the GPU busy while the CPU queues the second, so that the marks around that one do not count the
        CPU's time; trtexec's queue, which never runs empty, does the same.
        """
        self._open()
        self._once()
        self._timer.start()
        self._once()
        self._timer.stop()

    def elapsed_ms(self) -> float:
        """Wait for the last `run`, and return how long its timed inference took on the GPU, transfers excluded."""
        self._open()
        return self._timer.elapsed_ms()

    def outputs(self) -> tuple[Array, ...]:
        """Copy out the outputs of the last run, in the model's order. Raises BackendError after `close`."""
        return self._open().outputs()

    def close(self) -> None:
        """Free the graph, the engine and the buffers."""
        session, self._session = self._session, None
        if session is not None:
            self._once = _nothing
            session.close()

    def _open(self) -> EngineSession:
        if self._session is None:
            raise closed_runner()
        return self._session


def _captured(session: EngineSession, device: Device) -> tuple[Callable[[], None], str | None]:
    """One inference as a CUDA graph where that can be had, else queued as it is, with the reason."""
    context = session.context
    if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(device.stream):
        return session.enqueue, "TensorRT says that this engine cannot be captured"
    try:
        with collected_messages():
            return device.capture(session.enqueue), None
    except Exception as cause:
        return session.enqueue, first_line(cause)


def _nothing() -> None:
    """What a closed runner holds in place of a graph."""
