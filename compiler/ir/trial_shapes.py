"""Shapes worked out at a few concrete sizes: what a node gives when the batch is a number, and the symbolic shape that
follows from it.

An operator on symbolic fake tensors takes tens of milliseconds the first time that torch sees it with these shapes:
torch decomposes it and reasons about each size. On meta tensors of concrete sizes it takes a fraction. A rewrite keeps
the form of a shape (a batch, a constant, so many times the batch) and changes numbers in it, so a few sizes tell the
new one; where they do not, the caller asks torch symbolically.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .program import Program, is_tensor

#: What the first symbol of a program is set to, trial by trial; each further one gets `STEP` more.
SIZES = (6, 11, 23)
STEP = 2
META = torch.device("meta")
Size: TypeAlias = "int | torch.SymInt"


class UnknownShapeError(Exception):
    """Concrete sizes do not tell: a shape depends on data, or it has another form than the one before."""


class TrialShapes:
    """The values of a program's nodes with its symbols set to numbers, `trials` times.

    What a node states (``meta["val"]``) is read when it is first asked for, and anew after `forget`. Every method
    raises UnknownShapeError where only torch's symbolic shapes can tell.
    """

    def __init__(self, program: Program, trials: int = len(SIZES)) -> None:
        self._program, self._trials = program, range(trials)
        inputs = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and is_tensor(n)]
        #: the dimensions of inputs that are a symbol each
        self._symbols = {str(size.node.expr): size for value in inputs for size in _symbolic(value.shape)}
        expressions = [size.node.expr for value in inputs for size in _symbolic(value.shape)]
        names = dict.fromkeys(str(symbol) for expr in expressions for symbol in expr.free_symbols)
        self._sizes = [{name: SIZES[t] + STEP * i for i, name in enumerate(names)} for t in self._trials]
        self._stated: dict[str, list[Any]] = {}
        self._numbers: dict[Any, list[int]] = {}
        self._results: dict[Any, Any] = {}

    def forget(self, node: fx.Node) -> None:
        """The node states something else now."""
        self._stated.pop(node.name, None)

    def agrees(self, node: fx.Node) -> bool:
        """Whether the node gives what it states, on what its operands state."""
        left_out = _left_out(node, node.meta.get("val"))
        return all(_same_leaves(*pair, left_out) for pair in zip(self._of(node), self._computed(node), strict=True))

    def symbolic(self, node: fx.Node, like: Any) -> Any:
        """What the node gives, as symbolic values in the form of those in `like` and under its fake mode. A value that
        is as before is the one of `like` itself."""
        results = [pytree.tree_leaves(value) for value in self._computed(node)]
        leaves, structure = pytree.tree_flatten(like)
        if any(len(result) != len(leaves) for result in results):
            raise UnknownShapeError
        left_out = _left_out(node, like)
        changed = [
            leaf if i in left_out else self._like(leaf, [result[i] for result in results])
            for i, leaf in enumerate(leaves)
        ]
        return pytree.tree_unflatten(changed, structure)

    def _of(self, node: fx.Node) -> list[Any]:
        """What the node states, trial by trial."""
        if node.name not in self._stated:
            value = self._program.constant(node) if node.op == "get_attr" else node.meta.get("val")
            self._stated[node.name] = [
                pytree.tree_map(lambda leaf, trial=t: self._at(leaf, trial), value) for t in self._trials
            ]
        return self._stated[node.name]

    def _computed(self, node: fx.Node) -> list[Any]:
        """What the node gives, trial by trial."""
        operands = {n: self._of(n) for n in node.all_input_nodes}
        results = []
        for trial in self._trials:
            here = {n: values[trial] for n, values in operands.items()}
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), here.__getitem__)
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": META}
            results.append(self._run(node, args, kwargs))
        return results

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The operator on meta tensors; the same call is made once, however many layers are alike."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        key = (node.target, structure, *map(_form, leaves))
        try:
            known = key in self._results
        except TypeError as cause:  # an argument that is no plain value
            raise UnknownShapeError from cause
        if not known:
            try:
                with torch.no_grad():
                    self._results[key] = node.target(*args, **kwargs)  # type: ignore[operator]
            except Exception as cause:  # operators raise many unrelated types; symbolic shapes say what is wrong
                raise UnknownShapeError from cause
        return self._results[key]

    def _at(self, leaf: Any, trial: int) -> Any:
        """A leaf of a stated value in one trial."""
        if isinstance(leaf, torch.Tensor):
            shape, stride = ([self._number(d, trial) for d in sizes] for sizes in (leaf.shape, leaf.stride()))
            return torch.empty_strided(shape, stride, dtype=leaf.dtype, device=META)
        if isinstance(leaf, torch.SymInt):
            return self._number(leaf, trial)
        if isinstance(leaf, (torch.SymFloat, torch.SymBool, torch.nn.Module)):
            raise UnknownShapeError
        return leaf

    def _number(self, size: Size, trial: int) -> int:
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in self._numbers:
            if any(str(symbol) not in self._sizes[0] for symbol in expr.free_symbols):  # data tell this size
                raise UnknownShapeError
            values = [{symbol: sizes[str(symbol)] for symbol in expr.free_symbols} for sizes in self._sizes]
            self._numbers[expr] = [int(expr.xreplace(value)) for value in values]
        return self._numbers[expr][trial]

    def _like(self, leaf: Any, results: Sequence[Any]) -> Any:
        """The symbolic value that is `results` in the trials, in the form of `leaf`."""
        if isinstance(leaf, (int, torch.SymInt)):
            return self._size(leaf, results)
        if not isinstance(leaf, torch.Tensor):
            raise UnknownShapeError
        if any(not isinstance(r, torch.Tensor) or r.dim() != leaf.dim() for r in results):
            raise UnknownShapeError
        rank, before = leaf.dim(), [*leaf.shape, *leaf.stride()]
        sizes = zip(*([*r.shape, *r.stride()] for r in results), strict=True)
        after = [self._size(old, values) for old, values in zip(before, sizes, strict=True)]
        dtype = results[0].dtype
        if dtype == leaf.dtype and all(new is old for new, old in zip(after, before, strict=True)):
            return leaf
        mode = getattr(leaf, "fake_mode", None)
        if mode is None:
            raise UnknownShapeError
        with mode:
            return torch.empty_strided(after[:rank], after[rank:], dtype=dtype, device=leaf.device)

    def _size(self, old: Size, values: Sequence[Any]) -> Size:
        """The size that is `values` in the trials: the old one where it still is, a constant in place of a constant,
        and in place of a polynomial so many times its symbol and so many more."""
        if any(type(value) is not int for value in values):
            raise UnknownShapeError
        if all(self._number(old, trial) == values[trial] for trial in self._trials):
            return old
        if isinstance(old, int):
            if len(set(values)) > 1:
                raise UnknownShapeError
            return int(values[0])
        symbols = old.node.expr.free_symbols
        if len(symbols) != 1 or not old.node.expr.is_polynomial(*symbols):
            raise UnknownShapeError
        name = str(next(iter(symbols)))
        if name not in self._symbols:
            raise UnknownShapeError
        return _affine(self._symbols[name], [sizes[name] for sizes in self._sizes], values)


def _form(leaf: Any) -> Any:
    """What a result depends on: of a tensor its shape, strides and dtype; 1, 1.0 and True are not the same."""
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), tuple(leaf.stride()), leaf.storage_offset(), leaf.dtype
    return type(leaf), leaf


def _affine(symbol: torch.SymInt, places: Sequence[int], values: Sequence[int]) -> Size:
    """``factor * symbol + offset`` through all the points."""
    factor, rest = divmod(values[1] - values[0], places[1] - places[0])
    offset = values[0] - factor * places[0]
    if rest or factor <= 0 or any(factor * p + offset != v for p, v in zip(places, values, strict=True)):
        raise UnknownShapeError
    size = symbol if factor == 1 else symbol * factor
    return size if offset == 0 else size + offset


def _left_out(node: fx.Node, value: Any) -> set[int]:
    """Results that nobody reads and that are empty: statistics that only training wants, which kernels of the CPU leave
    out and those of meta tensors do not."""
    if isinstance(value, torch.Tensor):
        return set()
    empty = {
        i for i, leaf in enumerate(pytree.tree_leaves(value)) if isinstance(leaf, torch.Tensor) and 0 in leaf.shape
    }
    read = {user.args[1] if user.target is operator.getitem else None for user in node.users} if empty else set()
    return set() if None in read else empty - read


def _same_leaves(stated: Any, computed: Any, left_out: set[int]) -> bool:
    one, two = pytree.tree_leaves(stated), pytree.tree_leaves(computed)
    return len(one) == len(two) and all(i in left_out or _same(one[i], two[i]) for i in range(len(one)))


def _same(stated: Any, computed: Any) -> bool:
    if isinstance(stated, torch.Tensor) and isinstance(computed, torch.Tensor):
        return stated.dtype == computed.dtype and stated.shape == computed.shape
    return type(stated) is type(computed) and bool(stated == computed)


def _symbolic(sizes: Iterable[Size]) -> list[torch.SymInt]:
    return [size for size in sizes if isinstance(size, torch.SymInt)]
