"""The low-rank rewrite: a convolution or linear layer becomes two or three thinner ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ...compiler.ir.edit import set_tensors
from ...compiler.ir.edit_chain import Link, replace_layers
from ...compiler.ir.execute import evaluate
from ...compiler.ir.program import Program
from ...compiler.support.errors import RewriteError, plural
from ..solve.layers import Layer, add_delta, find_layers
from ..solve.targets import Target, trace_target
from .decision import FactorizeLayer
from .decompositions import PLAIN, Decomposition, Geometry, Matrices, Metric, Ranks
from .low_rank import SCHEMES

aten = torch.ops.aten

#: What the factors of a scheme are called, by their number.
NAMES = {2: ("first", "last"), 3: ("first", "core", "last")}
#: A rewritten layer and the weight that it stands for may differ by this much of the largest output.
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Factors:
    """One layer's factors, in float64: `matrices` (groups, out, in, kh, kw) in the order of application, `shift` what
    the bias takes over (None: nothing), `dense` the weight that they stand for, (groups, out, columns)."""

    layer: str
    matrices: Matrices = field(repr=False)
    dense: torch.Tensor = field(repr=False)
    shift: torch.Tensor | None = field(repr=False, default=None)

    @classmethod
    def of(cls, layer: str, decomposition: Decomposition, ranks: tuple[int, ...]) -> Factors:
        return cls(
            layer=layer,
            matrices=decomposition.matrices(ranks),
            dense=decomposition.dense(ranks),
            shift=decomposition.shift(ranks),
        )


def factorize(program: Program, factors: Sequence[Factors]) -> Program:
    """Replace layers by their factors; groups, stride, padding, dilation and bias stay what they were.

    The first factors have no bias, so what a padding adds is the same zeros. The last factor's node keeps the layer's
    name; the others' weights are new parameters. Exact, up to rounding, where the factors are of full rank. Each chain
    is run once on random values beside the weight that it stands for. Raises RewriteError when a layer is not there or
    cannot be factorised, when shapes do not fit, or when a chain computes something else.
    """
    layers, _ = find_layers(program)
    shifted: dict[str, torch.Tensor] = {}
    chains: dict[str, list[Link]] = {}
    for item in factors:
        layer = _layer(layers, item.layer)
        chains[item.layer] = _links(program, layer, item.matrices)
        if item.shift is not None:
            shifted |= shift_tensors(program, trace_target(program, layer, {}), item.shift)
    if not chains:
        return program
    base = set_tensors(program, shifted, note="shift biases") if shifted else program
    result = replace_layers(base, chains, note=f"factorise {plural(len(chains), 'layer')}")
    for item in factors:
        _check(program, result, layers[item.layer], item.dense)
    return result


def factorize_plain(program: Program, decisions: Sequence[FactorizeLayer]) -> Program:
    """The factorisations of a plan without data: the best approximations of the weights themselves.

    Raises RewriteError when a decision names a layer, a scheme or ranks that the program does not have.
    """
    layers, _ = find_layers(program)
    found = []
    for decision in decisions:
        layer = _layer(layers, decision.layer)
        check_ranks(Geometry.of(program, layer), decision)
        found.append(
            Factors.of(
                layer.node, decompose(program, layer, decision.scheme, PLAIN, most=decision.ranks), decision.ranks
            )
        )
    return factorize(program, found)


def factorize_for_timing(program: Program, decisions: Sequence[FactorizeLayer], *, seed: int = 0) -> Program:
    """The program that a plan leads to with made-up weights in the factors: what it takes to know its latency, without
    a decomposition."""
    layers, _ = find_layers(program)
    generator = torch.Generator().manual_seed(seed)
    chains = {}
    for decision in decisions:
        layer = _layer(layers, decision.layer)
        size = Geometry.of(program, layer)
        check_ranks(size, decision)
        shapes = SCHEMES[decision.scheme].shapes(size, decision.ranks)
        matrices = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) * 0.05 for shape in shapes)
        chains[decision.layer] = _links(program, layer, matrices)
    note = f"factorise {plural(len(chains), 'layer')}, for timing"
    return replace_layers(program, chains, note=note) if chains else program


def chain_nodes(program: Program, layer: Layer) -> list[str]:
    """The nodes of a factorised layer, from the first factor to the one that has the layer's name."""
    names = [layer.node]
    while (source := program.nodes[names[0]].all_input_nodes[0].name) != layer.input:
        names.insert(0, source)
    return names


