"""Batch norms in eval mode: per-channel affine maps that a preceding convolution can take over exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..devices.precision import in_float64
from .program import Program, getitem_source, is_call, is_constant

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class BatchNorm:
    """y = scale * (x - mean) + bias per channel (dim 1), in float64, and the names of its trained tensors. `deviation`
    is the standard deviation of x that it knows.

    `node` computes it, `output` is the node that holds y (a getitem where the operator returns a tuple).
    """

    node: str
    output: str
    weight: str | None
    bias: str | None
    scale: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor
    offset: torch.Tensor


def batch_norm_of(program: Program, node: fx.Node) -> BatchNorm | None:
    """The batch norm that a node (the norm itself or the getitem that reads it) stands for; None for anything else."""
    source = getitem_source(node) or node
    if not is_call(source, aten._native_batch_norm_legit_no_training, aten.native_batch_norm, aten.batch_norm):
        return None
    legit = is_call(source, aten._native_batch_norm_legit_no_training)
    if not legit and source.args[5]:
        return None  # training mode: the statistics are the batch's own
    _, weight, bias, mean, var = source.args[:5]
    if not isinstance(mean, fx.Node) or not isinstance(var, fx.Node) or not is_constant(mean) or not is_constant(var):
        return None
    eps = float(source.args[6 if legit else 7])  # type: ignore[arg-type]
    deviation = (in_float64(program.constant(var).detach()) + eps).sqrt()
    scale = deviation.reciprocal()
    if isinstance(weight, fx.Node):
        scale = scale * in_float64(program.constant(weight).detach())
    offset = in_float64(program.constant(bias).detach()) if isinstance(bias, fx.Node) else torch.zeros_like(scale)
    output = (
        source
        if is_call(source, aten.batch_norm)
        else next((u for u in source.users if getitem_source(u) is source), source)
    )
    return BatchNorm(
        node=source.name,
        output=output.name,
        weight=str(weight.target) if isinstance(weight, fx.Node) else None,
        bias=str(bias.target) if isinstance(bias, fx.Node) else None,
        scale=scale,
        mean=in_float64(program.constant(mean).detach()),
        deviation=deviation,
        offset=offset,
    )
