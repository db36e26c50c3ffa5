"""Labels through contractions: convolutions, linear maps, matrix products, attention.

Labels that vary along the contracted dimension only are consumed: they index the weight's input slices, and the
result gets fresh labels. Labels that also vary along a kept dimension are tied along the contracted one and passed on:
that is what makes an attention head one unit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..ir.program import argument, is_constant
from .label_trace import Rule, Trace, Value, meets_fixed
from .labels import along, compress, fixed, lifted, vector

aten = torch.ops.aten


def carries_groups(channels: int, groups: int) -> bool:
    """Whether a grouped layer is cut by whole groups (many small groups) or inside each group (few large ones)."""
    return groups > 1 and groups >= channels // groups


def linear(trace: Trace, node: fx.Node) -> Value:
    """A stored weight over the last dimension."""
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    return _with_constant(trace, node, argument(node, 0, "input"), weight, bias, consumed=1)


def _with_constant(trace: Trace, node: fx.Node, x: Any, weight: Any, bias: Any, consumed: int) -> Value:
    """x @ weight over the last dimension of x, with a stored 2-d weight: one dimension is consumed, the other made."""
    made = 1 - consumed
    if not is_constant(weight) or trace.program.constant(weight).dim() != 2 or not (bias is None or is_constant(bias)):
        return trace.lock_node(node, f"its weight is computed at {node.name}")
    labels, shape = trace.of(x), trace.shape(node)
    if _reduce_to_last(trace, labels, node.name):
        return compress(labels.narrow(-1, 0, 1).expand(shape))
    trace.slot(weight, consumed, "in", node, vector(labels, -1))
    return along(_made(trace, node, weight, bias, made), len(shape) - 1, shape)


def _made(trace: Trace, node: fx.Node, weight: fx.Node, bias: Any, dim: int) -> torch.Tensor:
    """Fresh labels for what a layer makes, with the slots of weight and bias."""
    made = trace.labels.fresh(int(trace.program.constant(weight).shape[dim]))
    trace.slot(weight, dim, "out", node, made)
    _bias(trace, node, bias, made, "out")
    return made


def _bias(trace: Trace, node: fx.Node, bias: Any, labels: torch.Tensor, role: str) -> None:
    if is_constant(bias):
        trace.slot(bias, 0, role, node, labels)


def _reduce_to_last(trace: Trace, labels: torch.Tensor, where: str) -> bool:
    """Make the labels vary along the last dimension only, for it to be consumed, or not at all along it; then True."""
    last = labels.dim() - 1
    varying = trace.labels.varying(labels)
    kept = [d for d in varying if d != last]
    reason = meets_fixed(where)
    if kept and (last not in varying or trace.labels.kept_dim(labels, varying) != last):
        trace.labels.tie(labels, [last], reason)
        return True
    # rows that differ were only put together (a class token in front of the patches), or are constants
    trace.labels.tie(labels, range(last), reason)
    return False


def convolution(trace: Trace, node: fx.Node) -> Value:
    """Channels of dim 1 are consumed, or passed on by groups; transposed ones have their weight the other way round."""
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    transposed = is_transposed(node)
    groups = int(argument(node, 8 if _general(node) else 6, "groups", 1))
    if not is_constant(weight) or not (bias is None or is_constant(bias)):
        return trace.lock_node(node, f"its weight is computed at {node.name}")
    labels, shape = trace.of(argument(node, 0, "input")), trace.shape(node)
    if labels.dim() != trace.program.constant(weight).dim():
        return trace.lock_node(node, f"without a batch dimension at {node.name}")
    trace.tie_others(labels, 1, node.name)
    channels = vector(labels, 1)
    if groups > 1:
        return _grouped(trace, node, channels, weight, bias, groups)
    trace.slot(weight, 0 if transposed else 1, "in", node, channels)
    return along(_made(trace, node, weight, bias, 1 if transposed else 0), 1, shape)


def _general(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) is aten.convolution


def is_transposed(node: fx.Node) -> bool:
    """Whether a convolution is transposed: its weight has the inputs in front."""
    if _general(node):
        return bool(argument(node, 6, "transposed", False))
    packet = getattr(node.target, "overloadpacket", None)
    return packet in (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)


def _grouped(trace: Trace, node: fx.Node, channels: torch.Tensor, weight: fx.Node, bias: Any, groups: int) -> Value:
    """Whole groups are passed on, or each group is cut alike inside."""
    transposed = is_transposed(node)
    shape = trace.shape(node)
    reason = meets_fixed(node.name)
    grid = channels.view(groups, -1)
    if carries_groups(len(channels), groups):
        trace.labels.tie(grid, [1], reason)
        made = grid[:, :1].expand(groups, shape[1] // groups).reshape(-1)
        trace.slot(weight, 0, "carry", node, channels if transposed else made)
        _bias(trace, node, bias, made, "carry")
        return along(made, 1, shape)
    if transposed:
        return trace.lock_node(node, f"a transposed convolution with few large groups at {node.name}")
    trace.labels.tie(grid, [0], reason)
    trace.slot(weight, 1, "in", node, grid[0])
    fresh = trace.labels.fresh(shape[1] // groups)
    made = fresh.expand(groups, -1).reshape(-1)
    trace.slot(weight, 0, "out", node, made)
    _bias(trace, node, bias, made, "out")
    return along(made, 1, shape)


def embedding(trace: Trace, node: fx.Node) -> Value:
    """The table's columns are made fresh; its rows are looked up."""
    weight = argument(node, 0, "weight")
    if not is_constant(weight):
        return trace.lock_node(node, f"its table is computed at {node.name}")
    trace.lock_dim(weight, 0, f"its rows are looked up at {node.name}")
    shape = trace.shape(node)
    return along(_made(trace, node, weight, None, 1), len(shape) - 1, shape)


