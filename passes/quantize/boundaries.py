"""What it costs where a layer in int8 stands beside one in floating point: values are converted there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import fx

from ...compiler.ir.program import Program
from .savings import Saved
from .values import clipped, stays_on_grids

#: Two layers with nothing between them but what is computed on grids, and the elements of the value that the second
#: reads.
Borders = dict[tuple[str, str], int]


def borders(folded: Program, standing: Mapping[str, Sequence[str]]) -> Borders:
    """The pairs of layers between which no value is converted where both are in int8; by the names of `standing`, which
    has the names in `folded` of what stands for each."""
    owner = {inside: name for name, names in standing.items() for inside in names}
    found: Borders = {}
    for inside, name in owner.items():
        seen: set[fx.Node] = set()
        open_ = [clipped(folded.nodes[inside])]
        while open_:
            value = open_.pop()
            if value in seen:
                continue
            seen.add(value)
            readers = [owner[user.name] for user in value.users if user.name in owner and user.args[0] is value]
            size = math.prod(folded.shape(value, batch=1)) if readers else 0
            found |= {(name, reader): size for reader in readers if reader != name}
            if not readers:
                open_ += [user for user in value.users if stays_on_grids(user)]
    return found


def boundary_costs(
    found: Mapping[str, Saved], between: Borders, measured: Callable[[Sequence[str]], float]
) -> dict[str, dict[str, float]]:
    """What each layer in int8 saves less for each of its neighbours that is not, as a share of the network's latency.

    `measured` says what the network saves with some layers in int8. With every second one in it, it saves less than
    they do among others in int8: that is what the values between them cost, each by its elements.
    """
    half = list(found)[::2]
    apart = {pair: size for pair, size in between.items() if (pair[0] in half) != (pair[1] in half)}
    if not apart:
        return {}
    lost = sum(found[name].saving for name in half) - measured(half)
    each = max(lost, 0.0) / sum(apart.values())
    costs: dict[str, dict[str, float]] = {}
    for (one, other), size in between.items() if each else ():
        for here, there in ((one, other), (other, one)):
            row = costs.setdefault(here, {})
            row[there] = row.get(there, 0.0) + each * size
    return costs
