"""Labels through everything that is not a contraction.

Data movement runs itself on the labels: no rule per operator. Elementwise operators are known by torch's own tag.
What no rule knows locks the labels that it meets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..ir.program import argument, is_constant, is_size, is_tensor
from .contraction_labels import CONTRACTIONS, carries_groups
from .label_trace import Rule, Trace, Value
from .labels import along, compress, vector
from .operator_kinds import index_operands, kind_of

aten = torch.ops.aten


def rule_for(node: fx.Node) -> Rule | None:
    """How labels pass a node; None when that is not known."""
    return _RULES.get(kind_of(node))


def is_movement(node: fx.Node) -> bool:
    """Whether the node only moves elements around."""
    return kind_of(node) == "movement"


def move(call: Any, lookup: Callable[[fx.Node], Any]) -> Any:
    """Run a data-movement call on tensors that stand for its operands: `lookup` gives each graph operand's stand-in.

    `call` has target, args and kwargs: a node, or the call that is to take its place.
    """
    target = call.target
    if getattr(target, "overloadpacket", None) in (aten.view, aten._unsafe_view):
        target = aten.reshape.default  # a view asks for one memory layout
    return target(*fx.node.map_arg(call.args, lookup), **fx.node.map_arg(call.kwargs, lookup))


def movement(trace: Trace, node: fx.Node) -> Value:
    """Data movement: the operator itself runs on the labels of the elements; indices stay what they are."""

    def stand_in(operand: fx.Node) -> Any:
        if is_size(operand):
            return trace.program.scalar(operand)
        if operand in indices:
            return indices[operand]
        return trace.of(operand)

    indices: dict[fx.Node, Any] = {}
    for index in index_operands(node):
        indices[index] = trace.concrete(index)
        if indices[index] is None:
            return trace.lock_node(node, f"indexed by a computed value at {node.name}")
    result = move(node, stand_in)
    if isinstance(result, torch.Tensor):
        return compress(result)
    return tuple(compress(r) for r in result)


def _getitem(trace: Trace, node: fx.Node) -> Value:
    source, index = node.args
    assert isinstance(source, fx.Node)
    found = trace.values.get(source.name)
    if isinstance(found, tuple) and isinstance(index, int):
        return found[index]
    return trace.lock_node(node, f"an item of something unknown at {node.name}")


def _elementwise(trace: Trace, node: fx.Node) -> Value:
    operands = [trace.of(n) for n in node.all_input_nodes if is_tensor(n)]
    return trace.meet(operands, trace.shape(node), node.name)


def _per_channel_activation(trace: Trace, node: fx.Node) -> Value:
    """prelu: its weight runs along dim 1."""
    x, weight = trace.of(node.args[0]), node.args[1]
    if not (is_constant(weight) and trace.program.constant(weight).numel() == 1):  # type: ignore[arg-type]
        trace.channel_parameters(x, [weight], 1, node.name)
    return x


def _same(trace: Trace, node: fx.Node) -> Value:
    """Element by element in one operand."""
    return trace.of(node.args[0])


def _spatial(trace: Trace, node: fx.Node) -> Value:
    """Pooling and resampling: each channel of dim 1 by itself."""
    x = trace.of(node.args[0])
    inner = re.search(r"(\d)d", str(node.target))
    if inner and x.dim() != int(inner[1]) + 2:
        raise ValueError("without a batch dimension")
    trace.tie_others(x, 1, node.name)
    channels = vector(x, 1)
    return _value_of(node, [along(channels, 1, shape) for shape in trace.shapes(node)])


def _value_of(node: fx.Node, results: Sequence[torch.Tensor]) -> Value:
    """The labels of a node's results in the form of its value."""
    return results[0] if is_tensor(node) else tuple(results)


def _like_first(trace: Trace, node: fx.Node, x: torch.Tensor) -> Value:
    """A norm's value: its first result has the labels of its operand, saved statistics have none."""
    return _value_of(node, [x, *(trace.of(None) for _ in trace.shapes(node)[1:])])


def _batch_norm(trace: Trace, node: fx.Node) -> Value:
    x = trace.of(node.args[0])
    trace.channel_parameters(x, node.args[1:5], 1, node.name)
    return _like_first(trace, node, x)


def _layer_norm(trace: Trace, node: fx.Node) -> Value:
    """Normalised over the trailing dimensions. A cut changes mean and variance: what reads it is re-solved."""
    x = trace.of(node.args[0])
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    for name in ("weight", "bias"):
        parameter = argument(node, names.index(name), name) if name in names else None
        if trace.is_fixed_value(parameter):
            trace.met.append((trace.of(parameter), x, node.name))
        elif isinstance(parameter, fx.Node):
            trace.labels.lock(x, f"meets a computed parameter at {node.name}")
    return _like_first(trace, node, x)


