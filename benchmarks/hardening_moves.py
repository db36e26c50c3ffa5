"""Pieces of the random networks of hardening.py: channels moved about, weights computed in the graph or shared."""

from __future__ import annotations

import random

import torch
from hardening_pieces import Piece, Shape, activation, need, piece, same_conv, width_near
from torch import nn
from torch.nn import functional as F


def shuffled(rng: random.Random, count: int) -> list[int]:
    order = list(range(count))
    rng.shuffle(order)
    return order


@piece("map", "vector")
class Shuffle(Piece):
    """A channel shuffle or a transposition of the channel grid."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        self.groups = rng.choice([2, 3, 4])
        need(shape[0] % self.groups == 0)
        self.own = rng.random() < 0.5 and len(shape) > 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.own:
            return F.channel_shuffle(x, self.groups)
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


@piece("map")
class PixelShuffle(Piece):
    """Channels to positions or back."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        need(len(shape) == 3)
        down = shape[1] % 2 == 0 and shape[2] % 2 == 0 and shape[0] <= 6
        need(down or (shape[0] % 4 == 0 and shape[1] <= 5))
        self.move = nn.PixelUnshuffle(2) if down else nn.PixelShuffle(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.move(x)


@piece("map", "vector", "tokens")
class Moved(Piece):
    """The channels in another order: roll, flip, gather, an index, a permutation by matrix."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        self.dim = 2 if len(shape) == 2 and rng.random() < 0.5 else 1
        c = shape[self.dim - 1]
        self.kind, self.by = (
            rng.choice(["roll", "roll", "flip", "gather", "index", "select", "matrix"]),
            rng.choice([1, 2, -1]),
        )
        self.register_buffer("order", torch.tensor(shuffled(rng, c)))
        self.register_buffer("matrix", torch.eye(c)[self.order])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "roll":
            return x.roll(self.by, self.dim)
        if self.kind == "flip":
            return x.flip(self.dim)
        if self.kind == "gather":
            return x.gather(self.dim, self.order.view(-1, *[1] * (x.dim() - 1 - self.dim)).expand(x.shape))
        if self.kind == "index":
            return x[:, self.order] if self.dim == 1 else x[:, :, self.order]
        if self.kind == "select":
            return x.index_select(self.dim, self.order)
        return torch.tensordot(x, self.matrix, ([self.dim], [1])).movedim(-1, self.dim)


@piece("map", "vector", "tokens")
class Taken(Piece):
    """Some of the channels, some twice: slices, halves added, even and odd, chosen, repeated, padded."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        self.dim = len(shape) if len(shape) == 2 else 1
        c = shape[self.dim - 1]
        need(c % 2 == 0 and c >= 4)
        kinds = ["halves", "even", "slice", "chosen", "pad", "swap", "replace", "interleave"]
        self.kind = rng.choice(kinds + (["repeat", "twice"] if c <= 6 else []))
        self.register_buffer("chosen", torch.tensor([rng.randrange(c) for _ in range(4)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dim, c = self.dim, x.shape[self.dim]
        a, b = x.narrow(dim, 0, c // 2), x.narrow(dim, c // 2, c // 2)
        if self.kind == "halves":
            return a + b
        if self.kind == "even":
            even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
            return even - 0.5 * odd
        if self.kind == "slice":
            return x.narrow(dim, 1, c - 2)
        if self.kind == "chosen":
            return x.index_select(dim, self.chosen)
        if self.kind == "pad":
            return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [1, 2])
        if self.kind == "swap":
            return torch.cat([torch.relu(b), a], dim)
        if self.kind == "replace":
            return torch.cat([torch.tanh(a), b], dim)
        if self.kind == "interleave":
            return torch.stack([a, b], dim + 1).flatten(dim, dim + 1)
        if self.kind == "repeat":
            return x.repeat_interleave(2, dim)
        return torch.cat([x, torch.relu(x)], dim)


@piece("map", "tokens")
class Coupled(Piece):
    """Movements that take two dimensions at once: the diagonal, strides of memory, a fold into positions."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        self.kind = rng.choice(["diagonal", "strided", "fold", "transposed", "unfold"])
        last, other = shape[-1], shape[0]
        need(self.kind != "diagonal" or (last >= 2 and other >= 4))
        self.size = min(last, other)
        self.fc = nn.Linear(self.size, other if len(shape) > 2 else last)
        self.conv = same_conv(
            shape[0], shape[-1] if self.kind == "transposed" and len(shape) == 3 else shape[0], len(shape) - 1
        )
        self.rank = len(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "diagonal":  # of channels and positions
            y = self.fc(x.diagonal(0, 1, x.dim() - 1))
            if self.rank == 2:
                return x + y.unsqueeze(1)
            return (
                x + y.flatten(1, -2).mean(1).view(x.shape[0], -1, *[1] * (self.rank - 1))
                if y.dim() > 2
                else x * y.mean()
            )
        if self.kind == "strided":
            x = x.contiguous()
            return x.as_strided((x.shape[0], x.shape[1] - 1, *x.shape[2:]), x.stride(), 0)
        if self.kind == "fold":
            return x.flatten(1).view(x.shape[0], x.shape[2], x.shape[1], *x.shape[3:])
        if self.kind == "transposed":
            return x.transpose(1, -1).contiguous()
        return x.unfold(1, 2, 1).sum(-1)


class Computed(nn.Module):
    """A weight that the graph computes from parameters, (outputs, inputs)."""

    KINDS = (
        "norm_in", "norm_out", "softmax_out", "softmax_in", "standard", "sum", "cumsum", "sort", "product", "spectral",
        "scaled", "masked", "max", "clamped", "circulant",
    )  # fmt: skip

    def __init__(self, outputs: int, inputs: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight, self.gain = nn.Parameter(torch.ones(outputs, inputs)), nn.Parameter(torch.ones(outputs, 1))
        self.left, self.right = nn.Parameter(torch.ones(outputs, 3)), nn.Parameter(torch.ones(3, inputs))

    def forward(self) -> torch.Tensor:
        w = self.weight
        if self.kind == "product":
            return self.left @ self.right
        if self.kind == "circulant":
            return w + torch.roll(w, 1, 0)
        return {
            "norm_in": lambda: w / w.norm(dim=1, keepdim=True) * self.gain,
            "norm_out": lambda: w / w.norm(dim=0),
            "softmax_out": lambda: w.softmax(0),
            "softmax_in": lambda: w.softmax(1),
            "standard": lambda: (w - w.mean(1, keepdim=True)) / (w.var(1, keepdim=True) + 1e-3).sqrt() * self.gain,
            "sum": lambda: w / w.abs().sum(1, keepdim=True),
            "cumsum": lambda: w.cumsum(0) * 0.5,
            "sort": lambda: w.sort(0).values,
            "spectral": lambda: w / (w * w).sum().sqrt() * 2,
            "scaled": lambda: w * self.gain,
            "masked": lambda: w.tril(1),
            "max": lambda: w / w.abs().amax(0, keepdim=True),
            "clamped": lambda: w.clamp(-0.5, 0.5),
        }[self.kind]()


@piece("map", "tokens", "vector")
class Parametrised(Piece):
    """A layer whose weight is computed: weight norm, standardisation, a softmax, a product ..."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        self.channels_last = (len(shape) == 2 and rng.random() < 0.5) or len(shape) == 1
        c = shape[-1] if self.channels_last else shape[0]
        self.weight = Computed(width_near(rng), c, rng.choice(Computed.KINDS))
        self.act, self.dims = activation(rng), len(shape) - 1
        self.official = rng.random() < 0.25 and self.dims > 0 and not self.channels_last
        conv = same_conv(c, c, max(1, self.dims), 3)
        self.conv = (
            nn.utils.parametrizations.weight_norm(conv, dim=rng.choice([0, 0, 1])) if self.official else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight()
        if self.channels_last:
            return self.act(F.linear(x, w))
        function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[self.dims]
        return self.act(function(self.conv(x), w.view(*w.shape, *[1] * self.dims)))


@piece("map", "tokens", "vector")
class Weighted(Piece):
    """Channels times a vector that is normalised in the graph, or plus one."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        self.last = len(shape) == 2 or len(shape) == 1
        c = shape[-1] if self.last else shape[0]
        self.kind = rng.choice(
            ["softmax", "unit", "sum", "cumsum", "sort", "mean", "table", "exp", "sigmoid", "layer", "flip"]
        )
        self.p, self.rest, self.table = nn.Parameter(torch.ones(c)), len(shape) - 1, nn.Parameter(torch.ones(3, c))
        self.add = rng.random() < 0.3

    def vector(self) -> torch.Tensor:
        p = self.p
        return {
            "softmax": lambda: p.softmax(0) * len(p),
            "unit": lambda: p / p.norm(),
            "sum": lambda: p / p.abs().sum(),
            "cumsum": lambda: p.cumsum(0),
            "sort": lambda: p.sort().values,
            "mean": lambda: p - p.mean(),
            "table": lambda: self.table.softmax(0).sum(0) + self.table[1],
            "exp": lambda: -p.exp(),
            "sigmoid": lambda: p.sigmoid(),
            "layer": lambda: F.layer_norm(p, p.shape),
            "flip": lambda: p.flip(0),
        }[self.kind]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = self.vector()
        v = v if self.last else v.view(-1, *[1] * self.rest)
        return x + v if self.add else x * v


@piece("tokens", "vector")
class Tied(Piece):
    """A weight that is used twice: transposed, cut in pieces, as a table of vectors, or as it is."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        c = shape[-1]
        self.kind = rng.choice(["transposed", "square", "rows", "twice", "halves", "view", "buffers"])
        hidden = c if self.kind in {"square", "twice", "view", "buffers"} else rng.choice([4, 6, 8])
        self.up, self.down = nn.Linear(c, hidden), nn.Linear(hidden, c)
        self.act = activation(rng)
        if self.kind == "view":  # another view of the same memory
            self.down.weight = nn.Parameter(self.up.weight.detach().t())
        if self.kind == "buffers":
            self.register_buffer("table", torch.ones(hidden, c))
            self.register_buffer("turned", self.table.t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "buffers":
            return x + F.linear(self.act(F.linear(x, self.table)), self.turned)
        h = self.act(self.up(x))
        if self.kind == "transposed":
            return x + F.linear(h, self.up.weight.t())
        if self.kind == "square":
            return x + self.down(torch.tanh(F.linear(h, self.up.weight.t())))
        if self.kind == "rows":
            return x + self.down(h) + self.up.weight[1] * 0.5
        if self.kind == "twice":
            return self.down(self.act(self.up(h)))
        if self.kind == "view":
            return x + F.linear(h, self.down.weight)
        half = h.shape[-1] // 2
        return (
            x
            + F.linear(h[..., :half], self.down.weight[:, :half])
            + F.linear(h[..., half:], self.down.weight[:, half:])
        )


@piece("map")
class Dynamic(Piece):
    """Weights from activations: a mixture of kernels, or a product of two maps."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        c, dims = shape[0], len(shape) - 1
        self.kind, h = rng.choice(["mixture", "gram", "where", "max", "pair"]), 4
        self.a, self.b = same_conv(c, h, dims), same_conv(c, h, dims)
        self.out, self.route = same_conv(h, c, dims), nn.Linear(c, 2)
        self.grams = nn.Linear(h * h, c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, axes = self.a(x), self.b(x), tuple(range(2, x.dim()))
        ones = [1] * len(axes)
        if self.kind == "mixture":
            share = self.route(x.mean(axes)).softmax(-1).unbind(1)
            return x + self.out(a * share[0].view(-1, 1, *ones) + b * share[1].view(-1, 1, *ones))
        if self.kind == "gram":
            gram = a.flatten(2) @ b.flatten(2).transpose(1, 2) / 9
            return x + self.grams(gram.flatten(1)).view(*x.shape[:2], *ones)
        if self.kind == "where":
            return x + self.out(torch.where(a > b, a, b * 0.5))
        return x + self.out(torch.maximum(a, b) if self.kind == "max" else a * b)
