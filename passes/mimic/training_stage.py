"""Feature mimicking: gradient descent on the difference between student and teacher features, from unlabelled inputs.

The loss is, over the features before the head and over *hints* (the last stream of each shape, where a stage ends),

    L = sum_f  ||S_f(x) - T_f(x)||^2 / ||T_f||^2     (+ the same for the outputs, times `outputs`)

(the feature term is PRACTISE's, Wang & Wu, CVPR 2023, arXiv 2202.07861, section 3; here relative, with hints, in eval
mode and from re-solved weights). Batch norms keep their statistics; they are folded into their convolutions for the
time of the training and taken out afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ...compiler.ir.edit import set_tensors
from ...compiler.ir.edit_folds import fold_batch_norms, unfold_tensors
from ...compiler.ir.program import Program
from ...compiler.store.checkpoint import UNKEPT, Checkpoint, Standing
from ...compiler.support.progress import Progress, silent
from .settings import MimicSettings
from .training import Lesson, Training

#: A held-out error so many times the least so far says that the steps are too long: the training goes back to the best
#: weights, and on with steps so many times shorter.
TOO_FAR, SHORTER = 1.2, 3.0
#: How the weights that were best so far are named among the tensors of a training's state.
BEST = "best "


@dataclass(frozen=True, kw_only=True)
class Mimicked:
    """The trained program, the held-out error (relative, of features and outputs) before and after, and the
    iterations run."""

    program: Program
    before: float
    after: float
    iterations: int


def mimic(
    lesson: Lesson,
    settings: MimicSettings | None = None,
    *,
    progress: Progress = silent,
    checkpoint: Checkpoint = UNKEPT,
) -> Mimicked:
    """Train all weights of a student to reproduce its teacher's features, in the channels that it has.

    The graph does not change. The returned weights are those of the least held-out error of features and outputs at
    which the outputs alone are no worse either, the starting
    ones included, so the held-out error never ends above where it began; a step that is not finite ends the training.
    Where the error is far above the least so far, it goes back to the weights of that, and on with shorter steps.
    Same seed, same result, also where the training was cut off and goes on from its `checkpoint`. Raises MimicError
    when an operator has no gradient.
    """
    settings = settings or MimicSettings()
    student = lesson.student
    trainee, norms = fold_batch_norms(student)
    run = Training(replace(lesson, teacher=fold_batch_norms(lesson.teacher)[0], student=trainee), settings)
    if not run.parameters:
        error, _ = run.error()
        return Mimicked(program=student, before=error, after=error, iterations=0)
    course = _Course(run, dict(trainee.module.named_parameters()), checkpoint)
    every = max(1, settings.iterations // settings.checks)
    while run.done < settings.iterations and course.misses < settings.patience:
        finite = run.step()
        progress("mimic", run.done, settings.iterations)
        if not finite:
            break
        if run.done % every == 0 or run.done == settings.iterations:
            course.judge()
        checkpoint.keep(course.standing)
    if course.best is None:
        return Mimicked(program=student, before=course.before, after=course.before, iterations=run.done)
    trained = set_tensors(trainee, course.best, note="mimic")
    program = set_tensors(student, unfold_tensors(student, trained, norms), note=f"mimic {run.done} iterations")
    return Mimicked(program=program, before=course.before, after=course.error, iterations=run.done)


class _Course:
    """What a training has come to: the held-out errors that it began with, the least error since and its weights (None
    while nothing was better, and `start` is), and the checks in a row that were no better."""

    def __init__(self, run: Training, start: Mapping[str, torch.Tensor], checkpoint: Checkpoint) -> None:
        self._run, self._start = run, start
        self.misses = 0
        self.best: dict[str, torch.Tensor] | None = None
        kept = checkpoint.read()
        if kept is None:
            self.before, self._limit = run.error()
            self.error = self.before
            return
        data, tensors = kept
        self.before, self._limit, self.error, self.misses = (data[n] for n in ("before", "limit", "error", "misses"))
        best = {name.removeprefix(BEST): value for name, value in tensors.items() if name.startswith(BEST)}
        self.best = best or None
        run.go_on(data["done"], tensors)

    def judge(self) -> None:
        """Look at the held-out error; the weights are the best so far where it is the least and the outputs alone are
        no worse than in the beginning."""
        error, at_outputs = self._run.error()
        if error < self.error and at_outputs <= self._limit:
            self.misses, self.error, self.best = 0, error, self._run.weights()
            return
        self.misses += 1
        if error > TOO_FAR * self.error or not math.isfinite(error):
            self._run.again_from(self.best or self._start, SHORTER)

    def standing(self) -> Standing:
        """All that a training which was cut off needs to go on."""
        errors = {"before": self.before, "limit": self._limit, "error": self.error}
        data = {"done": self._run.done, "misses": self.misses, **errors}
        best = {f"{BEST}{name}": value.contiguous() for name, value in (self.best or {}).items()}
        return data, self._run.state() | best
