"""Values whose channels can be scaled by positive factors that the layers around them take in: which layers write them,
which read them.

What stands between commutes with a positive factor for each channel. Each layer cuts the graph, a depthwise convolution
too: what it reads and what it writes are scaled independently.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from ...compiler.devices.precision import in_float64
from ...compiler.ir.edit import set_tensors
from ...compiler.ir.program import Program, argument, is_size, is_tensor
from ...compiler.support.errors import RewriteError, plural
from ..solve.layers import Layer
from .values import quantizable

aten = torch.ops.aten
#: f(s x) = s f(x) for s > 0, element by element.
_ELEMENTWISE = (
    *(aten.relu, aten.leaky_relu, aten.abs, aten.neg, aten.add, aten.sub),
    *(aten.clone, aten.contiguous, aten.dropout, aten.detach, aten.alias),
)
#: The same for each channel of dimension 1, over the dimensions behind it.
_POOLS = (
    *(aten.max_pool1d, aten.max_pool2d, aten.avg_pool1d, aten.avg_pool2d),
    *(aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten._adaptive_avg_pool2d),
)
_FLATTENINGS = (aten.view, aten.reshape, aten.flatten, aten.squeeze)


@dataclass(frozen=True, kw_only=True)
class ScalingGroup:
    """Values of as many channels that are scaled together. `values` are in topological order, `writers` first among
    what they feed; the group has the name of its first writer."""

    values: tuple[str, ...]
    writers: tuple[Layer, ...]
    readers: tuple[Layer, ...]
    channels: int
    #: dimension of the channels in each value
    axes: Mapping[str, int] = field(repr=False)

    @property
    def name(self) -> str:
        """The first layer that writes to it."""
        return self.writers[0].node

    def touches(self, layers: Collection[str]) -> bool:
        """Whether one of some layers writes to the group or reads from it."""
        return any(layer.node in layers for layer in (*self.writers, *self.readers))


def scaling_groups(program: Program) -> dict[str, ScalingGroup]:
    """The groups of a program by name, in topological order. What the network returns, and what anything reads that
    does not commute with a positive factor, is in none."""
    from networkx.utils import UnionFind  # most plans are read and applied without it

    layers = quantizable(program)
    axes: dict[str, int] = {}
    families: UnionFind[str] = UnionFind()
    fixed: set[str] = set()
    for name, node in program.nodes.items():
        sources = [operand.name for operand in node.all_input_nodes if operand.name in axes]
        if name in layers:
            axis = _channel_axis(layers[name], node.args[0])  # type: ignore[arg-type]
            fixed.update(source for source in sources if axes[source] != axis)
            axes[name] = _channel_axis(layers[name], node)
            families.union(name)
        elif sources and not is_size(node):
            passed = _axis_behind(node, axes)
            if passed is None:
                fixed.update(sources)
                continue
            axes[name] = passed
            families.union(name, *sources)
    groups = {}
    sets = [sorted(family, key=program.order.__getitem__) for family in families.to_sets()]
    for values in sorted(sets, key=lambda family: program.order[family[0]]):
        group = _group(program, layers, values, axes)
        if group.readers and not fixed.intersection(values):
            groups[group.name] = group
    return groups


def rescaled(program: Program, scales: Mapping[str, torch.Tensor]) -> Program:
    """The same network with the channels of some groups divided by their scales: in the weights and biases of the
    layers that write them, and back in the columns of those that read them. Raises RewriteError where the program has
    no such channels."""
    groups = scaling_groups(program) if scales else {}
    tensors: dict[str, torch.Tensor] = {}

    def multiply(name: str, factors: torch.Tensor) -> None:
        known = tensors[name] if name in tensors else in_float64(program.module.get_parameter(name).detach())
        tensors[name] = known * factors.to(known.device)

    for name, scale in scales.items():
        channels = groups[name].channels if name in groups else 0
        if len(scale) != channels:
            raise RewriteError(
                "no such channels to scale",
                node=name,
                expected=channels,
                actual=len(scale),
                hint="apply a plan to the network it was made for",
            )
        for layer in groups[name].writers:
            dims = program.module.get_parameter(layer.weight).dim()
            multiply(layer.weight, 1 / scale.reshape(-1, *[1] * (dims - 1)))
            if layer.bias is not None:
                multiply(layer.bias, 1 / scale)
        for layer in groups[name].readers:
            multiply(layer.weight, _column_factors(program, layer, scale))
    note = f"{plural(len(scales), 'group')} of channels evened out"
    return set_tensors(program, tensors, note=note) if scales else program


def _column_factors(program: Program, layer: Layer, scale: torch.Tensor) -> torch.Tensor:
    """A factor for each channel that a layer reads, as a tensor that its weight can be multiplied by."""
    weight = program.module.get_parameter(layer.weight)
    rows = scale.reshape(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
    return rows.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def _channel_axis(layer: Layer, node: fx.Node) -> int:
    """The channels of what a layer reads or writes."""
    return 1 if layer.window is not None else int(node.meta["val"].dim()) - 1


def _axis_behind(node: fx.Node, axes: Mapping[str, int]) -> int | None:
    """The dimension of the channels behind a call on scaled values; None where it does not commute with scaling."""
    operands = [operand for operand in node.all_input_nodes if not is_size(operand)]
    found = {axes.get(operand.name) for operand in operands}
    axis = found.pop()
    if not is_tensor(node) or found or axis is None:
        return None
    packet = getattr(node.target, "overloadpacket", None)
    shape, before = node.meta["val"].shape, operands[0].meta["val"].shape
    if packet in _ELEMENTWISE:
        alike = all(isinstance(n, fx.Node) and n.meta["val"].shape == shape for n in _operands(node))
        return axis if alike else None
    if packet in _POOLS:
        return axis if axis == 1 and len(shape) == len(before) > 2 else None
    if packet is aten.mean:
        return _axis_behind_mean(node, axis, len(before))
    if packet in _FLATTENINGS:
        single = axis == 1 and all(size == 1 for size in before[2:])
        return 1 if single and len(shape) == 2 and shape[1] == before[1] else None
    return None


def _operands(node: fx.Node) -> tuple[object, ...]:
    """What an elementwise call computes with, beside its settings."""
    return node.args[:2] if getattr(node.target, "overloadpacket", None) in (aten.add, aten.sub) else node.args[:1]


def _axis_behind_mean(node: fx.Node, axis: int, dims: int) -> int | None:
    over = argument(node, 1, "dim")
    if not isinstance(over, (list, tuple)) or not over:
        return None
    gone = {int(dim) % dims for dim in over}
    if axis in gone:
        return None
    return axis if argument(node, 2, "keepdim", False) else axis - sum(dim < axis for dim in gone)


def _group(program: Program, layers: Mapping[str, Layer], values: list[str], axes: Mapping[str, int]) -> ScalingGroup:
    writers = tuple(layers[name] for name in values if name in layers)
    return ScalingGroup(
        values=tuple(values),
        writers=writers,
        readers=tuple(layer for layer in layers.values() if layer.input in values),
        channels=int(program.module.get_parameter(writers[0].weight).shape[0]),
        axes={name: axes[name] for name in values},
    )
