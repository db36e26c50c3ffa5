"""The layers that can be re-solved: convolutions and linear maps whose weight is theirs alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ...compiler.ir.program import Program, argument, is_call, is_constant, is_tensor
from ...compiler.support.errors import Reject

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

    def extent(self, program: Program, value: torch.Tensor) -> tuple[int, int]:
        """(columns, rows) of A for an input value, without making it."""
        if self.window is None:
            return value.shape[-1], value.numel() // value.shape[-1]
        kernel, image = self.kernel(program), _as_image(value)
        height, width = self._positions(kernel, image)
        return image.shape[1] // self.groups * kernel[0] * kernel[1], image.shape[0] * height * width

    def rows_per_sample(self, program: Program) -> int:
        """Rows of A that one sample gives: the places of the layer's output."""
        outputs = program.module.get_parameter(self.weight).shape[0]
        return math.prod(program.shape(program.nodes[self.node])) // outputs

    def rows(self, program: Program, value: torch.Tensor, every: int = 1) -> torch.Tensor:
        """A as (groups, columns, rows), from the layer's input value: all of its rows, or each `every`-th. The row axis
        is last: Gram products read it in place."""
        if self.window is None:
            return value.reshape(-1, value.shape[-1])[::every].T.unsqueeze(0)
        kernel, image = self.kernel(program), _as_image(value)
        if every > 1:
            return self._gathered(kernel, image, every)
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

    def outputs(self, value: torch.Tensor, every: int = 1) -> torch.Tensor:
        """A tensor of the layer's output shape as (groups, out/groups, rows), rows those of `rows` in their order."""
        if self.window is None:
            return value.reshape(-1, value.shape[-1])[::every].T.unsqueeze(0)
        flat = value.flatten(2)
        n, o, positions = flat.shape
        if every > 1:
            picks = torch.arange(0, n * positions, every, device=value.device)
            return flat[picks // positions, :, picks % positions].T.reshape(self.groups, o // self.groups, -1)
        return (
            flat.view(n, self.groups, o // self.groups, positions)
            .permute(1, 2, 0, 3)
            .reshape(self.groups, o // self.groups, -1)
        )

    def picked(self, value: torch.Tensor, every: int) -> torch.Tensor:
        """Each `every`-th position of an image of the layer's output shape, as samples of one position each."""
        flat = value.flatten(2)
        picks = torch.arange(0, flat.shape[0] * flat.shape[2], every, device=value.device)
        return flat[picks // flat.shape[2], :, picks % flat.shape[2]][..., None, None]

    def _positions(self, kernel: tuple[int, int], image: torch.Tensor) -> tuple[int, int]:
        """Height and width of the output."""
        assert self.window is not None
        height, width = (
            (size + 2 * pad - reach * (taps - 1) - 1) // step + 1
            for size, taps, step, pad, reach in zip(image.shape[2:], kernel, *self.window, strict=True)
        )
        return height, width

    def _gathered(self, kernel: tuple[int, int], image: torch.Tensor, every: int) -> torch.Tensor:
        """Some patches, without those between them."""
        assert self.window is not None
        (down, right), (top, left), (below, beside) = self.window
        height, width = self._positions(kernel, image)
        device = image.device
        picks = torch.arange(0, image.shape[0] * height * width, every, device=device).reshape(-1, 1, 1)
        sample, place = picks // (height * width), picks % (height * width)
        y = place // width * down + (torch.arange(kernel[0], device=device) * below).reshape(-1, 1)
        x = place % width * right + torch.arange(kernel[1], device=device) * beside
        patches = F.pad(image, (left, left, top, top))[sample, :, y, x]  # (rows, kernel height, kernel width, channels)
        return patches.permute(3, 1, 2, 0).reshape(self.groups, -1, len(picks))

    def kernel(self, program: Program) -> tuple[int, int]:
        shape = program.module.get_parameter(self.weight).shape
        return (int(shape[2]), int(shape[3])) if len(shape) == 4 else (1, int(shape[2]))

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as (groups, out/groups, columns)."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)


def _as_image(value: torch.Tensor) -> torch.Tensor:
    return value.unsqueeze(2) if value.dim() == 3 else value


def layer_names(program: Program, layer: Layer) -> tuple[str, ...]:
    """What a layer may be called in an `ignore` pattern: its node, its module path, its weight. Paths of files begin
    with a slash, which nobody writes."""
    path = program.path(program.nodes[layer.node])
    return tuple(dict.fromkeys((layer.node, path, path.removeprefix("/"), layer.weight)))


def all_layer_names(program: Program) -> list[str]:
    """Every name of every layer."""
    return [name for layer in find_layers(program)[0].values() for name in layer_names(program, layer)]


def matching_layers(program: Program, patterns: Sequence[str]) -> frozenset[str]:
    """The nodes of the layers that the patterns name."""
    layers = find_layers(program)[0] if patterns else {}
    return frozenset(
        node
        for node, layer in layers.items()
        if any(fnmatchcase(name, pattern) for name in layer_names(program, layer) for pattern in patterns)
    )


def find_layers(program: Program) -> tuple[dict[str, Layer], list[Reject]]:
    """Re-solvable layers by node name in topological order, and those contractions that are locked, with the reason."""
    layers: dict[str, Layer] = {}
    rejects: list[Reject] = []
    for name, node in program.nodes.items():
        if not is_call(node, aten.conv1d, aten.conv2d, aten.conv3d, aten.linear):
            continue
        found = _describe(program, node)
        if isinstance(found, Layer):
            layers[name] = found
        else:
            rejects.append(Reject(reason=found, node=name))
    return layers, rejects


def _describe(program: Program, node: fx.Node) -> Layer | str:
    source, weight, bias = node.args[0], argument(node, 1, "weight"), argument(node, 2, "bias")
    if not isinstance(source, fx.Node) or not is_tensor(source):
        return "its input is not an activation"
    if not is_constant(weight) or not (bias is None or is_constant(bias)):
        return "its weight is computed in the graph, not stored"
    tensor = program.constant(weight)
    if not isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point():
        return "its weight is not a trained parameter"
    if not program.owned(weight):
        return "its weight is shared with another layer"
    biased = str(bias.target) if program.owned(bias) else None
    linear = Layer(node=node.name, input=source.name, weight=str(weight.target), bias=biased)
    if is_call(node, aten.linear):
        return linear if tensor.dim() == 2 else "its weight is a vector"
    if tensor.dim() not in (3, 4):
        return "a convolution over three dimensions"
    kernel = [int(k) for k in tensor.shape[2:]]
    stride = _pair(argument(node, 3, "stride", 1), len(kernel), 1)
    dilation = _pair(argument(node, 5, "dilation", 1), len(kernel), 1)
    padding: Any = argument(node, 4, "padding", 0)
    if isinstance(padding, str):
        total = [
            0 if padding == "valid" else d * (k - 1) for d, k in zip(dilation[-len(kernel) :], kernel, strict=True)
        ]
        if any(t % 2 for t in total):
            return "its padding is not the same on both sides"
        padding = [t // 2 for t in total]
    window = (stride, _pair(padding, len(kernel), 0), dilation)
    return replace(linear, groups=int(argument(node, 6, "groups", 1)), window=window)


def _pair(value: Any, dims: int, neutral: int) -> tuple[int, int]:
    """A window setting in two dims; a 1-d convolution is read as a 2-d one of height 1."""
    sizes = [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)
    return (int(sizes[0]), int(sizes[1])) if dims == 2 else (neutral, int(sizes[0]))


def current_parameter(program: Program, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A parameter as it stands during a solve: from `tensors` when it was changed already, else the program's own."""
    return tensors[name] if name in tensors else program.module.get_parameter(name).detach()


def add_delta(tensor: torch.Tensor, change: torch.Tensor, length: float = 1.0) -> torch.Tensor:
    """tensor + length * change, added in float64 where the change is, in the tensor's shape and dtype on its device."""
    added = tensor.to(change.device).double() + length * change.reshape(tensor.shape)
    return added.to(tensor.dtype).to(tensor.device)
