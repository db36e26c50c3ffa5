"""Proof that a call computes, on what a cut leaves of its operands, what the cut leaves of its old result.

The proof compares elements, not classes of labels. Data movement is run on the elements' numbers, before and after.
Everything else has a rule (`cut_rules`); what has none proves nothing, and is refused. A refusal is a RewriteError:
never a wrong network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...compiler.analysis.label_rules import move
from ...compiler.analysis.operator_kinds import index_operands, kind_of
from ...compiler.ir.edit import Call
from ...compiler.ir.execute import ConcreteValues
from ...compiler.ir.program import argument, is_size, is_tensor
from ..solve.targets import Kept, select_kept
from .cut_rules import RULES, same_kept
from .shape_arguments import LAST, Cut

aten = torch.ops.aten

#: Elements of all operands of one movement, beyond which it is not proven but refused.
MOST_ELEMENTS = 1 << 27
#: Movements that keep their meaning where the channels share a dimension with the batch.
_LAYOUT = {
    aten.view,
    aten.reshape,
    aten._unsafe_view,
    aten.permute,
    aten.transpose,
    aten.t,
    aten.unsqueeze,
    aten.squeeze,
    aten.expand,
    aten.flatten,
    aten.unflatten,
    aten.movedim,
    aten.swapaxes,
    aten.expand_as,
    aten.view_as,
}
#: Movements along the dimension that they name.
_ONE_DIMENSION = {
    aten.slice,
    aten.select,
    aten.narrow,
    aten.index_select,
    aten.unbind,
    aten.chunk,
    aten.split,
    aten.split_with_sizes,
    aten.cat,
}


class Prover:
    """Proves calls of one program, one by one. `prove` returns the call to use; it raises RewriteError."""

    def __init__(self, concrete: ConcreteValues) -> None:
        self.concrete = concrete

    def prove(self, cut: Cut, call: Call | None) -> Call | None:
        kind = kind_of(cut.node)
        if kind in ("movement", "concatenate", "pad"):
            return self._moved(cut, call)
        rule = RULES.get(kind)
        if rule is None:
            raise cut.fail("it would be cut through an operator that is not understood")
        rule(cut)
        return call

    def _moved(self, cut: Cut, call: Call | None) -> Call | None:
        _refuse_shared_with_batch(cut)
        try:
            proven = self._same_elements(cut, call)
            if not index_operands(cut.node):
                self._same_for_two_samples(cut, proven)
            return proven
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as cause:
            raise cut.fail(f"what is left cannot be moved like the whole: {cause}") from cause

    def _same_elements(self, cut: Cut, call: Call | None) -> Call | None:
        """The call itself where it moves what is left as before; else, where it only reorders one dimension, that order
        written out."""
        numbers = self._numbers(cut)
        before = _as_tuple(self._run(cut.node, numbers, cut, filtered=False))
        wanted = [select_kept(b, k) for b, k in zip(before, cut.results, strict=True)]
        try:
            found = _as_tuple(self._run(call or cut.node, numbers, cut, filtered=True))
            if len(found) == len(wanted) and all(map(torch.equal, found, wanted)):
                return call
        except (RuntimeError, ValueError, IndexError):
            pass  # the call does not even run on what is left
        reordered = _reordered(cut, numbers, before)
        if reordered is not None:
            return reordered
        raise cut.fail("moving the remaining channels gives another order than before")

    def _same_for_two_samples(self, cut: Cut, call: Call | None) -> None:
        """What was proven for one sample is so for two: nothing moves from one to the other on the way."""
        numbers = self._numbers(cut, batch=2)
        before = _as_tuple(self._run(cut.node, numbers, cut, filtered=False, batch=2))
        values = _as_tuple(cut.node.meta["val"])
        wanted = [
            select_kept(b, _of_samples(cut, kept, value, 2))
            for b, kept, value in zip(before, cut.results, values, strict=True)
        ]
        found = _as_tuple(self._run(call or cut.node, numbers, cut, filtered=True, batch=2))
        if len(found) != len(wanted) or not all(map(torch.equal, found, wanted)):
            raise cut.fail("it moves channels from one sample to another")

    def _numbers(self, cut: Cut, batch: int = 1) -> dict[fx.Node, torch.Tensor]:
        """A number for each element of each operand that holds data."""
        indices = index_operands(cut.node)
        found, count = {}, 0
        for operand in cut.node.all_input_nodes:
            if is_tensor(operand) and operand not in indices:
                shape = cut.program.shape(operand, batch)
                size = math.prod(shape)
                found[operand] = torch.arange(count, count + size).view(shape)
                count += size
                if count > batch * MOST_ELEMENTS:
                    raise cut.fail("too large to be proven")
        return found

    def _run(self, call: Any, numbers: dict[fx.Node, torch.Tensor], cut: Cut, *, filtered: bool, batch: int = 1) -> Any:
        def stand_in(operand: fx.Node) -> Any:
            if is_size(operand):
                return cut.program.scalar(operand, batch)
            value = numbers.get(operand)
            if value is None:
                value = self.concrete(operand)
                if value is None:
                    raise cut.fail("it is indexed by a computed value")
            return (
                select_kept(value, _of_samples(cut, cut.of(operand), operand.meta["val"], batch)) if filtered else value
            )

        if kind_of(cut.node) == "pad":
            mode = argument(cut.node, 2, "mode", "constant")
            if mode != "constant" and getattr(cut.node.target, "overloadpacket", None) is aten.pad:
                return aten.pad.default(*fx.node.map_arg(call.args, lambda n: stand_in(n).double()))
            # the value that is filled in has no number
            return aten.constant_pad_nd.default(*fx.node.map_arg(tuple(call.args[:2]), stand_in), -1)
        return move(call, stand_in)


def _of_samples(cut: Cut, kept: Kept, value: Any, batch: int) -> Kept:
    """What is kept of a value of so many samples: where channels share a dimension with the batch, of each sample, one
    behind the other."""
    if batch == 1:
        return kept
    found = []
    for indices, size in zip(kept, value.shape, strict=True):
        if indices is not None and cut.program.follows_batch(size):
            each = cut.program.dim(size)
            indices = torch.cat([indices + sample * each for sample in range(batch)])
        found.append(indices)
    return tuple(found)


def _as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _refuse_shared_with_batch(cut: Cut) -> None:
    """The elements are looked at for one sample. Where channels share a dimension with the batch, only a change of
    layout, or what leaves that dimension alone, is the same for any number of them."""
    if getattr(cut.node.target, "overloadpacket", None) in _LAYOUT:
        return
    for operand in cut.node.all_input_nodes:
        kept = cut.of(operand)
        for dim, indices in enumerate(kept):
            shared = indices is not None and cut.program.follows_batch(operand.meta["val"].shape[dim])
            if shared and dim in _addressed(cut.node, len(kept)):
                raise cut.fail("it takes positions of a dimension that channels share with the batch")


def _addressed(node: fx.Node, rank: int) -> Sequence[int]:
    """The dimensions whose positions a movement depends on: all that are not known to be left alone."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is aten.slice and _takes_all(node):
        return ()
    if packet in _ONE_DIMENSION:
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        return [int(argument(node, names.index("dim"), "dim", 0)) % rank]
    if kind_of(node) == "pad":
        pads = list(node.args[1])  # type: ignore[arg-type]
        return [d for d in range(rank) if any(pads[2 * (rank - 1 - d) : 2 * (rank - d)])]
    return range(rank)


