"""The layers that can be re-solved: convolutions and linear maps whose weight is theirs alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ..compiler.errors import Reject
from ..compiler.program import Program, argument, is_call, is_constant, is_tensor

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer of a Program, seen as Y = A W^T + b, one matrix product per group.

    `weight` and `bias` name its tensors. For a convolution A holds the input patches, (groups, rows, in/groups * kh *
    kw), a row for each output position; for a linear layer the input vectors, one group.
    """

    node: str
    input: str
    weight: str
    bias: str | None
    groups: int = 1
    #: stride, padding, dilation of a convolution as 2-tuples; None for a linear layer
    window: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None = None

    def rows(self, program: Program, value: torch.Tensor) -> torch.Tensor:
        """A as (groups, columns, rows), from the layer's input value. The row axis is last: Gram products read it in
        place."""
        if self.window is None:
            return value.reshape(1, -1, value.shape[-1]).transpose(1, 2)
        kernel = self.kernel(program)
        image = value.unsqueeze(2) if value.dim() == 3 else value
        stride, padding, dilation = self.window
        if kernel == (1, 1) and stride == (1, 1) and padding == (0, 0):
            columns = image.flatten(2)
        else:
            columns = F.unfold(image, kernel, dilation=dilation, padding=padding, stride=stride)
        n, d, positions = columns.shape
        return (
            columns.view(n, self.groups, d // self.groups, positions)
            .permute(1, 2, 0, 3)
            .reshape(self.groups, d // self.groups, -1)
        )

    def outputs(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor of the layer's output shape as (groups, out/groups, rows), rows in the order of `rows`."""
        if self.window is None:
            return value.reshape(1, -1, value.shape[-1]).transpose(1, 2)
        flat = value.flatten(2)
        n, o, positions = flat.shape
        return (
            flat.view(n, self.groups, o // self.groups, positions)
            .permute(1, 2, 0, 3)
            .reshape(self.groups, o // self.groups, -1)
        )

    def kernel(self, program: Program) -> tuple[int, int]:
        shape = program.module.get_parameter(self.weight).shape
        return (int(shape[2]), int(shape[3])) if len(shape) == 4 else (1, int(shape[2]))

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as (groups, out/groups, columns)."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)


def find_layers(program: Program) -> tuple[dict[str, Layer], list[Reject]]:
    """Re-solvable layers by node name in topological order, and those contractions that are locked, with the reason."""
    layers: dict[str, Layer] = {}
    rejects: list[Reject] = []
    shared = _tied_weights(program)
    for name, node in program.nodes.items():
        if not is_call(node, aten.conv1d, aten.conv2d, aten.conv3d, aten.linear):
            continue
        found = _describe(program, node, shared)
        if isinstance(found, Layer):
            layers[name] = found
        else:
            rejects.append(Reject(reason=found, node=name))
    return layers, rejects


def _describe(program: Program, node: fx.Node, shared: set[int]) -> Layer | str:
    source, weight, bias = node.args[0], argument(node, 1, "weight"), argument(node, 2, "bias")
    if not isinstance(source, fx.Node) or not is_tensor(source):
        return "its input is not an activation"
    if not is_constant(weight) or not (bias is None or is_constant(bias)):
        return "its weight is computed in the graph, not stored"
    tensor = program.constant(weight)
    if not isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point():
        return "its weight is not a trained parameter"
    if tensor.data_ptr() in shared:
        return "its weight is shared with another layer"
    biased = str(bias.target) if bias is not None else None
    linear = Layer(node=node.name, input=source.name, weight=str(weight.target), bias=biased)
    if is_call(node, aten.linear):
        return linear
    if tensor.dim() not in (3, 4):
        return "a convolution over three dimensions"
    if isinstance(argument(node, 4, "padding"), str):
        return "its padding is given by name"
    stride, padding, dilation = (
        _pair(node, index, label, default, tensor.dim() - 2) for index, label, default in _WINDOW
    )
    return replace(linear, groups=int(argument(node, 6, "groups", 1)), window=(stride, padding, dilation))


_WINDOW = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))


def _pair(node: fx.Node, index: int, label: str, default: int, dims: int) -> tuple[int, int]:
    value: Any = argument(node, index, label, default)
    sizes = [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)
    # a 1-d convolution is read as a 2-d one of height 1
    return (int(sizes[0]), int(sizes[1])) if dims == 2 else (0 if label == "padding" else 1, int(sizes[0]))


def _tied_weights(program: Program) -> set[int]:
    """Storage of weights that more than one node reads."""
    readers: Counter[int] = Counter()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            value = program.constant(node)
            if isinstance(value, torch.Tensor):
                readers[value.data_ptr()] += len(node.users)
    return {pointer for pointer, count in readers.items() if count > 1}
