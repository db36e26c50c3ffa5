"""The choice of channels with its results kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ...compiler.analysis.provenance import Provenance
from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.store.analysis_store import AnalysisStore, Tensors
from ...compiler.support.progress import Progress, silent
from ..solve.resolve_network import LayerError, ResolveSettings
from .select_channels import ChannelChoice, Variant, choose_channels
from .submodular import Selection


def stored_channels(
    store: AnalysisStore,
    provenance: Provenance,
    calibration: CalibrationSet,
    counts: Mapping[str, int],
    *,
    variant: Variant = "asymmetric",
    stream_target: bool = True,
    given: Mapping[str, Selection] | None = None,
    settings: ResolveSettings | None = None,
    progress: Progress = silent,
) -> ChannelChoice:
    """`choose_channels`, or what it came to before."""

    def compute() -> tuple[dict[str, Any], Tensors]:
        found = choose_channels(
            provenance,
            calibration,
            counts,
            variant=variant,
            stream_target=stream_target,
            given=given,
            settings=settings,
            progress=progress,
        )
        tensors = {f"tensor {name}": value for name, value in found.tensors.items()} | {"removed": found.removed}
        for name, selection in found.selections.items():
            tensors |= {f"order {name}": selection.order, f"errors {name}": selection.errors}
        bounds = [[name, selection.ratio_bound] for name, selection in found.selections.items()]
        return {"layers": [asdict(e) for e in found.layers], "bounds": bounds}, tensors

    inputs = [provenance.program, calibration, counts, variant, stream_target, given or {}, settings]
    data, tensors = store.result("choose channels", inputs, compute)
    return ChannelChoice(
        removed=tensors["removed"],
        tensors={name.removeprefix("tensor "): v for name, v in tensors.items() if name.startswith("tensor ")},
        selections={
            name: Selection(order=tensors[f"order {name}"], errors=tensors[f"errors {name}"], ratio_bound=bound)
            for name, bound in data["bounds"]
        },
        layers=tuple(LayerError(**e) for e in data["layers"]),
    )
