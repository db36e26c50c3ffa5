"""Where two networks are compared: the features before the head."""

from __future__ import annotations

import torch
from torch import fx

from ..compiler.program import Program, data_inputs, is_call, is_tensor, output_nodes

aten = torch.ops.aten

#: Between the features and the head: pooling, reductions and data movement.
_POOLING = (
    aten.mean,
    aten.amax,
    aten.sum,
    aten.adaptive_avg_pool2d,
    aten.adaptive_avg_pool1d,
    aten._adaptive_avg_pool2d,
    aten.avg_pool2d,
    aten.adaptive_max_pool2d,
    aten.max_pool2d,
    aten.view,
    aten.reshape,
    aten.flatten,
    aten.squeeze,
    aten.unsqueeze,
    aten.permute,
    aten.transpose,
    aten.clone,
    aten.dropout,
    aten.contiguous,
    aten.select,
    aten.alias,
    aten.detach,
)
_CONTRACTIONS = (aten.linear, aten.addmm, aten.mm, aten.conv1d, aten.conv2d, aten.conv3d)


def head_features(program: Program) -> tuple[str, ...]:
    """For each output, the activation that the last layer's pooling reads; the output itself where no head is found.

    From the output back over pooling and data movement to the last linear layer or convolution, over that, and over
    pooling again: the last feature map of a classifier, the input of the last convolution of a segmentation network.
    Of a network without such an end (a bare backbone) the outputs are the features. Only floating-point values are
    returned, each once.
    """
    names: list[str] = []
    for output in output_nodes(program.graph):
        node = _before_head(output)
        if is_tensor(node) and node.meta["val"].is_floating_point() and node.name not in names:
            names.append(node.name)
    return tuple(names)


def _before_head(output: fx.Node) -> fx.Node:
    head = _skip_pooling(output)
    if not is_call(head, *_CONTRACTIONS):
        return output
    operands = [n for n in data_inputs(head) if is_tensor(n)]
    if len(operands) != 1 or operands[0].op != "call_function":
        return output
    return _skip_pooling(operands[0])


def _skip_pooling(node: fx.Node) -> fx.Node:
    while is_call(node, *_POOLING):
        operands = [n for n in data_inputs(node) if is_tensor(n)]
        if len(operands) != 1 or operands[0].op != "call_function":
            return node
        node = operands[0]
    return node
