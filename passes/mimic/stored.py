"""Mimicking with its result kept."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.ir.program import Program
from ...compiler.store.analysis_store import AnalysisStore, Tensors
from ...compiler.store.changed_tensors import changed, with_changes
from ...compiler.support.errors import MimicError
from ...compiler.support.progress import Progress, silent
from ..solve.targets import Kept
from .settings import MimicSettings
from .training_stage import mimic


def mimicked(
    store: AnalysisStore,
    teacher: Program,
    student: Program,
    calibration: CalibrationSet,
    held_out: CalibrationSet,
    *,
    kept: Mapping[str, Kept],
    settings: MimicSettings,
    seed: int,
    progress: Progress = silent,
) -> Program:
    """The student after `mimic`, or what it came to before; as it was, with a warning, when it cannot be trained (an
    operator without a gradient). A training that was cut off goes on from the last state that was kept."""

    inputs = [teacher, student, calibration, held_out, kept, settings, seed]

    def compute() -> tuple[dict[str, Any], Tensors]:
        found = mimic(
            teacher,
            student,
            calibration,
            held_out,
            kept=kept,
            settings=settings,
            seed=seed,
            progress=progress,
            checkpoint=store.checkpoint("mimic", inputs),
        )
        return with_changes({}, student, found.program)

    try:
        return changed(student, *store.result("mimic", inputs, compute))
    except MimicError as cause:
        warnings.warn(f"mimicking failed, the re-solved network is kept: {cause.message}", stacklevel=2)
        return student
