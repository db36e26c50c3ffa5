"""Pieces of the random networks of hardening.py: registry, activations, norms, and all that convolves and pools.

A piece is a module built for one input shape (without the batch) from one random generator. It takes and returns a
*map* (channels, then 1 to 3 spatial dimensions), *tokens* (positions, channels) or a *vector*. A piece that does not
fit a shape raises `UnfitError`, and is left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

Shape = tuple[int, ...]


class UnfitError(Exception):
    """The piece cannot be built for this shape."""


class Piece(nn.Module):
    """`result`: the form that comes out (`map`, `tokens`, `vector`), "" for the one that went in."""

    result = ""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__()
        del shape, rng


#: Name -> (class, forms that it takes).
PIECES: dict[str, tuple[type[Piece], tuple[str, ...]]] = {}


def piece(*forms: str) -> Callable[[type[Piece]], type[Piece]]:
    """Register a class under its name in lower case."""

    def register(kind: type[Piece]) -> type[Piece]:
        PIECES[kind.__name__.lower()] = (kind, forms)
        return kind

    return register


def need(condition: bool) -> None:
    if not condition:
        raise UnfitError


CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
WIDTHS = (4, 6, 8, 12)


def activation(rng: random.Random, channels: int = 1) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [
        nn.ReLU, nn.ReLU, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.ELU, nn.Softplus, nn.Mish,
        nn.Hardsigmoid, nn.ReLU6, lambda: nn.LeakyReLU(0.1), lambda: nn.PReLU(channels), nn.PReLU, nn.SELU, nn.Identity,
    ]  # fmt: skip
    return rng.choice(kinds)()


class ChannelsLast(nn.Module):
    """A layer norm over the channels of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class WrittenOut(nn.Module):
    """RMS norm over dim 1, operator by operator."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)
        return x * self.weight.view(-1, *[1] * (x.dim() - 2))


def norm(rng: random.Random, channels: int, dims: int) -> nn.Module:
    kind = rng.choice(["batch", "batch", "none", "none", "group", "instance", "layer", "rms", "whole"])
    if kind == "batch":
        return BATCH_NORMS[dims](channels, affine=rng.random() < 0.8)
    if kind == "group":
        return nn.GroupNorm(rng.choice([g for g in (2, 3, 4, channels) if channels % g == 0]), channels)
    if kind == "instance":
        return INSTANCE_NORMS[dims](channels, affine=rng.random() < 0.5)
    if kind == "layer":
        return ChannelsLast(channels)
    if kind == "rms" and rng.random() < 0.3:
        return WrittenOut(channels)
    return nn.GroupNorm(1, channels) if kind == "whole" else nn.Identity()


def width_near(rng: random.Random, groups: int = 1) -> int:
    return rng.choice([w for w in WIDTHS if w % groups == 0])


def convolution(rng: random.Random, shape: Shape, outputs: int | None = None, kernel: int | None = None) -> nn.Module:
    """A convolution of any kind that keeps the positions, or halves them."""
    channels, dims = shape[0], len(shape) - 1
    kernel = kernel or rng.choice([1, 3])
    dilation = 2 if kernel == 3 and min(shape[1:]) > 4 and rng.random() < 0.2 else 1
    stride = 2 if outputs is None and min(shape[1:]) >= 6 and rng.random() < 0.15 else 1
    groups = 1
    if rng.random() < 0.4:
        groups = rng.choice([g for g in (2, 3, 4, channels) if channels % g == 0])
    if outputs is None:
        outputs = channels * rng.choice([1, 1, 2]) if groups == channels else width_near(rng)
    if outputs % groups:
        groups = 1
    bias = rng.random() < 0.7
    padding = dilation * (kernel // 2)
    return CONVS[dims](channels, outputs, kernel, stride, padding, dilation, groups, bias)


def same_conv(inputs: int, outputs: int, dims: int, kernel: int = 1, groups: int = 1) -> nn.Module:
    return CONVS[dims](inputs, outputs, kernel, padding=kernel // 2, groups=groups)


@piece("map")
class Conv(Piece):
    """Convolution, norm, activation."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        self.conv = convolution(rng, shape)
        self.norm = norm(rng, self.conv.out_channels, len(shape) - 1)
        self.act = activation(rng, self.conv.out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


@piece("map")
class Preact(Piece):
    """Norm, activation, convolution."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        self.norm, self.act = norm(rng, shape[0], len(shape) - 1), activation(rng, shape[0])
        self.conv = convolution(rng, shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.act(self.norm(x)))


@piece("map")
class Transposed(Piece):
    """A transposed convolution, grouped at times."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        dims, groups = len(shape) - 1, rng.choice([1, 1, 2])
        need(max(shape[1:]) <= 8)
        groups = groups if shape[0] % 2 == 0 else 1
        stride, kernel = rng.choice([(1, 3), (2, 2), (2, 4)])
        need(dims < 3 or stride == 1)
        padding = {3: 1, 2: 0, 4: 1}[kernel]
        self.conv = TRANSPOSED[dims](shape[0], width_near(rng, groups), kernel, stride, padding, groups=groups)
        self.norm, self.act = norm(rng, self.conv.out_channels, dims), activation(rng)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


@piece("map")
class Pool(Piece):
    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        dims = len(shape) - 1
        need(min(shape[1:]) >= 4)
        functions = {
            1: [F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d],
            2: [F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d],
            3: [F.max_pool3d, F.avg_pool3d],
        }[dims]
        self.function = rng.choice(functions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, 2)


@piece("map")
class Upsample(Piece):
    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        need(max(shape[1:]) <= 5 and len(shape) < 4)
        linear = {2: "linear", 3: "bilinear"}[len(shape)]
        self.mode = rng.choice(["nearest", linear])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2, mode=self.mode)