def decompose(
    program: Program,
    layer: Layer,
    scheme: str,
    metric: Metric,
    gain: torch.Tensor | None = None,
    most: tuple[int, ...] | None = None,
) -> Decomposition:
    """A layer's weight under a scheme, for a metric and the gains of its outputs; where no ranks above `most` are
    wanted, with no more work than for those."""
    weight = program.module.get_parameter(layer.weight)
    return SCHEMES[scheme].decomposition(Geometry.of(program, layer), weight, metric, gain, most)


def within_full(program: Program, decisions: Sequence[FactorizeLayer]) -> list[FactorizeLayer]:
    """The decisions with no rank above what its layer has, and without those that no longer save anything: a group that
    is cut where a region was dropped may have narrowed a layer that it did not reach in the original. Raises
    RewriteError as `check_ranks` does, but for that."""
    layers, _ = find_layers(program) if decisions else ({}, ())
    fitting = []
    for decision in decisions:
        size = Geometry.of(program, _layer(layers, decision.layer))
        full = _full_ranks(size, decision)
        ranks = tuple(min(pair) for pair in zip(decision.ranks, full, strict=True))
        if ranks == decision.ranks or SCHEMES[decision.scheme].macs(size, ranks) < size.macs:
            fitting.append(replace(decision, ranks=ranks))
    return fitting


def check_decisions(program: Program, decisions: Sequence[FactorizeLayer]) -> None:
    """Raise RewriteError unless each decision names a layer, a scheme and ranks that the program has."""
    layers = find_layers(program)[0] if decisions else {}
    for decision in decisions:
        check_ranks(Geometry.of(program, _layer(layers, decision.layer)), decision)


def check_factors(before: Program, after: Program, decisions: Sequence[FactorizeLayer]) -> None:
    """Raise RewriteError unless each layer of the decisions has become factors of the ranks that they say."""
    layers = find_layers(before)[0] if decisions else {}
    for decision in decisions:
        layer = _layer(layers, decision.layer)
        shapes = SCHEMES[decision.scheme].shapes(Geometry.of(before, layer), decision.ranks)
        weights = [after.nodes[name].args[1] for name in chain_nodes(after, layer)]
        actual = [after.constant(weight).numel() for weight in weights if isinstance(weight, fx.Node)]
        expected = [math.prod(shape) for shape in shapes]
        if actual != expected:
            raise RewriteError("factors of other sizes", node=decision.layer, expected=expected, actual=actual)


def check_ranks(size: Geometry, decision: FactorizeLayer) -> None:
    """Raise RewriteError unless the scheme exists, suits a layer of that size, and has those ranks."""
    full = _full_ranks(size, decision)
    if len(decision.ranks) != len(full) or not all(1 <= r <= f for r, f in zip(decision.ranks, full, strict=False)):
        raise RewriteError(
            "ranks out of range",
            node=decision.layer,
            expected=" x ".join(f"1 to {f}" for f in full),
            actual=" x ".join(map(str, decision.ranks)),
        )


def _full_ranks(size: Geometry, decision: FactorizeLayer) -> Ranks:
    """The full ranks of a layer of that size under the decision's scheme."""
    scheme = SCHEMES.get(decision.scheme)
    if scheme is None or not scheme.suits(size):
        raise RewriteError(
            f"no scheme {decision.scheme!r} for this layer",
            node=decision.layer,
            expected=", ".join(name for name, known in SCHEMES.items() if known.suits(size)),
        )
    return scheme.full(size)


