"""Solves on another device: nothing mixes, nothing waits in a loop over batches, and the results are the CPU's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.output_error import errors_by_output, output_error
from foldcut.compiler.data.sampled_error import sampled_error
from foldcut.compiler.export.edit_device import moved
from foldcut.compiler.ir.program import Program
from foldcut.passes.drop.drop_blocks import changes_of_drops, drop_blocks
from foldcut.passes.solve.layers import find_layers
from foldcut.passes.solve.moments import collect_moments
from foldcut.passes.solve.resolve_network import Resolved, ResolveSettings, resolve_network

SETTINGS = ResolveSettings(batch_size=6, refine=1, guard_samples=24)
CPU = torch.device("cpu")


def resolved_on(
    device: torch.device, teacher: Program, samples: CalibrationSet, settings: ResolveSettings = SETTINGS
) -> Resolved:
    regions = [find_regions(teacher).blocks[1]]
    student = moved(drop_blocks(teacher, regions), device)
    return resolve_network(moved(teacher, device), student, samples, changes_of_drops(regions), settings=settings)


def assert_alike(here: Resolved, there: Resolved) -> None:
    assert len(here.layers) == len(there.layers) >= 2
    for a, b in zip(here.layers, there.layers, strict=True):
        assert a.node == b.node and b.after == pytest.approx(a.after, rel=1e-4)
    wanted, found = here.program.module.state_dict(), there.program.module.state_dict()
    assert wanted.keys() == found.keys()
    for name, value in found.items():
        assert value.device.type == "elsewhere"
        torch.testing.assert_close(value.cpu(), wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "transformer", "inverted"])
def test_a_whole_solve(
    name: str, request: pytest.FixtureRequest, nets: SimpleNamespace, elsewhere: SimpleNamespace
) -> None:
    teacher = request.getfixturevalue(name)
    data = nets.tokens(24) if name == "transformer" else nets.images(24)
    samples = CalibrationSet.of(data)
    here = resolved_on(CPU, teacher, samples)
    assert_alike(here, resolved_on(elsewhere.device, teacher, samples))


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_nothing_waits_in_a_loop_over_batches(
    name: str, request: pytest.FixtureRequest, nets: SimpleNamespace, elsewhere: SimpleNamespace
) -> None:
    """Twice as many batches of the same samples, thinned: as many waits at the same places."""
    teacher = request.getfixturevalue(name)
    samples = CalibrationSet.of(nets.tokens(48) if name == "transformer" else nets.images(48))
    found = []
    for size in (12, 6):
        with elsewhere.watched() as waits:
            settings = replace(SETTINGS, batch_size=size, rows_per_column=2, guard_samples=48)
            resolved_on(elsewhere.device, teacher, samples, settings)
        # a solve never sees a batch, but tries other ridges where the held-out rows are others
        found.append(Counter(place for place in waits if not place.startswith("closed_form.py")))
    assert found[0].total() > 10
    assert found[0] == found[1]


def test_frontiers_come_back_from_files(residual: Program, nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    samples = CalibrationSet.of(nets.images(24))
    settings = replace(SETTINGS, ram_bytes=0)
    here = resolved_on(CPU, residual, samples, settings)
    assert_alike(here, resolved_on(elsewhere.device, residual, samples, settings))


def test_a_device_without_float64(residual: Program, nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    """Moments are added up in compensated float32 there, and solved from in float64 on the CPU."""
    samples = CalibrationSet.of(nets.images(24))
    here = resolved_on(CPU, residual, samples)
    with elsewhere.without_float64():
        there = resolved_on(elsewhere.device, residual, samples)
        assert_alike(here, there)
        program = moved(residual, elsewhere.device)
        error = output_error(program, there.program, samples)
    assert error == pytest.approx(output_error(residual, here.program, samples), rel=1e-4)


def test_compensated_moments_lose_nothing(residual: Program, nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    """48 batches of one sample: plain float32 sums would be off by several roundings."""
    samples, layers = CalibrationSet.of(nets.images(48)), find_layers(residual)[0]
    wanted = collect_moments(residual, layers, samples, batch_size=1)
    with elsewhere.without_float64():
        found = collect_moments(moved(residual, elsewhere.device), layers, samples, batch_size=1)
    for name, moments in wanted.items():
        assert found[name].gram.device == CPU and found[name].gram.dtype == torch.float64
        torch.testing.assert_close(found[name].gram, moments.gram, rtol=2e-7, atol=0)


def test_errors_of_outputs(residual: Program, nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    samples = CalibrationSet.of(nets.images(20))
    student = drop_blocks(residual, [find_regions(residual).blocks[1]])
    there = moved(residual, elsewhere.device), moved(student, elsewhere.device)
    assert output_error(*there, samples) == pytest.approx(output_error(residual, student, samples), rel=1e-4)
    assert errors_by_output(*there, samples) == pytest.approx(errors_by_output(residual, student, samples), rel=1e-4)
    here, elsewhere_found = sampled_error(residual, student, samples), sampled_error(*there, samples)
    assert elsewhere_found.error == pytest.approx(here.error, rel=1e-4)
    with elsewhere.watched() as waits:
        for size in (4, 2):
            output_error(*there, samples, size)
    assert len(waits) == 2
