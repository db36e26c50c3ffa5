"""Grids of the values around quantised layers, chosen by what rounding to them loses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.data.live_bytes import live_bytes
from ...compiler.data.output_error import bounded, output_error
from ...compiler.devices.precision import WideSums, added, widest
from ...compiler.ir.execute import bind, run_until
from ...compiler.ir.program import Program
from ...compiler.processes.sharing import own
from ...compiler.support.memory import samples_at_once
from ..solve.layers import Layer
from ..solve.resolve_network import batch_size_for
from .edit_quantize import ValueGrid, quantize_program
from .ranges import RANGES, GridKind, Histogram, histograms
from .values import held_by, quantizable, values_of

#: Samples that tell what a range loses.
RANGE_SAMPLES = 32
_FEW: WeakKeyDictionary[CalibrationSet, CalibrationSet] = WeakKeyDictionary()
#: Ways to take ranges: of all values alike, for each value the one of these that loses least at the layers that read
#: it, and the way with which the network loses least.
WAYS = (*RANGES, "each", "best")


def few_of(samples: CalibrationSet) -> CalibrationSet:
    """The first of some samples, the same set each time."""
    return _FEW.setdefault(samples, samples.take(slice(0, RANGE_SAMPLES)))


def choose_grids(
    program: Program,
    layers: Sequence[str],
    samples: CalibrationSet,
    kind: GridKind,
    ranges: str,
    among: Collection[str] | None = None,
) -> dict[str, ValueGrid]:
    """The grids of the values around some layers, all or those `among` some values, with ranges of one of the `WAYS`.
    What is only moved from one value to another stays on one grid."""
    # an error at the next layer is not one at the output: what is cut off adds up from layer to layer, what is rounded
    # goes up and down
    ways = WAYS[:-1] if ranges == "best" else (ranges,)
    _, grids = _least_lost(program, layers, samples, kind, ways, among)
    return grids


def best_way(program: Program, layers: Sequence[str], samples: CalibrationSet, kind: GridKind) -> str:
    """The way of taking the ranges of all values alike with which the network loses least on some samples."""
    way, _ = _least_lost(program, layers, samples, kind, tuple(RANGES))
    return way


def _least_lost(
    program: Program,
    layers: Sequence[str],
    samples: CalibrationSet,
    kind: GridKind,
    ways: Sequence[str],
    among: Collection[str] | None = None,
) -> tuple[str, dict[str, ValueGrid]]:
    """Of some ways the one with which the network's outputs lose least, and its grids."""
    names = [name for name in values_of(program, layers) if among is None or name in among]
    holders = held_by(program, names)
    own = list(dict.fromkeys(holders.values()))
    found = histograms(program, own, samples, batch_size=batch_size_for(program, quantizable(program).values()))
    few = few_of(samples)
    made: dict[str, dict[str, ValueGrid]] = {}
    for way in ways:
        if way == "each":
            grids = _each(program, layers, few, found, holders, kind)
        else:
            grids = {name: RANGES[way](found[name], kind) for name in own}
        made[way] = {name: grids[holders[name]] for name in names}
    best = ways[0] if len(ways) == 1 else min(made, key=lambda way: _lost(program, made[way], few))
    return best, made[best]


def _lost(program: Program, grids: Mapping[str, ValueGrid], few: CalibrationSet) -> float:
    """The output error of the network with its values on grids, and its weights as they are."""
    return bounded(output_error(program, quantize_program(program, grids, {}, note="values on integer grids"), few))


def _each(
    program: Program,
    layers: Sequence[str],
    few: CalibrationSet,
    found: Mapping[str, Histogram],
    holders: Mapping[str, str],
    kind: GridKind,
) -> dict[str, ValueGrid]:
    offered = {
        name: list(dict.fromkeys(way(histogram, kind) for way in RANGES.values())) for name, histogram in found.items()
    }
    sums = WideSums()
    there = quantizable(program)
    readers: dict[str, dict[str, list[Layer]]] = {name: {} for name in found}
    for layer in (there[name] for name in layers):
        if layer.input in holders:
            readers[holders[layer.input]].setdefault(layer.input, []).append(layer)
    for _, batch in own(few.batches(samples_at_once(2 * live_bytes(program).whole, 4))):
        with torch.no_grad():
            values = run_until(program, list(holders), bind(program, batch))
            for name, grids in offered.items():
                for place, grid in enumerate(grids):
                    lost = energy(grid.rounded(values[name]) - values[name])
                    passed = [
                        _passed_on(program, behind, grid.rounded(values[value]) - values[value])
                        for value, behind in readers[name].items()
                    ]
                    if passed:
                        total = added(passed)
                        lost = torch.where(total == 0, lost, total)
                    sums.add(f"{name} {place}", lost)
    found_sums = sums.floats()
    losses = {name: [found_sums[f"{name} {place}"] for place in range(len(grids))] for name, grids in offered.items()}
    return {name: grids[losses[name].index(min(losses[name]))] for name, grids in offered.items()}


def _passed_on(program: Program, readers: Sequence[Layer], change: torch.Tensor) -> torch.Tensor:
    """Sum of squares of what a change of a value does to the outputs of the layers that read it."""
    made = (product(program, layer, change, program.module.get_parameter(layer.weight)) for layer in readers)
    return added(map(energy, made))


def energy(change: torch.Tensor) -> torch.Tensor:
    """Its sum of squares, in the most exact dtype of its device."""
    return change.to(widest(change.device)).square().sum()


def product(program: Program, layer: Layer, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a layer makes of a value with some weight, without its bias."""
    node = program.nodes[layer.node]
    settings = {name: value for name, value in node.kwargs.items() if name not in ("input", "weight", "bias")}
    made: torch.Tensor = node.target(value, weight, None, *node.args[3:], **settings)  # type: ignore[operator]
    return made