@piece("map")
class SqueezeExcite(Piece):
    """A gate from pooled channels: by layers, by a 1-D convolution over them (ECA), or by a softmax over two paths."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        c, self.dims, self.kind = shape[0], len(shape) - 1, rng.choice(["se", "se", "linear", "eca", "select"])
        hidden = rng.choice([2, 4])
        if self.kind == "eca":
            self.down = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        elif self.kind == "linear":
            self.down, self.up = nn.Linear(c, hidden), nn.Linear(hidden, c)
        else:
            self.down = same_conv(c, hidden, self.dims)
            self.up = same_conv(hidden, c * (2 if self.kind == "select" else 1), self.dims)
            self.other = same_conv(c, c, self.dims, 3, c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axes = tuple(range(2, x.dim()))
        if self.kind == "eca":
            gate = self.down(x.mean(axes).unsqueeze(1)).squeeze(1)
            return x * torch.sigmoid(gate).view(*gate.shape, *[1] * self.dims)
        if self.kind == "linear":
            gate = self.up(F.relu(self.down(x.mean(axes))))
            return x * F.hardsigmoid(gate).reshape(*gate.shape, *[1] * self.dims)
        gate = self.up(F.silu(self.down(x.mean(axes, keepdim=True))))
        if self.kind == "se":
            return x * torch.sigmoid(gate)
        both = gate.unflatten(1, (2, -1)).softmax(1)
        return x * both[:, 0] + self.other(x) * both[:, 1]


@piece("map")
class Gated(Piece):
    """Two halves, one gates the other: GLU, swish, simple gate, spatial gating."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        outputs, dims = width_near(rng), len(shape) - 1
        self.conv, self.kind = same_conv(shape[0], 2 * outputs, dims, 3), rng.choice(["glu", "swish", "simple", "two"])
        self.gate = same_conv(shape[0], 2 * outputs, dims) if self.kind == "two" else nn.Identity()
        self.local = same_conv(outputs, outputs, dims, 3, outputs) if rng.random() < 0.3 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if self.kind == "two":
            return torch.tanh(y) * torch.sigmoid(self.gate(x))
        if self.kind == "glu":
            return F.glu(y, 1)
        a, b = y.chunk(2, 1)
        return a * F.silu(self.local(b)) if self.kind == "swish" else self.local(a) * b


