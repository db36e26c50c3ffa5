"""The channel rewrite on random networks out of all the pieces that bind channels to each other."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import onnxruntime
import torch
from foldcut.compiler.analysis.provenance import Provenance, find_units
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from foldcut.passes.cut.prune_channels import prune_channels
from foldcut.passes.prune.select_channels import Consumer, find_consumers
from foldcut.passes.prune.submodular import Objective, select_units
from foldcut.passes.solve.closed_form import solve_without
from foldcut.passes.solve.moments import Moments, collect_moments
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

KINDS = ("conv", "depthwise", "grouped", "concat", "shuffle", "residual", "attention", "gate", "norm")


@dataclass(frozen=True)
class Piece:
    """One piece of a network: `width` channels where it makes new ones, `groups` where it has any."""

    kind: str
    width: int = 8
    groups: int = 2
    permuted: bool = False


pieces = st.builds(Piece, st.sampled_from(KINDS), st.sampled_from([4, 8, 12]), st.sampled_from([2, 4]))
heads = st.sampled_from(["pool", "flatten"])
networks = st.tuples(st.lists(pieces, min_size=1, max_size=4), heads, st.integers(0, 1000))
rarely = settings(max_examples=8, suppress_health_check=list(HealthCheck))


def conv(inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)


class Block(nn.Module):
    """A `Piece` behind `inputs` channels; `outputs` says how many come out. All inner activations are ReLUs."""

    def __init__(self, piece: Piece, inputs: int) -> None:
        super().__init__()
        self.piece, self.outputs = piece, inputs
        width, kind = piece.width, piece.kind
        if kind == "conv":
            self.outputs, self.a, self.norm = width, conv(inputs, width, 3), nn.BatchNorm2d(width)
            self.register_buffer("order", torch.arange(width).view(2, -1).t().reshape(-1))
        elif kind == "depthwise":
            self.a = conv(inputs, inputs, 3, inputs)
        elif kind == "grouped":
            self.outputs, self.a = width, conv(inputs, width, 1, piece.groups)
        elif kind == "concat":
            self.outputs, self.a = inputs + width, conv(inputs, width)
        elif kind == "norm":
            self.norm = nn.BatchNorm2d(inputs)
        elif kind == "attention":
            self.a, self.b = nn.Linear(inputs, 3 * width), nn.Linear(width, inputs)
        elif kind in {"residual", "gate"}:
            self.a, self.b = conv(inputs, width), conv(width, inputs)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Two heads over the positions."""
        n, c, h, w = x.shape
        qkv = self.a(x.flatten(2).transpose(1, 2)).reshape(n, h * w, 3, 2, self.piece.width // 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, self.piece.width)
        return x + self.b(mixed).transpose(1, 2).reshape(n, c, h, w)

    def shuffle(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.piece.groups, -1, h, w).transpose(1, 2).reshape(n, c, h, w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = self.piece.kind
        if kind == "conv":
            x = F.relu(self.norm(self.a(x)))
            return x[:, self.order] if self.piece.permuted else x
        if kind == "concat":
            return torch.cat([x, F.relu(self.a(x))], 1)
        if kind == "residual":
            return F.relu(x + self.b(F.relu(self.a(x))))
        if kind == "gate":
            return x * torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))
        if kind == "attention":
            return self.attend(x)
        if kind == "shuffle":
            return self.shuffle(x)
        return F.relu(self.norm(x) if kind == "norm" else self.a(x))