def _takes_all(node: fx.Node) -> bool:
    start, end, step = (argument(node, i, n, d) for i, n, d in ((2, "start", 0), (3, "end", None), (4, "step", 1)))
    return start in (0, None) and end in (None, LAST) and step == 1


def _reordered(cut: Cut, numbers: dict[fx.Node, torch.Tensor], before: tuple[torch.Tensor, ...]) -> Call | None:
    """The movement as an index along one dimension, renumbered; None when it is not one."""
    if len(numbers) != 1 or len(before) != 1 or kind_of(cut.node) != "movement":
        return None
    ((source, old),), (result,) = numbers.items(), before
    if old.dim() != result.dim() or not old.numel():
        return None
    for dim, (kept_in, kept_out) in enumerate(zip(cut.of(source), cut.results[0], strict=True)):
        if kept_in is None or cut.program.follows_batch(source.meta["val"].shape[dim]):
            continue
        line = result
        for other in range(result.dim()):
            line = line if other == dim else line.narrow(other, 0, 1)
        taken = line.reshape(-1) // old.stride(dim) % old.shape[dim]
        if not torch.equal(old.index_select(dim, taken), result):
            continue
        place = torch.full((old.shape[dim],), -1)
        place[kept_in] = torch.arange(len(kept_in))
        index = place[taken if kept_out is None else taken[kept_out]]
        others = zip(cut.of(source), cut.results[0], strict=True)
        if bool((index < 0).any()) or not all(d == dim or same_kept(a, b) for d, (a, b) in enumerate(others)):
            return None
        return Call(target=aten.index_select.default, args=(source, dim, index), kwargs={})
    return None


__all__ = ["Prover"]
