"""What was measured on a backend on the way to a plan, kept for a day: a compile that goes on after an interruption
then plans by the same figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...compiler.ir.program import Program
from ...compiler.store.analysis_store import AnalysisStore
from ...compiler.support.atomic_files import digest
from ..measure.conditions import Conditions
from ..measure.environment import lasting
from .latency_probe import LatencyProbe

#: Seconds after which a measurement is taken again: machines change in ways that their description does not show.
MOST_AGE_S = 24 * 3600.0


class StoredLatency:
    """A `LatencyProbe` whose results are kept under the original's fingerprint and files, the shapes of its inputs,
    backend, machine, batch and threads. The final measurement is never read from here."""

    def __init__(self, store: AnalysisStore, probe: LatencyProbe) -> None:
        self.probe, self._store = probe, store
        before = digest(probe.before)
        models = [before, before if probe.model is probe.before else digest(probe.model)]
        inputs = [[name, str(value.dtype), list(value.shape)] for name, value in probe.inputs.items()]
        settings = [lasting(probe.backend.environment()), *_of(probe.conditions)]
        self._inputs = [probe.program, models, inputs, *settings]

    def original_ms(self) -> float:
        """The original's latency in milliseconds, by itself."""
        return self.kept("original", [], self.probe.original_ms)

    def ratio(self, name: str, inputs: Sequence[Any], rewritten: Callable[[], Program]) -> float:
        """Latency of a rewritten program over that of the original: the upper end of its interval."""
        found: float = self.kept(name, inputs, lambda: self.probe.against(rewritten()).high)
        return found

    def estimate(self, name: str, inputs: Sequence[Any], rewritten: Callable[[], Program]) -> float:
        """Latency of a rewritten program over that of the original: the middle of its interval."""
        found: float = self.kept(f"{name}, about", inputs, lambda: self.probe.against(rewritten()).ratio)
        return found

    def kept(self, name: str, inputs: Sequence[Any], measure: Callable[[], Any]) -> Any:
        """Plain data that `measure` finds out about `inputs`, beside the original."""
        return self._store.value(f"measured {name}", [*self._inputs, *inputs], measure, most_age_s=MOST_AGE_S)


def _of(conditions: Conditions) -> list[Any]:
    """What a measurement depends on."""
    return [conditions.batch, conditions.threads, conditions.seed, conditions.regime]
