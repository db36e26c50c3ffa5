"""The result of comparing two latencies, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from .backend import Clock, Regime

_LEAST_CLAIM = 0.02  # what equal networks can differ by from where their buffers happen to lie in memory


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Latency of one network as a ratio to another's, on one machine.

    `ratio` is after / before (below 1: `after` is faster), `low` and `high` its 95 % interval; it is the
    median of the pairs' ratios, so it is near but not equal to after_ms / before_ms. `before_ms` and
    `after_ms` are medians in milliseconds per inference on `clock`, and far less repeatable than the
    ratio. `samples` holds each pair as (before, after), in milliseconds per inference, in the order they
    were taken. `contended`: something else used the machine meanwhile; the ratio bears that, the
    milliseconds less so.

    `regime` says what the caches held, `loads` the ratio that each fresh load of both networks gave, and `control`
    the latency ratio of a second session of the original to the first: 1 but for noise. Without `loads` all pairs are
    of one load, and the interval says nothing about another.
    """

    ratio: float
    low: float
    high: float
    pairs: int
    clock: Clock
    before_ms: float
    after_ms: float
    samples: tuple[tuple[float, float], ...] = field(repr=False)
    environment: dict[str, str | int] = field(repr=False)
    contended: bool
    regime: Regime = "hot"
    loads: tuple[float, ...] = ()
    control: float | None = None

    @property
    def half_width(self) -> float:
        """Half the interval's width relative to the ratio: 0.01 reads as "within 1 %"."""
        return math.log(self.high / self.low) / 2

    @property
    def faster(self) -> bool:
        """Whether to claim that `after` is faster: the interval excludes 1 and the gain is at least 2 %."""
        return self.high < 1 and self.ratio <= 1 - _LEAST_CLAIM

    @property
    def slower(self) -> bool:
        """Whether to claim that `after` is slower: the interval excludes 1 and the loss is at least 2 %."""
        return self.low > 1 and self.ratio >= 1 + _LEAST_CLAIM

    @property
    def verdict(self) -> str:
        """What may be claimed, in words."""
        return "faster" if self.faster else "slower" if self.slower else "no difference that can be claimed"

    def to_dict(self, samples: bool = True) -> dict[str, object]:
        """Return the fields as JSON-able values; ``samples=False`` leaves the samples out."""
        fields: dict[str, object] = asdict(self)
        del fields["samples"]
        if samples:
            fields["samples"] = [list(pair) for pair in self.samples]
        return fields
