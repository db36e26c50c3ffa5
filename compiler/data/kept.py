"""What was found out about a network on a set of samples, for whoever asks again."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from ..ir.program import Program
from .calibration_set import CalibrationSet


def kept_for(program: Program, samples: CalibrationSet) -> dict[Any, Any]:
    """The results about a network on these samples (the same object, not equal ones), to be read and added to. They are
    there for as long as both are."""
    return program.derived(_by_samples).setdefault(samples, {})


def first_of(samples: CalibrationSet, count: int) -> CalibrationSet:
    """The first `count` samples, the same object each time: what is kept for them is found again."""
    firsts = _firsts.setdefault(samples, {})
    if count not in firsts:
        firsts[count] = samples.take(slice(0, count))
    return firsts[count]


_firsts: WeakKeyDictionary[CalibrationSet, dict[int, CalibrationSet]] = WeakKeyDictionary()


def _by_samples(program: Program) -> WeakKeyDictionary[CalibrationSet, dict[Any, Any]]:
    del program
    return WeakKeyDictionary()
