"""Torch-Pruning (group magnitude) on the same convolutions, as its users run it without training: the peer to compare
with."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn


def prune_with_torch_pruning(
    teacher: nn.Module, images: torch.Tensor, layers: Sequence[str], keep: float, *, reestimate: bool = True
) -> nn.Module:
    """A copy of `teacher` with a share `keep` of the output channels of the named convolutions, by group magnitude;
    then batch-norm statistics over the images."""
    import torch_pruning as tp

    student = copy.deepcopy(teacher).eval()
    modules = dict(student.named_modules())
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    for name in layers:
        graph = tp.DependencyGraph().build_dependency(student, example_inputs=images[:2])
        conv = modules[name]
        channels = int(conv.out_channels)  # type: ignore[arg-type]
        group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=list(range(channels)))
        scores = importance(group)
        count = channels - round(keep * channels)
        worst = scores.argsort()[:count].tolist()
        graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=worst).prune()
    if reestimate:
        reestimate_batch_norm(student, images)
    return student.eval()


def prune_whole_with_torch_pruning(teacher: nn.Module, images: torch.Tensor, keep: float) -> nn.Module:
    """A copy of `teacher` with a share `keep` of all channels but those of its outputs, coupled ones together, by group
    magnitude; then batch-norm statistics over the images."""
    import torch_pruning as tp

    student = copy.deepcopy(teacher).eval()
    tp.pruner.MagnitudePruner(
        student,
        images[:2],
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1 - keep,
        ignored_layers=[module for module in student.modules() if isinstance(module, nn.Linear)],
    ).step()
    reestimate_batch_norm(student, images)
    return student.eval()


def reestimate_batch_norm(model: nn.Module, images: torch.Tensor, batch_size: int = 100) -> None:
    """Running means and variances as plain averages over the images."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            model(images[start : start + batch_size])
    model.eval()
