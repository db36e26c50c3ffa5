"""What a cut may take from the operands of an operator, kind by kind.

Element by element, operands and result lose the same indices; along dimensions that an operator mixes, nothing is lost;
a contraction loses the same indices on both sides. A rule raises RewriteError where that does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ...compiler.analysis.contraction_labels import carries_groups, is_transposed
from ...compiler.analysis.label_rules import reduced_dims
from ...compiler.ir.program import argument, is_tensor
from ..solve.targets import Kept
from .shape_arguments import Cut

aten = torch.ops.aten


def same_kept(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    """Whether the same is left along two dimensions."""
    if one is None or two is None:
        return one is two
    return torch.equal(one, two)


def _need(cut: Cut, one: torch.Tensor | None, two: torch.Tensor | None) -> None:
    if not same_kept(one, two):
        raise cut.fail("its operands and its result would lose different channels")


def _whole(cut: Cut, kept: Kept, dims: Sequence[int]) -> None:
    if any(kept[d] is not None for d in dims):
        raise cut.fail("it would be cut along a dimension whose elements it mixes")


def _aligned(cut: Cut, kept: Kept, shape: Sequence[int], result: Kept, sizes: Sequence[int]) -> None:
    """An operand that is broadcast to the result loses what the result loses."""
    lead = len(sizes) - len(shape)
    for dim, size in enumerate(shape):
        if size == sizes[dim + lead]:
            _need(cut, kept[dim], result[dim + lead])
        elif kept[dim] is not None:
            raise cut.fail("its operands and its result would lose different channels")


def _elementwise(cut: Cut) -> None:
    for operand in cut.node.all_input_nodes:
        if is_tensor(operand):
            sizes = cut.program.shape(cut.node)
            _aligned(cut, cut.of(operand), cut.program.shape(operand), cut.results[0], sizes)


def _like_first(cut: Cut) -> None:
    """Each dimension by itself in the first operand."""
    kept = cut.operand(0)
    for dim, indices in enumerate(cut.results[0]):
        _need(cut, kept[dim], indices)


def _others_whole(cut: Cut) -> None:
    """Results but the first are statistics, which nothing may have cut."""
    for result in cut.results[1:]:
        _whole(cut, result, range(len(result)))


def _same(cut: Cut) -> None:
    _like_first(cut)


def _spatial(cut: Cut) -> None:
    kept = cut.operand(0)
    _whole(cut, kept, [d for d in range(len(kept)) if d != 1])
    for result in cut.results:
        _whole(cut, result, [d for d in range(len(result)) if d != 1])
        _need(cut, kept[1], result[1])


def _reduction(cut: Cut) -> None:
    kept = cut.operand(0)
    dims = reduced_dims(cut.node, len(kept)) if kept else []
    _whole(cut, kept, dims)
    left = [k for d, k in enumerate(kept) if d not in dims]
    for result in cut.results:
        padded = len(result) == len(kept)
        for place, indices in enumerate(kept if padded else left):
            _need(cut, result[place], indices)


def _normalised(cut: Cut) -> None:
    kept = cut.operand(0)
    _whole(cut, kept, reduced_dims(cut.node, len(kept)) if kept else [])
    for result in cut.results:
        for one, two in zip(kept, result, strict=True):
            _need(cut, one, two)


def _uniform(cut: Cut) -> None:
    """One value everywhere has any size."""


def _getitem(cut: Cut) -> None:
    """The item itself: what made it has been proven."""


def _per_channel(cut: Cut, names: Sequence[str], kept: Kept) -> None:
    """Parameters with one value a channel of dimension 1."""
    schema = [a.name for a in cut.node.target._schema.arguments]  # type: ignore[union-attr]
    for name in names:
        parameter = argument(cut.node, schema.index(name), name) if name in schema else None
        if isinstance(parameter, fx.Node):
            _need(cut, cut.of(parameter)[0], kept[1])


def _batch_norm(cut: Cut) -> None:
    _like_first(cut)
    _others_whole(cut)
    _per_channel(cut, ("weight", "bias", "running_mean", "running_var"), cut.operand(0))


def _prelu(cut: Cut) -> None:
    _like_first(cut)
    weight = cut.node.args[1]
    if isinstance(weight, fx.Node) and math.prod(cut.program.shape(weight)) > 1:
        _need(cut, cut.of(weight)[0], cut.operand(0)[1])


def _layer_norm(cut: Cut) -> None:
    """The statistics are those of the channels that are left, by design."""
    _like_first(cut)
    _others_whole(cut)
    schema = [a.name for a in cut.node.target._schema.arguments]  # type: ignore[union-attr]
    for name in ("weight", "bias"):
        parameter = argument(cut.node, schema.index(name), name) if name in schema else None
        if isinstance(parameter, fx.Node):
            kept = cut.of(parameter)
            for one, two in zip(kept, cut.operand(0)[-len(kept) :], strict=True):
                _need(cut, one, two)


def _group_norm(cut: Cut) -> None:
    _like_first(cut)
    _others_whole(cut)
    kept = cut.operand(0)
    _whole(cut, kept, [d for d in range(len(kept)) if d != 1])
    _per_channel(cut, ("weight", "bias"), kept)
    native = getattr(cut.node.target, "overloadpacket", None) is aten.native_group_norm
    groups = int(cut.node.args[6 if native else 1])  # type: ignore[arg-type]
    if kept[1] is not None and groups > 1:
        size = cut.program.shape(cut.node.args[0])[1]  # type: ignore[arg-type]
        grid = _grid(kept[1], size, groups)
        _need_even(cut, grid, whole=carries_groups(size, groups))


def _grid(kept: torch.Tensor | None, size: int, groups: int) -> torch.Tensor:
    """What is left, a row for each group."""
    mask = torch.ones(size, dtype=torch.bool) if kept is None else torch.zeros(size, dtype=torch.bool)
    if kept is not None:
        mask[kept] = True
    return mask.view(groups, -1)


def _need_even(cut: Cut, grid: torch.Tensor, *, whole: bool) -> None:
    """Whole groups are gone, or each has lost the same."""
    if not torch.equal(grid, (grid[:, :1] if whole else grid[:1]).expand_as(grid)):
        raise cut.fail("its groups would lose different channels")


def _convolution(cut: Cut) -> None:
    node = cut.node
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    transposed = is_transposed(node)
    general = getattr(node.target, "overloadpacket", None) is aten.convolution
    # conv_transpose has output_padding in front of groups
    groups = int(argument(node, 8 if general else 6, "groups", 1))
    kept, held, result = cut.operand(0), cut.of(weight), cut.results[0]
    rank = len(kept)
    for side in (kept, result):
        _whole(cut, side, [d for d in range(rank) if d != 1])
    _whole(cut, held, range(2, len(held)))
    if isinstance(bias, fx.Node):
        _need(cut, cut.of(bias)[0], result[1])
    first, second = (kept[1], result[1]) if transposed else (result[1], kept[1])
    _need(cut, held[0], first)
    if groups == 1:
        _need(cut, held[1], second)
        return
    inputs, outputs = cut.program.shape(node.args[0])[1], cut.program.shape(node)[1]  # type: ignore[arg-type]
    one, two = _grid(kept[1], inputs, groups), _grid(result[1], outputs, groups)
    whole = carries_groups(inputs, groups)
    _need_even(cut, one, whole=whole)
    _need_even(cut, two, whole=whole)
    if whole:
        _need(cut, held[1], None)
        if not torch.equal(one[:, 0], two[:, 0]):
            raise cut.fail("its operands and its result would lose different channels")
        return
    inner = (two if transposed else one)[0]
    _need(cut, held[1], None if bool(inner.all()) else inner.nonzero().reshape(-1))


def _linear(cut: Cut) -> None:
    kept, result = cut.operand(0), cut.results[0]
    weight, bias = cut.of(argument(cut.node, 1, "weight")), argument(cut.node, 2, "bias")
    for one, two in zip(kept[:-1], result[:-1], strict=True):
        _need(cut, one, two)
    _need(cut, kept[-1], weight[-1])
    if len(weight) == 2:
        _need(cut, result[-1], weight[0])
    if isinstance(bias, fx.Node):
        _aligned(cut, cut.of(bias), cut.program.shape(bias), result, cut.program.shape(cut.node))


def _embedding(cut: Cut) -> None:
    weight, indices = cut.of(argument(cut.node, 0, "weight")), cut.of(argument(cut.node, 1, "indices"))
    _whole(cut, weight, [0])
    _whole(cut, indices, range(len(indices)))
    _whole(cut, cut.results[0], range(len(cut.results[0]) - 1))
    _need(cut, weight[1], cut.results[0][-1])


def _product(cut: Cut, first: Any, second: Any) -> None:
    """(..., m, k) times (..., k, n)."""
    a, b, result = cut.of(first), cut.of(second), cut.results[0]
    if len(a) < 2 or len(b) < 2:
        for kept in (a, b, result):
            _whole(cut, kept, range(len(kept)))
        return
    _need(cut, a[-1], b[-2])
    _need(cut, a[-2], result[-2])
    _need(cut, b[-1], result[-1])
    sizes = cut.program.shape(cut.node)
    for operand, kept in ((first, a), (second, b)):
        _aligned(cut, kept[:-2], cut.program.shape(operand)[:-2], result[:-2], sizes[:-2])


def _matmul(cut: Cut) -> None:
    _product(cut, cut.node.args[0], cut.node.args[1])


def _addmm(cut: Cut) -> None:
    bias = cut.node.args[0]
    _product(cut, cut.node.args[1], cut.node.args[2])
    _aligned(cut, cut.of(bias), cut.program.shape(bias), cut.results[0], cut.program.shape(cut.node))  # type: ignore[arg-type]


def _attention(cut: Cut) -> None:
    query, key, value = (argument(cut.node, i, n) for i, n in enumerate(("query", "key", "value")))
    mask, result = argument(cut.node, 3, "attn_mask"), cut.results[0]
    q, k, v = cut.of(query), cut.of(key), cut.of(value)
    _need(cut, q[-1], k[-1])
    _need(cut, v[-1], result[-1])
    for kept in (q, k, v, result):
        _whole(cut, kept, [len(kept) - 2])
    sizes = cut.program.shape(cut.node)
    for operand, kept in ((query, q), (key, k), (value, v)):
        _aligned(cut, kept[:-2], cut.program.shape(operand)[:-2], result[:-2], sizes[:-2])
    if isinstance(mask, fx.Node):
        shape = cut.program.shape(mask)
        _whole(cut, cut.of(mask), range(max(0, len(shape) - 2), len(shape)))
        _aligned(cut, cut.of(mask)[:-2], shape[:-2], result[:-2], sizes[:-2])


def _einsum(cut: Cut) -> None:
    equation, operands = str(cut.node.args[0]).replace(" ", ""), cut.node.args[1]
    if "." in equation or "->" not in equation:
        raise cut.fail("it would be cut through an einsum that is not understood")
    inputs, out = equation.split("->")
    known: dict[str, torch.Tensor | None] = {}
    sides = [*zip(inputs.split(","), map(cut.of, operands), strict=True), (out, cut.results[0])]  # type: ignore[arg-type]
    for text, kept in sides:
        for letter, indices in zip(text, kept, strict=True):
            _need(cut, known.setdefault(letter, indices), indices)


RULES: dict[str | None, Callable[[Cut], None]] = {
    "elementwise": _elementwise,
    "same": _same,
    "spatial": _spatial,
    "reduction": _reduction,
    "normalised": _normalised,
    "uniform": _uniform,
    "getitem": _getitem,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "prelu": _prelu,
    "convolution": _convolution,
    "linear": _linear,
    "embedding": _embedding,
    "matmul": _matmul,
    "addmm": _addmm,
    "attention": _attention,
    "einsum": _einsum,
}

__all__ = ["RULES", "same_kept"]
