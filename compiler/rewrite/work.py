"""How much a stage has to do: what the time of a compile is estimated from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Work:
    """About what a stage takes: as many forward passes of one sample through the original as take as long, and seconds
    that do not hang on how large the network is, such as those of measurements."""

    passes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(passes=self.passes + other.passes, seconds=self.seconds + other.seconds)

    def takes_s(self, pass_s: float) -> float:
        """The time, where a forward pass of one sample takes `pass_s` seconds."""
        return self.passes * pass_s + self.seconds
