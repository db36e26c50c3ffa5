"""How `mimic` trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...compiler.ir.program import Batch
from ...compiler.support.errors import CalibrationError
from ...compiler.support.setting_checks import Allowed, check_number, check_switch, check_whole, refuse, settled

#: Changes a batch of inputs at random (flips, crops, mixes); the teacher sees what it returns.
Augment = Callable[[Batch, torch.Generator], Batch]


@dataclass(frozen=True, kw_only=True)
class MimicSettings:
    """`learning_rate` is relative to the root mean square of each weight tensor, so it needs no tuning per network;
    it falls by a cosine.

    `hints` and `outputs` weigh the losses at stage ends and outputs. `augment` draws a new version of each batch (the
    teacher then runs in every iteration; without it, its features are computed once and kept while they fit into
    `cache_bytes`). `checks` times the held-out error is looked at; the best state wins. `patience` checks without
    improvement end the training. `bfloat16` None uses it where the CPU multiplies bfloat16 matrices in hardware.
    """

    iterations: int = 400
    batch_size: int = 32
    learning_rate: float = 0.015
    hints: float = 6.0
    outputs: float = 0.0
    augment: Augment | None = None
    checks: int = 8
    patience: int = 4
    bfloat16: bool | None = None
    cache_bytes: int = 1 << 30

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
        settled(self)
