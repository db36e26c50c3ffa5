"""The re-solve with its results kept: looked up by what goes into it, and computed where it is not found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.ir.program import Program
from ...compiler.store.analysis_store import AnalysisStore, Tensors
from ...compiler.store.changed_tensors import changed, with_changes
from ...compiler.support.errors import Reject
from ...compiler.support.progress import Progress, silent
from .resolve_network import LayerError, Resolved, ResolveSettings, resolve_network
from .targets import Kept


def stored_resolve(
    store: AnalysisStore,
    teacher: Program,
    student: Program,
    calibration: CalibrationSet,
    dropped: Iterable[tuple[str, str]],
    *,
    kept: Mapping[str, Kept] | None = None,
    replaced: Iterable[str] = (),
    settings: ResolveSettings,
    progress: Progress = silent,
) -> Resolved:
    """`resolve_network`, or what it came to before."""
    pairs, names = list(dropped), list(replaced)

    def compute() -> tuple[dict[str, Any], Tensors]:
        found = resolve_network(
            teacher, student, calibration, pairs, kept=kept, replaced=names, settings=settings, progress=progress
        )
        data = {"layers": [asdict(e) for e in found.layers], "locked": [asdict(r) for r in found.locked]}
        return with_changes(data, student, found.program)

    inputs = [teacher, student, calibration, pairs, kept or {}, names, settings]
    data, tensors = store.result("re-solve", inputs, compute)
    return Resolved(
        program=changed(student, data, tensors),
        layers=tuple(LayerError(**e) for e in data["layers"]),
        locked=tuple(Reject(**r) for r in data["locked"]),
    )
