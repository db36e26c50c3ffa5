"""Data-efficient structured pruning by submodular selection (El Halabi et al., arXiv 2203.04940): channels removed,
the layers that read them solved again, nothing trained."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from cifar_data import Cifar, accuracy, load_resnet
from foldcut.compiler.analysis.provenance import Provenance, find_units
from foldcut.compiler.analysis.unit_groups import UnitGroup
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.cost import program_cost
from foldcut.compiler.ir.program import Program
from foldcut.passes.cut.prune_channels import Pruned, prune_channels
from foldcut.passes.prune.channel_budget import ChannelLimits, CutModel, allocate
from foldcut.passes.prune.error_curves import error_curves
from foldcut.passes.prune.select_channels import ChannelChoice, choose_channels, select_layerwise
from foldcut.passes.prune.settings import ChannelSettings
from foldcut.passes.prune.submodular import Objective, Selection, select_units
from foldcut.passes.solve.changes import Changes
from foldcut.passes.solve.resolve_network import resolve_network
from papers_images import STRIDE, cifar
from papers_networks import trained
from papers_run import Case, Options, PaperRun, grouped, markdown, over_seeds
from papers_scores import METHODS, Ranked, first_of, objectives, orders
from rows import Row

KEEPS = (0.05, 0.1, 0.25, 0.5, 0.75)
NETWORKS = ("lenet", "vgg11", "resnet56")
SAMPLES = 500
#: The paper's three variants, and what foldcut does: the target behind the addition, and a second sweep.
GREEDY = ("greedy-layerwise", "greedy-sequential", "greedy-asymmetric", "foldcut")
#: Shares that the budgets of equal loss choose from.
SHARES = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0)
BUDGETS = ("uniform", "equal loss on labelled images (the paper's)", "error curves (foldcut)")
#: Subsets that the best choice is looked for among, at most.
MOST_SUBSETS = 5_000
#: Between the counts of two losses.
STEPS = 64


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network whose groups, each read by one layer alone, are pruned; the images of a seed, with labels for the
    methods that take them; test images."""

    program: Program
    provenance: Provenance
    groups: tuple[UnitGroup, ...]
    ranked: Ranked
    data: Cifar
    original: float
    macs: float

    @property
    def samples(self) -> CalibrationSet:
        return CalibrationSet.of(self.ranked.images)

    def counts(self, keep: float) -> dict[str, int]:
        return {g.name: max(1, round(keep * len(g))) for g in self.groups}

    def made(self, pruned: Pruned | Program) -> dict[str, float]:
        """Top-1 and MACs of what is left."""
        program = pruned.program if isinstance(pruned, Pruned) else pruned
        return {"top1": accuracy(program.module, self.data), "macs": program_cost(program).macs / self.macs}


@functools.lru_cache(maxsize=1)
def subject(name: str, seed: int, options: Options) -> Subject:
    """The network of a run with the images of a seed: seed 0 has the first ones."""
    count = 60 if options.quick else SAMPLES
    if name.startswith("resnet"):
        data = cifar(options.data, seed * STRIDE + SAMPLES, 500 if options.quick else None, True)
        module: torch.nn.Module = load_resnet(options.models, name)
        chosen = torch.arange(seed * STRIDE, seed * STRIDE + count)
    else:
        module, data = trained(name, 0, options)
        drawn = torch.randperm(len(data.calibration), generator=torch.Generator().manual_seed(seed))
        chosen = drawn[:count] if seed else torch.arange(count)
    assert data.calibration_labels is not None
    images, labels = data.calibration[chosen], data.calibration_labels[chosen]
    program = capture(module, images[:2])
    provenance = find_units(program)
    groups = tuple(g for g in provenance.prunable if len(g.consumers) == 1)
    return Subject(
        program=program,
        provenance=provenance,
        groups=groups,
        ranked=Ranked(provenance=provenance, groups=groups, images=images, labels=labels),
        data=data,
        original=accuracy(module, data),
        macs=program_cost(program).macs,
    )


