"""What TensorRT made of a network: its layers after fusion, and the time of each.

Needs a GPU, and has not run on one yet (docs/tensorrt.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from ...compiler.support.errors import BackendError
from ..measure.backend import Array
from .device import Device
from .engine import TensorRTEngine
from .library import Library
from .runner import EngineSession

_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of an engine. `onnx_nodes` are those that were fused into it, as far as TensorRT says; `ms` the median
    of its time on the GPU in milliseconds, None where TensorRT reports none."""

    name: str
    kind: str
    onnx_nodes: tuple[str, ...]
    outputs: tuple[str, ...]
    ms: float | None


def profile_layers(
    library: Library, engine: TensorRTEngine, inputs: Mapping[str, Array], device: Device, *, runs: int = 20
) -> tuple[Layer, ...]:
    """List an engine's layers in the order in which they run, each with the median of its time over `runs` inferences.

    Biased: timing single layers keeps them apart, so the sum is above the time of the whole.
    Raises BackendError: the engine cannot be loaded, or TensorRT does not describe it. ValueError: `runs` below 1.
    """
    if runs < 1:
        raise ValueError(f"runs must be at least 1, not {runs}")
    session = EngineSession(library, engine, inputs, device)
    try:
        described = _describe(library.trt, session)
        times = _times(library.trt, session, device, runs)
    finally:
        session.close()
    return tuple(_layer(entry, times) for entry in described)


def _describe(trt: Any, session: EngineSession) -> list[Any]:
    inspector = session.cuda_engine.create_engine_inspector()
    inspector.execution_context = session.context  # with the sizes that are bound, not the profile's
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as cause:
        raise BackendError(
            f"{session.title} does not describe the engine", actual=str(text)[:80], hint="build the engine again"
        ) from cause
    return list(layers)


def _times(trt: Any, session: EngineSession, device: Device, runs: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}

    class Collector(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.setdefault(layer_name, []).append(ms)

    context = session.context
    context.profiler = Collector()
    for _ in range(runs):
        session.enqueue()
        device.wait()
    return times


def _layer(entry: Any, times: Mapping[str, list[float]]) -> Layer:
    """Read the inspector's entry: a dictionary, or a bare name where the engine was built without details."""
    fields: Mapping[str, Any] = entry if isinstance(entry, dict) else {"Name": str(entry)}
    name = str(fields.get("Name", ""))
    outputs = fields.get("Outputs") or ()
    return Layer(
        name=name,
        kind=str(fields.get("LayerType", "")),
        onnx_nodes=tuple(_ONNX_NODE.findall(str(fields.get("Metadata", "")))),
        outputs=tuple(_tensor(output) for output in outputs),
        ms=median(times[name]) if times.get(name) else None,
    )


def _tensor(output: Any) -> str:
    """``name: type and layout`` of a layer's output."""
    if not isinstance(output, dict):
        return str(output)
    layout = output.get("Format/Datatype") or output.get("Format") or ""
    return f"{output.get('Name', '')}: {layout}"
