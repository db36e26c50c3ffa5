"""From ONNX bytes to a plan: parse, set the profiles and targets, build. Works without a GPU with TensorRT-RTX."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...compiler.onnx.model_file import OnnxFile, OnnxModel
from ...compiler.support.errors import BackendError, first_line
from ..measure.backend import Array
from .device import Gpu, visible_gpu
from .engine import PORTABLE
from .library import RTX, Interrupt, Library, Messages, collected_messages, deferred_interrupt, logger_of
from .profile import Profile, TensorInfo, choose_profiles

_MAX_PROTOBUF = 2**31 - 1
_ELSEWHERE = "see what the message asks for; ONNX Runtime (backend 'onnxruntime') may still run the model"
_NAMED_OPERATION = re.compile(r"operation '([^']+)'")  # as the builder names a node that it cannot compile
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How to build: `targets` as in ``sm89`` (empty: the library's own choice), `workspace_bytes` of GPU memory that
    one layer may use, `optimization_level` 0 to 5 (None: TensorRT's defaults)."""

    profiles: Mapping[str, Profile] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    optimization_level: int | None = None


@dataclass(frozen=True, kw_only=True)
class Built:
    """A plan with what TensorRT said of the network."""

    plan: bytes = field(repr=False)
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    profiles: Mapping[str, Profile]
    targets: tuple[str, ...]
    device: str
    network_layers: int


def build_plan(
    library: Library, model: OnnxModel, settings: BuildSettings, inputs: Mapping[str, Array] | None
) -> Built:
    """Parse and build. Ctrl-C ends a build at its next step.

    Raises BackendError: bytes are above 2 GB, the model does not parse (with the node), a dynamic input has no profile,
    a target is unknown to the library, full TensorRT has no GPU, or the builder refuses.
    """
    if not isinstance(model, OnnxFile) and len(model) > _MAX_PROTOBUF:
        raise BackendError(
            f"the ONNX model has {len(model) / 1e9:.1f} GB",
            expected="at most 2 GB, which is what one protobuf message holds",
            actual=f"{len(model):,} bytes",
            hint="save it with external data, and pass OnnxFile(path) of foldcut.compiler.onnx.model_file",
        )
    gpu = None if library.flavour == RTX else _gpu_for_full(library, settings.targets)
    with deferred_interrupt() as interrupt, collected_messages() as messages:
        return _Build(library, messages, interrupt).run(model, settings, inputs, gpu)


def target_names(library: Library) -> tuple[str, ...]:
    """The compute capabilities that the library can be asked to build for; none for full TensorRT, which builds for the
    GPU that it runs on."""
    if not hasattr(library.trt, "ComputeCapability"):
        return ()
    members = [name for name in library.trt.ComputeCapability.__members__ if name.startswith("SM")]
    return tuple(sorted((name.lower() for name in members), key=lambda name: int(name[2:])))


def check_targets(library: Library, targets: Sequence[str]) -> None:
    """Raise BackendError unless TensorRT-RTX knows all of `targets`."""
    known = target_names(library)
    for target in targets:
        if target not in known:
            raise BackendError(
                f"{library.title} cannot build for '{target}'",
                expected=", ".join(known),
                actual=target,
                hint="device=None builds one engine for Ampere and everything newer",
            )


def _gpu_for_full(library: Library, targets: Sequence[str]) -> Gpu:
    gpu = visible_gpu()
    if gpu is None:
        raise BackendError(
            f"{library.title} builds on the GPU that it builds for, and none is seen here",
            hint="build where the GPU is; TensorRT-RTX in place of tensorrt builds without one",
        )
    if targets and tuple(targets) != (gpu.target,):
        raise BackendError(
            f"{library.title} builds for the GPU that it runs on only",
            expected=gpu.target,
            actual=", ".join(targets),
            hint="leave out `device`, and build on the machine of the GPU that you want",
        )
    return gpu