def matmul(trace: Trace, node: fx.Node) -> Value:
    """A stored 2-d matrix is a weight; anything else is a product of two activations."""
    first, second = node.args[0], node.args[1]
    if is_constant(second) and trace.program.constant(second).dim() == 2 and not is_constant(first):  # type: ignore[arg-type]
        return _with_constant(trace, node, first, second, None, consumed=0)
    a, b = trace.of(first), trace.of(second)
    if a.dim() < 2 or b.dim() < 2:
        return trace.lock_node(node, f"a product with a vector at {node.name}")
    return compress(contract(trace, a, b, node.name).expand(trace.shape(node)))


def addmm(trace: Trace, node: fx.Node) -> Value:
    """A product and a bias."""
    bias, first, second = node.args[:3]
    if is_constant(second) and not is_constant(first):
        return _with_constant(trace, node, first, second, bias, consumed=0)
    product = contract(trace, trace.of(first), trace.of(second), node.name)
    return trace.meet([trace.of(bias), product.expand(trace.shape(node))], trace.shape(node), node.name)


def contract(trace: Trace, a: torch.Tensor, b: torch.Tensor, where: str) -> torch.Tensor:
    """Labels of a (..., m, k) times b (..., k, n), batch dimensions broadcast: (..., m, n), size 1 where nothing
    varies."""
    labels = trace.labels
    dims = max(a.dim(), b.dim())
    a, b = lifted(a, dims), lifted(b, dims)
    m, k = dims - 2, dims - 1
    reason = meets_fixed(where)
    varies_a, varies_b = labels.varying(a), labels.varying(b)
    consumed = False
    if k in varies_a or m in varies_b:
        # rows that differ only because they were put together do not count
        if set(varies_a) == {m, k} and labels.kept_dim(a, varies_a) == k:
            labels.tie(a, [m], reason)
        if set(varies_b) == {m, k} and labels.kept_dim(b, varies_b) == m:
            labels.tie(b, [k], reason)
        consumed = set(labels.varying(a)) <= {k} and set(labels.varying(b)) <= {m}
        if consumed:
            labels.unite(vector(a, k), vector(b, m), reason)
        else:
            labels.tie(a, [k], reason)
            labels.tie(b, [m], reason)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = [*batch, a.shape[m], b.shape[k]]
    left, right = a.narrow(k, 0, 1), b.narrow(m, 0, 1)
    if consumed or not (labels.varying(left) or labels.varying(right)):
        return fixed(shape)
    return trace.meet([left, right], shape, where)


def attention(trace: Trace, node: fx.Node) -> Value:
    """Scores from queries and keys, softmax, then the values: two contractions."""
    query, key, value = (trace.of(argument(node, i, n)) for i, n in enumerate(("query", "key", "value")))
    mask = argument(node, 3, "attn_mask")
    if argument(node, 7, "enable_gqa", False) or query.dim() < 3:
        return trace.lock_node(node, f"grouped-query attention at {node.name}")
    scores = contract(trace, query, key.transpose(-1, -2), node.name)
    if isinstance(mask, fx.Node):
        scores = trace.meet([scores, trace.of(mask)], scores.shape, node.name)
    if scores.dim() - 1 in trace.labels.varying(scores):
        trace.labels.tie(scores, [scores.dim() - 1], f"softmax over the channels at {node.name}")
    return compress(contract(trace, scores, value, node.name).expand(trace.shape(node)))


def einsum(trace: Trace, node: fx.Node) -> Value:
    """Two operands with plain letters, brought to a batched matrix product."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if "->" not in equation or "." in equation or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return trace.lock_node(node, f"einsum {equation} at {node.name}")
    inputs, out = equation.split("->")
    one, two = inputs.split(",")
    repeated = any(len(set(text)) != len(text) for text in (one, two, out))
    if repeated or not (set(one) ^ set(two)) <= set(out):
        return trace.lock_node(node, f"einsum {equation} at {node.name}")
    batch = [c for c in out if c in one and c in two]
    rows, columns = [c for c in out if c in one and c not in two], [c for c in out if c in two and c not in one]
    contracted = [c for c in one if c in two and c not in out]
    sizes = {
        c: s for text, o in zip((one, two), operands, strict=True) for c, s in zip(text, trace.of(o).shape, strict=True)
    }
    a = _matrix(trace.of(operands[0]), one, batch, rows, contracted, sizes)
    b = _matrix(trace.of(operands[1]), two, batch, contracted, columns, sizes)
    product = contract(trace, a, b, node.name).expand([*a.shape[:-1], b.shape[-1]])
    order = [*batch, *rows, *columns]
    return compress(product.reshape([sizes[c] for c in order]).permute([order.index(c) for c in out]))


def _matrix(
    labels: torch.Tensor, text: str, batch: list[str], rows: list[str], columns: list[str], sizes: dict[str, int]
) -> torch.Tensor:
    moved = labels.permute([text.index(c) for c in [*batch, *rows, *columns]])
    return moved.reshape(
        [*(sizes[c] for c in batch), math.prod(sizes[c] for c in rows), math.prod(sizes[c] for c in columns)]
    )


CONTRACTIONS: dict[str | None, Rule] = {
    "convolution": convolution,
    "linear": linear,
    "embedding": embedding,
    "addmm": addmm,
    "attention": attention,
    "einsum": einsum,
    "matmul": matmul,
}

__all__ = ["CONTRACTIONS", "carries_groups"]
