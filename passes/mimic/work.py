"""How much a training computes, in multiply-accumulates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...compiler.ir.cost import program_cost
from ...compiler.ir.program import Program
from .crops import Crop
from .settings import MimicSettings
from .timetable import affordable

#: A forward and a backward pass of the student, in forward passes.
FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True, kw_only=True)
class Work:
    """The multiply-accumulates of one sample in `teacher` and `student`, of a `look` at the held-out error, and how
    many a training may take in all; how many samples an iteration has, and how many looks there are."""

    teacher_macs: int
    student_macs: int
    look_macs: int
    most_macs: float
    batch: int
    checks: int

    @classmethod
    def of(cls, teacher: Program, student: Program, samples: tuple[int, int], settings: MimicSettings) -> Work:
        """Of a training with so many samples (to fit with, to judge by)."""
        teacher_macs, student_macs = program_cost(teacher).macs, program_cost(student).macs
        fit, judge = samples
        return cls(
            teacher_macs=teacher_macs,
            student_macs=student_macs,
            look_macs=judge * (teacher_macs + student_macs),
            most_macs=math.inf if settings.macs is None else settings.macs,
            batch=min(settings.batch_size, fit),
            checks=settings.checks,
        )

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

    def share(self, iterations: int) -> float:
        """The share of each sample that so many iterations may have."""
        left = self.most_macs - (self.checks + 1) * self.look_macs
        return max(0.0, left / (iterations * self.iteration()))

    def asked(self, iterations: int, *, cached: bool) -> float:
        """The work of so many iterations and of the looks among them."""
        return iterations * self.iteration(cached=cached) + (self.checks + 1) * self.look_macs

    def smaller(self, wanted: int, made: int, asked: float, crop: Crop | None) -> str:
        """What is done instead of so much work, and what to set for more."""
        ways = [] if crop is None else [f"it is trained on {crop}"]
        ways += [f"{made} iterations are made"] if made < wanted else []
        return (
            f"mimicking was made smaller: {wanted} iterations of {self.batch} samples would take {asked:.1e} "
            f"multiply-accumulates, and it may take {self.most_macs:.1e}: {' and '.join(ways)}; "
            f"foldcut.MimicSettings(macs={_rounded_up(asked)}) allows all of it, macs=None any number"
        )


def _rounded_up(macs: float) -> str:
    """Not much above, as one would write it: ``25 * 10**14``."""
    zeros = max(0, len(str(int(macs))) - 2)
    return f"{math.ceil(macs / 10**zeros)} * 10**{zeros}"
