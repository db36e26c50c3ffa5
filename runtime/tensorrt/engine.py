"""A built engine and its files: the plan as TensorRT's own tools read it, and what it was built from and for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...compiler.support.atomic_files import Content, hashed, write_folder
from ...compiler.support.errors import BackendError, named_first_line
from ..measure.backend import Array
from ..measure.inputs import InputSpec, check_inputs
from .device import Gpu
from .library import RTX, Library
from .profile import Profile, TensorInfo

FORMAT = 1
#: TensorRT-RTX compiles for the GPU as it loads: by default its engines run on Ampere and everything newer.
PORTABLE = "sm80+"
_OLDEST_PORTABLE = 80


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine was built from, with and for.

    `targets` are compute capabilities (``sm89``; ``sm80+``: that and newer). `device` is the GPU that TensorRT tuned it
    on; empty for TensorRT-RTX. `network_layers` counts layers before TensorRT fuses them. `float32_operators` is how
    many operators of an fp16 engine stayed float32, `half_error` how far its outputs are from float32 (0 for fp32).
    """

    model_sha256: str
    flavour: str
    version: str
    precision: str
    targets: tuple[str, ...]
    device: str
    profiles: Mapping[str, Profile]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    network_layers: int
    float32_operators: int = 0
    half_error: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EngineInfo:
        """The inverse of `to_dict`. Raises BackendError where a field is missing or of the wrong kind."""
        try:
            return _read_info(fields)
        except (KeyError, TypeError, ValueError, AttributeError, BackendError) as cause:
            raise BackendError(
                f"an engine's metadata cannot be read: {named_first_line(cause)}", hint="build the engine again"
            ) from cause

    def check_library(self, library: Library) -> None:
        """Raise BackendError unless the engine was built with just this library: plans do not go across versions."""
        built, here = f"{self.flavour} {self.version}", library.title
        if built != here:
            raise BackendError(
                "the engine was built with another TensorRT",
                expected=built,
                actual=here,
                hint="build it again from the ONNX file with the TensorRT installed here",
            )

    def check_gpu(self, gpu: Gpu) -> None:
        """Raise BackendError unless the engine was built for this GPU's compute capability."""
        portable = PORTABLE in self.targets and int(gpu.target.removeprefix("sm")) >= _OLDEST_PORTABLE
        if gpu.target not in self.targets and not portable:
            asked = f'build it with TensorRTBackend(device="{gpu.target}")'
            raise BackendError(
                "the engine was built for another GPU",
                expected=" or ".join(self.targets) + (f" ({self.device})" if self.device else ""),
                actual=f"{gpu.target} ({gpu.name})",
                hint=asked if self.flavour == RTX else "build it again on this machine",
            )

    def check_inputs(self, inputs: Mapping[str, Array]) -> None:
        """Raise BackendError unless `inputs` has the engine's names and dtypes, and sizes within its profiles."""
        check_inputs(tuple(_spec(tensor) for tensor in self.inputs), inputs)
        for name, profile in self.profiles.items():
            if not profile.holds(inputs[name].shape):
                raise BackendError(
                    f"the input '{name}' lies outside of the sizes that the engine was built for",
                    expected=profile,
                    actual=inputs[name].shape,
                    hint=f"build with TensorRTBackend(profiles={{'{name}': Profile(min=..., opt=..., max=...)}})",
                )


@dataclass(frozen=True, kw_only=True)
class TensorRTEngine:
    """A serialised engine: the plan, and what it is."""

    plan: bytes = field(repr=False)
    info: EngineInfo

    def check_model(self, model: bytes) -> None:
        """Raise BackendError unless the engine was built from just these ONNX bytes."""
        actual = sha256(model)
        if actual != self.info.model_sha256:
            raise BackendError(
                "the engine was built from another model",
                expected=f"sha256 {self.info.model_sha256[:16]}",
                actual=f"sha256 {actual[:16]}",
                hint="build it again from this model",
            )

    def save(self, path: str | Path) -> tuple[Path, Path]:
        """Write the plan to `path` and what it is to ``<path>.json``, both or neither. Raises OutputError."""
        plan = Path(path).absolute()
        beside = _metadata_path(plan)
        text = {"format": FORMAT, "plan_sha256": sha256(self.plan), "engine": self.info.to_dict()}
        write_folder(plan.parent, {plan.name: self.plan, beside.name: (json.dumps(text, indent=1) + "\n").encode()})
        return plan, beside


