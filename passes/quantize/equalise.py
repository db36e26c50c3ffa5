"""Cross-layer equalisation: channels of a value brought to one range, where the layers behind lose less then.

A value has one grid, and a weight one scale for each output. With s > 0 for each channel,

    W_B x = (W_B diag(s)) (diag(1 / s) x),

and what writes x takes in the 1 / s (Nagel et al., ICCV 2019, arXiv 1906.04721, equations 7 to 11). Rows have scales of
their own, so the writer loses nothing; what the value gains the columns of its readers may lose. How much is migrated
is compared: ``s_c = max |x_c|^a / max |W_B[:, c]|^(1 - a)`` (SmoothQuant, arXiv 2211.10438, equation 4). Scales are
powers of two: the network then computes the same numbers in floating point, bit by bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.data.live_bytes import live_bytes
from ...compiler.devices.precision import WideSums
from ...compiler.ir.execute import bind, device_of, evaluate, run_until
from ...compiler.ir.program import Program, is_size
from ...compiler.processes.sharing import largest, own
from ...compiler.support.memory import samples_at_once
from ..solve.layers import Layer
from .decision import MOST_EXPONENT, QuantizeLayer
from .edit_quantize import ValueGrid
from .grids import choose_grids, energy, few_of, product
from .quantize import rounded_plainly
from .ranges import GridKind
from .scaling_groups import ScalingGroup, rescaled, scaling_groups
from .values import values_of

#: Shares of the differences between channels that the weights behind take over, the first to be tried in front.
STRENGTHS = (0.5, 0.25, 0.75, 1.0)
#: Channels are compared where half of those that are ever used have less than this share of the largest range: three of
#: the eight bits are then lost on them.
WIDE = 1 / 8
#: A group of channels is scaled where that takes away this share of the loss. Less is noise of a few samples.
LEAST_GAIN = 0.1

#: Name of a group of channels, and the power of two that each of its channels is divided by.
Exponents = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Precision:
    """Integers of values, how their ranges are taken, and the largest weight."""

    kind: GridKind
    ranges: str
    limit: int


def choose_scales(
    program: Program, layers: Sequence[str], samples: CalibrationSet, precision: Precision
) -> dict[str, tuple[int, ...]]:
    """The powers of two that groups of channels are divided by, of those that some layers read. A group is scaled only
    where the ranges of its channels differ widely, and a few samples say that rounding its values and the weights
    behind then changes less of what these layers compute, by `LEAST_GAIN`."""
    inside = set(layers)
    groups = {
        name: group
        for name, group in scaling_groups(program).items()
        if not inside.isdisjoint(reader.node for reader in group.readers)
    }
    few = few_of(samples)
    every = _Comparison(program=program, groups=groups, layers=tuple(layers), few=few, precision=precision)
    largest = every.largest()
    comparison = every.among([name for name in groups if _differ_widely(largest[name])])
    least = {name: lost * (1 - LEAST_GAIN) for name, lost in comparison.lost({}).items()}
    chosen: dict[str, tuple[int, ...]] = {}
    for strength in STRENGTHS:
        offered = {name: _exponents(program, groups[name], largest[name], strength) for name in least}
        offered = {name: powers for name, powers in offered.items() if any(powers)}
        for name, lost in comparison.among(offered).lost(offered).items():
            if lost < least[name]:
                least[name], chosen[name] = lost, offered[name]
        least = {name: least[name] for name in chosen}  # what gains nothing by the first strength stays
        if not least:
            break
    return {name: chosen[name] for name in groups if name in chosen}


def equalised(program: Program, exponents: Exponents) -> Program:
    """The same network with groups of channels divided by powers of two. Raises RewriteError where the program has no
    such channels."""
    return rescaled(program, _scales(exponents))


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A network with its channels evened out by powers of two, and grids of its values."""

    program: Program
    exponents: Exponents
    grids: Mapping[str, ValueGrid]

    @cached_property
    def _groups(self) -> dict[str, ScalingGroup]:
        return scaling_groups(self.program)

    def stated(self, decision: QuantizeLayer, layers: Sequence[str]) -> QuantizeLayer:
        """The decision with all that came from data: of the values and channels around the layers that it is about."""
        grids = tuple((v, self.grids[v].scale, self.grids[v].zero_point) for v in values_of(self.program, layers))
        even = tuple(
            (name, tuple(powers)) for name, powers in self.exponents.items() if self._groups[name].touches(layers)
        )
        return replace(decision, grids=grids, equalised=even)


def fitted(
    program: Program, exponents: Exponents, layers: Sequence[str], samples: CalibrationSet, precision: Precision
) -> Fitted:
    """The network with its channels evened out so, and the grids of the values around some layers."""
    even = equalised(program, exponents)
    grids = choose_grids(even, layers, samples, precision.kind, precision.ranges)
    return Fitted(program=even, exponents=exponents, grids=grids)


def _differ_widely(largest: torch.Tensor) -> bool:
    live = largest[largest > 0]
    return len(live) > 0 and float(live.median()) < WIDE * float(live.max())


def _scales(exponents: Exponents) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(found).double().exp2() for name, found in exponents.items()}


