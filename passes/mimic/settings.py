"""Settings of feature mimicking."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...compiler.ir.program import Batch
from ...compiler.support.errors import CalibrationError
from ...compiler.support.setting_checks import Allowed, check_number, check_switch, check_whole, refuse, settled

#: What a step of a training takes for each sample, in forward passes of the original.
STEP_PASSES = 2.0
#: Multiply-accumulates that a training takes at most, unless the settings say otherwise: a little more than what 400
#: iterations of 32 samples of 300 M each take (MobileNetV2 at 224 pixels), and eight minutes or so at its pace on one
#: thread, 0.4e11 a second. Networks up to that size are trained in full.
MOST_MACS = 2 * 10**13

#: Changes a batch of inputs at random (flips, crops, mixes); the teacher sees what it returns.
Augment = Callable[[Batch, torch.Generator], Batch]


@dataclass(frozen=True, kw_only=True)
class MimicSettings:
    """How the result is trained on the features of the original, from unlabelled samples.

    The loss is ``sum_f w_f ||S_f(x) - T_f(x)||^2 / ||T_f(x)||^2`` over the features f before the head (weight 1), the
    last stream of each shape (weight `hints`) and the outputs (weight `outputs`). The feature term is that of
    PRACTISE (arXiv 2202.07861), here relative. Adam trains all weights behind the first change; batch norms keep
    their statistics. The state of least held-out error at which the outputs are no worse than before is returned, the
    first one included.

    Arguments:
        iterations: Largest number of iterations.
        batch_size: Samples per iteration.
        learning_rate: Learning rate relative to the root mean square of each tensor. It falls along a cosine, and by
            a factor of 3 where the held-out error shows that the steps are too long.
        hints: Weight of the streams at stage ends.
        outputs: Weight of the outputs. Without features before the head it is at least 1.
        augment: A function of a batch and a `torch.Generator` that changes the batch at random. The original then
            runs in every iteration.
        checks: How often the held-out error is looked at.
        patience: Checks in a row without improvement after which training ends.
        bfloat16: Whether to use autocast to bfloat16. None uses it on CPUs that multiply such matrices in hardware.
        cache_bytes: Memory for the features of the original, in bytes. If they need more, they are computed in every
            iteration.
        seconds: Time for the training, in seconds; 0 leaves it out. The first iterations are timed, and as many are
            made as fit, with a learning rate that comes down within them. A single iteration and the last look at the
            held-out error are not cut off. The result is then not repeatable. If None, time does not matter.
        macs: Multiply-accumulates that the training may take in all. What would take more is made smaller, with a
            warning: networks that take images of any size are trained on random crops, and judged on whole images;
            then there are fewer iterations. If None, work does not matter.

    Raises:
        CalibrationError: If a setting is out of range or of the wrong type.

    Example:
        >>> settings = foldcut.MimicSettings(iterations=100, checks=4)
        >>> settings.iterations // settings.checks
        25
    """

    iterations: int = 400
    batch_size: int = 32
    learning_rate: float = 0.005
    hints: float = 6.0
    outputs: float = 0.0
    augment: Augment | None = None
    checks: int = 8
    patience: int = 4
    bfloat16: bool | None = None
    cache_bytes: int = 1 << 30
    seconds: float | None = None
    macs: int | None = MOST_MACS

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "checks", "patience"):
            check_whole(name, getattr(self, name), Allowed(least=1), error=CalibrationError)
        check_number("learning_rate", self.learning_rate, Allowed(above=0), error=CalibrationError)
        for name in ("hints", "outputs"):
            check_number(name, getattr(self, name), Allowed(least=0), error=CalibrationError)
        if self.augment is not None and not callable(self.augment):
            refuse("augment", self.augment, "a function of a batch and a generator, or None", error=CalibrationError)
        check_switch("bfloat16", self.bfloat16, none=True, error=CalibrationError)
        check_whole("cache_bytes", self.cache_bytes, Allowed(least=0), error=CalibrationError)
        check_number("seconds", self.seconds, Allowed(least=0, none=True), error=CalibrationError)
        check_whole("macs", self.macs, Allowed(least=1, none=True), error=CalibrationError)
        settled(self)


def expected_mimic_s(settings: MimicSettings | None, sample_macs: int, pass_s: float) -> float:
    """About how long a training to its end takes where a forward pass of one sample, of so many multiply-accumulates,
    takes `pass_s` seconds; None: no training."""
    if settings is None:
        return 0.0
    passes = STEP_PASSES * settings.iterations * settings.batch_size
    if settings.macs is not None:
        passes = min(passes, STEP_PASSES / 3 * settings.macs / max(1, sample_macs))  # forward, and backward twice that
    return min(passes * pass_s, math.inf if settings.seconds is None else settings.seconds)
