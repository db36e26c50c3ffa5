"""The reference to beat: PRACTISE's final finetune (Wang & Wu, CVPR 2023), written from the paper's description.

From the plain dropped network: all weights, batch norm in train mode, mean squared error of the features before
global pooling,
SGD 0.02 with momentum 0.9 and weight decay 1e-4, batch 64, learning rate x 0.1 at 40 % and 80 % of the iterations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from cifar_data import CifarResNet
from foldcut.compiler.ir.edit import expose, set_tensors
from foldcut.compiler.ir.program import Program
from foldcut.passes.drop.decision import DropBlock
from foldcut.passes.drop.drop_blocks import drop_blocks, standing_for
from foldcut.passes.solve.features import head_features
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

#: A loss so many times that of the first batch is not coming back.
LOST = 10.0
Features = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """How long, on how many images at a time, and in which order. The paper's batch and rate."""

    iterations: int
    seed: int
    batch: int = 64
    learning_rate: float = 0.02


def finetune(
    teacher: CifarResNet, dropped: list[str], images: torch.Tensor, *, iterations: int, seed: int
) -> CifarResNet:
    """The student: `dropped` lists module paths (``layer1.3``) of identity blocks."""
    student = copy.deepcopy(teacher)
    for path in dropped:
        stage, _, index = path.partition(".")
        getattr(student, stage)[int(index)] = nn.Identity()
    student.train()
    parameters = [p for p in student.parameters() if p.requires_grad]
    for _ in losses(teacher.features, student.features, parameters, images, Finetune(iterations=iterations, seed=seed)):
        pass
    return student.eval()


def finetune_program(
    teacher: Program, drops: Sequence[DropBlock], images: torch.Tensor, settings: Finetune
) -> tuple[Program, float] | None:
    """The same for any network, whose batch norms (where it has some that are not folded) keep their statistics: the
    student, and the loss of its last batch over that of its first. None where the loss is lost on the way."""
    student = drop_blocks(teacher, drops)
    names = head_features(teacher)
    theirs, ours = expose(teacher, names), expose(student, [standing_for(name, drops) for name in names])
    weights = {name: value.detach().clone().requires_grad_() for name, value in ours.named_parameters()}

    def features(batch: torch.Tensor) -> torch.Tensor:
        return functional_call(ours, weights, (batch,))[0]

    first = last = 0.0
    for index, loss in enumerate(losses(lambda batch: theirs(batch)[0], features, weights.values(), images, settings)):
        first, last = (loss, loss) if index == 0 else (first, loss)
        if not loss <= LOST * first:
            return None
    trained = {name: value.detach() for name, value in weights.items()}
    return set_tensors(student, trained, note="finetune"), last / max(first, 1e-30)


def losses(
    teacher: Features, student: Features, parameters: Iterable[torch.Tensor], images: torch.Tensor, settings: Finetune
) -> Iterator[float]:
    """Train, batch by batch: the loss of each before its step."""
    iterations = settings.iterations
    optimiser = torch.optim.SGD(list(parameters), lr=settings.learning_rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [int(0.4 * iterations), int(0.8 * iterations)])
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(iterations):
        if len(order) < min(settings.batch, len(images)):
            order = torch.randperm(len(images), generator=generator)
        batch, order = images[order[: settings.batch]], order[settings.batch :]
        with torch.no_grad():
            wanted = teacher(batch)
        loss = F.mse_loss(student(batch), wanted)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        yield float(loss.detach())
