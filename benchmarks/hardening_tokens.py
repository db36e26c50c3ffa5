"""Pieces of the random networks of hardening.py: attention, MLPs, recurrence, and what takes tokens or vectors."""

from __future__ import annotations

import random

import torch
from hardening_pieces import Piece, Shape, activation, need, piece, width_near
from torch import nn
from torch.nn import functional as F


class Rms(nn.Module):
    """RMS norm over the last dimension: torch's, or operator by operator."""

    def __init__(self, channels: int, written: bool) -> None:
        super().__init__()
        self.weight, self.written = nn.Parameter(torch.ones(channels)), written

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.written:
            return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)
        return self.weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5))


def norm(rng: random.Random, channels: int) -> nn.Module:
    kind = rng.choice(["layer", "layer", "rms", "written", "none", "bare"])
    if kind in {"rms", "written"}:
        return Rms(channels, kind == "written")
    return {
        "layer": nn.LayerNorm(channels),
        "none": nn.Identity(),
        "bare": nn.LayerNorm(channels, elementwise_affine=False),
    }[kind]


def rotary(x: torch.Tensor, table: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate pairs of the last dimension by the angles of `table` (positions, size / 2)."""
    cos, sin = table.cos(), table.sin()
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@piece("tokens")
class Attention(Piece):
    """Self-attention: fused or separate, grouped keys, rotary positions, norms of both, a bias table, causal."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        t, c = shape
        self.heads, self.size = rng.choice([1, 2, 4]), rng.choice([2, 4])
        self.shared = rng.choice([n for n in (1, 2, 4) if self.heads % n == 0])
        self.value = self.size if rng.random() < 0.8 else 3
        queries, keys, values = self.heads * self.size, self.shared * self.size, self.shared * self.value
        self.kind = rng.choice(["fused", "fused_split", "separate", "separate"])
        if self.kind == "fused":
            self.shared, self.value = self.heads, self.size
            self.qkv = nn.Linear(c, 3 * queries, bias=rng.random() < 0.7)
        elif self.kind == "fused_split":
            self.sizes = [queries, keys, values]
            self.qkv = nn.Linear(c, sum(self.sizes))
        else:
            self.q, self.k, self.v = nn.Linear(c, queries), nn.Linear(c, keys, bias=False), nn.Linear(c, values)
        self.out = nn.Linear(self.heads * self.value, c)
        self.pre = norm(rng, c)
        self.norm_q, self.norm_k = (
            (nn.LayerNorm(self.size), Rms(self.size, True)) if rng.random() < 0.2 else (nn.Identity(),) * 2
        )
        self.rotate, self.interleaved = rng.random() < 0.3, rng.random() < 0.5
        self.register_buffer("angles", torch.rand(t, self.size // 2))
        self.way = rng.choice(["plain", "sdpa", "causal", "gqa"])
        self.bias = nn.Parameter(torch.zeros(self.heads, t, t)) if self.way == "plain" and rng.random() < 0.4 else None
        self.residual = rng.random() < 0.7

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n, t, _ = x.shape
        if self.kind == "fused":
            q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        found = self.qkv(x).split(self.sizes, -1) if self.kind == "fused_split" else (self.q(x), self.k(x), self.v(x))
        q, k, v = found
        q = q.view(n, t, self.heads, self.size).transpose(1, 2)
        k = k.view(n, t, self.shared, self.size).transpose(1, 2)
        return q, k, v.reshape(n, t, self.shared, self.value).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.parts(self.pre(x))
        q, k = self.norm_q(q), self.norm_k(k)
        if self.rotate:
            q, k = (rotary(y, self.angles, self.interleaved) for y in (q, k))
        if self.way == "gqa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (y.repeat_interleave(self.heads // self.shared, 1) for y in (k, v))
            if self.way == "plain":
                scores = q @ k.transpose(-1, -2) * self.size**-0.5
                y = (scores if self.bias is None else scores + self.bias).softmax(-1) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=self.way == "causal")
        y = self.out(y.transpose(1, 2).reshape(n, t, self.heads * self.value))
        return x + y if self.residual else y


@piece("tokens")
class LinearAttention(Piece):
    """Keys times values first; over the channels instead of the positions at times (XCiT)."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        self.heads, self.size, self.cross = 2, rng.choice([2, 4]), rng.random() < 0.5
        self.qkv, self.out = (
            nn.Linear(shape[1], 3 * self.heads * self.size),
            nn.Linear(self.heads * self.size, shape[1]),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = (y.view(n, t, self.heads, self.size).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if self.cross:
            weights = (q.transpose(-1, -2) @ k * 0.3).softmax(-1)
            y = (weights @ v.transpose(-1, -2)).transpose(-1, -2)
        else:
            y = F.elu(q) @ (F.elu(k).transpose(-1, -2) @ v) / t
        return x + self.out(y.transpose(1, 2).flatten(2))


@piece("tokens", "vector")
class Mlp(Piece):
    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        c, hidden = shape[-1], rng.choice([4, 8, 12, 16])
        self.pre, self.up, self.down = norm(rng, c), nn.Linear(c, hidden), nn.Linear(hidden, c)
        self.act, self.inner = activation(rng), norm(rng, hidden) if rng.random() < 0.3 else nn.Identity()
        self.residual = rng.random() < 0.7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(self.inner(self.act(self.up(self.pre(x)))))
        return x + y if self.residual else y


@piece("tokens", "vector")
class GatedMlp(Piece):
    """SwiGLU and its kin, fused or not, two experts at times."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        c, hidden = shape[-1], rng.choice([4, 6, 8])
        self.kind = rng.choice(["fused", "separate", "glu", "experts", "interleaved"])
        self.up, self.gate = nn.Linear(c, 2 * hidden), nn.Linear(c, 2 * hidden)
        inner = 2 * hidden if self.kind == "separate" else hidden
        self.down, self.act = nn.Linear(inner, c), activation(rng)
        self.other, self.route = nn.Linear(hidden, c), nn.Linear(c, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        if self.kind == "separate":
            return x + self.down(y * self.act(self.gate(x)))
        if self.kind == "glu":
            return x + self.down(F.glu(y, -1))
        if self.kind == "interleaved":
            return x + self.down(y[..., ::2] * self.act(y[..., 1::2]))
        a, b = y.chunk(2, -1)
        if self.kind == "fused":
            return x + self.down(a * self.act(b))
        share = self.route(x).softmax(-1)
        return x + self.down(F.relu(a)) * share[..., :1] + self.other(F.relu(b)) * share[..., 1:]


@piece("tokens", "vector")
class Projection(Piece):
    """A linear layer to another width, in one of several spellings."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        self.kind, outputs = rng.choice(["linear", "matmul", "einsum", "addmm", "bmm"]), width_near(rng)
        self.weight, self.bias = nn.Parameter(torch.ones(shape[-1], outputs)), nn.Parameter(torch.zeros(outputs))
        self.act = activation(rng)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "linear":
            y = F.linear(x, self.weight.t(), self.bias)
        elif self.kind == "einsum":
            y = torch.einsum("...c,co->...o", x, self.weight) + self.bias
        elif self.kind == "addmm" and x.dim() == 2:
            y = torch.addmm(self.bias, x, self.weight)
        elif self.kind == "bmm" and x.dim() == 3:
            y = torch.bmm(x, self.weight.expand(x.shape[0], -1, -1)) + self.bias
        else:
            y = x @ self.weight + self.bias
        return self.act(y)


@piece("tokens")
class TokenMix(Piece):
    """A layer over the positions, or a convolution along them."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        t, c = shape
        self.kind, hidden = rng.choice(["mixer", "conv", "depthwise", "causal"]), rng.choice([4, 8])
        self.up, self.down, self.norm = nn.Linear(t, hidden), nn.Linear(hidden, t), nn.LayerNorm(c)
        groups = 1 if self.kind == "conv" else c
        self.conv = nn.Conv1d(c, c, 3, padding=0 if self.kind == "causal" else 1, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x).transpose(1, 2)
        if self.kind == "mixer":
            y = self.down(F.gelu(self.up(y)))
        else:
            y = F.silu(self.conv(F.pad(y, (2, 0)) if self.kind == "causal" else y))
        return x + y.transpose(1, 2)


@piece("tokens")
class Positions(Piece):
    """A table, a class token, registers, or sums along the positions."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        self.kind = rng.choice(["table", "class", "sum", "flip", "shift"])
        self.table, self.token = nn.Parameter(torch.zeros(1, *shape)), nn.Parameter(torch.zeros(1, 1, shape[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "table":
            return x + self.table
        if self.kind == "class":
            return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        if self.kind == "sum":
            return x.cumsum(1) * 0.3
        return x.flip(1) if self.kind == "flip" else (x + torch.roll(x, 1, 1)) * 0.7


@piece("tokens")
class Recurrent(Piece):
    """A cell unrolled over the first positions: GRU, LSTM, minimal, or a diagonal state (S4-like)."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        c, self.steps = shape[1], min(3, shape[0])
        self.kind, h = rng.choice(["gru", "lstm", "plain", "diagonal", "minimal"]), rng.choice([4, 6])
        self.last = rng.random() < 0.4
        if self.kind in {"gru", "lstm"}:
            self.cell: nn.Module = (nn.GRUCell if self.kind == "gru" else nn.LSTMCell)(c, h)
        else:
            self.x, self.h = nn.Linear(c, h * (2 if self.kind == "minimal" else 1)), nn.Linear(h, h)
        self.decay, self.out, self.hidden = nn.Parameter(torch.zeros(h)), nn.Linear(h, c), h

    def step(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kind == "gru":
            return self.cell(x, h), c
        if self.kind == "lstm":
            return self.cell(x, (h, c))
        if self.kind == "plain":
            return torch.tanh(self.x(x) + self.h(h)), c
        if self.kind == "diagonal":
            return torch.sigmoid(self.decay) * h + self.x(x), c
        a, b = self.x(x).chunk(2, -1)
        gate = torch.sigmoid(a)
        return (1 - gate) * h + gate * torch.tanh(b), c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = c = x.new_zeros(x.shape[0], self.hidden)
        states = []
        for step in range(self.steps):
            h, c = self.step(x[:, step], h, c)
            states.append(h)
        return x + (self.out(h).unsqueeze(1) if self.last else self.out(torch.stack(states, 1)).mean(1, keepdim=True))


@piece("tokens")
class TokensToMap(Piece):
    result = "map"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


@piece("tokens")
class TokensToVector(Piece):
    """Mean, first, last, or an attention pooling with a learned query."""

    result = "vector"

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        self.kind = rng.choice(["mean", "first", "last", "query", "flat"])
        self.query, self.key = nn.Parameter(torch.zeros(1, 4)), nn.Linear(shape[1], 4)
        self.fc = nn.Linear(shape[0] * shape[1], 6) if self.kind == "flat" else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "query":
            weights = (self.query @ self.key(x).transpose(1, 2)).softmax(-1)
            return (weights @ x).squeeze(1)
        if self.kind == "flat":
            return self.fc(x.flatten(1))
        return x.mean(1) if self.kind == "mean" else x[:, 0 if self.kind == "first" else -1]


@piece("vector")
class Dense(Piece):
    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        h = width_near(rng)
        self.fc, self.act = nn.Linear(shape[0], h, bias=rng.random() < 0.7), activation(rng)
        self.norm = rng.choice([nn.BatchNorm1d(h), nn.Identity(), nn.LayerNorm(h)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.fc(x)))


@piece("vector")
class Crossed(Piece):
    """Factorisation, cross and bilinear layers: channels times channels."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        c = shape[0]
        self.kind = rng.choice(["cross", "outer", "bilinear", "maxout", "dot"])
        need(c <= 12)
        self.a, self.b = nn.Linear(c, c), nn.Linear(c, 2 * 4)
        self.outer, self.small = nn.Linear(16, c), nn.Linear(c, 4)
        self.pair = nn.Bilinear(c, c, 4) if self.kind == "bilinear" else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "cross":
            return x * self.a(x) + x
        if self.kind == "outer":
            y = self.small(x)
            return x + self.outer((y.unsqueeze(2) * y.unsqueeze(1)).flatten(1))
        if self.kind == "bilinear":
            return self.pair(x, self.a(x))
        if self.kind == "maxout":
            return self.b(x).unflatten(1, (2, 4)).amax(1)
        return x * (self.a(x) * x).sum(1, keepdim=True)


@piece("vector")
class VectorToMap(Piece):
    result = "map"

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        super().__init__(shape, rng)
        self.dims, self.channels = rng.choice([1, 2]), rng.choice([4, 6])
        self.fc = nn.Linear(shape[0], self.channels * 4**self.dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).view(x.shape[0], self.channels, *[4] * self.dims)