class RandomNet(nn.Module):
    """A stem, the pieces, and a linear layer behind pooled or flattened channels."""

    def __init__(self, parts: list[Piece], head: str) -> None:
        super().__init__()
        self.stem = conv(3, 8, 3)
        blocks: list[Block] = []
        for piece in parts:
            blocks.append(Block(piece, blocks[-1].outputs if blocks else 8))
        self.blocks, self.kind = nn.Sequential(*blocks), head
        self.head = nn.Linear(blocks[-1].outputs * (1 if head == "pool" else 16), 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(x.mean((2, 3)) if self.kind == "pool" else x.flatten(1))


Network = tuple[list[Piece], str, int]


def captured(network: Network, nets: SimpleNamespace) -> Program:
    parts, head, seed = network
    return capture(nets.seeded(lambda: RandomNet(parts, head), seed), nets.images(2, 4))


def half(provenance: Provenance, seed: int) -> list[int]:
    """A random half of the units of every prunable group."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [g.units[torch.randperm(len(g), generator=generator)[: len(g) // 2]] for g in provenance.prunable]
    return [unit for units in chosen for unit in units.tolist()]


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert float((found - wanted).abs().max()) <= tolerance * max(1e-3, float(wanted.abs().max()))


@rarely
@given(network=networks)
def test_half_of_everything_can_go(network: Network, nets: SimpleNamespace) -> None:
    program = captured(network, nets)
    provenance = find_units(program)
    assert not provenance.unknown
    assert provenance.prunable
    smaller = prune_channels(provenance, half(provenance, network[2])).program
    assert smaller.parameter_count() < program.parameter_count()
    for count in (1, 3):
        x = nets.images(count, 4, seed=count)
        assert smaller(x).shape == program(x).shape
        assert bool(smaller(x).isfinite().all())
    near(smaller(x)[:1], smaller(x[:1]))


@rarely
@given(network=networks)
def test_units_of_zeros_go_without_a_trace(network: Network, nets: SimpleNamespace) -> None:
    provenance = find_units(captured(network, nets))
    units = half(provenance, network[2] + 1)
    silent = nets.zeroed(provenance, units)
    smaller = prune_channels(find_units(silent), units).program
    x = nets.images(3, 4, seed=9)
    near(smaller(x), silent(x), 1e-5)


@rarely
@given(network=networks)
def test_what_is_left_can_be_cut_again(network: Network, nets: SimpleNamespace) -> None:
    """The smaller program is one like any other: its units are those that were left."""
    provenance = find_units(captured(network, nets))
    smaller = prune_channels(provenance, half(provenance, network[2])).program
    again = find_units(smaller)
    units = half(again, network[2])
    silent = nets.zeroed(again, units)
    x = nets.images(3, 4, seed=9)
    near(prune_channels(find_units(silent), units).program(x), silent(x), 1e-5)


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(network=networks, width=st.sampled_from([8, 12]))
def test_the_order_of_the_channels_does_not_matter(network: Network, width: int, nets: SimpleNamespace) -> None:
    """Permuted where a convolution hands them on: as many units, in groups as large."""
    parts, head, seed = network
    found = []
    for permuted in (False, True):
        first = Piece("conv", width, permuted=permuted)
        provenance = find_units(captured(([first, *parts], head, seed), nets))
        found.append(sorted((len(g), g.widths, g.reason is None) for g in provenance.groups))
    assert found[0] == found[1]


@settings(max_examples=3, suppress_health_check=list(HealthCheck))
@given(network=networks)
def test_onnx_computes_what_the_smaller_network_computes(network: Network, nets: SimpleNamespace) -> None:
    provenance = find_units(captured(network, nets))
    smaller = prune_channels(provenance, half(provenance, network[2])).program
    session = onnxruntime.InferenceSession(to_onnx(smaller), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x = nets.images(count, 4, seed=count)
        found = np.asarray(session.run(None, {smaller.inputs[0].name: x.numpy()})[0])
        near(torch.from_numpy(found), smaller(x))


class Doubled(nn.Module):
    """A layer, something that keeps channels apart, and a layer that reads them."""

    def __init__(self, between: str, reader: str, channels: int) -> None:
        super().__init__()
        self.between, self.reader = between, reader
        self.a, self.norm = conv(3, channels, 3), nn.BatchNorm2d(channels)
        self.middle = conv(channels, channels, 3, channels) if between == "depthwise" else nn.Identity()
        self.b = nn.Linear(16 * channels, 5) if reader == "flatten" else conv(channels, 5, 3 if reader == "3x3" else 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.middle(F.relu(self.norm(self.a(x)))))
        x = F.relu(self.b(x.flatten(1) if self.reader == "flatten" else x))
        return self.head(x if self.reader == "flatten" else x.mean((2, 3)))


def copy_channels(net: nn.Module, source: torch.Tensor) -> None:
    """Give every channel of `a` and what follows it the values of its source: the reader's weights stay split."""
    with torch.no_grad():
        for layer in (net.a, net.norm, net.middle):
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.dim():
                    tensor.copy_(tensor[source])


def with_own_target(moments: Moments) -> Moments:
    """The layer's own output as the target: no residual before the cut."""
    nothing = torch.zeros_like(moments.cross), torch.zeros_like(moments.energy)
    return Moments(gram=moments.gram, cross=nothing[0], energy=nothing[1], rows=moments.rows)


def reader_of(provenance: Provenance) -> Consumer:
    return next(c for c in find_consumers(provenance).values() if c.layer.weight == "b.weight")


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(
    between=st.sampled_from(["nothing", "depthwise"]),
    reader=st.sampled_from(["1x1", "3x3", "flatten"]),
    distinct=st.integers(1, 3),
    extra=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    seed=st.integers(0, 100),
)
def test_copies_of_channels_go_without_a_trace(
    between: str, reader: str, distinct: int, extra: list[int], seed: int, nets: SimpleNamespace
) -> None:
    """Selection keeps one of each, and the solve gives it the others' weights."""
    source = torch.tensor([*range(distinct), *(e % distinct for e in extra)])
    net = nets.seeded(lambda: Doubled(between, reader, len(source)), seed)
    copy_channels(net, source)
    program = capture(net.double(), nets.images(2, 4).double())
    provenance = find_units(program)
    group = next(g for g in provenance.prunable if g.name == "a")
    consumer = reader_of(provenance)
    layer = consumer.layer
    calibration = CalibrationSet.of(nets.images(256, 4, seed=1).double())
    moments = with_own_target(collect_moments(program, {layer.node: layer}, calibration)[layer.node])
    weight = layer.matrix(program.module.get_parameter(layer.weight).detach())
    selection = select_units([Objective.of(moments, weight, consumer.columns(group.units), bias=False)], distinct)
    alive = {int(s) for s in source[selection.order]}
    assert float(selection.errors[-1]) < 1e-6
    stay = torch.isin(torch.arange(len(group)), selection.order)
    gone = provenance.removal(group.units[~stay])
    correction = solve_without(moments, weight, consumer.gone(gone), ridge=0, bias=True)
    assert correction.bias is not None
    tensors = {
        layer.weight: (weight + correction.weight).reshape(program.module.get_parameter(layer.weight).shape),
        "b.bias": program.module.get_parameter("b.bias").detach() + correction.bias,
    }
    smaller = prune_channels(provenance, group.units[~stay], tensors).program
    assert smaller.module.get_parameter("a.weight").shape[0] == distinct
    x = nets.images(5, 4, seed=3).double()
    if len(alive) == distinct:
        near(smaller(x), program(x))
    else:  # a channel that never fires needs nobody
        near(smaller(nets.images(256, 4, seed=1).double()), program(nets.images(256, 4, seed=1).double()))
