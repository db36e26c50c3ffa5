"""How much a training computes, in multiply-accumulates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...compiler.ir.cost import program_cost
from ...compiler.ir.program import Program
from ...compiler.support.errors import plural
from .crops import Crop
from .settings import MimicSettings
from .timetable import affordable

#: A forward and a backward pass of the student, in forward passes.
FORWARD_AND_BACKWARD = 3
#: Looks at the held-out error may take this share of the work; so many samples judge in any case, of those there are.
LOOKS, LEAST_JUDGES = 0.25, 8


@dataclass(frozen=True, kw_only=True)
class TrainingMacs:
    """The multiply-accumulates of one sample in teacher and student, and how many a training may take in all; how many
    iterations are wanted, of how many samples, how many samples there are to judge by, and how many looks at these."""

    teacher_macs: int
    student_macs: int
    most_macs: float
    iterations: int
    batch: int
    samples: int
    checks: int

    @classmethod
    def of(cls, teacher: Program, student: Program, samples: tuple[int, int], settings: MimicSettings) -> TrainingMacs:
        """Of a training with so many samples (to fit with, to judge by)."""
        fit, judge = samples
        return cls(
            teacher_macs=program_cost(teacher).macs,
            student_macs=program_cost(student).macs,
            most_macs=math.inf if settings.macs is None else settings.macs,
            iterations=settings.iterations,
            batch=min(settings.batch_size, fit),
            samples=judge,
            checks=settings.checks,
        )

    @property
    def judges(self) -> int:
        """How many samples judge: all where all can be done, else as many as leave the most of it to the iterations."""
        looks = (self.checks + 1) * (self.teacher_macs + self.student_macs)
        if self.asked(cached=True) <= self.most_macs or not looks:
            return self.samples
        return min(self.samples, max(LEAST_JUDGES, int(LOOKS * self.most_macs / looks)))

    @property
    def look_macs(self) -> int:
        """The work of a look at the held-out error."""
        return self.judges * (self.teacher_macs + self.student_macs)

    def iteration(self, *, cached: bool = False, share: float = 1.0) -> float:
        """The work of one: on so large a share of each sample, the teacher's values cached or not."""
        forward = FORWARD_AND_BACKWARD * self.student_macs + (0 if cached else self.teacher_macs)
        return share * self.batch * forward

    def affords(self, *, cached: bool = False, share: float = 1.0) -> float:
        """How many such iterations there may be, behind the look that everything begins with."""
        if math.isinf(self.most_macs) or not self.iteration():
            return math.inf
        left = self.most_macs - self.look_macs
        return affordable(left, self.iteration(cached=cached, share=share), self.look_macs, self.checks)

    @property
    def share(self) -> float:
        """The share of each sample that the iterations may have, all of them."""
        left = self.most_macs - (self.checks + 1) * self.look_macs
        return max(0.0, left / (self.iterations * self.iteration()))

    def asked(self, *, cached: bool) -> float:
        """The work of all iterations, and of looks with all samples."""
        looks = (self.checks + 1) * self.samples * (self.teacher_macs + self.student_macs)
        return self.iterations * self.iteration(cached=cached) + looks

    def smaller(self, made: int, *, crop: Crop | None, cached: bool) -> tuple[str, ...]:
        """What is done instead of all that was asked for, and what to set for more; nothing where it is all done."""
        ways = [] if crop is None else [f"it is trained on {crop}"]
        ways += [plural(made, "iteration is made", "iterations are made")] if made < self.iterations else []
        ways += [f"{self.judges} of {plural(self.samples, 'sample')} judge it"] if self.judges < self.samples else []
        if not ways:
            return ()
        return (
            f"mimicking was made smaller: {plural(self.iterations, 'iteration')} of {plural(self.batch, 'sample')} "
            f"would take {self.asked(cached=cached):.1e} multiply-accumulates, and it may take {self.most_macs:.1e}: "
            f"{' and '.join(ways)}; foldcut.MimicSettings(macs={_rounded_up(self.asked(cached=False))}) allows all of "
            "it, macs=None any number",
        )


def _rounded_up(macs: float) -> str:
    """Not much above, as one would write it: ``25 * 10**14``."""
    zeros = max(0, len(str(int(macs))) - 2)
    return f"{math.ceil(macs / 10**zeros)} * 10**{zeros}"
