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
from ...compiler.support.errors import plural
from ...compiler.support.progress import Progress, silent
from .settings import MimicSettings
from .timetable import Timetable
from .training import Lesson, Training

#: A held-out error so many times the least so far says that the steps are too long: the training goes back to the best
#: weights, and on with steps so many times shorter.
TOO_FAR, SHORTER = 1.2, 3.0
#: Why nothing is trained.
NOTHING_TO_TRAIN = "behind the first change there are no weights that what is compared depends on"
NO_ROOM = "not one iteration fits into what it may take (seconds, macs)"
#: How the weights that were best so far are named among the tensors of a training's state.
BEST = "best "


@dataclass(frozen=True, kw_only=True)
class Mimicked:
    """The trained program, the held-out error (relative, of features and outputs) before and after, and the
    iterations run; `skipped` says why there are none, `said` what else the user has to know."""

    program: Program
    before: float
    after: float
    iterations: int
    skipped: str | None = None
    said: tuple[str, ...] = ()


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
    Same seed, same result, also where the training was cut off and goes on from its `checkpoint`; not where it has a
    time to keep to. Raises MimicError when an operator has no gradient.
    """
    settings = settings or MimicSettings()
    student = lesson.student
    trainee, norms = fold_batch_norms(student)
    kept = checkpoint.read()
    timetable = Timetable(settings, None if kept is None else kept[0]["time"])
    lesson = replace(lesson, teacher=fold_batch_norms(lesson.teacher)[0], student=trainee)
    run = Training(lesson, settings, timetable)
    if not run.parameters:
        error, _ = run.error()
        return Mimicked(program=student, before=error, after=error, iterations=0, skipped=NOTHING_TO_TRAIN)
    course = _Course(run, timetable, dict(trainee.module.named_parameters()), kept)
    finite = True
    while finite and course.misses < settings.patience and timetable.goes_on(run.done):
        with timetable.step():
            finite = run.step()
        progress("mimic", run.done, timetable.iterations)
        if finite and timetable.due(run.done):
            finite = run.sound()
            if finite:
                course.judge()
        if finite:
            checkpoint.keep(course.standing)
    finite = finite and run.sound()
    said = run.said
    if finite and course.misses < settings.patience and timetable.ran_out(run.done):
        said += (
            f"mimicking ended after {run.done} of {plural(timetable.most, 'iteration')}, within {settings.seconds:g} s",
        )
        if run.done > timetable.checked:
            course.judge()
    found = Mimicked(
        program=student,
        before=course.before,
        after=course.error,
        iterations=run.done,
        skipped=None if run.done else NO_ROOM,
        said=said,
    )
    if course.best is None:
        return found
    trained = set_tensors(trainee, course.best, note="mimic")
    note = f"mimic {plural(run.done, 'iteration')}"
    program = set_tensors(student, unfold_tensors(student, trained, norms), note=note)
    return replace(found, program=program)


class _Course:
    """What a training has come to: the held-out errors that it began with, the least error since and its weights (None
    while nothing was better, and `start` is), and the checks in a row that were no better."""

    def __init__(
        self, run: Training, timetable: Timetable, start: Mapping[str, torch.Tensor], kept: Standing | None
    ) -> None:
        self._run, self._time, self._start = run, timetable, start
        self.misses = 0
        self.best: dict[str, torch.Tensor] | None = None
        if kept is None:
            with timetable.look(0):
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
        with self._time.look(self._run.done):
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
        data = {"done": self._run.done, "misses": self.misses, "time": self._time.state(), **errors}
        best = {f"{BEST}{name}": value.contiguous() for name, value in (self.best or {}).items()}
        return data, self._run.state() | best
