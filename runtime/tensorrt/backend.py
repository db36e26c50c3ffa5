"""TensorRT or TensorRT-RTX, by its own Python API: engines from ONNX bytes, in float32 or half precision.

TensorRT-RTX builds on a machine without a GPU; full TensorRT builds on the GPU that it builds for. Running needs a GPU,
and torch with CUDA for its memory, streams and graphs. docs/tensorrt.md says what has run where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from ...compiler.onnx.model_file import OnnxFile, OnnxModel
from ...compiler.support.errors import BackendError
from ..measure.backend import Array, Availability, Runner, check_threads
from ..measure.environment import host_environment
from ..measure.inputs import onnx_model
from .build import BuildSettings, build_plan, check_targets
from .device import open_device, visible_gpu, why_no_device
from .engine import EngineInfo, TensorRTEngine, load_engine, sha256
from .half_precision import HalfPrecision, to_half_precision
from .layers import Layer, profile_layers
from .library import RTX, find_library
from .profile import Profile
from .runner import EngineSession, TensorRTRunner

__all__ = ["Layer", "Profile", "TensorRTBackend", "TensorRTEngine", "load_engine"]

Precision = Literal["fp32", "fp16"]
_HIGHEST_LEVEL = 5


class TensorRTBackend:
    """Builds engines, strongly typed: every value has the type that the ONNX model gives it.

    - `precision`: ``fp16`` converts the model first (`half_precision`), guided by `samples` (one array per input, a few
      dozen rows) or else by the inputs that it is built for, and refuses where the outputs then differ by more than
      `half_tolerance`, relative to the largest. In ``fp32`` matrix products may use TF32, TensorRT's own default.
    - `profiles`: the sizes of dynamic inputs; by default just those of the inputs that it is built for.
    - `device`: compute capabilities to build for (``"sm89"``, ``("sm86", "sm89")``); TensorRT-RTX only. By default its
      engines run on Ampere and everything newer.
    - `workspace_bytes`, `optimization_level` (0 to 5): TensorRT's own defaults when None.

    Raises BackendError for a setting that is none of these.
    """

    def __init__(
        self,
        *,
        precision: Precision = "fp32",
        profiles: Mapping[str, Profile] | None = None,
        device: str | Sequence[str] | None = None,
        workspace_bytes: int | None = None,
        optimization_level: int | None = None,
        samples: Mapping[str, Array] | None = None,
        half_tolerance: float = 0.01,
    ) -> None:
        if precision not in ("fp32", "fp16"):
            raise BackendError("there is no such precision", expected="fp32 or fp16", actual=precision, hint="fp16")
        if optimization_level is not None and optimization_level not in range(_HIGHEST_LEVEL + 1):
            raise BackendError(
                "the optimization level is out of range",
                expected=f"0 to {_HIGHEST_LEVEL}",
                actual=optimization_level,
                hint="higher levels build longer and try more kernels; None is TensorRT's default",
            )
        self._precision, self._samples, self._half_tolerance = precision, samples, half_tolerance
        targets = [device] if isinstance(device, str) else list(device or ())
        self._settings = BuildSettings(
            profiles=dict(profiles or {}),
            targets=tuple(dict.fromkeys(target.lower() for target in targets)),
            workspace_bytes=workspace_bytes,
            optimization_level=optimization_level,
        )

    @property
    def name(self) -> str:
        """``tensorrt``."""
        return "tensorrt"

    def available(self) -> Availability:
        """Say apart whether it can build here and whether it can run here, and what is in the way."""
        try:
            library = find_library()
        except BackendError as error:
            reason = f"{error.message}: {error.hint}"
            return Availability(can_build=False, can_run=False, reason=reason)
        no_run = why_no_device()
        if library.flavour == RTX:
            reason = f"{library.title} builds here; {no_run}" if no_run else ""
            return Availability(can_build=True, can_run=not no_run, reason=reason)
        can_build = visible_gpu() is not None
        return Availability(can_build=can_build, can_run=not no_run, reason=no_run)

    def build(self, model: OnnxModel, inputs: Mapping[str, Array] | None = None) -> TensorRTEngine:
        """Build an engine from an ONNX model. Without a GPU where the library is TensorRT-RTX.

        A dynamic input gets the sizes of `inputs` unless `profiles` has others; a model of fixed sizes needs neither.
        Raises BackendError: TensorRT is missing or too old, a dynamic input has no sizes, half precision does not hold
        the tolerance or has no samples, TensorRT cannot parse (with the node) or build the model.
        """
        content = onnx_model(model, "TensorRT")
        library = find_library()
        if library.flavour == RTX:
            check_targets(library, self._settings.targets)
        half = self._to_half(content, inputs) if self._precision == "fp16" else None
        built = build_plan(library, half.model if half else content, self._settings, inputs)
        info = EngineInfo(
            model_sha256=sha256(content),
            flavour=library.flavour,
            version=library.version,
            precision=self._precision,
            targets=built.targets,
            device=built.device,
            profiles=built.profiles,
            inputs=built.inputs,
            outputs=built.outputs,
            network_layers=built.network_layers,
            float32_operators=len(half.kept) if half else 0,
            half_error=half.error if half else 0.0,
        )
        return TensorRTEngine(plan=built.plan, info=info)

    def load(self, engine: object, inputs: Mapping[str, Array], *, threads: int = 1) -> Runner:
        """Put an engine on the GPU, copy and bind `inputs`, run it once and capture it as a CUDA graph.

        Raises BackendError: the engine was built by another version or for another GPU, the inputs do not fit it or
        lie outside of its profiles, there is no GPU, or TensorRT refuses.
        """
        check_threads(threads)
        checked = _checked_engine(engine)
        library = find_library()
        checked.info.check_library(library)
        _check_here(checked, inputs)
        device = open_device()
        session = EngineSession(library, checked, inputs, device)
        try:
            return TensorRTRunner(session, device)
        except BaseException:
            session.close()
            raise

    def layers(self, engine: object, inputs: Mapping[str, Array], *, runs: int = 20) -> tuple[Layer, ...]:
        """List what TensorRT made of the network, with the time of each layer. Needs a GPU.

        Raises BackendError as `load` does. ValueError: `runs` below 1.
        """
        checked = _checked_engine(engine)
        library = find_library()
        checked.info.check_library(library)
        _check_here(checked, inputs)
        return profile_layers(library, checked, inputs, open_device(), runs=runs)

    def environment(self) -> dict[str, str | int]:
        """Describe the host, the library, the GPU and the precision. Raises BackendError without a library."""
        import torch

        library = find_library()
        gpu = visible_gpu()
        return {
            **host_environment(),
            "backend": self.name,
            "tensorrt": library.title,
            "precision": self._precision,
            "gpu": f"{gpu.name} ({gpu.target})" if gpu else "none",
            "driver_cuda": gpu.driver_cuda if gpu else "none",
            "torch": str(torch.__version__),
        }

    def _to_half(self, model: OnnxModel, inputs: Mapping[str, Array] | None) -> HalfPrecision:
        samples = self._samples or inputs
        if not samples:
            raise BackendError(
                "half precision needs sample inputs, to see which values would overflow",
                hint='pass TensorRTBackend(precision="fp16", samples={...}), one array per input, a few dozen rows',
            )
        if isinstance(model, OnnxFile):
            raise BackendError(
                "half precision is chosen in a model of one piece, and the weights of this one lie beside it",
                hint="build it in float32, or give a model whose weights are in half precision",
            )
        return to_half_precision(model, samples, tolerance=self._half_tolerance)


def _check_here(engine: TensorRTEngine, inputs: Mapping[str, Array]) -> None:
    """Before anything is loaded: the engine is for this GPU, where there is one, and the inputs are the engine's."""
    gpu = visible_gpu()
    if gpu is not None:
        engine.info.check_gpu(gpu)
    engine.info.check_inputs(inputs)


def _checked_engine(engine: object) -> TensorRTEngine:
    if not isinstance(engine, TensorRTEngine):
        raise BackendError(
            "TensorRT runs engines, not models",
            expected="TensorRTEngine",
            actual=type(engine).__name__,
            hint="pass TensorRTBackend().build(onnx_bytes), or load_engine(path)",
        )
    return engine