def cases_of(network: str) -> Any:
    """Seeds, keeps and methods of one network."""

    def cases(options: Options) -> list[Case]:
        name = "resnet20" if options.quick and network == "resnet56" else network
        methods = (*METHODS, *GREEDY) if options.peers else ("foldcut",)
        keeps = (0.25,) if options.quick else KEEPS
        return [
            {"network": name, "keep": keep, "method": method, "seed": seed}
            for seed in options.seeds_or(5)
            for keep in keeps
            for method in methods
        ]

    return cases


def pruned_row(case: Case, options: Options) -> Row:
    """One method at one share of the channels: without and with the layers behind solved again."""
    torch.set_num_threads(1)
    about = subject(case["network"], case["seed"], options)
    counts, method = about.counts(case["keep"]), case["method"]
    row: Row = {"original": about.original}
    if method in METHODS:
        wanted: Mapping[str, Any] = first_of(_orders(method, case["network"], case["seed"], options), counts)
        how = ChannelSettings(stream_target=False)
    else:
        wanted = counts
        variant: Any = method.removeprefix("greedy-") if method != "foldcut" else "asymmetric"
        how = ChannelSettings(variant=variant, stream_target=method == "foldcut")
    choice = choose_channels(about.provenance, about.samples, wanted, how=how)
    row["plain"] = about.made(prune_channels(about.provenance, choice.removed))
    row["resolved"] = about.made(_solved(about, choice, polish=method == "foldcut"))
    return row


@functools.lru_cache(maxsize=len(METHODS))
def _orders(method: str, network: str, seed: int, options: Options) -> dict[str, Selection]:
    """One ranking serves every share of the channels."""
    return orders(method, subject(network, seed, options).ranked, seed)


def _solved(about: Subject, choice: ChannelChoice, *, polish: bool) -> Program:
    pruned = prune_channels(about.provenance, choice.removed, choice.tensors)
    if not polish:
        return pruned.program
    changes = Changes(kept=pruned.kept)
    return resolve_network(about.program, pruned.program, about.samples, changes).program


def methods_table(rows: Sequence[Row]) -> str:
    """Top-1 without and with the solve, by method and share kept."""
    keeps = sorted({row["case"]["keep"] for row in rows}, reverse=True)
    by = grouped(rows, "method", "keep")
    lines = []
    for method in (*METHODS, *GREEDY):
        for part, words in (("plain", "no"), ("resolved", "yes")):
            cells = [over_seeds((row[part]["top1"] for row in by.get((method, keep), ())), 1) for keep in keeps]
            lines.append([method, words, *cells])
    seeds = len({row["case"]["seed"] for row in rows})
    head = f"Original {over_seeds({row['original'] for row in rows})} %; top-1 at each share of the channels kept, "
    network = rows[0]["case"]["network"]
    return (
        f"{head}{network}, {seeds} seed{'s' if seeds > 1 else ''}:\n\n"
        f"{markdown(('channels by', 'solved again', *(f'{keep:g}' for keep in keeps)), lines)}"
    )


def budget_cases(options: Options) -> list[Case]:
    networks = ("lenet", "resnet20") if options.quick else NETWORKS
    keeps = (0.25,) if options.quick else (0.1, 0.25, 0.5)
    return [
        {"network": name, "keep": keep, "budget": budget, "seed": seed}
        for seed in options.seeds_or(1)
        for name in networks
        for keep in keeps
        for budget in BUDGETS
    ]


def budget_row(case: Case, options: Options) -> Row:
    """Channels by the paper's greedy selection, as many of each layer as a budget says, at the MACs of equal shares."""
    torch.set_num_threads(1)
    about = subject(case["network"], case["seed"], options)
    model = CutModel.of_macs(about.provenance, about.groups)
    uniform = about.counts(case["keep"])
    target = model([uniform[g.name] for g in about.groups])
    if case["budget"] == BUDGETS[0]:
        counts = uniform
    elif case["budget"] == BUDGETS[1]:
        losses = _single_losses(case["network"], case["seed"], options)
        counts = equal_loss(losses, {g.name: len(g) for g in about.groups}, model, target)
    else:
        curves = _curves(case["network"], case["seed"], options)
        counts = allocate(model, curves, target, ChannelLimits(multiple_of=1, least=min(SHARES)))[0]
    choice = choose_channels(about.provenance, about.samples, counts, how=ChannelSettings(stream_target=False))
    found = about.made(_solved(about, choice, polish=False))
    return {"original": about.original, "counts": counts, **found}


