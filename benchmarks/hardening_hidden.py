"""Hidden channels that may go for nothing, from the choice to the cut: dead ones, copies, and another order of them.

Small networks of one hidden layer with something behind it that keeps channels apart, so that what is right is known
without an oracle.
"""

from __future__ import annotations

import random

import torch
from foldcut.compiler.analysis.provenance import Provenance, find_units
from foldcut.compiler.analysis.unit_groups import UnitGroup
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from foldcut.passes.cut.prune_channels import prune_channels
from foldcut.passes.prune.select_channels import choose_channels
from foldcut.passes.solve.resolve_network import ResolveSettings
from hardening_checks import Case, WrongError, check_program, same
from torch import nn
from torch.nn import functional as F

#: A calibration set with more rows than the widest reader has columns.
SAMPLES = 256
#: What is exact without a ridge.
EXACTLY = ResolveSettings(ridge=1e-9, refine=0)


class Hidden(nn.Module):
    """A layer, a depthwise convolution or a norm, an order of the channels, a layer that reads them."""

    def __init__(self, rng: random.Random, channels: int) -> None:
        super().__init__()
        self.between, self.reader = rng.choice(["depthwise", "norm", "none"]), rng.choice(["1x1", "3x3", "flatten"])
        self.first, self.norm = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.local = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.last = nn.Linear(16 * channels, 5) if self.reader == "flatten" else self._conv(channels)
        self.head = nn.Linear(5, 4)
        self.register_buffer("order", torch.arange(channels))
        self.permuted = False

    def _conv(self, channels: int) -> nn.Module:
        kernel = 3 if self.reader == "3x3" else 1
        return nn.Conv2d(channels, 5, kernel, padding=kernel // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        if self.between == "depthwise":
            x = F.relu(self.local(x))
        elif self.between == "norm":
            x = torch.tanh(self.norm(x))
        if self.permuted:
            x = x[:, self.order]
        if self.reader == "flatten":
            return self.head(F.relu(self.last(x.flatten(1))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def seeded(rng: random.Random, channels: int) -> Hidden:
    seed = rng.randrange(1 << 30)
    net = Hidden(random.Random(seed), channels).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point():
                size = tensor[0].numel() if tensor.dim() > 1 else 4
                noise = torch.randn(tensor.shape, generator=generator) * 1.5 / size**0.5
                tensor.copy_(noise.abs() + 0.5 if "var" in name else noise)
    return net


def arrange(net: Hidden, source: torch.Tensor) -> None:
    """Give each hidden channel the values of its source; the reader's weights stay its own."""
    with torch.no_grad():
        for layer in (net.first, net.norm, net.local):
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.dim():
                    tensor.copy_(tensor[source])


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def hidden_group(program: Program) -> tuple[Provenance, UnitGroup]:
    provenance = find_units(program)
    found = [g for g in provenance.prunable if ("first.weight", 0) in g.producers]
    if len(found) != 1:
        raise WrongError("the hidden channels are not one prunable group")
    return provenance, found[0]


def check_hidden(case: Case) -> None:
    """All three, on a network of their own."""
    with case.stage("dead channels"):
        _dead(random.Random(case.number))
    with case.stage("copied channels"):
        _copied(random.Random(case.number))
    with case.stage("permuted channels"):
        _permuted(random.Random(case.number))
    case.counts["hidden layers tried"] += 1


def _chosen(program: Program, keep: int, what: str) -> None:
    """Choose, solve and cut down to `keep` hidden channels: the outputs must stay."""
    provenance, group = hidden_group(program)
    calibration = CalibrationSet.of(images(SAMPLES, 1))
    choice = choose_channels(provenance, calibration, {group.name: keep}, resolve=EXACTLY)
    smaller = prune_channels(provenance, choice.removed, choice.tensors).program
    check_program(smaller)
    if smaller.module.get_parameter("first.weight").shape[0] != keep:
        raise WrongError(f"{what}: {keep} channels were to stay")
    x = images(5, 2)
    same(smaller(x), program(x), what, 5e-3)


def _dead(rng: random.Random) -> None:
    net = seeded(rng, 8)
    dead = torch.tensor(rng.sample(range(8), rng.randint(1, 5)))
    with torch.no_grad():  # zero wherever they are read, whatever they carry
        weight = net.last.weight
        (weight.view(5, 8, -1) if weight.dim() == 2 else weight)[:, dead] = 0
    _chosen(capture(net, images(3, 0)), 8 - len(dead), f"{len(dead)} channels that nobody reads were removed")


def _copied(rng: random.Random) -> None:
    net, distinct = seeded(rng, 8), rng.randint(2, 6)
    arrange(net, torch.tensor([*range(distinct), *(rng.randrange(distinct) for _ in range(8 - distinct))]))
    _chosen(capture(net, images(3, 0)), distinct, f"{8 - distinct} copies were removed and their readers solved")


def _permuted(rng: random.Random) -> None:
    """The hidden channels stored in another order and put back: as many units, and the same outputs of the same cut."""
    net, gone = seeded(rng, 8), torch.tensor(rng.sample(range(8), rng.randint(1, 6)))
    x = images(5, 3)
    plain = capture(net, images(3, 0))
    order = torch.tensor(rng.sample(range(8), 8))  # stored place -> channel
    arrange(net, order)
    net.order.copy_(order.argsort())
    net.permuted = True
    turned = capture(net, images(3, 0))
    same(turned(x), plain(x), "channels in another order", 1e-5)
    results = []
    for program, places in ((plain, gone), (turned, order.argsort()[gone])):
        provenance, group = hidden_group(program)
        rows = next(s.labels for s in provenance.slots if s.parameter == "first.weight" and s.dim == 0)
        results.append(prune_channels(provenance, rows[places]).program(x))
        if len(group) != 8:
            raise WrongError(f"{len(group)} units of 8 hidden channels")
    same(results[1], results[0], "the same cut of channels in another order", 1e-5)
