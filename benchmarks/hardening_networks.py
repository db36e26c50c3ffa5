"""Random networks of 5 to 40 operators for hardening.py: the same number and seed give the same network, alone or not.

A network is a `Recipe`, plain data: where it starts, a list of pieces (each a name and a seed of its own), how it ends.
Each piece is built for the shape that it meets, so any piece can be left out of a recipe: that is how a failure is
made small.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import hardening_moves  # noqa: F401 - registers its pieces
import hardening_tokens  # noqa: F401
import torch
from hardening_pieces import PIECES, Piece, Shape, UnfitError, same_conv
from torch import nn
from torch.nn import functional as F

STARTS = ("map2", "map2", "map2", "map1", "map3", "tokens", "ids", "vector")
#: What refers to other values of the network.
LINKS = ("add", "join", "times", "residual", "again", "condition", "output")
#: From one form to another.
BRIDGES = {
    ("map", "tokens"): "totokens",
    ("tokens", "map"): "tokenstomap",
    ("tokens", "vector"): "tokenstovector",
    ("map", "vector"): "tovector",
    ("vector", "map"): "vectortomap",
}
#: Pieces behind each other, drawn from these: small networks find as much a second, and shrink less.
LENGTHS = (1, 2, 2, 2, 3, 3, 3, 4, 5, 8)
#: Ids that an embedding table holds.
IDS = 11


@dataclass(frozen=True)
class Step:
    """One piece; `inner` are the pieces of a residual branch."""

    kind: str
    seed: int
    inner: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A network as plain data. `repr` gives the code that makes it again."""

    start: str
    seed: int
    steps: tuple[Step, ...] = ()
    tied: bool = False
    condition: bool = field(default=False)


def random_recipe(number: int, seed: int = 0) -> Recipe:
    """The recipe of one network."""
    rng = random.Random(f"{seed}/{number}")
    start = rng.choice(STARTS)
    form, steps = form_of(start), list[Step]()
    for _ in range(rng.choice(LENGTHS)):
        steps.append(_step(rng, form, depth=0))
        form = result_of(steps[-1], form)
    condition = any(s.kind == "condition" for s in steps)
    return Recipe(start, rng.randrange(1 << 30), tuple(steps), start == "ids" and rng.random() < 0.5, condition)


def _step(rng: random.Random, form: str, depth: int) -> Step:
    seed = rng.randrange(1 << 30)
    if rng.random() < 0.25:
        kind = rng.choice(LINKS if depth == 0 else ("again", "add", "join"))
        if kind == "residual":
            return Step(kind, seed, tuple(_step(rng, form, 1) for _ in range(rng.choice([1, 2, 3]))))
        return Step(kind, seed)
    fitting = [name for name, (_, forms) in PIECES.items() if form in forms]
    if depth:  # a branch has to end in the form that it began in
        fitting = [name for name in fitting if not PIECES[name][0].result]
    return Step(rng.choice(fitting if rng.random() < 0.9 else list(PIECES)), seed)


def result_of(step: Step, form: str) -> str:
    """The form behind a step, as far as its name says it."""
    return PIECES[step.kind][0].result or form if step.kind in PIECES else form


def form_of(kind: str) -> str:
    return {"map1": "map", "map2": "map", "map3": "map", "ids": "tokens"}.get(kind, kind)


