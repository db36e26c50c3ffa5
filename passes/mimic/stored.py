"""Mimicking where it can pay, with its result kept."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
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

#: A relative squared error of the outputs that counts as none: a thousandth of their size.
EXACT = 1e-6


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The network after mimicking; `skipped` says why it is as it was, where nothing was trained."""

    program: Program
    skipped: str | None = None


def mimicked(ctx: Context, done: Applied, settings: MimicSettings) -> Trained:
    """The network after `mimic`, or the result of before; as it was where that cannot pay, and, with a warning, where
    it cannot be trained (an operator without a gradient) or has no room. A training that was cut off goes on from the
    last state that was kept."""
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
        said = {"skipped": found.skipped, "said": list(found.said)}
        return with_changes(said, done.program, found.program)

    inputs = [lesson, settings]
    skipped = unneeded(ctx, done, settings)
    if skipped is not None:
        return Trained(program=done.program, skipped=skipped)
    try:
        data, tensors = ctx.store.result("mimic", inputs, compute)
    except MimicError as cause:
        warnings.warn(f"mimicking failed, the re-solved network is kept: {cause.message}", stacklevel=2)
        return Trained(program=done.program, skipped=cause.message)
    for words in data["said"]:
        warnings.warn(words, stacklevel=2)
    return Trained(program=changed(done.program, data, tensors), skipped=data["skipped"])


def unneeded(ctx: Context, done: Applied, settings: MimicSettings) -> str | None:
    """Why mimicking cannot pay, as far as that is known without a look at the network; None where it may."""
    if settings.seconds == 0:
        return "it was given 0 seconds"
    error = list(done.errors.values())[-1] if done.errors else None
    if error is not None and error <= EXACT and ctx.goal.within(error):
        return f"the output error is {error:.1e} without it, which counts as none"
    # few samples of their own can help, and what judges sees to it that they do no harm; nothing does where these are
    # the same samples
    if ctx.sets.shared and set(ctx.judge.digests) <= set(ctx.fit.digests):
        return "the samples that would judge it are those that it would be trained on: give three or more that differ"
    return None