def load_engine(path: str | Path, model: bytes | None = None) -> TensorRTEngine:
    """Read an engine that `TensorRTEngine.save` wrote; `model`, when given, must be what it was built from.

    It is not loaded into TensorRT yet: that, with the checks of version and GPU, is `TensorRTBackend.load`.
    Raises BackendError: a file is missing or damaged, the two do not belong together, or `model` is another one.
    """
    plan_path = Path(path)
    plan, text = _read(plan_path), _read(_metadata_path(plan_path))
    try:
        stored = json.loads(text)
        wanted, found = stored["plan_sha256"], stored["format"]
        fields = stored["engine"]
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise BackendError(
            f"{_metadata_path(plan_path)} is not the metadata of an engine: {named_first_line(cause)}",
            hint="build the engine again",
        ) from cause
    if found != FORMAT:
        raise BackendError(
            "the engine's metadata is of another format", expected=FORMAT, actual=found, hint="build the engine again"
        )
    if wanted != sha256(plan):
        raise BackendError(
            f"{plan_path} is damaged, or is not the plan that its metadata describe",
            expected=f"sha256 {str(wanted)[:16]}",
            actual=f"sha256 {sha256(plan)[:16]}",
            hint="copy both files again, or build the engine again",
        )
    engine = TensorRTEngine(plan=plan, info=EngineInfo.from_dict(fields))
    if model is not None:
        engine.check_model(model)
    return engine


def sha256(content: Content) -> str:
    """The hex digest that identifies models and plans."""
    return hashed(content, hashlib.sha256())


def _metadata_path(plan: Path) -> Path:
    return plan.with_name(plan.name + ".json")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as cause:
        raise BackendError(
            f"cannot read {path}: {cause.strerror}",
            hint="an engine is two files: the plan, and its metadata with .json added to the name",
        ) from cause


def _read_info(fields: Mapping[str, Any]) -> EngineInfo:
    """Rebuild the dataclasses; anything unexpected raises one of Python's own errors."""
    texts = ("model_sha256", "flavour", "version", "precision", "device")
    inputs = tuple(_tensor(entry) for entry in fields["inputs"])
    profiles = {
        str(name): Profile(min=tuple(p["min"]), opt=tuple(p["opt"]), max=tuple(p["max"]))
        for name, p in fields["profiles"].items()
    }
    if not set(profiles) <= {tensor.name for tensor in inputs}:
        raise ValueError("a profile is of no input")
    targets = fields["targets"]
    if not isinstance(targets, list | tuple) or not all(isinstance(fields[name], str) for name in texts):
        raise TypeError("a text or a list is of another kind")
    return EngineInfo(
        **{name: fields[name] for name in texts},
        targets=tuple(str(target) for target in targets),
        profiles=profiles,
        inputs=inputs,
        outputs=tuple(_tensor(entry) for entry in fields["outputs"]),
        network_layers=int(fields["network_layers"]),
        float32_operators=int(fields["float32_operators"]),
        half_error=float(fields["half_error"]),
    )


def _tensor(entry: Mapping[str, Any]) -> TensorInfo:
    shape = tuple(int(size) for size in entry["shape"])
    return TensorInfo(name=str(entry["name"]), dtype=str(entry["dtype"]), shape=shape)


def _spec(tensor: TensorInfo) -> InputSpec:
    import numpy as np

    try:
        dtype: np.dtype[Any] | None = np.dtype(tensor.dtype)
    except TypeError:
        dtype = None
    shape = tuple(None if size == -1 else size for size in tensor.shape)
    return InputSpec(name=tensor.name, shape=shape, dtype=dtype, declared=tensor.dtype)