@piece("map")
class Branches(Piece):
    """The channels split, a part of them convolved, all concatenated again, in some order."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        c = shape[0]
        need(c >= 4)
        first = rng.choice([c // 2, 1, c // 4 or 1])
        self.sizes = [first, c - first]
        self.conv = same_conv(c - first, c - first, len(shape) - 1, rng.choice([1, 3]))
        self.order, self.act, self.whole = rng.random() < 0.5, activation(rng), rng.random() < 0.3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.split(self.sizes, 1)
        parts = [a, self.act(self.conv(b)), *([b] if self.whole else [])]
        return torch.cat(parts[::-1] if self.order else parts, 1)


@piece("map")
class Inception(Piece):
    """Several convolutions of one value side by side; at times read by one convolution (Fire)."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        dims, count = len(shape) - 1, rng.choice([2, 3])
        self.paths = nn.ModuleList(
            same_conv(shape[0], rng.choice([2, 4, 6]), dims, rng.choice([1, 3])) for _ in range(count)
        )
        total = sum(p.out_channels for p in self.paths)
        self.read = same_conv(total, width_near(rng), dims) if rng.random() < 0.5 else nn.Identity()
        self.dense = rng.random() < 0.3 and isinstance(self.read, nn.Identity)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [F.relu(p(x)) for p in self.paths]
        return self.read(torch.cat([x, *found] if self.dense else found, 1))


@piece("map")
class Inverted(Piece):
    """Expand, depthwise, project."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        dims, wide = len(shape) - 1, shape[0] * 2
        self.expand, self.depth = same_conv(shape[0], wide, dims), same_conv(wide, wide, dims, 3, wide)
        self.norm, self.act = norm(rng, wide, dims), activation(rng, wide)
        self.project = same_conv(wide, shape[0], dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(self.act(self.norm(self.depth(self.expand(x)))))


@piece("map")
class Scale(Piece):
    """Layer scale, a learned offset, or a constant map."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        ones = [1] * (len(shape) - 1)
        self.scale = nn.Parameter(torch.ones(shape[0], *ones))
        self.place = nn.Parameter(torch.ones(*(shape if rng.random() < 0.5 else (1, *shape[1:]))))
        self.plain = rng.random() < 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale if self.plain else x * self.scale + self.place


@piece("map")
class OverChannels(Piece):
    """Statistics over the channels: a spatial gate, global response norm, cosine normalisation, softmax pooling."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        dims, self.kind = len(shape) - 1, rng.choice(["spatial", "response", "unit", "context", "softmax"])
        self.conv = same_conv({"spatial": 2}.get(self.kind, shape[0]), 1, dims, 3)
        self.scale = nn.Parameter(torch.ones(shape[0], *[1] * dims))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axes = tuple(range(2, x.dim()))
        if self.kind == "spatial":
            return x * torch.sigmoid(self.conv(torch.cat([x.mean(1, True), x.amax(1, True)], 1)))
        if self.kind == "response":
            size = x.pow(2).sum(axes, keepdim=True).sqrt()
            return x + self.scale * (x * (size / (size.mean(1, keepdim=True) + 1e-3)))
        if self.kind == "unit":
            return F.normalize(x, dim=1) * self.scale
        if self.kind == "softmax":
            return x * x.softmax(1)
        weights = self.conv(x).flatten(2).softmax(-1)
        return x + (x.flatten(2) @ weights.transpose(1, 2)).view(*x.shape[:2], *[1] * len(axes))


@piece("map")
class ToTokens(Piece):
    result = "tokens"

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        size = torch.Size(shape[1:]).numel()
        self.stride = 2 if size > 30 and len(shape) == 3 else 1
        need(size <= 30 or len(shape) == 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride == 2:
            x = F.avg_pool2d(x, 2)
        return x.flatten(2).transpose(1, 2)


@piece("map")
class ToVector(Piece):
    """Pooled, or flattened into a linear layer."""

    result = "vector"

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        size = torch.Size(shape).numel()
        self.kind = rng.choice(["mean", "mean", "max", "flatten", "adaptive", "einsum"])
        self.fc = nn.Linear(size, 8) if self.kind == "flatten" else nn.Identity()
        self.last = rng.random() < 0.3  # flattened behind a permutation
        self.weight = nn.Parameter(torch.ones(torch.Size(shape[1:]).numel()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axes = tuple(range(2, x.dim()))
        if self.kind == "flatten":
            return self.fc((x.movedim(1, -1) if self.last else x).flatten(1))
        if self.kind == "max":
            return x.amax(axes)
        if self.kind == "einsum":
            return torch.einsum("ncp,p->nc", x.flatten(2), self.weight)
        return x.mean(axes) if self.kind == "mean" else F.adaptive_avg_pool1d(x.flatten(2), 1).squeeze(-1)