def _group_norm(trace: Trace, node: fx.Node) -> Value:
    native = getattr(node.target, "overloadpacket", None) is aten.native_group_norm
    groups = int(node.args[6 if native else 1])  # type: ignore[arg-type]
    weight, bias = (
        argument(node, i, n) for i, n in (((1, "weight"), (2, "bias")) if native else ((2, "weight"), (3, "bias")))
    )
    x = trace.of(node.args[0])
    if groups > 1:
        trace.tie_others(x, 1, node.name)
        grid = vector(x, 1).view(groups, -1)
        trace.tie_others(grid, 0 if carries_groups(grid.numel(), groups) else 1, node.name)
    trace.channel_parameters(x, [weight, bias], 1, node.name)
    return _like_first(trace, node, x)


def reduced_dims(node: fx.Node, rank: int) -> list[int]:
    """The dimensions that a reduction or a normalisation runs over; all where it names none."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    dims = argument(node, names.index("dim"), "dim") if "dim" in names else None
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return sorted(int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims]))


def _tie_reduced(trace: Trace, node: fx.Node, x: torch.Tensor) -> list[int]:
    """Channels that are summed or normalised together go together; when nothing else tells them apart, they stay.
    Constants among them too: they are part of the sum."""
    dims = reduced_dims(node, x.dim()) if x.dim() else []
    varying = trace.labels.varying(x, free=True)
    if set(dims) & set(varying):
        reason = f"reduced over the channels by {node.name}"
        if set(varying) <= set(dims):
            trace.labels.lock(x, reason)
        trace.labels.tie(x, dims, reason)
    return dims


def _reduction(trace: Trace, node: fx.Node) -> Value:
    x = trace.of(node.args[0])
    dims = _tie_reduced(trace, node, x)
    for dim in dims:
        x = x.narrow(dim, 0, 1)
    results = []
    for shape in trace.shapes(node):
        small = x if len(shape) == x.dim() else x.reshape([s for d, s in enumerate(x.shape) if d not in dims])
        results.append(compress(small.expand(shape)))
    return _value_of(node, results)


def _normalised(trace: Trace, node: fx.Node) -> Value:
    """softmax and the like: as long as before along the reduced dimension."""
    x = trace.of(node.args[0])
    _tie_reduced(trace, node, x)
    return _value_of(node, [x.expand(shape) for shape in trace.shapes(node)])


def _pad(trace: Trace, node: fx.Node) -> Value:
    """Padding along the channels makes free channels of its own; along other dimensions it continues its neighbours."""
    if getattr(node.target, "overloadpacket", None) is aten.pad and argument(node, 2, "mode", "constant") != "constant":
        return _spatial(trace, node)
    x, pads = trace.of(node.args[0]), [int(trace.concrete(p)) for p in node.args[1]]  # type: ignore[union-attr]
    varying = trace.labels.varying(x)
    for position in range(len(pads) // 2):
        dim = x.dim() - 1 - position
        x = _padded(trace, x, dim, pads[2 * position], pads[2 * position + 1], own=dim in varying)
    return compress(x)


def _padded(trace: Trace, x: torch.Tensor, dim: int, before: int, after: int, *, own: bool) -> torch.Tensor:
    size = x.shape[dim]
    if before < 0 or after < 0:
        x = x.narrow(dim, max(0, -before), size - max(0, -before) - max(0, -after))
    parts = [x]
    for count, edge, front in ((before, 0, True), (after, x.shape[dim] - 1, False)):
        if count <= 0:
            continue
        shape = [count if d == dim else s for d, s in enumerate(x.shape)]
        fill = along(trace.labels.fresh(count, free=True), dim, shape) if own else x.narrow(dim, edge, 1).expand(shape)
        parts.insert(0 if front else len(parts), fill)
    small = slim_together(parts, dim)
    return torch.cat(small, dim).expand(
        [sum(p.shape[dim] for p in parts) if d == dim else s for d, s in enumerate(x.shape)]
    )


def slim_together(parts: Sequence[torch.Tensor], dim: int) -> list[torch.Tensor]:
    """The parts with those dimensions but `dim` cut to size 1 along which none of them has a stride."""
    result = list(parts)
    for d in range(result[0].dim()):
        if d != dim and all(p.stride(d) == 0 or p.shape[d] == 1 for p in result):
            result = [p.narrow(d, 0, 1) for p in result]
    return result


def _uniform(trace: Trace, node: fx.Node) -> Value:
    """One value everywhere, made in the graph: free, like a parameter."""
    shape = trace.shape(node)
    count = torch.Size(shape).numel()
    return trace.labels.fresh(count, free=True).view(shape) if count <= 1 << 16 else trace.fixed_like(node)


def _concatenate(trace: Trace, node: fx.Node) -> Value:
    parts = [trace.of(n) for n in node.args[0]]  # type: ignore[union-attr]
    dim = int(argument(node, 1, "dim", 0)) % parts[0].dim()
    shape = trace.shape(node)
    return compress(torch.cat(slim_together(parts, dim), dim).expand(shape))


_RULES: dict[str | None, Rule] = {
    "getitem": _getitem,
    "elementwise": _elementwise,
    "movement": movement,
    "same": _same,
    "spatial": _spatial,
    "reduction": _reduction,
    "normalised": _normalised,
    "uniform": _uniform,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "pad": _pad,
    "concatenate": _concatenate,
    "prelu": _per_channel_activation,
    **CONTRACTIONS,
}
__all__ = ["is_movement", "move", "reduced_dims", "rule_for"]
