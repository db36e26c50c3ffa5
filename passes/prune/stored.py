"""The choice of channels with its results kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ...compiler.analysis.provenance import Provenance
from ...compiler.data.kept import kept_for
from ...compiler.rewrite.context import Context
from ...compiler.store.analysis_store import Tensors
from ..solve.resolve_network import LayerError
from .select_channels import ChannelChoice, choose_channels
from .settings import ChannelSettings
from .submodular import Selection

#: What the orders are kept under.
ORDERS = "unit orders"


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


def keep_orders(ctx: Context, orders: Mapping[str, Selection]) -> None:
    """Keep all units of each group in the order of choice on the original network, for `known_units`."""
    kept_for(ctx.teacher, ctx.fit)[ORDERS] = orders


def known_units(ctx: Context, units: Provenance, counts: Mapping[str, int]) -> dict[str, Selection] | None:
    """So many units of each group, as the original network has them chosen; None where that of one is not known, or is
    of another number of units than there are by now.

    Trials of plans go by them: a choice on the network as the rest of the plan leaves it would take longer than all
    else in a trial, and what is solved behind it differs little.
    """
    orders: Mapping[str, Selection] = kept_for(ctx.teacher, ctx.fit).get(ORDERS, {})
    sizes = {group.name: len(group) for group in units.prunable}
    if not all(name in orders and len(orders[name].order) == sizes[name] for name in counts):
        return None
    return {name: orders[name].first(count) for name, count in counts.items()}
