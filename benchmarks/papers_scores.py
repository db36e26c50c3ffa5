"""How the methods that El Halabi et al. compare with rank the channels of a layer, each from the same images.

random               any order
l1                   the L1 norm of the weights that make a channel (Li et al.)
activation-gradient  |sum of activation times gradient| over a feature map, mean over the images (Molchanov et al.);
                     the gradient is that of the cross entropy: this one takes labels
layer-sampling       drawn with probabilities that follow each channel's largest share of an output of the next layer
                     (Liebenwein et al.), without replacement, so that the number of channels is the one asked for
one-shot-residual    what the next layer, solved again, cannot do without that channel alone: greedy selection's first
                     look from the other end, without looking again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from foldcut.compiler.analysis.provenance import Provenance
from foldcut.compiler.analysis.unit_groups import UnitGroup
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.ir.execute import bind, run_until
from foldcut.compiler.ir.program import output_nodes
from foldcut.passes.prune.select_channels import Consumer, find_consumers, select_by_norm
from foldcut.passes.prune.submodular import Objective, Selection
from foldcut.passes.solve.moments import Moments, collect_moments
from foldcut.passes.solve.resolve_network import ResolveSettings
from foldcut.passes.solve.targets import trace_target
from torch.nn import functional as F

METHODS = ("random", "l1", "activation-gradient", "layer-sampling", "one-shot-residual")
#: Patches that the largest shares are read off, and images that the gradient is of, at a time.
PATCHES, BATCH = 256, 50


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """The network whose groups, each read by one layer, are to be ranked; the images, and their labels."""

    provenance: Provenance
    groups: Sequence[UnitGroup]
    images: torch.Tensor
    labels: torch.Tensor

    def consumers(self) -> dict[str, Consumer]:
        """The layer that reads each group."""
        found = find_consumers(self.provenance).values()
        return {g.name: next(c for c in found if torch.isin(c.labels, g.units).any()) for g in self.groups}


def orders(method: str, ranked: Ranked, seed: int) -> dict[str, Selection]:
    """All units of each group, the one to keep longest first."""
    if method == "l1":
        return {g.name: select_by_norm(ranked.provenance, g, len(g), power=1) for g in ranked.groups}
    generator = torch.Generator().manual_seed(seed)
    if method == "random":
        return {g.name: _selection(torch.randperm(len(g), generator=generator)) for g in ranked.groups}
    if method == "layer-sampling":
        return {name: _selection(_drawn(s, generator)) for name, s in largest_shares(ranked).items()}
    scores = activation_gradients(ranked) if method == "activation-gradient" else residuals(ranked)
    return {name: _selection(score.argsort(descending=True, stable=True)) for name, score in scores.items()}


def _selection(order: torch.Tensor) -> Selection:
    return Selection(order=order, errors=torch.full((len(order) + 1,), torch.nan, dtype=torch.float64))


def _drawn(shares: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(shares.double() + 1e-12, len(shares), replacement=False, generator=generator)


def activation_gradients(ranked: Ranked) -> dict[str, torch.Tensor]:
    """Of each group's units, from the values that the layer behind them reads."""
    program, consumers = ranked.provenance.program, ranked.consumers()
    names = sorted({c.layer.input for c in consumers.values()}, key=program.order.__getitem__)
    output = output_nodes(program.graph)[0].name
    totals = {g.name: torch.zeros(len(g), dtype=torch.float64) for g in ranked.groups}
    for images, labels in zip(ranked.images.split(BATCH), ranked.labels.split(BATCH), strict=True):
        with torch.enable_grad():
            start = bind(program, images.clone().requires_grad_())
            values = run_until(program, [*names, output], start)
            loss = F.cross_entropy(values[output], labels, reduction="sum")
            gradients = torch.autograd.grad(loss, [values[name] for name in names])
        products = {
            n: (values[n].detach() * g).flatten(2).sum(2) if g.dim() > 2 else values[n].detach() * g
            for n, g in zip(names, gradients, strict=True)
        }
        for group in ranked.groups:
            consumer = consumers[group.name]
            member = (consumer.labels.unsqueeze(0) == group.units.unsqueeze(1)).double()
            totals[group.name] += (products[consumer.layer.input].double() @ member.T).abs().sum(0)
    return totals


