"""What a network is measured under."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .regime import Regime


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The batch size and the CPU threads, the regime of the caches, the operator set that networks are exported with
    (None: their own), the seed of what is drawn, and the folder where times of parts are kept (None: the usual one)."""

    batch: int = 1
    threads: int = 1
    regime: Regime = "hot"
    opset: int | None = None
    seed: int = 0
    folder: Path | None = None
