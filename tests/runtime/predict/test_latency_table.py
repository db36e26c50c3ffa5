"""The latency table: on a backend whose clock counts layers, sums of segments are exact."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from foldcut.compiler.analysis.provenance import find_units
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.cost import node_macs
from foldcut.compiler.ir.edit_folds import fold_batch_norms
from foldcut.compiler.ir.program import Program
from foldcut.passes.cut.prune_channels import prune_channels
from foldcut.passes.drop.drop_blocks import drop_blocks
from foldcut.passes.quantize.decision import QuantizeLayer
from foldcut.passes.quantize.rewrite import Quantize
from foldcut.passes.quantize.values import quantizable
from foldcut.runtime.measure.conditions import Conditions
from foldcut.runtime.measure.measurement_cache import MeasurementCache
from foldcut.runtime.onnxruntime.backend import OnnxRuntimeBackend
from foldcut.runtime.predict.latency_table import LatencyTable
from foldcut.runtime.predict.reference_network import reference_network

#: The counting backend shows 1 ms and 10 ms a layer; the reference network has three layers.
LAYER, REFERENCE = 10.0, 31.0


@pytest.fixture(autouse=True)
def at_once(quick_measurement: None) -> None:
    """Nothing is warmed up."""


def layers(program: Program) -> int:
    return sum(node_macs(program, node) > 0 for node in program.graph.nodes)


def test_segments_and_one_call_add_up_to_the_network(counting_backend: Any, residual: Program) -> None:
    table = LatencyTable(counting_backend)
    found = table.predict(residual)
    assert sum(s.units for s in found.segments) == pytest.approx(layers(residual) * LAYER / REFERENCE)
    assert found.call == pytest.approx(1 / REFERENCE)
    assert found.units == pytest.approx(table.measure_network(to_onnx(residual)))
    assert found.half_width == pytest.approx(0)
    assert [s.name for s in found.segments] == ["x>relu", "relu>relu_2", "relu_2>relu_4", "relu_4>mean", "mean>linear"]
    assert found.measured == 4  # two blocks are equal


def test_a_rewritten_program_costs_only_its_new_segments(counting_backend: Any, residual: Program) -> None:
    table = LatencyTable(counting_backend)
    before = table.predict(residual)
    (first, *_) = find_regions(residual).blocks
    dropped = table.predict(drop_blocks(residual, [first]))
    assert dropped.measured == 0
    assert dropped.ratio_to(before) == pytest.approx(1 - 2 * LAYER / (1 + LAYER * layers(residual)))
    provenance = find_units(residual)
    group = next(g for g in provenance.prunable if len(g.producers) == 1)
    narrower = table.predict(prune_channels(provenance, group.units[4:]).program)
    assert narrower.measured == 1
    assert narrower.ratio_to(before) == pytest.approx(1)


@pytest.mark.parametrize("on_disk", [False, True], ids=["same-session", "from-disk"])
def test_what_slows_layers_but_not_the_reference_is_taken_out(
    counting_backend: Any, residual: Program, tmp_path: Path, on_disk: bool
) -> None:
    class Disturbed(type(counting_backend)):  # type: ignore[misc]
        """From some moment on everything but the reference network takes twice as long."""

        slow = 1.0

        def load(self, engine: Any, inputs: Any, *, threads: int = 1) -> Any:
            runner = super().load(engine, inputs, threads=threads)
            runner.time_ms *= 1.0 if engine == reference_network() else self.slow
            return runner

    backend = Disturbed()
    table = LatencyTable(backend, cache=MeasurementCache(tmp_path))
    before = table.predict(residual)
    backend.slow = 2.0
    if on_disk:
        table = LatencyTable(backend, cache=MeasurementCache(tmp_path))
    provenance = find_units(residual)
    group = next(g for g in provenance.prunable if len(g.producers) == 1)
    narrower = table.predict(prune_channels(provenance, group.units[4:]).program)
    assert narrower.measured == 1
    assert narrower.ratio_to(before) == pytest.approx(1)


def test_whole_networks_set_the_scale(counting_backend: Any, residual: Program) -> None:
    table = LatencyTable(counting_backend)
    plain = table.predict(residual)
    (first, *_) = find_regions(residual).blocks
    smaller = table.predict(drop_blocks(residual, [first]))
    for _ in range(2):  # the second fit does not come on top of the first
        assert table.fit([(residual, 0.9 * plain.units)]) == pytest.approx(0.9)
    fitted = table.predict(residual)
    assert fitted.units == pytest.approx(0.9 * plain.units)
    assert fitted.call == pytest.approx(0.9 * plain.call)
    again = table.predict(drop_blocks(residual, [first]))
    assert again.ratio_to(fitted) == pytest.approx(smaller.ratio_to(plain))


def test_segments_of_integers_have_a_scale_of_their_own(counting_backend: Any, residual: Program) -> None:
    folded, _ = fold_batch_norms(residual)
    names = list(quantizable(folded))
    integers, mixed = (Quantize().shape(folded, [QuantizeLayer(layer=n) for n in names[k:]]) for k in (0, 2))
    table = LatencyTable(counting_backend)
    plain, rest, part = (table.predict(program) for program in (residual, mixed, integers))
    of_integers = sum(time.units for time in part.segments if time.integers)
    whole = 0.9 * (part.units - of_integers) + 0.5 * of_integers
    measured = [(residual, 0.9 * plain.units), (integers, whole)]
    for pairs in (measured, measured[::-1]):
        assert table.fit(pairs) == pytest.approx(0.9)
        assert table.integer_scale == pytest.approx(0.5)
    of_integers = sum(time.units for time in rest.segments if time.integers)
    assert 0 < of_integers < rest.units - rest.call
    assert table.predict(mixed).units == pytest.approx(0.9 * (rest.units - of_integers) + 0.5 * of_integers)
    assert table.fit([(integers, 2 * part.units)]) == table.integer_scale == pytest.approx(2)
    assert table.fit([(residual, plain.units)]) == table.integer_scale == pytest.approx(1)
    # a network that takes less than its part in floating point says nothing of the rest
    table.fit([(residual, plain.units), (integers, 1e-6 * part.call)])
    assert table.integer_scale == pytest.approx(1)


def test_times_are_kept_on_disk_for_one_place(counting_backend: Any, residual: Program, tmp_path: Path) -> None:
    def table(backend: Any = counting_backend, **conditions: Any) -> LatencyTable:
        return LatencyTable(backend, Conditions(**conditions), cache=MeasurementCache(tmp_path))

    first = table().predict(residual)
    again = table().predict(residual)
    assert (first.measured, again.measured) == (4, 0)
    assert again.segments == first.segments
    assert table(batch=2).predict(residual).measured == 4
    assert table(threads=2).predict(residual).measured == 4
    other = copy.copy(counting_backend)
    other.environment = lambda: {"backend": "counting", "version": 2}
    assert table(other).predict(residual).measured == 4


def test_an_interrupted_measurement_keeps_what_it_had(counting_backend: Any, tmp_path: Path, nets: Any) -> None:
    """More distinct segments than are timed together; Ctrl-C in the second lot."""
    from foldcut.compiler.frontend.capture import capture

    widths = range(2, 14)
    convs = [torch.nn.Conv2d(3 if w == 2 else w - 1, w, 1) for w in widths]
    program = capture(torch.nn.Sequential(*convs).eval(), nets.images())

    def interrupt(_stage: str, done: int, total: int) -> None:
        if done > 0.8 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LatencyTable(counting_backend, cache=MeasurementCache(tmp_path)).predict(program, progress=interrupt)
    again = LatencyTable(counting_backend, cache=MeasurementCache(tmp_path)).predict(program)
    assert again.measured == len(widths) - 8


def test_on_onnx_runtime_every_segment_takes_some_time(transformer: Program) -> None:
    table = LatencyTable(OnnxRuntimeBackend(), rounds=6)
    found = table.predict(transformer)
    assert found.units > 0
    assert sum(s.units for s in found.segments) + found.call == pytest.approx(found.units)