class _Build:
    def __init__(self, library: Library, messages: Messages, interrupt: Interrupt) -> None:
        self._library, self._trt = library, library.trt
        self._messages, self._interrupt = messages, interrupt
        try:
            self._builder = self._trt.Builder(logger_of(self._trt))
        except Exception as cause:  # pybind11 says only that the factory returned nothing
            raise self._refused("cannot start", hint="check the driver with nvidia-smi") from cause

    def run(
        self, model: OnnxModel, settings: BuildSettings, inputs: Mapping[str, Array] | None, gpu: Gpu | None
    ) -> Built:
        network = self._parse(model)
        tensors = tuple(self._describe(network.get_input(index)) for index in range(network.num_inputs))
        profiles = choose_profiles(tensors, inputs, settings.profiles)
        config = self._configure(settings, gpu)
        if profiles:
            self._add_profile(config, profiles)
        plan = self._builder.build_serialized_network(network, config)
        if plan is None:
            raise self._refused("cannot build the model", hint=_ELSEWHERE)
        return Built(
            plan=bytes(plan),
            inputs=tensors,
            outputs=tuple(self._describe(network.get_output(index)) for index in range(network.num_outputs)),
            profiles=profiles,
            targets=(gpu.target,) if gpu else settings.targets or (PORTABLE,),
            device=gpu.name if gpu else "",
            network_layers=network.num_layers,
        )

    def _parse(self, model: OnnxModel) -> Any:
        trt = self._trt
        # TensorRT 11 has no other kind: precision is what the model says
        network = self._builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger_of(trt))
        if parser.parse_from_file(str(model.path)) if isinstance(model, OnnxFile) else parser.parse(model):
            return network
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        if not errors:
            raise self._refused("cannot parse the model", hint=_ELSEWHERE)
        parser_error = errors[0]
        name = parser_error.node_name() if hasattr(parser_error, "node_name") else ""
        operator = parser_error.node_operator() if hasattr(parser_error, "node_operator") else ""
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise BackendError(
            f"{self._library.title} cannot parse the model: {parser_error.desc().strip()}{more}",
            node=(f"{name} ({operator})" if operator else name) or None,
            hint="check the file with onnx.checker; what TensorRT lacks may run on another backend ('onnxruntime')",
        )

    def _describe(self, network_tensor: Any) -> TensorInfo:
        if network_tensor.is_shape_tensor:
            raise BackendError(
                f"'{network_tensor.name}' is a shape that the model computes with, which this backend does not take",
                hint="export the model with that size fixed, or as a dynamic dimension of another input",
            )
        kind = network_tensor.dtype.name
        return TensorInfo(
            name=network_tensor.name,
            dtype=_DTYPES.get(kind, kind.lower()),
            shape=tuple(int(size) for size in network_tensor.shape),
        )

    def _configure(self, settings: BuildSettings, gpu: Gpu | None) -> Any:
        trt = self._trt
        config = self._builder.create_builder_config()
        # without it the engine does not say what its layers are
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if settings.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
        if settings.optimization_level is not None:
            config.builder_optimization_level = settings.optimization_level
        if settings.targets and gpu is None:
            check_targets(self._library, settings.targets)
            config.num_compute_capabilities = len(settings.targets)
            for index, target in enumerate(settings.targets):
                if not config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index):
                    raise self._refused(f"cannot build for {target}", hint="ask for other devices")
        config.progress_monitor = _monitor(trt, self._interrupt)
        return config

    def _add_profile(self, config: Any, profiles: Mapping[str, Profile]) -> None:
        shapes = self._builder.create_optimization_profile()
        try:
            for name, profile in profiles.items():
                shapes.set_shape(name, profile.min, profile.opt, profile.max)
            added = config.add_optimization_profile(shapes)
        except Exception as cause:
            raise self._refused(f"refused the profiles: {first_line(cause)}", hint="check their shapes") from cause
        if added < 0:
            raise self._refused("refused the profiles", hint="check their shapes")

    def _refused(self, problem: str, *, hint: str) -> BackendError:
        said = self._messages.first_error()
        node = _NAMED_OPERATION.search(said)
        return BackendError(
            f"{self._library.title} {problem}" + (f": {said}" if said else ""),
            node=node.group(1) if node else None,
            hint=hint,
        )


def _monitor(trt: Any, interrupt: Interrupt) -> Any:
    """What TensorRT asks, step by step, whether to go on."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Nothing to do."""

        def phase_finish(self, phase_name: str) -> None:
            """Nothing to do."""

        def step_complete(self, phase_name: str, step: int) -> bool:  # noqa: ARG002 - TensorRT names the step
            return not interrupt.pressed

    return Monitor()