def _exponents(program: Program, group: ScalingGroup, largest: torch.Tensor, strength: float) -> tuple[int, ...]:
    """Powers of two near the scales of a strength, one on average. A channel that is always zero on the samples, or
    that nothing reads, stays as it is."""
    columns = torch.zeros_like(largest)
    for reader in group.readers:
        weight = program.module.get_parameter(reader.weight).detach().cpu().double().abs()
        most = weight.flatten(2).amax(2) if weight.dim() > 2 else weight
        columns = torch.maximum(columns, reader.matrix(most).amax(1).reshape(-1))
    live = (largest > 0) & (columns > 0)
    scale = strength * largest.log2() - (1 - strength) * columns.log2()
    scale = torch.where(live, scale - scale[live].mean(), 0.0).round().clamp(-MOST_EXPONENT, MOST_EXPONENT)
    return tuple(int(power) for power in scale)


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """What rounding loses at the readers of some groups, under one scaling or another."""

    program: Program
    groups: Mapping[str, ScalingGroup]
    layers: tuple[str, ...]
    few: CalibrationSet
    precision: Precision

    def among(self, names: Collection[str]) -> _Comparison:
        """The same of fewer groups."""
        groups = {name: self.groups[name] for name in names}
        layers = tuple(name for name in self.layers if any(group.touches([name]) for group in groups.values()))
        return replace(self, groups=groups, layers=layers)

    def largest(self) -> dict[str, torch.Tensor]:
        """The largest absolute value of each channel, over the values that layers read."""
        found: dict[str, torch.Tensor] = {}
        for values in self._values(self.program, writers=False):
            for name, group in self.groups.items():
                for value in {reader.input for reader in group.readers}:
                    channels = values[value].abs().movedim(group.axes[value], 0).flatten(1).amax(1)
                    found[name] = torch.maximum(found[name], channels) if name in found else channels
        return largest({name: most.cpu().double() for name, most in found.items()}, list(self.groups))

    def lost(self, exponents: Exponents) -> dict[str, float]:
        """For each group, the sum of squares of what rounding changes of its readers' outputs, as they are without
        scales: rounding its values, on their way from the layers that write them, and the readers' weights."""
        if not self.groups:
            return {}
        program = equalised(self.program, exponents)
        values = {value for group in self.groups.values() for value in group.values}
        # groups are compared by what they lose at their readers, not by the outputs
        ranges = "each" if self.precision.ranges == "best" else self.precision.ranges
        grids = choose_grids(program, self.layers, self.few, self.precision.kind, ranges, values)
        sums = WideSums()
        gains = self._gains(exponents)
        weights = {
            reader.node: self._weights(program, reader, grids[reader.input])
            for group in self.groups.values()
            for reader in group.readers
            if reader.node in self.layers
        }
        for exact in self._values(program, writers=True):
            for name, group in self.groups.items():
                now = _on_grids(program, group, exact, grids)
                for reader in group.readers:
                    if reader.node in weights:
                        weight, near = weights[reader.node]
                        wanted = product(program, reader, exact[reader.input], weight)
                        change = product(program, reader, now[reader.input], near) - wanted
                        sums.add(name, energy(change * gains.get(reader.node, 1.0)))
        found = sums.floats()
        return {name: found.get(name, 0.0) for name in self.groups}

    def _weights(self, program: Program, reader: Layer, grid: ValueGrid) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight of a layer, and what is read back of it once it is rounded."""
        weight = program.module.get_parameter(reader.weight).detach()
        near = rounded_plainly(program, reader, grid, self.precision.limit).weight
        return weight, near.reshape(weight.shape).to(weight)

    def _gains(self, exponents: Exponents) -> dict[str, torch.Tensor]:
        """What the outputs of layers have to be multiplied by to be as they are without scales."""
        gains, device = {}, device_of(self.program)
        for name, scale in _scales(exponents).items():
            for writer in self.groups[name].writers:
                node = self.program.nodes[writer.node]
                behind = node.meta["val"].dim() - 1 - self.groups[name].axes[writer.node]
                gains[writer.node] = scale.float().to(device).reshape(-1, *[1] * behind)
        return gains

    def _values(self, program: Program, *, writers: bool) -> Iterator[dict[str, torch.Tensor]]:
        """What the readers of the groups read, and what their writers write, batch by batch."""
        wanted = {reader.input for group in self.groups.values() for reader in group.readers}
        if writers:
            inside = [program.nodes[value] for group in self.groups.values() for value in group.values]
            wanted |= {writer.node for group in self.groups.values() for writer in group.writers}
            wanted |= {operand.name for node in inside for operand in node.all_input_nodes if is_size(operand)}
        for _, batch in own(self.few.batches(samples_at_once(2 * live_bytes(program).whole, 4))):
            with torch.no_grad():
                yield run_until(program, sorted(wanted), bind(program, batch))


def _on_grids(
    program: Program, group: ScalingGroup, exact: Mapping[str, torch.Tensor], grids: Mapping[str, ValueGrid]
) -> dict[str, torch.Tensor]:
    """The values of a group, rounded where they have a grid, from what its writers write."""
    writers = {writer.node for writer in group.writers}
    now = dict(exact)  # sizes too
    for value in group.values:
        made = exact[value] if value in writers else evaluate(program, program.nodes[value], now)
        now[value] = grids[value].rounded(made) if value in grids else made
    return now