class Chain(nn.Module):
    """Steps behind each other; a step may read any value before it. `shape` and `form` are those of the result."""

    def __init__(self, steps: Sequence[Step], shape: Shape, form: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.plan: list[tuple[str, int, int]] = []  # kind, part, value referred to
        self.places: list[tuple[Shape, str]] = [(shape, form)]
        for step in steps:
            self._grow(step)
        self.shape, self.form = self.places[-1]

    def _grow(self, step: Step) -> None:
        shape, form = self.places[-1]
        rng = random.Random(step.seed)
        if step.kind in LINKS:
            self._link(step, rng, shape, form)
            return
        kind, forms = PIECES[step.kind]
        # a piece for another form is reached through a change of form, where there is one
        if form not in forms:
            bridge = BRIDGES.get((form, forms[0]))
            if bridge is None or rng.random() < 0.5 or not self._add(PIECES[bridge][0], rng):
                return
        self._add(kind, rng)

    def _add(self, kind: type[Piece], rng: random.Random) -> bool:
        shape, form = self.places[-1]
        try:
            part = kind(shape, rng)
            found = measured(part, shape)
        except UnfitError:
            return False
        if found.numel() > 1200 or found.numel() == 0 or min(found) == 0:
            return False
        self.parts.append(part)
        self._done("piece", len(self.parts) - 1, -1, tuple(found), kind.result or form)
        return True

    def _done(self, kind: str, part: int, other: int, shape: Shape, form: str) -> None:
        self.plan.append((kind, part, other))
        self.places.append((shape, form))

    def _link(self, step: Step, rng: random.Random, shape: Shape, form: str) -> None:
        if step.kind == "residual":
            inner = Chain(step.inner, shape, form)
            if inner.form == form and inner.shape == shape and len(inner.plan):
                self.parts.append(inner)
                self._done("residual", len(self.parts) - 1, -1, shape, form)
            return
        if step.kind == "again":  # the same module once more, where its shapes allow it
            here = (shape, form)
            usable = [
                part
                for (kind, part, _), before, after in zip(self.plan, self.places, self.places[1:], strict=False)
                if kind == "piece" and before == after == here
            ]
            if usable:
                self._done("piece", rng.choice(usable), -1, shape, form)
            return
        if step.kind == "condition":
            self.parts.append(nn.Linear(5, 2 * (shape[0] if form != "tokens" else shape[1])))
            self._done("condition", len(self.parts) - 1, -1, shape, form)
            return
        if step.kind == "output":
            self.parts.append(head(shape, form, 3, rng))
            self._done("output", len(self.parts) - 1, -1, shape, form)
            return
        self._refer(step.kind, rng, shape, form)

    def _refer(self, kind: str, rng: random.Random, shape: Shape, form: str) -> None:
        """Combine with an earlier value of the same positions, through a projection where the channels differ."""
        axis = 1 if form == "tokens" else 0

        def positions(shape: Shape) -> list[int]:
            return [size for dim, size in enumerate(shape) if dim != axis]

        earlier = [i for i, (s, f) in enumerate(self.places[:-1]) if f == form and positions(s) == positions(shape)]
        if not earlier:
            return
        other = rng.choice(earlier)
        there = self.places[other][0]
        if kind == "join":
            joined = list(shape)
            joined[axis] += there[axis]
            if joined[axis] <= 24:
                self._done(kind, -1, other, tuple(joined), form)
            return
        if there == shape and rng.random() < 0.8:
            self._done(kind, -1, other, shape, form)
            return
        layer = same_conv(there[0], shape[0], len(shape) - 1) if form == "map" else nn.Linear(there[-1], shape[-1])
        self.parts.append(layer)
        self._done(kind, len(self.parts) - 1, other, shape, form)

    def forward(
        self, x: torch.Tensor, condition: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        values, outputs = [x], []
        for (kind, part, other), (_, form) in zip(self.plan, self.places[1:], strict=True):
            x = values[-1]
            if kind == "piece":
                x = self.parts[part](x)
            elif kind == "residual":
                x = x + self.parts[part](x, condition)[0]
            elif kind == "output":
                outputs.append(self.parts[part](x))
            elif kind == "condition":
                assert condition is not None
                x = conditioned(x, self.parts[part](condition), form)
            else:
                y = values[other] if part < 0 else self.parts[part](values[other])
                dim = 2 if form == "tokens" else 1
                x = torch.cat([x, y], dim) if kind == "join" else x + y if kind == "add" else x * torch.tanh(y)
            values.append(x)
        return values[-1], outputs


def conditioned(x: torch.Tensor, y: torch.Tensor, form: str) -> torch.Tensor:
    """Scaled and shifted channel by channel (FiLM)."""
    scale, shift = y.chunk(2, -1)
    if form == "tokens":
        return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    ones = [1] * (x.dim() - 2)
    return x * torch.sigmoid(scale).view(*scale.shape, *ones) + shift.view(*shift.shape, *ones)


def measured(part: nn.Module, shape: Shape) -> torch.Size:
    """The shape that comes out."""
    with torch.no_grad():
        return part.eval()(torch.zeros(2, *shape)).shape[1:]


class Head(nn.Module):
    def __init__(self, channels: int, form: str, outputs: int) -> None:
        super().__init__()
        self.form, self.fc = form, nn.Linear(channels, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == "map":
            x = x.flatten(2).mean(-1)
        return self.fc(x)


def head(shape: Shape, form: str, outputs: int, rng: random.Random) -> nn.Module:
    if form == "map" and rng.random() < 0.3:
        return same_conv(shape[0], outputs, len(shape) - 1)
    return Head(shape[1] if form == "tokens" else shape[0], form, outputs)


class Network(nn.Module):
    """A stem, the chain of steps, a head; outputs of steps besides."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        rng = random.Random(recipe.seed)
        self.start, self.tied = recipe.start, recipe.tied
        form = form_of(recipe.start)
        width = rng.choice([4, 6, 8, 12])
        if recipe.start == "ids":
            self.stem: nn.Module = nn.Embedding(IDS, width)
            shape: Shape = (6, width)
        else:
            spatial = {"map1": (8,), "map2": (rng.choice([6, 7, 8]),) * 2, "map3": (4, 4, 4)}.get(recipe.start, ())
            shape = (width, *spatial) if form != "tokens" else (6, width)
            self.stem = same_conv(3, width, len(spatial), rng.choice([1, 3])) if form == "map" else nn.Linear(5, width)
        self.chain = Chain(recipe.steps, shape, form)
        last = self.chain.shape
        self.project = nn.Identity()
        if self.tied:
            self.project = nn.Linear(last[1] if self.chain.form == "tokens" else last[0], width)
        self.hidden = rng.random() < 0.4
        self.head = nn.Linear(IDS, 4) if self.tied else head(last, self.chain.form, 4, rng)
        self.inputs = example_shapes(recipe, shape)

    def forward(self, x: torch.Tensor, condition: torch.Tensor | None = None) -> Any:
        x, outputs = self.chain(F.relu(self.stem(x)) if self.start != "ids" else self.stem(x), condition)
        if not self.tied:
            result = self.head(x)
        else:
            if self.chain.form == "map":
                x = x.flatten(2).mean(-1)
            result = F.linear(self.project(x), self.stem.weight)  # the table as the output layer, or as a hidden one
            result = self.head(F.relu(result)) if self.hidden else result
        return (result, *outputs) if outputs else result

    def example(self, count: int, seed: int) -> tuple[torch.Tensor, ...]:
        """A batch of inputs."""
        generator = torch.Generator().manual_seed(seed)
        first: torch.Tensor
        if self.start == "ids":
            first = torch.randint(IDS, (count, 6), generator=generator)
        else:
            first = torch.randn((count, *self.inputs[0]), generator=generator)
        return (first, *(torch.randn((count, *s), generator=generator) for s in self.inputs[1:]))


def example_shapes(recipe: Recipe, shape: Shape) -> list[Shape]:
    form = form_of(recipe.start)
    first = (3, *shape[1:]) if form == "map" else (6, 5) if form == "tokens" else (5,)
    return [first, (5,)] if recipe.condition else [first]


def build(recipe: Recipe) -> Network:
    """The network with seeded weights, in eval mode. No two values of a weight are alike."""
    state = torch.random.get_rng_state()
    network = Network(recipe).eval()
    torch.random.set_rng_state(state)
    generator = torch.Generator().manual_seed(recipe.seed)
    seen: set[int] = set()
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.is_floating_point() and tensor.data_ptr() not in seen and not name.endswith("matrix"):
                seen.add(tensor.data_ptr())
                tensor.copy_(_values(name, tensor, generator))
    return network


def _values(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith("running_var") or ("norm" in name and name.endswith("weight") and tensor.dim() == 1):
        return 0.5 + torch.rand(tensor.shape, generator=generator)
    if tensor.dim() < 2:
        return noise * 0.5
    fan_in = tensor[0].numel() if tensor.dim() > 2 else tensor.shape[1]
    return noise * (1.5 / max(1, fan_in) ** 0.5)


def smaller(recipe: Recipe) -> list[Recipe]:
    """Recipes with one step less, or with a residual branch taken apart: what a failure is made small by."""
    found = []
    for index, step in enumerate(recipe.steps):
        before, after = recipe.steps[:index], recipe.steps[index + 1 :]
        found.append(replace(recipe, steps=before + after))
        if step.inner:
            found.append(replace(recipe, steps=before + step.inner + after))
            for inner in range(len(step.inner)):
                less = replace(step, inner=step.inner[:inner] + step.inner[inner + 1 :])
                found.append(replace(recipe, steps=(*before, less, *after)))
    return found
