"""The choice of channels with its results kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ...compiler.analysis.provenance import Provenance
from ...compiler.rewrite.context import Context
from ...compiler.store.analysis_store import Tensors
from ..solve.resolve_network import LayerError
from .select_channels import ChannelChoice, choose_channels
from .settings import ChannelSettings
from .submodular import Selection


def stored_channels(
    ctx: Context, units: Provenance, wanted: Mapping[str, int | Selection], how: ChannelSettings
) -> ChannelChoice:
    """`choose_channels`, or its result of before."""

    def compute() -> tuple[dict[str, Any], Tensors]:
        found = choose_channels(units, ctx.solve, wanted, how=how, resolve=ctx.resolve, progress=ctx.progress)
        tensors = {f"tensor {name}": value for name, value in found.tensors.items()} | {"removed": found.removed}
        for name, selection in found.selections.items():
            tensors |= {f"order {name}": selection.order, f"errors {name}": selection.errors}
        bounds = [[name, selection.ratio_bound] for name, selection in found.selections.items()]
        return {"layers": [asdict(e) for e in found.layers], "bounds": bounds}, tensors

    inputs = [units.program, ctx.solve, wanted, how.variant, how.stream_target, ctx.resolve]
    data, tensors = ctx.store.result("choose channels", inputs, compute)
    return ChannelChoice(
        removed=tensors["removed"],
        tensors={name.removeprefix("tensor "): v for name, v in tensors.items() if name.startswith("tensor ")},
        selections={
            name: Selection(order=tensors[f"order {name}"], errors=tensors[f"errors {name}"], ratio_bound=bound)
            for name, bound in data["bounds"]
        },
        layers=tuple(LayerError(**e) for e in data["layers"]),
    )
