"""New arguments for calls whose operands lost channels: sizes, positions, group counts that stand in the graph as
numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...compiler.analysis.contraction_labels import carries_groups
from ...compiler.ir.edit import Call
from ...compiler.ir.program import Program, argument, is_constant, is_tensor
from ...compiler.support.errors import RewriteError
from ..solve.targets import Kept

aten = torch.ops.aten


#: How torch writes "to the end" in a slice.
LAST = 9223372036854775807


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What a removal leaves of one node's operands and results. `operand(i)` and `result` give what is kept."""

    program: Program
    node: fx.Node
    kept: Callable[[fx.Node], Kept]
    parameter_kept: Callable[[fx.Node], Kept]
    results: tuple[Kept, ...]

    def operand(self, index: int) -> Kept:
        """What stays of the operand at a position."""
        return self.of(self.node.args[index])

    def of(self, value: Any) -> Kept:
        """What stays of any operand, with an entry for each dimension."""
        if not isinstance(value, fx.Node) or not is_tensor(value):
            return ()
        kept = self.parameter_kept(value) if is_constant(value) else self.kept(value)
        return kept or (None,) * value.meta["val"].dim()

    def fail(self, why: str) -> RewriteError:
        return RewriteError(why, node=self.node.name, excerpt=self.program.excerpt(self.node))


def new_call(cut: Cut) -> Call | None:
    """The call as it must be after the cut, or None when it can stay. Raises RewriteError when there is none."""
    packet = getattr(cut.node.target, "overloadpacket", cut.node.target)
    rule = _RULES.get(packet)
    try:
        return rule(cut) if rule else None
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as cause:
        raise cut.fail(f"its arguments cannot be worked out for what is left: {cause}") from cause


