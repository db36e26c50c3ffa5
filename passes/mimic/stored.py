"""Mimicking with its result kept."""

from __future__ import annotations

import warnings
from typing import Any

from ...compiler.ir.program import Program
from ...compiler.rewrite.context import Context
from ...compiler.rewrite.rewrite import Applied
from ...compiler.store.analysis_store import Tensors
from ...compiler.store.changed_tensors import changed, with_changes
from ...compiler.support.errors import MimicError
from .settings import MimicSettings
from .training import Lesson
from .training_stage import mimic


def mimicked(ctx: Context, done: Applied, settings: MimicSettings) -> Program:
    """The network after `mimic`, or the result of before; as it was, with a warning, when it cannot be trained (an
    operator without a gradient). A training that was cut off goes on from the last state that was kept."""
    lesson = Lesson(
        teacher=ctx.teacher,
        student=done.program,
        fit=ctx.fit,
        judge=ctx.judge,
        kept=done.changes.kept,
        seed=ctx.seed,
    )

    def compute() -> tuple[dict[str, Any], Tensors]:
        found = mimic(lesson, settings, progress=ctx.progress, checkpoint=ctx.store.checkpoint("mimic", inputs))
        return with_changes({}, done.program, found.program)

    inputs = [lesson, settings]
    try:
        return changed(done.program, *ctx.store.result("mimic", inputs, compute))
    except MimicError as cause:
        warnings.warn(f"mimicking failed, the re-solved network is kept: {cause.message}", stacklevel=2)
        return done.program
