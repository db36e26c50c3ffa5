"""PyTorch, eager and on the CPU: what the imported graph computes, operator by operator. A reference, not a goal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...compiler.onnx.model_file import OnnxModel, readable
from ...compiler.support.errors import BackendError, CompilerError, first_line
from ..measure.backend import Array, Availability, Clock, Runner, check_threads, closed_runner, run_once
from ..measure.environment import host_environment
from ..measure.inputs import InputSpec, check_inputs, model_specs, onnx_model

if TYPE_CHECKING:
    from ...compiler.ir.program import Program, TensorSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class TorchEngine:
    """An imported model. `specs` are the inputs that it takes: the file's, with what importing fixed."""

    program: Program
    specs: tuple[InputSpec, ...]


class TorchBackend:
    """The ONNX file as a `torch.fx` module, run eagerly: no fusion, no layouts, an allocation for each value."""

    @property
    def name(self) -> str:
        """``torch``."""
        return "torch"

    def available(self) -> Availability:
        """Say whether what importing an ONNX file takes is here."""
        try:
            import onnx  # noqa: F401
            import onnx_graphsurgeon  # noqa: F401
            import onnxruntime  # noqa: F401
            import torch  # noqa: F401
        except Exception as error:  # an ImportError, or an OSError from one of their libraries
            reason = f"pip install torch onnx onnx-graphsurgeon onnxruntime ({first_line(error)})"
            return Availability(can_build=False, can_run=False, reason=reason)
        return Availability(can_build=True, can_run=True, reason="")

    def build(self, model: OnnxModel, inputs: Mapping[str, Array] | None = None) -> TorchEngine:
        """Import an ONNX model; the result is compared with ONNX Runtime on `inputs`, or on random ones.

        A network whose other dimensions cannot stay dynamic is built for those of `inputs`. Raises BackendError: the
        model cannot be imported, `inputs` are not the model's, or there are none and a dimension needs a size.
        """
        import torch

        from ...compiler.onnx_import.importer import import_onnx

        content = onnx_model(model, "The torch backend")
        specs = model_specs(content)
        example = None
        if inputs is not None:
            check_inputs(specs, inputs)
            example = {name: torch.from_numpy(np.array(array, order="C", copy=True)) for name, array in inputs.items()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # they speak of what compiling would need
                program = import_onnx(readable(content), example)
        except CompilerError as cause:
            raise BackendError(
                f"torch cannot run the model: {cause.message}",
                node=cause.node,
                expected=cause.expected,
                actual=cause.actual,
                hint=cause.hint or "use the backend onnxruntime",
            ) from cause
        return TorchEngine(program=program, specs=tuple(map(_narrowed, specs, program.inputs)))

    def load(self, engine: object, inputs: Mapping[str, Array], *, threads: int = 1) -> Runner:
        """Copy `inputs` and run once, so that faults show here.

        Raises BackendError: the engine is not one of `build`, the inputs' names, dtypes or shapes are not the
        model's, or the first inference fails.
        """
        check_threads(threads)
        if not isinstance(engine, TorchEngine):
            raise BackendError(
                "torch loads what TorchBackend.build returned",
                expected="TorchEngine",
                actual=type(engine).__name__,
                hint="load(build(model), inputs)",
            )
        check_inputs(engine.specs, inputs)
        return TorchRunner(engine, inputs, threads=threads)

    def environment(self) -> dict[str, str | int]:
        """Describe the host, and torch's version."""
        import torch

        return {**host_environment(), "backend": self.name, "torch": str(torch.__version__), "device": "CPU"}


class TorchRunner:
    """An fx module with its inputs. Made by `TorchBackend.load`; runs once when made."""

    def __init__(self, engine: TorchEngine, inputs: Mapping[str, Array], *, threads: int) -> None:
        import torch

        self._threads = threads
        self._module: Any = engine.program.module
        leaves = [torch.from_numpy(np.array(inputs[spec.name], order="C", copy=True)) for spec in engine.specs]
        self._args, self._kwargs = engine.program.structure(leaves)
        self._values: Any = None
        run_once(self)

    @property
    def clock(self) -> Clock:
        """``thread_cpu`` on one thread, where torch computes on the calling thread, else ``wall``."""
        return "thread_cpu" if self._threads == 1 else "wall"

    def run(self) -> None:
        """Run one inference. Raises BackendError if torch fails or the runner was closed."""
        import torch

        module = self._module
        if module is None:
            raise closed_runner()
        try:
            with torch_threads(self._threads), torch.inference_mode():
                self._values = module(*self._args, **self._kwargs)
        except Exception as error:
            raise BackendError(
                f"torch could not run the model: {first_line(error)}",
                hint="check that the inputs' sizes and values fit each other and the model",
            ) from error

    def outputs(self) -> tuple[Array, ...]:
        """Copy out the outputs of the last run, in the model's order.

        Raises BackendError after `close`, and for an output of a type that numpy does not have.
        """
        from ...compiler.ir.compare import flatten_outputs

        if self._module is None:
            raise closed_runner()
        try:
            return tuple(np.array(value.detach().numpy(), copy=True) for value in flatten_outputs(self._values))
        except TypeError as error:
            raise BackendError(
                f"an output has a type that numpy does not have: {first_line(error)}",
                hint="let the model cast its output",
            ) from error

    def close(self) -> None:
        """Free the module and its values."""
        self._module = self._values = None
        self._args, self._kwargs = (), {}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with `count` threads inside, and with as many as before outside. The number is one for the
    whole process, so another thread that uses torch meanwhile sees it too."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _narrowed(spec: InputSpec, traced: TensorSpec) -> InputSpec:
    """The input as the file declares it, with the dimensions that importing has fixed."""
    if len(spec.shape) != len(traced.shape):  # a rank that the file does not declare is that of the example
        return replace(spec, shape=traced.shape)
    shape = (
        have if isinstance(have, int) else declared for declared, have in zip(spec.shape, traced.shape, strict=True)
    )
    return replace(spec, shape=tuple(shape))
