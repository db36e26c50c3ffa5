"""The reference to beat: PRACTISE's final finetune (Wang & Wu, CVPR 2023), written from the paper's description.

From the plain dropped network: all weights, batch norm in train mode, mean squared error of the features before
global pooling,
SGD 0.02 with momentum 0.9 and weight decay 1e-4, batch 64, learning rate x 0.1 at 40 % and 80 % of the iterations.
"""

from __future__ import annotations

import copy

import torch
from cifar_data import CifarResNet
from torch import nn
from torch.nn import functional as F


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
    optimiser = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [int(0.4 * iterations), int(0.8 * iterations)])
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(iterations):
        if len(order) < min(64, len(images)):
            order = torch.randperm(len(images), generator=generator)
        batch, order = images[order[:64]], order[64:]
        with torch.no_grad():
            wanted = teacher.features(batch)
        loss = F.mse_loss(student.features(batch), wanted)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    return student.eval()
