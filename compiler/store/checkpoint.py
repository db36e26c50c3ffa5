"""How far a long computation has got, kept so that it can go on from there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..processes.sharing import by_first

#: Plain data (what JSON holds), and contiguous tensors.
Standing = tuple[Any, dict[str, torch.Tensor]]

#: Seconds between two states that are kept, and how many times as long as keeping one takes that is at least.
EVERY_S, SHARE = 30.0, 20.0


class Checkpoint(Protocol):
    """Keeps the last state of one computation."""

    def read(self) -> Standing | None:
        """The state that was kept last; None at the beginning."""

    def keep(self, standing: Callable[[], Standing]) -> None:
        """To be called wherever the computation could go on from, by all processes: takes the state where enough time
        has passed since the last one, which all help to make. The computation must not depend on whether it does."""


class Unkept:
    """Keeps nothing: the computation begins at its beginning, or where the first of several processes has come to."""

    def read(self) -> Standing | None:
        return by_first(lambda: None)

    def keep(self, standing: Callable[[], Standing]) -> None:
        if by_first(lambda: False):  # the state of the first one may want a part of every process
            standing()


UNKEPT = Unkept()


class Timed:
    """Keeps a state every `EVERY_S` seconds, less often where that would take more than a twentieth of the time."""

    def __init__(self, read: Callable[[], Standing | None], write: Callable[[Standing], None]) -> None:
        self.read, self._write = read, write
        self._due = time.monotonic() + EVERY_S

    def keep(self, standing: Callable[[], Standing]) -> None:
        began = time.monotonic()
        if not by_first(lambda: began >= self._due):
            return
        self._write(standing())
        ended = time.monotonic()
        self._due = ended + max(EVERY_S, SHARE * (ended - began))
