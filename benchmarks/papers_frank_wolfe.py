"""Compression-aware training by Frank-Wolfe (Zimmer et al., arXiv 2205.11921) beside its rivals: what is left after
filter pruning and low rank without retraining, and what a step costs."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Sequence

import torch
from cifar_data import CifarResNet, accuracy, load_cifar
from foldcut.passes.frank_wolfe import FrankWolfe, Gram, SpectralKSupport, parameter_groups
from frank_wolfe import KEEP, MACS, WAYS, compressed
from frank_wolfe_train import BLOCKS, MOMENTUM, Run, train, train_step
from papers_images import cifar
from papers_networks import vgg11
from papers_run import Case, Options, PaperRun, grouped, markdown, over_seeds
from rows import Row
from torch import nn

#: (what is shown, run of frank_wolfe_train.py)
TRAINED = (
    ("SGD, weight decay", "sgd:5e-4@0.1"),
    ("SGD, weight decay", "sgd:2e-3@0.1"),
    ("Prox-SGD, L1", "prox_l1:1e-4@0.1"),
    ("Prox-SGD, L1", "prox_l1:1e-3@0.1"),
    ("Prox-SGD, group", "prox_group:1e-3@0.1"),
    ("Prox-SGD, group", "prox_group:5e-3@0.1"),
    ("L2 filter norms in the loss", "filter:1e-3@0.1"),
    ("L2 filter norms in the loss", "filter:5e-3@0.1"),
    ("nuclear norm in the loss", "nuclear:1e-3@0.1"),
    ("nuclear norm in the loss", "nuclear:5e-3@0.1"),
    ("SFW, L2 balls", "l2:5@0.1"),
    ("SFW, spectral-k-support", "spectral:30:0.5@0.2"),
    ("SFW, spectral-k-support", "spectral:5:0.5@0.2"),
    ("SFW, group-k-support", "group:30:0.5@0.2"),
    ("SFW, group-k-support", "group:5:0.5@0.2"),
)
EPOCHS = 6
#: Methods whose step is timed; the last is the spectral set with an exact oracle.
TIMED = ("sgd:5e-4", "prox_l1:1e-4", "prox_group:1e-3", "filter:1e-3", "nuclear:1e-3", "l2:30", "group:30:0.1")
TIMED += ("spectral:30:0.1", "spectral:30:0.1:gram")
NETWORKS = ("resnet8", "resnet20", "vgg11")


def cases(options: Options) -> list[Case]:
    wanted = (TRAINED[0], TRAINED[4], TRAINED[6], TRAINED[8], TRAINED[11]) if options.quick else TRAINED
    wanted = wanted if options.peers else tuple(row for row in wanted if row[0].startswith("SFW"))
    return [{"trained": words, "by": run, "seed": seed} for seed in options.seeds_or(1) for words, run in wanted]


def trained_row(case: Case, options: Options) -> Row:
    """One training of ResNet-8, its accuracy, and what is left of it after cuts of every size."""
    torch.set_num_threads(1)
    run = Run.parse(case["by"])
    images, test = (256, 500) if options.quick else (None, None)
    data = load_cifar(options.data, images, test, labelled=True)
    settings = argparse.Namespace(
        seed=case["seed"],
        network="resnet8",
        epochs=options.epochs or (1 if options.quick else EPOCHS),
        batch=64 if options.quick else 128,
        float32=False,
    )
    network, row = train(run, data, settings)
    torch.save(network.state_dict(), options.beside(f"resnet8_{run.name}_seed{case['seed']}").with_suffix(".pt"))
    samples = cifar(options.data, 60 if options.quick else 500, 500 if options.quick else None)
    assert isinstance(network, CifarResNet)
    left = compressed(network.eval(), samples)
    return {
        "dense": accuracy(network, samples),
        "loss": row["loss"],
        "epochs": settings.epochs,
        "train_s": row["seconds"],
        "left": left,
    }


def trained_table(rows: Sequence[Row]) -> str:
    """Accuracy dense, and after each cut."""
    lines = []
    for (words, by), some in grouped(rows, "trained", "by").items():
        cells = [over_seeds((row["dense"] for row in some), 1)]
        for way, shares in zip(WAYS, (MACS, MACS, KEEP, KEEP), strict=True):
            marks = (over_seeds((row["left"][way][f"{share:g}"] for row in some), 1) for share in shares)
            cells.append(" / ".join(marks))
        lines.append([words, f"`{by}`", *cells])
    columns = ("trained by", "run", "dense", *(f"{way}, 75 / 50 / 25 % left" for way in WAYS))
    return markdown(columns, lines)


def step_cases(options: Options) -> list[Case]:
    return [{"network": name} for name in (NETWORKS[:1] if options.quick else NETWORKS)]


def step_row(case: Case, options: Options) -> Row:
    """CPU time of a training step of each method over that of SGD, turn by turn on the same batches."""
    torch.set_num_threads(1)
    repeats, batch = (2, 16) if options.quick else (7 if case["network"] != "vgg11" else 4, 128)
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(batch, 3, 32, 32, generator=draw), torch.randint(0, 10, (batch,), generator=draw)
    makers = {name: functools.partial(_stepper, case["network"], name) for name in TIMED}
    steppers = {name: make() for name, make in makers.items()}
    whole: dict[str, list[float]] = {name: [] for name in TIMED}
    own: dict[str, list[float]] = {name: [] for name in TIMED}
    for turn in range(repeats + 1):
        for name, (network, optimiser) in steppers.items():
            started = time.process_time()
            train_step(network, optimiser, images, labels)
            seconds = time.process_time() - started
            started = time.process_time()
            optimiser.step()
            if turn:  # the first has bases to find and memory to take
                whole[name].append(seconds)
                own[name].append(time.process_time() - started)
    found = {}
    for name in TIMED:
        ratios = [a / b for a, b in zip(whole[name], whole[TIMED[0]], strict=True)]
        found[name] = {"ratio": statistics.median(ratios), "own_ms": 1e3 * statistics.median(own[name])}
    return {"sgd_ms": 1e3 * statistics.median(whole[TIMED[0]]), "batch": batch, "methods": found}


def _stepper(network: str, name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = vgg11() if network == "vgg11" else CifarResNet(BLOCKS[network])
    net.train()
    if not name.endswith(":gram"):
        return net, Run.parse(f"{name}@0.01").optimizer(net)
    share = float(name.split(":")[2])

    def exact(weight: torch.Tensor) -> SpectralKSupport:
        rows, columns = weight.shape[0], weight[0].numel()
        return SpectralKSupport(k=max(1, round(share * min(rows, columns))), oracle=Gram())

    optimiser = FrankWolfe(parameter_groups(net, exact, factor=30.0), lr=0.01, momentum=MOMENTUM)
    optimiser.make_feasible()
    return net, optimiser


def step_table(rows: Sequence[Row]) -> str:
    """Ratio to SGD's whole step, and the optimiser's own milliseconds."""
    columns = ["method", *(f"{row['case']['network']}, batch {row['batch']}" for row in rows)]
    lines = []
    for name in TIMED:
        cells = [f"x{row['methods'][name]['ratio']:.2f} ({row['methods'][name]['own_ms']:.1f} ms)" for row in rows]
        lines.append([f"`{name}`", *cells])
    lines.append(["a step of SGD, ms", *(f"{row['sgd_ms']:.0f}" for row in rows)])
    return markdown(columns, lines)


RUNS = (
    PaperRun(
        name="frank_wolfe_rivals",
        what="ResNet-8 on CIFAR-10 trained by SGD, Prox-SGD, filter-norm and nuclear-norm penalties and SFW, then cut",
        shows="filter pruning and low rank without retraining, against other compression-aware training",
        hours=3,
        cases=cases,
        make=trained_row,
        table=trained_table,
    ),
    PaperRun(
        name="frank_wolfe_steps",
        what="CPU time of a training step of each of these, as a ratio to SGD's",
        shows="training time of the spectral sets beside nuclear-norm penalties",
        hours=0.1,
        cases=step_cases,
        make=step_row,
        table=step_table,
    ),
)
