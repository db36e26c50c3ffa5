"""Trains the networks of the Frank-Wolfe ablation: one CIFAR ResNet, equal epochs, SGD and stochastic Frank-Wolfe.

    python benchmarks/frank_wolfe_train.py --data ../shared/data --folder runs --run sgd:5e-4 --run spectral:30:0.1 ...

A run is METHOD:SETTING[:SHARE], with a learning rate behind "@" (0.1 without):
    sgd:DECAY              SGD with weight decay
    l2:FACTOR              SFW, every conv and linear weight in an L2 ball of diameter 2 * FACTOR * E||W_init||
    spectral:FACTOR:SHARE  SFW, spectral k-support balls, k = SHARE of full rank
    group:FACTOR:SHARE     SFW, k-support balls over filters, k = SHARE of the filters
    prox_l1:PENALTY        proximal SGD, L1 norm of the weights
    prox_group:PENALTY     proximal SGD, L2 norm of each filter
    filter:PENALTY         SGD, L2 norm of each filter added to the loss
    nuclear:PENALTY        SGD, nuclear norm of each weight added to the loss, by a full SVD at every step
Biases and batch norms take plain SGD steps. Momentum 0.9, learning rate falling linearly to zero, crops and mirror
images; weights in float32, forward pass in bfloat16 autocast. Writes RUN.pt (weights) and RUN.json (accuracy, loss,
seconds, norms) into the folder when a run is complete; a run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from cifar_data import Cifar, CifarResNet, accuracy, load_cifar
from foldcut.passes.frank_wolfe import (
    Constraint,
    FrankWolfe,
    GroupKSupport,
    LpBall,
    SpectralKSupport,
    Subspace,
    parameter_groups,
)
from frank_wolfe_rivals import PENALTIES, PenalisedSGD
from rows import Row, write_json
from torch import nn
from torch.nn import functional as F

MOMENTUM = 0.9
BLOCKS = {"resnet8": 1, "resnet14": 2, "resnet20": 3}


@dataclass(frozen=True)
class Run:
    """One training: how the weights are held, and how fast they move."""

    method: str
    setting: float
    share: float
    lr: float

    @classmethod
    def parse(cls, text: str) -> Run:
        body, _, lr = text.partition("@")
        method, *numbers = body.split(":")
        wanted = {"sgd": 1, "l2": 1, "spectral": 2, "group": 2, **dict.fromkeys(PENALTIES, 1)}.get(method)
        if wanted != len(numbers):
            raise argparse.ArgumentTypeError(f"{text!r} is not a run: see --help")
        values = [float(number) for number in numbers] + [1.0]
        return cls(method=method, setting=values[0], share=values[1] if wanted == 2 else 1.0, lr=float(lr or 0.1))

    @property
    def name(self) -> str:
        share = f"_{self.share:g}" if self.method in ("spectral", "group") else ""
        return f"{self.method}_{self.setting:g}{share}_lr{self.lr:g}"

    def constraint(self, weight: torch.Tensor) -> Constraint:
        """The set of one weight; `parameter_groups` gives it its radius."""
        rows, columns = weight.shape[0], weight[0].numel()
        if self.method == "l2":
            return LpBall(p=2)
        if self.method == "group":
            return GroupKSupport(k=max(1, round(self.share * rows)))
        return SpectralKSupport(k=max(1, round(self.share * min(rows, columns))), oracle=Subspace())

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        if self.method == "sgd":
            return torch.optim.SGD(network.parameters(), lr=self.lr, momentum=MOMENTUM, weight_decay=self.setting)
        if self.method in PENALTIES:
            return PenalisedSGD(
                network.parameters(), lr=self.lr, momentum=MOMENTUM, kind=self.method, penalty=self.setting
            )
        groups = parameter_groups(network, self.constraint, factor=self.setting)
        optimizer = FrankWolfe(groups, lr=self.lr, momentum=MOMENTUM)
        optimizer.make_feasible()
        return optimizer


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    data = load_cifar(arguments.data, arguments.train_images, labelled=True)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for run in arguments.run:
        target = arguments.folder / f"{run.name}_seed{arguments.seed}.json"
        if not target.exists():
            network, row = train(run, data, arguments)
            part = target.with_suffix(".pt.part")
            torch.save(network.state_dict(), part)
            part.replace(target.with_suffix(".pt"))
            write_json(target, row)
            print(f"{run.name}: {row['accuracy']:.2f} %, loss {row['loss']:.3f}, {row['seconds']:.0f} s", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--run", type=Run.parse, action="append", required=True)
    parser.add_argument("--network", choices=BLOCKS, default="resnet8")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--train-images", type=int, help="the first so many; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast in the forward pass")
    return parser.parse_args()


def train(run: Run, data: Cifar, arguments: argparse.Namespace) -> tuple[nn.Module, Row]:
    """Train one network; runs of one seed start from the same weights and see the same batches."""
    torch.manual_seed(arguments.seed)
    network = CifarResNet(BLOCKS[arguments.network])
    optimizer = run.optimizer(network)
    per_epoch = math.ceil(len(data.calibration) / arguments.batch)
    steps = arguments.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(arguments.seed)
    started, running = time.process_time(), 0.0
    for epoch in range(arguments.epochs):
        network.train()
        running = 0.0
        for images, labels in batches(data, arguments.batch, generator):
            running += train_step(network, optimizer, images, labels, bfloat16=not arguments.float32) / per_epoch
            schedule.step()
        network.eval()
        print(f"{run.name} epoch {epoch + 1}: loss {running:.3f}, {time.process_time() - started:.0f} s", flush=True)
    found = {name: float(w.norm()) for name, w in network.named_parameters() if w.dim() > 1}
    row: Row = {
        "run": run.name,
        "method": run.method,
        "setting": run.setting,
        "share": run.share,
        "lr": run.lr,
        "network": arguments.network,
        "epochs": arguments.epochs,
        "train_images": len(data.calibration),
        "seed": arguments.seed,
        "bfloat16": not arguments.float32,
        "accuracy": accuracy(network, data),
        "loss": running,
        "seconds": time.process_time() - started,
        "norms": found,
    }
    return network, row


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    bfloat16: bool = True,
    smoothing: float = 0.0,
) -> float:
    """One step on a batch, with the forward pass in bfloat16 autocast where that is wanted; its cross entropy."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = network(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def batches(data: Cifar, size: int, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch in random order: each image shifted by up to four pixels and mirrored half of the time."""
    assert data.calibration_labels is not None
    for chosen in torch.randperm(len(data.calibration), generator=generator).split(size):
        images = F.pad(data.calibration[chosen], (4, 4, 4, 4))
        down, right = torch.randint(0, 9, (2, len(chosen)), generator=generator)
        rows = down.view(-1, 1) + torch.arange(32)
        columns = right.view(-1, 1) + torch.arange(32)
        mirrored = torch.rand(len(chosen), generator=generator) < 0.5
        columns[mirrored] = columns[mirrored].flip(1)
        place = torch.arange(len(chosen)).view(-1, 1, 1)
        yield (
            images.permute(0, 2, 3, 1)[place, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2),
            data.calibration_labels[chosen],
        )


if __name__ == "__main__":
    main()
