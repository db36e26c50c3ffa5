"""Errors of dropped regions with their results kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...compiler.analysis.regions import Region
from ...compiler.data.output_error import bounded
from ...compiler.store.analysis_store import AnalysisStore
from .recoverability import Recoverability


class StoredErrors:
    """`Recoverability` whose errors are kept; its calibration is that of the candidates of the first call."""

    def __init__(self, store: AnalysisStore, recoverability: Recoverability) -> None:
        self._store, self._recoverability = store, recoverability
        r = recoverability
        self._inputs = [r.teacher, r.samples, r.final_samples, r.features, r.settings]
        self._first: Sequence[Region] | None = None

    def __call__(self, chosen: Sequence[Region], candidates: Sequence[Region]) -> Mapping[str, float]:
        if self._first is None:
            self._first = list(candidates)
        inputs = [*self._inputs, *(_names(regions) for regions in (self._first, chosen, candidates))]
        found = self._store.value("drop errors", inputs, lambda: self._errors(chosen, candidates))
        return {name: bounded(error) for name, error in found.items()}

    def _errors(self, chosen: Sequence[Region], candidates: Sequence[Region]) -> dict[str, float]:
        first, recoverability = self._first or (), self._recoverability
        if recoverability.settings.mode == "calibrated" and not recoverability.recovery:
            inputs = [*self._inputs, _names(first)]
            recoverability.recovery = self._store.value(
                "recovery", inputs, lambda: recoverability.calibration_of(first)
            )
        return dict(recoverability(chosen, candidates))


def _names(regions: Sequence[Region]) -> list[str]:
    return [region.name for region in regions]
