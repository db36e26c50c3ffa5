"""Where two networks are compared: the features before the head."""

from __future__ import annotations

import torch
from torch import fx

from ...compiler.ir.program import Program, data_inputs, is_call, is_tensor, output_nodes

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
    names = [_before_head(output).name for output in compared_outputs(program)]
    return tuple(dict.fromkeys(names))


def compared_outputs(program: Program) -> tuple[fx.Node, ...]:
    """The computed floating-point outputs, each once; without any, the floating values that the others were made from
    (an argmax).

    Outputs that are inputs or parameters say nothing about the network and are left out.
    """
    outputs = output_nodes(program.graph)
    floating = [node for node in outputs if _is_floating(node)] or [_floating_source(node) for node in outputs]
    return tuple(dict.fromkeys(node for node in floating if node.op == "call_function"))


def _floating_source(node: fx.Node) -> fx.Node:
    while not _is_floating(node) and (operands := [n for n in data_inputs(node) if is_tensor(n)]):
        node = operands[0]
    return node


def _is_floating(node: fx.Node) -> bool:
    return is_tensor(node) and bool(node.meta["val"].is_floating_point())


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
