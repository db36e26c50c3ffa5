"""The GPU: what the driver says of it, and the few things that a runner does with it, through torch.

Everything that touches memory, streams, graphs and events goes through `Device`, so that the control flow above it can
be tested where there is no GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...compiler.support.errors import BackendError
from ..measure.backend import Array
from ..measure.cuda_driver import open_driver

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_TORCH_WITH_CUDA = "install a torch wheel built for CUDA in its place"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first GPU that CUDA shows: its name, `target` (``sm89`` for compute capability 8.9), and the newest CUDA that
    the driver knows (``13.0``)."""

    name: str
    target: str
    driver_cuda: str


def visible_gpu() -> Gpu | None:
    """Ask the CUDA driver for the first GPU; None where there is no driver or no GPU."""
    driver, count = open_driver()
    if count < 1:
        return None
    device, version = ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDriverGetVersion(ctypes.byref(version))
    major, minor = ctypes.c_int(), ctypes.c_int()
    for value, attribute in ((major, _MAJOR), (minor, _MINOR)):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
    return Gpu(
        name=name.value.decode(errors="replace"),
        target=f"sm{major.value}{minor.value}",
        driver_cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def why_no_device() -> str:
    """What keeps this process from running on a GPU, as what to do about it; empty when nothing does."""
    if visible_gpu() is None:
        return "running needs an NVIDIA GPU and its driver, and none is seen here: build here, load where the GPU is"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA: {_TORCH_WITH_CUDA}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} cannot use the GPU: its CUDA {torch.version.cuda} needs a newer driver"
    return ""


class Timer(Protocol):
    """Two marks on a device's queue."""

    def start(self) -> None:
        """Mark the begin."""

    def stop(self) -> None:
        """Mark the end."""

    def elapsed_ms(self) -> float:
        """Wait for the end; milliseconds on the device between the marks."""
        ...


class Device(Protocol):
    """What a runner needs of a GPU: memory, one queue, and graphs and marks on it."""

    @property
    def stream(self) -> int:
        """The queue's handle, as CUDA knows it."""
        ...

    def upload(self, array: Array, *, host: bool) -> Any:
        """Copy an array into memory that the engine can read; with `host`, memory of the CPU."""
        ...

    def empty(self, shape: Sequence[int], dtype: str, *, host: bool) -> Any:
        """Make room for a tensor of numpy's dtype name, or ``bfloat16``."""
        ...

    def address(self, buffer: Any) -> int:
        """Where a buffer lies."""
        ...

    def download(self, buffer: Any) -> Array:
        """Copy a buffer out; bfloat16, which numpy does not have, as float32."""
        ...

    def wait(self) -> None:
        """Wait until the queue is empty."""
        ...

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what `enqueue` puts on the queue; the result puts all of it there at once."""
        ...

    def timer(self) -> Timer:
        """A pair of marks."""
        ...


def open_device() -> Device:
    """The GPU through torch. Raises BackendError, with what to install, where it cannot be used."""
    reason = why_no_device()
    if reason:
        raise BackendError("TensorRT cannot run here", hint=reason)
    return TorchDevice()


class TorchDevice:
    """`Device` on torch's current CUDA device, with a stream of its own: TensorRT synchronises the default one."""

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch
        self._stream = torch.cuda.Stream()

    @property
    def stream(self) -> int:
        """The CUDA stream's handle."""
        return int(self._stream.cuda_stream)

    def upload(self, array: Array, *, host: bool) -> Any:
        """Copy an array to the GPU, or to the CPU's memory."""
        tensor = self._torch.from_numpy(np.array(array, order="C", copy=True))
        with self._torch.cuda.stream(self._stream):
            return tensor if host else tensor.cuda()

    def empty(self, shape: Sequence[int], dtype: str, *, host: bool) -> Any:
        """Make a tensor of zeros. Raises BackendError where torch has no such type."""
        kind = getattr(self._torch, dtype, None)
        if not isinstance(kind, self._torch.dtype):
            raise BackendError(
                f"an output of type {dtype} has no counterpart in torch",
                hint="let the model cast its output to float32",
            )
        # on the stream of its own: elsewhere the zeros might be written after the engine's results
        with self._torch.cuda.stream(self._stream):
            return self._torch.zeros(tuple(shape), dtype=kind, device="cpu" if host else "cuda")

    def address(self, buffer: Any) -> int:
        """The tensor's data pointer."""
        return int(buffer.data_ptr())

    def download(self, buffer: Any) -> Array:
        """Copy a tensor into an array."""
        with self._torch.cuda.stream(self._stream):
            plain = buffer.float() if buffer.dtype == self._torch.bfloat16 else buffer
            return np.array(plain.cpu().numpy(), copy=True)

    def wait(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Capture a CUDA graph."""
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph, stream=self._stream):
            enqueue()

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                graph.replay()

        return replay

    def timer(self) -> Timer:
        """A pair of CUDA events."""
        return _EventTimer(self._torch, self._stream)


class _EventTimer:
    def __init__(self, torch: Any, stream: Any) -> None:
        self._stream = stream
        self._first, self._last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        self._first.record(self._stream)

    def stop(self) -> None:
        self._last.record(self._stream)

    def elapsed_ms(self) -> float:
        self._last.synchronize()
        return float(self._first.elapsed_time(self._last))