def shift_tensors(program: Program, target: Target, shift: torch.Tensor) -> dict[str, torch.Tensor]:
    """The bias, of the layer or of a norm behind it, that takes over a shift of the layer's output; nothing where there
    is none."""
    if target.shift is None:
        return {}
    change = shift if target.shift_scale is None else shift * target.shift_scale
    return {target.shift: add_delta(program.module.get_parameter(target.shift).detach(), change)}


def _layer(layers: Mapping[str, Layer], name: str) -> Layer:
    if name not in layers:
        raise RewriteError(
            f"{name!r} is no layer that can be factorised",
            hint="a convolution or linear layer with a weight of its own; apply a plan to the network it was made for",
        )
    return layers[name]


def _links(program: Program, layer: Layer, matrices: Matrices) -> list[Link]:
    weight = program.module.get_parameter(layer.weight)
    names = NAMES[len(matrices)]
    if layer.window is None:
        return [
            Link(name=name, target=aten.linear.default, weight=matrix[0, :, :, 0, 0].to(weight.detach()))
            for name, matrix in zip(names, matrices, strict=True)
        ]
    dims = weight.dim() - 2
    operator = aten.conv2d.default if dims == 2 else aten.conv1d.default
    links = []
    for name, matrix, window in zip(names, matrices, _windows(layer, matrices), strict=True):
        stored = matrix.flatten(0, 1).to(weight.detach())
        settings = tuple(list(pair[-dims:]) for pair in window)
        links.append(
            Link(
                name=name,
                target=operator,
                weight=stored if dims == 2 else stored.squeeze(2),
                settings=(*settings, layer.groups),
            )
        )
    return links


def _windows(layer: Layer, matrices: Matrices) -> list[tuple[tuple[int, int], ...]]:
    """Stride, padding and dilation of each factor: of three factors the core has the whole window, of two each has it
    along the axis of its kernel, the first where neither has one."""
    assert layer.window is not None
    neutral = (1, 0, 1)
    settings = list(zip(*layer.window, strict=True))  # (stride, padding, dilation) of either axis
    owners = [
        1 if len(matrices) == 3 else next((i for i, m in enumerate(matrices) if m.shape[3 + axis] > 1), 0)
        for axis in (0, 1)
    ]
    windows: list[tuple[Any, ...]] = []
    for place in range(len(matrices)):
        axes = [settings[axis] if owners[axis] == place else neutral for axis in (0, 1)]
        windows.append(tuple(zip(*axes, strict=True)))
    return windows


def _check(before: Program, after: Program, layer: Layer, dense: torch.Tensor) -> None:
    """Run the chain, and the layer with the weight that the chain stands for, on the same random values."""
    weight = before.module.get_parameter(layer.weight)
    generator = torch.Generator().manual_seed(0)
    node = before.nodes[layer.node]
    shape = before.shape(before.nodes[layer.input], batch=2)
    sample = torch.randn(shape, generator=generator).to(weight.detach())
    with torch.no_grad():
        stands_for = dense.reshape(weight.shape).to(weight.detach())
        wanted = evaluate(before, node, {layer.input: sample}, {layer.weight: stands_for})
        if layer.bias is not None:  # the shift is in it: left out of the comparison
            bias = after.module.get_parameter(layer.bias) - before.module.get_parameter(layer.bias)
            wanted = wanted + (bias if layer.window is None else bias.view(-1, *[1] * (weight.dim() - 2)))
        value: Any = sample
        for name in chain_nodes(after, layer):
            value = evaluate(after, after.nodes[name], {after.nodes[name].all_input_nodes[0].name: value})
    error = float((value - wanted).abs().max())
    tolerance = max(TOLERANCE, 4 * torch.finfo(weight.dtype).eps)
    if value.shape != wanted.shape or not error <= tolerance * max(float(wanted.abs().max()), 1e-30):
        raise RewriteError(
            "the factors of a layer compute something else than the weight that they stand for",
            node=layer.node,
            expected=f"within {tolerance:g} of the largest output",
            actual=f"{error:.3g}",
        )
