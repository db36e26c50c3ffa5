"""The channel lattice: read off staircases that are known, on a backend whose clock is a staircase."""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from foldcut.compiler.ir.program import Program
from foldcut.runtime.measure.backend import Array, Availability
from foldcut.runtime.measure.conditions import Conditions
from foldcut.runtime.measure.measurement_cache import MeasurementCache
from foldcut.runtime.predict.integer_kernels import IntegerKernels
from foldcut.runtime.predict.lattice import COUNTS, MULTIPLES, Lattice, kinds_in, lattice_step, probe_lattice
from hypothesis import given
from hypothesis import strategies as st

INTEGERS = IntegerKernels()
POINTS = sorted({64, *COUNTS, *(-(-c // m) * m for c in COUNTS for m in MULTIPLES)})


def staircase(time: Callable[[int], float], noise: float = 0.0, seed: int = 0) -> dict[int, list[float]]:
    generator = np.random.default_rng(seed)
    return {c: list(time(c) * np.exp(noise * generator.standard_normal(16))) for c in POINTS}


@given(st.sampled_from(MULTIPLES), st.integers(0, 1000))
def test_a_staircase_gives_its_step(width: int, seed: int) -> None:
    samples = staircase(lambda c: float(-(-c // width)), noise=0.01, seed=seed)
    assert lattice_step(samples) == width


@given(st.floats(0.5, 1.0), st.integers(0, 1000))
def test_time_that_grows_with_every_channel_has_no_lattice(power: float, seed: int) -> None:
    assert lattice_step(staircase(lambda c: c**power, noise=0.002, seed=seed)) == 1


def test_odd_counts_that_cost_more_are_raised() -> None:
    """As ONNX Runtime on the CPU does without multiples of 4, apart from that in proportion."""
    assert lattice_step(staircase(lambda c: c * (1.0 if c % 4 == 0 else 1.5))) == 4


class StaircaseRunner:
    """Its clock shows the multiply-accumulates with channels rounded up; it computes nothing."""

    clock = "cuda"

    def __init__(self, model: bytes, step: int) -> None:
        weights = [t.dims for t in onnx.load_model_from_string(model).graph.initializer]
        self.time_ms = sum(math.prod(-(-d // step) * step for d in dims) for dims in weights) / 1e3

    def run(self) -> None: ...

    def elapsed_ms(self) -> float:
        return self.time_ms

    def outputs(self) -> tuple[Array, ...]:
        return ()

    def close(self) -> None: ...


class StaircaseBackend:
    name = "staircase"

    def __init__(self, step: int, version: int = 1) -> None:
        self.step, self.version, self.built = step, version, 0

    def available(self) -> Availability:
        return Availability(can_build=True, can_run=True, reason="")

    def build(self, model: bytes, inputs: Mapping[str, Array] | None = None) -> bytes:
        self.built += 1
        return model

    def load(self, engine: Any, inputs: Mapping[str, Array], *, threads: int = 1) -> StaircaseRunner:
        return StaircaseRunner(engine, self.step)

    def environment(self) -> dict[str, str | int]:
        return {"backend": self.name, "version": self.version, "load_1min": str(self.built)}


@pytest.fixture(autouse=True)
def at_once(quick_measurement: None) -> None:
    """Nothing is warmed up."""


def test_probes_show_the_backends_step() -> None:
    lattice = probe_lattice(StaircaseBackend(8))
    assert lattice.steps["conv"] == lattice.steps["linear"] == 8
    assert lattice.times["conv"][64] == 1.0
    assert lattice.times["conv"][33] == pytest.approx(40 / 64)


def test_it_is_probed_once_for_each_environment(tmp_path: Any) -> None:
    backend = StaircaseBackend(16)
    first = probe_lattice(backend, cache=MeasurementCache(tmp_path))
    built = backend.built
    assert built > 0
    assert probe_lattice(backend, cache=MeasurementCache(tmp_path)) == first  # though the load has changed
    assert backend.built == built
    for other in (Conditions(threads=2), Conditions(batch=4)):
        probe_lattice(backend, cache=MeasurementCache(tmp_path), conditions=other)
        assert backend.built > built
        built = backend.built
    newer = StaircaseBackend(4, version=2)
    assert probe_lattice(newer, cache=MeasurementCache(tmp_path)).steps["conv"] == 4


def test_kinds_of_layers_are_probed_as_they_are_asked_for(tmp_path: Any) -> None:
    backend, cache = StaircaseBackend(8), MeasurementCache(tmp_path)
    some = probe_lattice(backend, cache=cache, kinds=("depthwise",))
    assert set(some.steps) == {"depthwise"}
    built = backend.built
    found = probe_lattice(backend, cache=cache)
    assert backend.built == 3 * built
    assert set(found.steps) == {"conv", "depthwise", "linear"} and found.times["depthwise"] == some.times["depthwise"]
    assert probe_lattice(backend, cache=cache, kinds=(), integers=INTEGERS).steps == {}
    probe_lattice(backend, cache=cache, kinds=("conv",), integers=INTEGERS)
    assert backend.built == 4 * built  # floating point says nothing about integers


@pytest.mark.parametrize("kind", ["conv", "depthwise", "linear"])
def test_layers_in_integers_are_computed_in_integers(kind: str, tmp_path: Any) -> None:
    """ONNX Runtime joins layer, ReLU and rounding to one operator, as it does in real networks."""
    seen: list[bytes] = []

    class Looking(StaircaseBackend):
        def build(self, model: bytes, inputs: Mapping[str, Array] | None = None) -> bytes:
            seen.append(model)
            return model

    probe_lattice(Looking(1), kinds=(kind,), integers=INTEGERS)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    ort.InferenceSession(seen[0], options, providers=["CPUExecutionProvider"])
    names = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert not {"Conv", "FusedConv", "MatMul", "Relu"}.intersection(names)
    assert sum(name in {"QLinearConv", "QLinearMatMul"} for name in names) == (3 if kind == "depthwise" else 2)


def test_progress_ends_at_its_total() -> None:
    seen: list[tuple[int, int]] = []
    probe_lattice(StaircaseBackend(8), progress=lambda _stage, done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)


LATTICE = Lattice(steps={"conv": 16, "depthwise": 8, "linear": 2}, times={})


def test_each_layer_has_the_step_of_its_kind(inverted: Program, nets: SimpleNamespace) -> None:
    steps = {name: LATTICE.step_of(inverted, name) for name in inverted.nodes}
    convs = [node for node in inverted.graph.nodes if "conv" in str(node.target)]
    grouped = {conv.name for conv in convs if conv.args[-1] != 1 and len(conv.args) == 7}
    assert grouped and all(steps[conv.name] == (8 if conv.name in grouped else 16) for conv in convs)
    assert {steps[name] for name in steps if "relu" in name} == {1}
    assert kinds_in(inverted, [conv.name for conv in convs]) == {"conv", "depthwise"}


def test_the_layers_of_a_network_decide(residual: Program, transformer: Program) -> None:
    assert LATTICE.multiple_for(residual) == 16
    assert LATTICE.multiple_for(transformer) == 2


def test_depthwise_layers_are_a_kind_of_their_own(inverted: Program, nets: SimpleNamespace) -> None:
    steps = {"conv": 1, "depthwise": 8, "linear": 1}
    assert Lattice(steps=steps, times={}).multiple_for(inverted) == 8
