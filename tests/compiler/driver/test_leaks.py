"""Whatever fails on the way, no network stays loaded: a backend that counts, and fails at each step in turn."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.edit import bypass
from foldcut.compiler.ir.program import Program
from foldcut.compiler.store.analysis_store import NOTHING_KEPT
from foldcut.compiler.support.errors import BackendError, MimicError
from foldcut.passes.drop.region_latency import region_savings
from foldcut.passes.mimic import stored
from foldcut.passes.mimic import training as mimic_training
from foldcut.passes.mimic.training import Lesson
from foldcut.passes.mimic.training_stage import mimic
from foldcut.runtime.measure.backend import run_once
from foldcut.runtime.measure.conditions import Conditions
from foldcut.runtime.onnxruntime.backend import OnnxRuntimeBackend, OnnxRuntimeRunner
from foldcut.runtime.probe.latency_probe import LatencyProbe
from foldcut.runtime.probe.stored_latency import StoredLatency
from torch import nn

pytestmark = pytest.mark.usefixtures("quick_measurement")


class Watched:
    """A backend that counts what it has open, and fails at one load, one build or one inference of all."""

    def __init__(self, inner: Any, *, load: int = 0, build: int = 0) -> None:
        self.inner, self.fail_load, self.fail_build = inner, load, build
        self.loads = self.builds = self.open = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def build(self, model: bytes, inputs: Any = None) -> Any:
        self.builds += 1
        if self.builds == self.fail_build:
            raise BackendError("this model is not built")
        return self.inner.build(model, inputs)

    def load(self, engine: Any, inputs: Any, *, threads: int = 1) -> Any:
        self.loads += 1
        if self.loads == self.fail_load:
            raise BackendError("no memory left")
        runner = self.inner.load(engine, inputs, threads=threads)
        self.open += 1
        left = [runner]

        def close() -> None:
            if left:  # closing twice is allowed, and one network all the same
                left.pop()
                self.open -= 1

        runner.close = close
        return runner


def probe_of(backend: Any, program: Program, nets: SimpleNamespace) -> LatencyProbe:
    model = to_onnx(program)
    samples = CalibrationSet.of(nets.images(3))
    return LatencyProbe(program, model, backend, samples, Conditions(batch=2), deployed=model + b"")


@pytest.mark.parametrize("step", ["load", "build"])
@pytest.mark.parametrize("number", [1, 2])
def test_an_original_that_is_loaded_by_half(
    residual: Program, counting_backend: Any, nets: SimpleNamespace, step: str, number: int
) -> None:
    """The file that runs today and the export of it are two networks; one of them may fail."""
    backend = Watched(counting_backend, **{step: number})
    with pytest.raises(BackendError):
        probe_of(backend, residual, nets)
    assert backend.loads + backend.builds > 0
    assert backend.open == 0


@pytest.mark.parametrize("step", ["load", "build"])
@pytest.mark.parametrize("number", [3, 4])
def test_variants_of_which_one_fails(
    residual: Program, counting_backend: Any, nets: SimpleNamespace, step: str, number: int
) -> None:
    backend = Watched(counting_backend, **{step: number})
    probe = probe_of(backend, residual, nets)
    regions = find_regions(residual).regions  # of two kinds
    with pytest.raises(BackendError):
        region_savings(StoredLatency(NOTHING_KEPT, probe), regions)
    assert backend.open == 2
    probe.close()
    assert backend.open == 0


def test_an_original_whose_closing_fails(residual: Program, counting_backend: Any, nets: SimpleNamespace) -> None:
    backend = Watched(counting_backend)
    probe = probe_of(backend, residual, nets)

    def refuse() -> None:
        raise BackendError("the device is gone")

    (original,) = probe._held.values()
    original.close = refuse  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="the device is gone"):
        probe.close()
    assert backend.open == 1


@pytest.mark.parametrize("limit", [-1.0, float("nan")])
def test_a_limit_that_is_none_loads_nothing(
    residual_net: nn.Module, counting_backend: Any, nets: SimpleNamespace, limit: float
) -> None:
    backend: Any = Watched(counting_backend)
    settings = foldcut.PipelineSettings(search_seconds=limit, mimic=None)
    with pytest.raises(foldcut.GoalError, match="a search cannot take"):
        foldcut.compile(
            residual_net, nets.images(16), goal=foldcut.Latency(0.8), backend=backend, settings=settings, progress=False
        )
    assert backend.open == 0


@pytest.mark.parametrize("number", [2, 3, 5, 9, 13, 20])
def test_a_compile_that_fails_at_a_load(
    residual: Program, counting_backend: Any, nets: SimpleNamespace, tmp_path: Path, number: int
) -> None:
    backend: Any = Watched(counting_backend, load=number)
    path = tmp_path / "net.onnx"
    path.write_bytes(to_onnx(residual))
    options: dict[str, Any] = {"backend": backend, "mimic": False, "progress": False, "cache": False}
    with pytest.raises(BackendError, match="no memory left"):
        foldcut.compile(path, nets.images(16), goal=foldcut.Latency(0.8), rewrites=("drop_blocks",), **options)
    assert backend.loads == number
    assert backend.open == 0


def test_a_runner_whose_first_inference_fails_is_closed(monkeypatch: pytest.MonkeyPatch, residual: Program) -> None:
    """The error's traceback holds the runner, and with it the network."""
    closed: list[bool] = []
    monkeypatch.setattr(OnnxRuntimeRunner, "close", lambda self: closed.append(True))
    monkeypatch.setattr(OnnxRuntimeRunner, "run", lambda self: run_once_failing())
    backend = OnnxRuntimeBackend()
    with pytest.raises(BackendError, match="gone"):
        backend.load(to_onnx(residual), {"x": torch.zeros(1, 3, 8, 8).numpy()})
    assert closed == [True]