def _function(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


def _call(cut: Cut, changes: dict[int, Any], target: Any = None) -> Call:
    args = list(cut.node.args)
    names = [a.name for a in cut.node.target._schema.arguments]  # type: ignore[union-attr]
    kwargs = dict(cut.node.kwargs)
    for index, value in changes.items():
        if index < len(args):
            args[index] = value
        else:
            kwargs[names[index]] = value
    return Call(target=target or _function(cut.node), args=tuple(args), kwargs=kwargs)


def _sizes(position: int) -> Callable[[Cut], Call | None]:
    """Sizes of the result, written out."""

    def rule(cut: Cut) -> Call | None:
        old, kept = cut.node.args[position], cut.results[0]
        if not isinstance(old, (list, tuple)) or not any(k is not None for k in kept):
            return None
        lead = len(old) - len(kept)
        new = list(old)
        for dim, indices in enumerate(kept):
            if indices is not None and isinstance(new[dim + lead], int) and new[dim + lead] != -1:
                new[dim + lead] = len(indices)
        for dim, indices in enumerate(kept):
            if indices is not None and isinstance(new[dim + lead], fx.Node):
                _spell_out(cut, new, lead)
                new[dim + lead] = -1  # a size that grows with the batch follows from the others
        return _call(cut, {position: new})

    return rule


def _spell_out(cut: Cut, sizes: list[Any], lead: int) -> None:
    """Write a size of -1 as the number that it stands for, so that another one may be -1."""
    for index, size in enumerate(sizes):
        if isinstance(size, int) and size == -1:
            dim = index - lead
            old, indices = cut.node.meta["val"].shape[dim], cut.results[0][dim]
            if cut.program.follows_batch(old):
                raise cut.fail("two sizes of this call cannot be known before it runs")
            sizes[index] = cut.program.dim(old) if indices is None else len(indices)


def _dim(cut: Cut, position: int, name: str = "dim", default: int = 0) -> int:
    rank = len(cut.program.shape(cut.node.args[0]))  # type: ignore[arg-type]
    return int(argument(cut.node, position, name, default)) % rank


def _positions(cut: Cut, dim: int) -> torch.Tensor | None:
    """What stays along a dimension that the call addresses by position. There are no fixed positions where the channels
    share the dimension with the batch."""
    kept = cut.operand(0)[dim]
    source = cut.node.args[0]
    if kept is not None and isinstance(source, fx.Node) and cut.program.follows_batch(source.meta["val"].shape[dim]):
        raise cut.fail("it takes positions of a dimension that channels share with the batch")
    return kept


def _slice(cut: Cut) -> Call | None:
    dim = _dim(cut, 1)
    start, end, step = (argument(cut.node, i, n, d) for i, n, d in ((2, "start", 0), (3, "end", None), (4, "step", 1)))
    if (start, step) == (0, 1) and (end is None or end == LAST):
        return None
    kept = _positions(cut, dim)
    if kept is None:
        return None
    size = cut.program.shape(cut.node.args[0])[dim]  # type: ignore[arg-type]
    if any(isinstance(v, fx.Node) for v in (start, end, step)):
        raise cut.fail("it slices the channels at positions that are computed")
    taken = torch.arange(size)[slice(start, end, step)]
    wanted = torch.isin(kept, taken).nonzero().reshape(-1)
    if len(wanted) == 0:
        raise cut.fail("nothing is left of this slice")
    first, last = int(wanted[0]), int(wanted[-1])
    if last - first + 1 == len(wanted):
        return _call(cut, {1: dim, 2: first, 3: last + 1, 4: 1})
    return Call(target=aten.index_select.default, args=(cut.node.args[0], dim, wanted), kwargs={})


def _narrow(cut: Cut) -> Call | None:
    dim = _dim(cut, 1)
    kept = _positions(cut, dim)
    if kept is None:
        return None
    start, length = int(cut.node.args[2]), int(cut.node.args[3])  # type: ignore[arg-type]
    before = int((kept < start).sum())
    return _call(cut, {2: before, 3: int((kept < start + length).sum()) - before})


def _select(cut: Cut) -> Call | None:
    dim = _dim(cut, 1)
    kept = _positions(cut, dim)
    if kept is None:
        return None
    size = cut.program.shape(cut.node.args[0])[dim]  # type: ignore[arg-type]
    place = kept.eq(int(cut.node.args[2]) % size).nonzero()  # type: ignore[arg-type]
    if not len(place):
        raise cut.fail("the channel that it selects is removed")
    return _call(cut, {2: int(place)})


def _split(cut: Cut) -> Call | None:
    dim = _dim(cut, 2)
    if _positions(cut, dim) is None:
        return None
    values = cut.node.meta["val"]
    sizes = []
    for value, kept in zip(values, cut.results, strict=True):
        indices = kept[dim]
        sizes.append(cut.program.dim(value.shape[dim]) if indices is None else len(indices))
    return Call(target=aten.split_with_sizes.default, args=(cut.node.args[0], sizes, dim), kwargs={})


def _index_select(cut: Cut) -> Call | None:
    dim = _dim(cut, 1)
    return _reindexed(cut, dim, cut.node.args[2], lambda new: _call(cut, {2: new}))


def _index(cut: Cut) -> Call | None:
    indices: Sequence[Any] = cut.node.args[1]  # type: ignore[assignment]
    used = [d for d, index in enumerate(indices) if index is not None]
    touched = [d for d in used if cut.operand(0)[d] is not None]
    if not touched:
        return None
    if len(used) > 1:
        raise cut.fail("it indexes the channels together with another dimension")
    dim = used[0]
    return _reindexed(cut, dim, indices[dim], lambda new: _call(cut, {1: [*indices[:dim], new, *indices[dim + 1 :]]}))


def _reindexed(cut: Cut, dim: int, index: Any, build: Callable[[torch.Tensor], Call]) -> Call | None:
    """Indices into a dimension that lost entries: those of what is kept, renumbered."""
    kept = _positions(cut, dim)
    if kept is None:
        return None
    if not is_constant(index) or cut.program.constant(index).dim() != 1:
        raise cut.fail("it indexes the channels by a computed value")
    size = cut.program.shape(cut.node.args[0])[dim]  # type: ignore[arg-type]
    old = cut.program.constant(index).cpu()
    old = old.nonzero().reshape(-1) if old.dtype == torch.bool else old % size
    rank = torch.full((size,), -1)
    rank[kept] = torch.arange(len(kept))
    return build(rank[old][rank[old] >= 0])


def _pad(cut: Cut) -> Call | None:
    kept_in, kept_out = cut.operand(0), cut.results[0]
    if not any(k is not None for k in kept_out):
        return None
    pads = list(cut.node.args[1])  # type: ignore[arg-type]
    shape = cut.program.shape(cut.node.args[0])  # type: ignore[arg-type]
    for dim, kept in enumerate(kept_out):
        position = 2 * (len(shape) - 1 - dim)
        if kept is None or position >= len(pads):
            continue
        before = int(pads[position])
        inner = kept[(kept >= before) & (kept < before + shape[dim])] - before
        expected = kept_in[dim] if kept_in[dim] is not None else torch.arange(shape[dim])
        if before < 0 or int(pads[position + 1]) < 0 or not torch.equal(inner, expected):  # type: ignore[arg-type]
            raise cut.fail("channels are cut off by a negative padding")
        pads[position] = int((kept < before).sum())
        pads[position + 1] = int((kept >= before + shape[dim]).sum())
    return _call(cut, {1: pads})


def _convolution(position: int) -> Callable[[Cut], Call | None]:
    """The number of groups of a grouped convolution that passes whole groups on."""

    def rule(cut: Cut) -> Call | None:
        groups = int(argument(cut.node, position, "groups", 1))
        channels = cut.program.shape(cut.node.args[0])[1]  # type: ignore[arg-type]
        kept = cut.operand(0)[1]
        if kept is None or groups == 1 or not carries_groups(channels, groups):
            return None
        return _call(cut, {position: len(kept) * groups // channels})

    return rule


def _group_norm(cut: Cut) -> Call | None:
    native = getattr(cut.node.target, "overloadpacket", None) is aten.native_group_norm
    channels, kept = cut.program.shape(cut.node.args[0])[1], cut.operand(0)[1]  # type: ignore[arg-type]
    if kept is None:
        return None
    groups = int(cut.node.args[6 if native else 1])  # type: ignore[arg-type]
    left = len(kept) * groups // channels if carries_groups(channels, groups) else groups
    return _call(cut, {4: len(kept), 6: left} if native else {1: left})


def _layer_norm(cut: Cut) -> Call | None:
    kept, sizes = cut.operand(0), list(cut.node.args[1])  # type: ignore[arg-type]
    for position in range(len(sizes)):
        indices = kept[len(kept) - len(sizes) + position]
        if indices is not None:
            sizes[position] = len(indices)
    return _call(cut, {1: sizes})


def _attention(cut: Cut) -> Call | None:
    """Without a scale of its own, attention divides by the root of the head size: the old one stays in force."""
    kept = cut.operand(0)
    if argument(cut.node, 6, "scale") is not None or kept[-1] is None:
        return None
    size = cut.program.shape(cut.node.args[0])[-1]  # type: ignore[arg-type]
    return Call(
        target=_function(cut.node), args=cut.node.args, kwargs={**cut.node.kwargs, "scale": 1 / math.sqrt(size)}
    )


def _unbind(cut: Cut) -> Call | None:
    if cut.operand(0)[_dim(cut, 1)] is not None:
        raise cut.fail("it takes the channels apart one by one")
    return None


def _unflatten(cut: Cut) -> Call | None:
    dim, sizes = _dim(cut, 1), list(cut.node.args[2])  # type: ignore[arg-type]
    for position in range(len(sizes)):
        indices = cut.results[0][dim + position]
        if indices is not None and sizes[position] != -1:
            sizes[position] = len(indices)
    return _call(cut, {2: sizes})


_RULES: dict[object, Callable[[Cut], Call | None]] = {
    **dict.fromkeys((aten.view, aten.reshape, aten._unsafe_view, aten.expand), _sizes(1)),
    **dict.fromkeys((aten.zeros, aten.ones, aten.full, aten.empty), _sizes(0)),
    **dict.fromkeys((aten.new_zeros, aten.new_ones, aten.new_full), _sizes(1)),
    **dict.fromkeys((aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split), _split),
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d), _convolution(6)),
    **dict.fromkeys((aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), _convolution(6)),
    **dict.fromkeys((aten.group_norm, aten.native_group_norm), _group_norm),
    **dict.fromkeys((aten.layer_norm, aten.native_layer_norm, aten.rms_norm), _layer_norm),
    aten.convolution: _convolution(8),
    aten.slice: _slice,
    aten.narrow: _narrow,
    aten.select: _select,
    aten.index_select: _index_select,
    aten.index: _index,
    aten.constant_pad_nd: _pad,
    aten.pad: _pad,
    aten.scaled_dot_product_attention: _attention,
    aten.unbind: _unbind,
    aten.unflatten: _unflatten,
}

__all__ = ["Cut", "new_call"]