@functools.lru_cache(maxsize=1)
def _curves(network: str, seed: int, options: Options) -> dict[str, torch.Tensor]:
    about = subject(network, seed, options)
    return error_curves(about.provenance, about.samples, about.groups)


@functools.lru_cache(maxsize=1)
def _single_losses(network: str, seed: int, options: Options) -> dict[str, dict[float, float]]:
    """Points of top-1 on the labelled calibration images that are lost when one layer alone keeps a share."""
    about = subject(network, seed, options)
    judged = replace(about.data, test=about.ranked.images, labels=about.ranked.labels)
    before = accuracy(about.program.module, judged)
    every = {g.name: len(g) for g in about.groups}
    found: dict[str, dict[float, float]] = {}
    for group, selection in select_layerwise(about.provenance, about.samples, about.groups, every):
        found[group.name] = {}
        for share in options.few(SHARES[:-1], 3):
            kept = selection.first(max(1, round(share * len(group))))
            choice = choose_channels(
                about.provenance, about.samples, {group.name: kept}, how=ChannelSettings(stream_target=False)
            )
            after = accuracy(_solved(about, choice, polish=False).module, judged)
            found[group.name][share] = before - after
        found[group.name][1.0] = 0.0
    return found


def equal_loss(
    losses: Mapping[str, Mapping[float, float]], sizes: Mapping[str, int], model: Any, target: float
) -> dict[str, int]:
    """The counts of the least loss that every layer alone stays within and that brings the cost down to the target:
    each layer keeps the smallest share that loses no more. The shares that were tried are few, so the counts are then
    moved back toward those of the next smaller loss, as far as the target allows."""
    above = below = dict(sizes)
    for most in sorted({loss for by_share in losses.values() for loss in by_share.values()}):
        shares = {
            name: min(share for share, loss in by_share.items() if loss <= most or share == 1.0)
            for name, by_share in losses.items()
        }
        above, below = below, {name: max(1, round(share * sizes[name])) for name, share in shares.items()}
        if model(list(below.values())) <= target:
            break
    for step in range(STEPS, -1, -1):
        counts = {name: below[name] + (above[name] - below[name]) * step // STEPS for name in sizes}
        if model(list(counts.values())) <= target:
            return counts
    return below


def budget_table(rows: Sequence[Row]) -> str:
    """Top-1 by network, share and budget."""
    by = grouped(rows, "network", "keep", "budget")
    keys = sorted({key[:2] for key in by})
    lines = []
    for network, keep in keys:
        cells = [over_seeds(row["top1"] for row in by.get((network, keep, budget), ())) for budget in BUDGETS]
        macs = [over_seeds((row["macs"] for row in by.get((network, keep, b), ())), 3) for b in BUDGETS]
        original = over_seeds(row["original"] for row in by.get((network, keep, BUDGETS[0]), ()))
        lines.append([network, f"{keep:g}", original, *cells, " / ".join(macs)])
    return markdown(("network", "share of equal cuts", "original", *BUDGETS, "MACs"), lines)


def guarantee_cases(options: Options) -> list[Case]:
    networks = ("lenet", "resnet20") if options.quick else NETWORKS
    return [{"network": name, "seed": seed} for seed in options.seeds_or(1) for name in networks]


def guarantee_row(case: Case, options: Options) -> Row:
    """For every layer: the share of the target that greedy selection explains, the least that is guaranteed, and, where
    the subsets are few enough to try them all, what the best of them explains."""
    torch.set_num_threads(1)
    about = subject(case["network"], case["seed"], options)
    found = []
    for name, objective in objectives(about.ranked).items():
        size = len(objective.units)
        selection = select_units([objective], size, bound=True)
        gamma = selection.ratio_bound or 0.0
        for keep in KEEPS:
            count = max(1, round(keep * size))
            found.append(
                {
                    "layer": name,
                    "units": size,
                    "kept": count,
                    "keep": keep,
                    "gamma": gamma,
                    "guarantee": -math.expm1(-gamma),
                    "error": float(selection.errors[count]),
                    "greedy": float(selection.errors[0] - selection.errors[count]),
                    "all": float(selection.errors[0] - selection.errors[-1]),
                    "best": best_explained(objective, count, 200 if options.quick else MOST_SUBSETS),
                }
            )
    return {"layers": found}


def explained(objective: Objective, kept: torch.Tensor) -> float:
    """F of some units over the target's energy: the share that a fit on them, and on what always stays, explains beyond
    that on what always stays."""
    return _fit(objective, kept) - _fit(objective, kept[:0])


def _fit(objective: Objective, kept: torch.Tensor) -> float:
    taken = objective.units[kept]
    columns = torch.cat([objective.always, taken[taken >= 0]])
    if not len(columns):
        return 0.0
    gram = objective.solved_gram()[:, columns][:, :, columns]
    cross = objective.solved_cross[:, columns]
    found = torch.linalg.lstsq(gram, cross, driver="gelsd").solution
    owed = float(objective.owed[:, columns].sum())
    return (float((found * cross).sum()) - owed) / objective.energy


def best_explained(objective: Objective, count: int, most: int) -> float | None:
    """The best of all subsets of so many units; None where they are more than `most`."""
    size = len(objective.units)
    if math.comb(size, count) > most:
        return None
    return max(explained(objective, torch.tensor(s)) for s in itertools.combinations(range(size), count))


def guarantee_table(rows: Sequence[Row]) -> str:
    """A line for each layer: errors at each share, and how near the best choice greedy comes where that is known."""
    lines = []
    for row in rows:
        for name in dict.fromkeys(line["layer"] for line in row["layers"]):
            some = [line for line in row["layers"] if line["layer"] == name]
            known = [line["greedy"] / line["best"] for line in some if line["best"] is not None]
            errors = " / ".join(f"{line['error']:.4f}" for line in some)
            nearest = f"{min(known):.4f} ({len(known)} shares)" if known else "-"
            gamma, share = (f"{some[0][key]:.1e}" for key in ("gamma", "guarantee"))
            lines.append([row["case"]["network"], name, some[0]["units"], gamma, share, nearest, errors])
    shares = " / ".join(f"{keep:g}" for keep in KEEPS)
    head = (
        "network",
        "layer",
        "channels",
        "gamma, at least",
        "guaranteed share of the best",
        "greedy's share of the best",
    )
    return f"{_in_short(rows)}\n\n{markdown((*head, f'relative error at {shares} kept'), lines)}"


def _in_short(rows: Sequence[Row]) -> str:
    every = [line for row in rows for line in row["layers"]]
    known = [line["greedy"] / line["best"] for line in every if line["best"] is not None]
    least = (
        f"; at the least {min(known):.4f} of the best subset where all were tried ({len(known)} lines)" if known else ""
    )
    held = sum(line["greedy"] >= line["guarantee"] * (line["best"] or line["all"]) - 1e-9 for line in every)
    return f"The guarantee holds in {held} of {len(every)} lines{least}."


def _run(network: str, what: str, hours: float) -> PaperRun:
    return PaperRun(
        name=f"submodular_{network}",
        what=f"{what}: 0.05 to 0.75 of the channels, all methods, with and without the solve, 5 seeds",
        shows=f"accuracy against compression, no fine-tuning, with and without reweighting: {network}",
        hours=hours,
        cases=cases_of(network),
        make=pruned_row,
        table=methods_table,
    )


RUNS = (
    _run("lenet", "LeNet, trained here on digits", 0.05),
    _run("vgg11", "VGG11, trained here on CIFAR-10 for 8 epochs", 11),
    _run("resnet56", "ResNet-56, the first convolution of each block", 3),
    PaperRun(
        name="submodular_budgets",
        what="channels per layer: equal shares, and, within their MACs, equal loss (the paper's) and error curves",
        shows="budget selection over layers",
        hours=2,
        cases=budget_cases,
        make=budget_row,
        table=budget_table,
    ),
    PaperRun(
        name="submodular_guarantee",
        what="greedy selection in every layer beside 1 - exp(-gamma), and beside the best subset where that is known",
        shows="the approximation guarantee (proposition 3.3), which the paper proves and does not measure",
        hours=0.5,
        cases=guarantee_cases,
        make=guarantee_row,
        table=guarantee_table,
    ),
)
