"""A program in floating point from one with values and weights on integer grids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import fx, nn

from ...compiler.ir.edit import check_interface, erase_dead, infer_shapes, rebuild
from ...compiler.ir.graph_copy import copied
from ...compiler.ir.program import Program, is_call, is_constant
from .values import least_of

aten = torch.ops.aten
quantized = torch.ops.quantized_decomposed
_STORES = (quantized.quantize_per_tensor, quantized.quantize_per_channel)
_READS = (quantized.dequantize_per_tensor, quantized.dequantize_per_channel)
#: What calibrated rounding appends to the name of a weight.
_ENDINGS = ("_int8", "_int32", "_quantized")


def dequantize_program(program: Program) -> Program:
    """Weights that are stored as integers become float32 parameters of the values that are read from them; values are
    no longer rounded.

    A value that was stored on a grid from zero on keeps its range: the grid did the work of a ReLU or ReLU6, which
    quantising tools leave out there. Elsewhere the range that a grid cuts off, chosen so that data hardly leave it, is
    given up. Integers that are computed with, instead of being read back, stay as they are.
    """
    module = rebuild(program.module, copied(program.graph))
    added: set[str] = set()
    for node in list(module.graph.nodes):
        if not is_call(node, *_READS):
            continue
        source = node.args[0]
        if is_constant(source):
            made = _weight(program, module, node)
        elif is_call(source, *_STORES) and _grid(node) == _grid(source):
            made = _value(module, source)
        else:
            continue
        node.replace_all_uses_with(made)
        added.add(made.name)
    erase_dead(module.graph)
    note = "values and weights in floating point"
    result = replace(program, module=rebuild(module, module.graph), history=(*program.history, note))
    fresh = {name for name in added if name in result.nodes and "val" not in result.nodes[name].meta}
    infer_shapes(result, fresh)
    result.graph.lint()
    check_interface(program, result)
    return result


def _weight(program: Program, module: fx.GraphModule, read: fx.Node) -> fx.Node:
    """A parameter with the values that are read from stored integers."""
    operands = [program.constant(a) if isinstance(a, fx.Node) else a for a in read.args]
    target: Callable[..., Any] = read.target  # type: ignore[assignment]
    with torch.no_grad():
        values = target(*operands, **read.kwargs)
    path, _, leaf = str(read.args[0].target).rpartition(".")  # type: ignore[union-attr]
    owner = module.get_submodule(path)
    name = leaf
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    while hasattr(owner, name):
        name += "_float"
    owner.register_parameter(name, nn.Parameter(values.contiguous(), requires_grad=True))
    with module.graph.inserting_before(read):
        return module.graph.get_attr(f"{path}.{name}" if path else name)


def _value(module: fx.GraphModule, stored: fx.Node) -> fx.Node:
    """What is read instead of the value that was stored: itself, or clipped as its grid did."""
    value: fx.Node = stored.args[0]  # type: ignore[assignment]
    if not is_call(stored, quantized.quantize_per_tensor):
        return value
    scale, zero, low, high = stored.args[1:5]
    if zero != low or _never_negative(value):
        return value
    top = (high - zero) * scale  # type: ignore[operator]
    with module.graph.inserting_after(stored):
        return module.graph.create_node(
            "call_function", aten.hardtanh.default, (value, 0.0, top), name=f"{value.name}_clipped"
        )


def _never_negative(node: fx.Node) -> bool:
    least = least_of(node)
    return is_call(node, aten.sigmoid) or (least is not None and least >= 0)


def _grid(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.args[1:6])
