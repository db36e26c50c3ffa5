"""Values and weights of a program on integer grids: QuantizeLinear and DequantizeLinear around what computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import fx, nn

from ...compiler.ir.edit import check_interface, erase_dead, free_name, infer_shapes, rebuild
from ...compiler.ir.graph_copy import copied
from ...compiler.ir.program import Program, argument, is_tensor
from ...compiler.support.errors import RewriteError

quantized = torch.ops.quantized_decomposed
#: Files hold scales in single precision: one below is stored as 0, or lost where runtimes flush what is so small.
LEAST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class ValueGrid:
    """The integers of a value: x is stored as ``q = clamp(round(x / scale) + zero_point, low, high)``, rounding half to
    even, and read back as ``(q - zero_point) * scale``. `dtype` is ``torch.uint8`` or ``torch.int8``; `low` and `high`
    are its ends, where QuantizeLinear saturates."""

    scale: float
    zero_point: int
    dtype: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        if not (LEAST_SCALE <= self.scale < float("inf")) or not self.low <= self.zero_point <= self.high:
            raise RewriteError(
                f"no grid of integers: scale {self.scale}, zero point {self.zero_point}, {self.dtype}",
                hint="the scale is finite and above 0 in single precision, the zero point is one of the integers",
            )

    @property
    def low(self) -> int:
        """The least of the integers."""
        return torch.iinfo(self.dtype).min

    @property
    def high(self) -> int:
        """The largest of them."""
        return torch.iinfo(self.dtype).max

    @property
    def settings(self) -> tuple[Any, ...]:
        """The arguments of the operators behind the value."""
        return (self.scale, self.zero_point, self.low, self.high, self.dtype)

    def rounded(self, value: torch.Tensor) -> torch.Tensor:
        """The value as it is read back: float, of the same shape."""
        stored = quantized.quantize_per_tensor(value, *self.settings)
        read: torch.Tensor = quantized.dequantize_per_tensor(stored, *self.settings)
        return read


@dataclass(frozen=True, kw_only=True)
class IntegerWeights:
    """A layer's weight as int8, and its bias where it has one.

    The weight is ``values * scales``, of the layer's shape or as a matrix, with one scale for each output channel (dim
    0). The bias is ``bias * bias_scales``, int32 with the scale of the input times that of the weight: then the layer's
    sum is one of integers. Without `bias_scales` it is in floating point.
    """

    values: torch.Tensor = field(repr=False)
    scales: torch.Tensor = field(repr=False)
    limit: int
    bias: torch.Tensor | None = field(default=None, repr=False)
    bias_scales: torch.Tensor | None = field(default=None, repr=False)


def quantize_program(
    program: Program, values: Mapping[str, ValueGrid], layers: Mapping[str, IntegerWeights], *, note: str
) -> Program:
    """Put values on integer grids, and store the weights of layers as integers.

    Behind each named value stand ``<value>_quantized`` and ``<value>_dequantized``; all that reads the value reads the
    latter, but for the network's outputs. The weight of a layer becomes the parameter ``<weight>_int8``, read through
    ``<layer>_weight``, its bias ``<bias>_int32``. Nodes keep their names. The batch stays dynamic; the old Program does
    not change.

    Raises RewriteError when a node is missing, is no floating-point tensor, or is no layer.
    """
    graph = copied(program.graph)
    module = rebuild(program.module, graph)
    nodes = {node.name: node for node in module.graph.nodes}
    for name in (*values, *layers):
        if name not in nodes:
            raise RewriteError(f"no node {name!r} in the program", hint="apply a plan to the network it was made for")
    added: set[str] = set()
    for name, weights in layers.items():
        added |= _store(module, nodes[name], weights)
    for name, grid in values.items():
        added |= _around(module, nodes[name], grid)
    erase_dead(module.graph)
    result = replace(program, module=rebuild(module, module.graph), history=(*program.history, note))
    infer_shapes(result, added)
    result.graph.lint()
    check_interface(program, result)
    return result


def _around(module: fx.GraphModule, node: fx.Node, grid: ValueGrid) -> set[str]:
    if not is_tensor(node) or not node.meta["val"].is_floating_point():
        raise RewriteError("only floating-point values are quantised", node=node.name)
    readers = [user for user in node.users if user.op != "output"]
    with module.graph.inserting_after(node):
        stored = _call(module, quantized.quantize_per_tensor.default, (node, *grid.settings), f"{node.name}_quantized")
    with module.graph.inserting_after(stored):
        read = _call(
            module, quantized.dequantize_per_tensor.default, (stored, *grid.settings), f"{node.name}_dequantized"
        )
    for made in (stored, read):
        made.meta = {key: item for key, item in node.meta.items() if key != "val"}
    for user in readers:
        user.replace_input_with(node, read)
    return {stored.name, read.name}


def _store(module: fx.GraphModule, layer: fx.Node, weights: IntegerWeights) -> set[str]:
    weight, bias = argument(layer, 1, "weight"), argument(layer, 2, "bias")
    if layer.op != "call_function" or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        raise RewriteError("not a layer with a stored weight", node=layer.name)
    limit = weights.limit
    names = {}
    values = weights.values.reshape(weight.meta["val"].shape)
    names[weight] = _read(
        module, layer, f"{layer.name}_weight", (weight, "int8", values, weights.scales, (-limit, limit))
    )
    if weights.bias is not None and not isinstance(bias, fx.Node):
        raise RewriteError("the layer has no bias to store", node=layer.name)
    if weights.bias is not None and weights.bias_scales is None:
        path, _, leaf = str(bias.target).rpartition(".")
        module.get_submodule(path).register_parameter(leaf, nn.Parameter(weights.bias.contiguous()))
    elif weights.bias is not None:
        bounds = (torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max)
        names[bias] = _read(
            module, layer, f"{layer.name}_bias", (bias, "int32", weights.bias, weights.bias_scales, bounds)
        )
    for stored, read in names.items():
        layer.replace_input_with(stored, read)
    return {read.name for read in names.values()}


def _read(module: fx.GraphModule, layer: fx.Node, name: str, stored: tuple[Any, ...]) -> fx.Node:
    """Integers, their scales and zero points beside the tensor that they stand for, and what reads them."""
    source, suffix, values, scales, bounds = stored
    path, _, leaf = str(source.target).rpartition(".")
    owner = module.get_submodule(path)
    device = getattr(owner, leaf).device
    leaf = free_name(owner, f"{leaf}_{suffix}")
    owner.register_parameter(leaf, nn.Parameter(values.contiguous().to(device), requires_grad=False))
    owner.register_buffer(f"{leaf}_scales", scales.float().to(device))
    owner.register_buffer(f"{leaf}_zeros", torch.zeros(len(scales), dtype=torch.int64, device=device))
    path = f"{path}." if path else ""
    with module.graph.inserting_before(layer):
        operands = [module.graph.get_attr(f"{path}{leaf}{end}") for end in ("", "_scales", "_zeros")]
        read = _call(module, quantized.dequantize_per_channel.default, (*operands, 0, *bounds, values.dtype), name)
    read.meta = {key: item for key, item in layer.meta.items() if key != "val"}
    return read


def _call(module: fx.GraphModule, target: Any, args: tuple[Any, ...], name: str) -> fx.Node:
    return module.graph.create_node("call_function", target, args, name=name)
