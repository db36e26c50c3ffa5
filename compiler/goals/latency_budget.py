"""What plans save of the latency: measured on the backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...runtime.probe.stored_latency import StoredLatency
from ..ir.program import Program
from ..plan.proposals import Mix
from ..rewrite.budget import Savings, Shape, keyed


class LatencyBudget:
    """Plans towards a latency ratio `aim`. `shape` makes the network that a plan leads to."""

    unit = "latency"
    whole = 1.0

    def __init__(self, target: float, latency: StoredLatency, shape: Shape) -> None:
        self.aim, self._measured, self._shape = target, latency, shape
        self.latency: StoredLatency | None = latency
        self.models: dict[str, Savings] = {}

    def share(self, changes: Any, program: Callable[[], Program]) -> float:
        """The latency ratio of a network, the upper end of its interval."""
        return self._measured.ratio("plan", [changes], program)

    def savings(self, variants: Mapping[str, Callable[[], Program]]) -> dict[str, float]:
        """By the times of single segments: those that a variant shares with others are timed once."""
        table = self._measured.probe.table()
        whole = table.predict(self._measured.probe.program).units
        return {name: 1 - table.predict(variant()).units / whole for name, variant in variants.items()}

    def ratio(self, mix: Mix) -> float:
        """The latency ratio of a plan, the upper end of its interval."""
        return self.share(keyed(mix), lambda: self._shape(mix))

    def adjuster(self, target: float) -> None:
        """Plans stay as they are: what a single step saves of the latency is not known well enough."""

    def finest(self, mix: Mix, target: float) -> Mix:
        """The plan as it is."""
        del target
        return mix
