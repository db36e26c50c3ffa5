"""Layers and joins in words, and the channels that a layer reads and makes, for people and for pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.program import Program, argument, dtype_name, is_call, is_tensor
from ..ir.segments import is_dequantized

aten = torch.ops.aten

_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)
_TRANSPOSED = (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
#: Where the operand stands that holds the weight of a matrix product.
_PRODUCTS: dict[object, int] = {aten.mm: 1, aten.matmul: 1, aten.addmm: 2}
_JOINS = {"add": "+", "sub": "\u2212", "mul": "\u00d7", "div": "\u00f7"}
_NAMES = {
    "addmm": "linear",
    "mm": "matrix product",
    "bmm": "matrix product",
    "baddbmm": "matrix product",
    "matmul": "matrix product",
    "scaled_dot_product_attention": "attention",
}


@dataclass(frozen=True, kw_only=True)
class Width:
    """Channels that a layer reads and makes."""

    inputs: int
    outputs: int


def layer_words(program: Program, node: fx.Node) -> str:
    """A contraction in words: ``3 x 3 convolution, stride 2``."""
    if not _is_convolution(node):
        name = _operator(node)
        return _NAMES.get(name, name.replace("_", " "))
    size, groups = program.shape(argument(node, 1, "weight")), _groups(node)
    depthwise = groups > 1 and size[1] == 1
    kind = "transposed " if _is_transposed(node) else "depthwise " if depthwise else ""
    words = [f"{_times(size[2:])} {kind}convolution"]
    stride = argument(node, 3, "stride", 1)
    steps = sorted(set(stride if isinstance(stride, (list, tuple)) else [stride]), key=str)
    if steps != [1]:
        words.append(f"stride {_times(steps)}")
    if groups > 1 and not depthwise:
        words.append(f"{groups} groups")
    return ", ".join(words)


def layer_precision(node: fx.Node) -> str:
    """What a layer multiplies: ``int8`` where its weight and its input are read back from integers, else the dtype of
    what it makes."""
    weight = argument(node, 1, "weight")
    if is_dequantized(weight) and is_dequantized(node.args[0]):
        return dtype_name(weight.args[0].meta["val"].dtype)
    return dtype_name(node.meta["val"].dtype)


def join_sign(node: fx.Node) -> str:
    """``+`` for an addition, ``cat`` for a concatenation, else the operator's name."""
    name = _operator(node)
    return _JOINS.get(name, name)


def layer_width(program: Program, node: fx.Node) -> Width | None:
    """Channels in and out, read off the weight; None for a contraction of two activations."""
    if _is_convolution(node):
        size = program.shape(argument(node, 1, "weight"))
        if _is_transposed(node):
            return Width(inputs=size[0], outputs=size[1] * _groups(node))
        return Width(inputs=size[1] * _groups(node), outputs=size[0])
    linear = is_call(node, aten.linear)
    place = 1 if linear else _PRODUCTS.get(getattr(node.target, "overloadpacket", None))
    weight = None if place is None else argument(node, place, "weight" if linear else "mat2")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or not is_tensor(weight):
        return None
    size = program.shape(weight)
    if len(size) != 2:
        return None
    return Width(inputs=size[1], outputs=size[0]) if linear else Width(inputs=size[0], outputs=size[1])


def _is_convolution(node: fx.Node) -> bool:
    return is_call(node, aten.convolution, *_CONVOLUTIONS, *_TRANSPOSED)


def _is_transposed(node: fx.Node) -> bool:
    return is_call(node, *_TRANSPOSED) or (is_call(node, aten.convolution) and bool(argument(node, 6, "transposed")))


def _groups(node: fx.Node) -> int:
    return int(argument(node, 8 if is_call(node, aten.convolution) else 6, "groups", 1))


def _operator(node: fx.Node) -> str:
    target: Any = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(target, "__name__", target)).rsplit(".", 1)[-1].rstrip("_")


def _times(numbers: Iterable[object]) -> str:
    return " \u00d7 ".join(map(str, numbers))