def run_once_failing() -> None:
    raise BackendError("gone")


def test_an_interrupt_in_the_first_inference_closes_too() -> None:
    class Interrupted:
        clock = "wall"
        closed = False

        def run(self) -> None:
            raise KeyboardInterrupt

        def outputs(self) -> tuple[Any, ...]:
            return ()

        def close(self) -> None:
            self.closed = True

    runner: Any = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run_once(runner)
    assert runner.closed


@pytest.fixture
def student_of(contexts: Any, nets: SimpleNamespace) -> Any:
    """Makes the network that mimicking leaves of one without a block."""

    def mimicked(residual: Program) -> Program:
        ctx = contexts(residual, CalibrationSet.of(nets.images(8)))
        student = foldcut.Applied(program=bypass(residual, "relu", "relu_2"))
        return stored.mimicked(ctx, student, foldcut.MimicSettings(iterations=2)).program

    return mimicked


@pytest.mark.parametrize("fault", [RuntimeError("shapes do not fit"), torch.OutOfMemoryError("full"), KeyError("x")])
def test_a_fault_while_mimicking_is_not_hidden(
    residual: Program, student_of: Any, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fail(self: Any) -> bool:
        raise fault

    monkeypatch.setattr(mimic_training.Training, "step", fail)
    with pytest.raises(type(fault), match=str(fault.args[0])):
        student_of(residual)


@torch.library.custom_op("foldcut_tests::without_gradient", mutates_args=())
def without_gradient(x: torch.Tensor) -> torch.Tensor:
    """An operator that nobody has registered a gradient for."""
    return x.clone()


@pytest.mark.parametrize("operation", [without_gradient, lambda x: torch.special.zeta(x.abs() + 2, x.abs() + 2)])
def test_an_operator_without_a_gradient_is_said(
    residual: Program, student_of: Any, nets: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, operation: Any
) -> None:
    """That is no fault: the network stays as it was re-solved."""
    real = mimic_training.Training._loss
    monkeypatch.setattr(mimic_training.Training, "_loss", lambda *given: operation(real(*given)))
    with pytest.warns(UserWarning, match="the re-solved network is kept: an operator has no gradient"):
        kept = student_of(residual)
    assert len(kept.history) == len(residual.history) + 1
    with pytest.raises(MimicError, match="no gradient"):
        samples = CalibrationSet.of(nets.images(8))
        lesson = Lesson(teacher=residual, student=kept, fit=samples, judge=samples)
        mimic(lesson, foldcut.MimicSettings(iterations=2))