def largest_shares(ranked: Ranked) -> dict[str, torch.Tensor]:
    """The largest share that each unit ever has of an output of the layer that reads it: contributions by magnitude."""
    program, consumers = ranked.provenance.program, ranked.consumers()
    names = sorted({c.layer.input for c in consumers.values()}, key=program.order.__getitem__)
    with torch.no_grad():
        values = run_until(program, names, bind(program, ranked.images[:BATCH]))
    found = {}
    for group in ranked.groups:
        consumer = consumers[group.name]
        value = values[consumer.layer.input]
        every = max(1, consumer.layer.extent(program, value)[1] // PATCHES)
        rows = consumer.layer.rows(program, value, every)[0]
        weight = consumer.layer.matrix(program.module.get_parameter(consumer.layer.weight).detach())[0]
        columns = consumer.columns(group.units)
        rows, weight = (F.pad(m, p) for m, p in ((rows, (0, 0, 0, 1)), (weight, (0, 1))))  # column -1 is empty
        best = torch.zeros(len(group))
        for part in weight.split(16):
            shares = torch.einsum("ukr,ouk->uor", rows[columns], part[:, columns]).abs()
            best = torch.maximum(best, (shares / shares.sum(0).clamp(min=1e-12)).amax((1, 2)))
        found[group.name] = best
    return found


def objectives(ranked: Ranked) -> dict[str, Objective]:
    """What greedy selection optimises for each group, on the original network: the layer's own output, with the ridge
    of the solve."""
    program, consumers = ranked.provenance.program, ranked.consumers()
    layers = {c.layer.node: c.layer for c in consumers.values()}
    samples = CalibrationSet.of(ranked.images)
    settings = ResolveSettings()
    moments = collect_moments(program, layers, samples, rows_per_column=settings.rows_per_column)
    ridge = settings.ridge_for(len(samples))
    return {
        g.name: _objective(ranked, consumers[g.name], moments[consumers[g.name].layer.node], g, ridge)
        for g in ranked.groups
    }


def _objective(ranked: Ranked, consumer: Consumer, moments: Moments, group: UnitGroup, ridge: float) -> Objective:
    program = ranked.provenance.program
    weight = consumer.layer.matrix(program.module.get_parameter(consumer.layer.weight).detach())
    bias = trace_target(program, consumer.layer, {}).shift is not None
    own = moments.without_residual()
    return Objective.of(own, weight, consumer.columns(group.units), bias=bias, ridge=ridge)


def residuals(ranked: Ranked) -> dict[str, torch.Tensor]:
    """What is lost without each unit alone, the others' weights solved again."""
    return {name: residual(objective) for name, objective in objectives(ranked).items()}


def residual(objective: Objective) -> torch.Tensor:
    """tr(W_u^T (G^-1)_uu^-1 W_u) of each unit u, G the Gram matrix with its ridge and W the whole layer's weights: how
    far the least squares fit falls behind when the columns of u alone are taken away."""
    columns = torch.cat([objective.always, objective.units[objective.units >= 0]])
    place = torch.full((objective.gram.shape[1] + 1,), -1, dtype=torch.long)
    place[columns] = torch.arange(len(columns))
    gram = objective.solved_gram()[:, columns][:, :, columns]
    level = torch.diagonal(gram, dim1=1, dim2=2).mean(1)
    gram += 1e-10 * level.view(-1, 1, 1) * torch.eye(len(columns), dtype=gram.dtype)  # columns without a ridge
    inverse = torch.linalg.inv(gram)
    weights = inverse @ objective.solved_cross[:, columns]
    lost = []
    for unit in objective.units:
        own = place[unit[unit >= 0]]
        block, part = inverse[:, own][:, :, own], weights[:, own]
        lost.append(float((part * torch.linalg.solve(block, part)).sum()))
    return torch.tensor(lost, dtype=torch.float64)


def first_of(selections: Mapping[str, Selection], counts: Mapping[str, int]) -> dict[str, Selection]:
    """Each selection's first so many."""
    return {name: selections[name].first(count) for name, count in counts.items()}
