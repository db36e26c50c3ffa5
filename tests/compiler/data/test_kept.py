"""Results about a network on a set of samples are kept for as long as both are there."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import foldcut
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.kept import first_of, kept_for
from foldcut.compiler.data.output_error import output_error


def test_each_network_and_each_set_has_its_own(residual: foldcut.Program, nets: SimpleNamespace) -> None:
    one, other = (CalibrationSet.of(nets.images(4, seed=seed)) for seed in (0, 1))
    kept_for(residual, one)["a"] = 1
    assert kept_for(residual, one) == {"a": 1} and kept_for(residual, other) == {}


def test_they_go_with_the_samples(residual: foldcut.Program, nets: SimpleNamespace) -> None:
    samples = CalibrationSet.of(nets.images(4))
    result = weakref.ref(kept_for(residual, samples).setdefault("outputs", torch.zeros(1)))
    assert result() is not None
    del samples
    gc.collect()
    assert result() is None


def test_errors_are_the_same_from_kept_outputs(
    residual: foldcut.Program, nets: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, ran = CalibrationSet.of(nets.images(16)), []
    student, equal = (foldcut.capture(nets.seeded(lambda: nets.ResNet(1, 8)), nets.images(2)) for _ in range(2))
    call = foldcut.Program.__call__
    monkeypatch.setattr(foldcut.Program, "__call__", lambda self, batch: ran.append(self) or call(self, batch))
    first, second, third = (output_error(residual, s, samples, batch_size=2) for s in (student, equal, student))
    assert first == second == third > 0
    assert ran.count(residual) == ran.count(student) == ran.count(equal) == 8, "the third is kept"
    assert output_error(residual, student, samples, batch_size=5) == pytest.approx(first)


def test_the_first_samples_are_the_same_object_each_time(nets: SimpleNamespace) -> None:
    samples = CalibrationSet.of(nets.images(4))
    first = first_of(samples, 3)
    assert first_of(samples, 3) is first and first_of(samples, 2) is not first
    assert len(first) == 3 and torch.equal(first.leaves[0], samples.leaves[0][:3])
    gone = weakref.ref(first)
    del samples, first
    gc.collect()
    assert gone() is None
