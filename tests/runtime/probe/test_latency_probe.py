"""What plans save, on a backend whose latency is known: 1 ms and 10 ms for each layer."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.edit import bypass
from foldcut.compiler.ir.program import Program
from foldcut.compiler.store.analysis_store import NOTHING_KEPT
from foldcut.passes.drop.drop_blocks import drop_blocks
from foldcut.passes.drop.region_latency import region_savings
from foldcut.runtime.measure.conditions import Conditions
from foldcut.runtime.probe import latency_probe
from foldcut.runtime.probe.latency_probe import LatencyProbe, example_inputs
from foldcut.runtime.probe.stored_latency import StoredLatency

pytestmark = pytest.mark.usefixtures("quick_measurement")
#: seven convolutions and the head
ALL = 81.0


@pytest.fixture(scope="module")
def probe(residual: Program, counting_backend: Any, nets: SimpleNamespace) -> Iterator[LatencyProbe]:
    samples = CalibrationSet.of(nets.images(3))
    made = LatencyProbe(residual, to_onnx(residual), counting_backend, samples, Conditions(batch=2))
    yield made
    made.close()


def test_each_block_saves_its_two_convolutions(probe: LatencyProbe, residual: Program) -> None:
    blocks = find_regions(residual).blocks
    assert region_savings(StoredLatency(NOTHING_KEPT, probe), blocks) == {
        r.name: pytest.approx(20 / ALL) for r in blocks
    }


def test_regions_of_one_kind_are_measured_once(
    probe: LatencyProbe, residual: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    real = latency_probe.measure_savings

    def counted(reference: Any, variants: Any, *how: Any, **options: Any) -> Any:
        measured.append(len(variants))
        return real(reference, variants, *how, **options)

    monkeypatch.setattr(latency_probe, "measure_savings", counted)
    regions = find_regions(residual).regions
    savings = region_savings(StoredLatency(NOTHING_KEPT, probe), regions)
    assert set(savings) == {r.name for r in regions}
    assert measured == [2]
    assert {r.kind: savings[r.name] for r in regions} == {
        "residual": pytest.approx(20 / ALL),
        "plain": pytest.approx(10 / ALL),
    }


def test_the_ratio_of_a_plan(probe: LatencyProbe, residual: Program) -> None:
    blocks = find_regions(residual).blocks
    assert probe.against(residual).ratio == pytest.approx(1)
    assert probe.against(drop_blocks(residual, [blocks[2], blocks[0]])).ratio == pytest.approx((ALL - 40) / ALL)


def test_the_finished_model(probe: LatencyProbe, residual: Program) -> None:
    measured = probe.final(to_onnx(bypass(residual, "relu", "relu_2")))
    assert measured.ratio == pytest.approx((ALL - 20) / ALL)
    assert measured.environment == {"backend": "counting", "threads": 1, "batch": 2}
    assert measured.before_ms == pytest.approx(ALL)


def test_progress_is_shown(probe: LatencyProbe, residual: Program) -> None:
    seen: list[tuple[str, int, int]] = []
    latency = StoredLatency(NOTHING_KEPT, probe)
    region_savings(latency, find_regions(residual).blocks[:1], progress=lambda *state: seen.append(state))
    assert seen[-1][1] == seen[-1][2] == len(seen)


def test_plans_are_measured_in_the_opset_that_is_delivered(
    residual: Program, counting_backend: Any, nets: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = CalibrationSet.of(nets.images(3))
    made = LatencyProbe(residual, to_onnx(residual, opset=15), counting_backend, samples, Conditions(batch=2, opset=15))
    built: list[bytes] = []
    real = made.backend.build

    def build(model: bytes, *rest: Any) -> Any:
        built.append(model)
        return real(model, *rest)

    monkeypatch.setattr(made.backend, "build", build)
    made.against(residual)
    made.table().predict(residual)
    made.close()
    opsets = [
        {o.version for o in onnx.load_from_string(model).opset_import if o.domain in {"", "ai.onnx"}} for model in built
    ]
    own = [version for version in opsets if version == {15}]
    assert opsets[0] == {15}
    assert len(own) >= len(built) - 1  # but for the reference network, which is the table's


def test_samples_are_repeated_to_fill_a_batch(residual: Program) -> None:
    x = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    inputs = example_inputs(residual, CalibrationSet.of(x), 5)
    assert list(inputs) == ["x"]
    assert inputs["x"].shape == (5, 3, 8, 8)
    assert inputs["x"][:, 0, 0, 0].tolist() == [0, 1, 0, 1, 0]
    assert inputs["x"].flags["C_CONTIGUOUS"]
    assert inputs["x"].dtype == np.float32
