"""Networks in half precision: solved in float32, and written back in the types that they are stored in.

Neither float16 nor bfloat16 can hold what a solve is made of: bfloat16 has eight bits of a number, and the squares of
small gradients are zero in float16. So such a network is widened, all that half precision holds becomes float32 (the
values are the same, float32 holds them all), and what was worked out is rounded once, at the end. Each node remembers
the types that it had in its `meta`, which stays with it through every rewrite.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..ir.compare import compare
from ..ir.edit import rebuild
from ..ir.graph_copy import copied
from ..ir.program import HALVES, Batch, Program, TensorSpec, is_tensor, output_nodes
from ..support.errors import CaptureError
from .edit_device import converted_tensors, put_tensor

aten = torch.ops.aten
#: What rounding to half precision may change, of the largest output, before it is worth a word.
MOST_ROUNDED = 5e-2
#: Under which name a node's `meta` holds its types.
_STORED = "stored types"


@dataclass(frozen=True, kw_only=True)
class _Types:
    """What a node was before it was widened: the types of its value and of the tensors that it reads, in the order of
    its arguments (None for what is no tensor), and the half-precision types among its arguments themselves, by their
    place in that order. A node that a rewrite made after the model of another has that one's: `of` tells."""

    of: tuple[str, Any]
    value: tuple[torch.dtype | None, ...]
    reads: tuple[torch.dtype | None, ...]
    said: dict[int, torch.dtype]


def widened(program: Program) -> Program:
    """A network stored in half precision as one that computes in float32.

    Weights, inputs, outputs and casts in float16 or bfloat16 become float32; nothing else changes, and no value of a
    weight does. `as_stored` is the way back. A network without half-precision weights and inputs comes back itself.

    Arguments:
        program: The network.

    Returns:
        The network in float32, with the same names of nodes and weights.

    Raises:
        CaptureError: If the network reads the bits of numbers as another type.

    Example:
        >>> from foldcut.compiler.export.edit_types import as_stored, widened
        >>> program = foldcut.capture(nn.Linear(8, 4).eval().bfloat16(), torch.randn(2, 8).bfloat16())
        >>> wide = widened(program)
        >>> print(wide.inputs[0], "->", as_stored(wide).outputs[0])
        input_1: float32[batch, 8] -> output: bfloat16[batch, 4]
        >>> as_stored(wide).fingerprint == program.fingerprint
        True
    """
    graph = program.graph
    held = [program.constant(node) for node in graph.nodes if node.op == "get_attr"]
    taken = [node.meta["val"] for node in graph.nodes if node.op == "placeholder" and is_tensor(node)]
    if not any(isinstance(value, torch.Tensor) and value.dtype in HALVES for value in (*held, *taken)):
        return program
    graph = copied(graph)
    for node in graph.nodes:
        if node.target in (aten.view.dtype, aten.view_copy.dtype):
            raise CaptureError(
                "a network in half precision that reads the bits of its numbers cannot be worked on in float32",
                node=node.name,
                hint="convert it first: net.float()",
            )
        node.meta[_STORED] = _types_of(node)
    for node in graph.nodes:
        _say_types(node, dict.fromkeys(node.meta[_STORED].said, torch.float32))
        node.meta["val"] = _like(node.meta.get("val"), _widest)
    return _rebuilt(program, graph, dict.fromkeys(_names_in(program, HALVES), torch.float32))


def as_stored(program: Program) -> Program:
    """What `widened` made, and rewrites changed, in the types that the network is stored in.

    Weights are rounded to the nearest number of their type. A weight that a rewrite made gets the type of what it is
    used with. Casts stand where a rewrite computes in float32 (as int8 does) beside what is stored in half precision.

    Arguments:
        program: The network.

    Returns:
        The network as it is stored; itself where it was not widened.

    Example:
        >>> from foldcut.compiler.export.edit_types import as_stored
        >>> program = foldcut.capture(nn.Linear(8, 4).eval(), torch.randn(2, 8))
        >>> as_stored(program) is program
        True
    """
    return program.derived(_as_stored)


def as_measured(program: Program) -> Program:
    """What backends run in the place of a network: the network as it is stored, but in float32 where that is bfloat16,
    which CPUs have next to no kernels of and numpy no name for.

    Arguments:
        program: The network.

    Returns:
        The network to export for a measurement.

    Example:
        >>> from foldcut.compiler.export.edit_types import as_measured
        >>> program = foldcut.capture(nn.Linear(8, 4).eval(), torch.randn(2, 8))
        >>> as_measured(program) is program
        True
    """
    return program if torch.bfloat16 in _stored_types(program) else as_stored(program)


def warn_of_types(program: Program, batch: Batch) -> None:
    """Warn where a widened network is measured in float32, and where half precision makes something else of it.

    Arguments:
        program: The network, widened or not.
        batch: A few samples.
    """
    if not _stored_types(program):
        return
    if torch.bfloat16 in _stored_types(program):
        warnings.warn(
            "the network is in bfloat16, which backends run in few places: latencies are those of the same network in "
            "float32, and so are the sizes of its ONNX files; the result is written in bfloat16",
            stacklevel=3,
        )
    found = compare(program(batch), _in_float32(as_stored(program)(batch)))
    if not found.relative <= MOST_ROUNDED:
        warnings.warn(
            f"half precision changes what the network computes by {found.relative:.2g} of its largest output: errors "
            "are against what its weights compute in float32",
            stacklevel=3,
        )


def _in_float32(outputs: Any) -> Any:
    """Outputs in half precision as float32, to be compared with such."""
    return pytree.tree_map_only(torch.Tensor, lambda value: value.to(_widest(value.dtype)), outputs)


def input_types(program: Program) -> tuple[torch.dtype, ...]:
    """The type of each input as the network is stored.

    Arguments:
        program: The network, widened or not.

    Returns:
        The types, in the order of the inputs.
    """
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and is_tensor(node)]
    stored = [node.meta[_STORED].value[0] if _STORED in node.meta else node.meta["val"].dtype for node in nodes]
    return tuple(stored)


def in_stored_types(program: Program, leaves: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Inputs in the types that the network takes as it is stored.

    Arguments:
        program: The network, widened or not.
        leaves: A tensor for each input.

    Returns:
        The tensors, rounded where half precision is taken.
    """
    types = zip(leaves, input_types(program), strict=True)
    return [leaf.to(dtype) if dtype in HALVES else leaf for leaf, dtype in types]


def _stored_types(program: Program) -> set[torch.dtype | None]:
    """Every type of a value of a network that was widened; nothing for another one."""
    found = [node.meta[_STORED] for node in program.graph.nodes if _STORED in node.meta]
    return {dtype for types in found for dtype in types.value}


def _as_stored(program: Program) -> Program:
    if not _stored_types(program):
        return program
    graph = copied(program.graph)
    weights: dict[str, torch.dtype] = {}
    for node in list(graph.nodes):
        known = _known(node)
        node.meta.pop(_STORED, None)
        if node.op == "get_attr" and _dtype(node) != torch.float32:  # a rewrite has put integers there
            known = None
        if node.op == "get_attr" and known is not None and known.value[0] is not None:
            weights[str(node.target)] = known.value[0]
        elif node.op == "call_function":
            _read_as(graph, node, _wanted(node, known), weights)
        elif node.op == "output":
            _read_as(graph, node, known.reads if known is not None else (), weights)
        _take_back(node, known)
    return _rebuilt(program, graph, weights)


def _known(node: fx.Node) -> _Types | None:
    """What a node was before it was widened, None where a rewrite made it."""
    found = node.meta.get(_STORED)
    return found if found is not None and found.of == (node.name, node.target) else None


def _take_back(node: fx.Node, known: _Types | None) -> None:
    """The node's own arguments and value in their stored types."""
    value = node.meta.get("val")
    if known is None:
        reads = {v.dtype for n in node.all_input_nodes if isinstance(v := n.meta.get("val"), torch.Tensor)}
        halves = reads & HALVES
        if node.op == "call_function" and halves and torch.float32 not in reads and not _says_type(node):
            node.meta["val"] = _like(value, lambda dtype: _narrowest(dtype, halves))
        return
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    _say_types(node, {i: t for i, t in known.said.items() if i < len(leaves) and leaves[i] == torch.float32})
    types = iter(known.value)
    node.meta["val"] = pytree.tree_map(lambda leaf: _cast(leaf, next(types, None)), value)


def _wanted(node: fx.Node, known: _Types | None) -> tuple[torch.dtype | None, ...]:
    """The types in which a call reads its tensors, in the order of its arguments."""
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    if known is not None and len(known.reads) == len(leaves):
        return known.reads
    reads = [_dtype(leaf) for leaf in leaves]
    if getattr(node.target, "namespace", "") == "quantized_decomposed":  # scales and values are of one type there
        return tuple(torch.float32 if dtype in HALVES else dtype for dtype in reads)
    halves = {dtype for leaf, dtype in zip(leaves, reads, strict=True) if dtype in HALVES}
    return tuple(_narrowest(dtype, halves) if dtype is not None else None for dtype in reads)


def _read_as(
    graph: fx.Graph, node: fx.Node, types: Iterable[torch.dtype | None], weights: dict[str, torch.dtype]
) -> None:
    """Cast what a node reads to the types that it wants: a new weight is stored in the first that is asked of it."""
    wanted = iter(types)

    def read(leaf: Any) -> Any:
        dtype, have = next(wanted, None), _dtype(leaf)
        if dtype is None or have is None or dtype == have or not have.is_floating_point or not dtype.is_floating_point:
            return leaf
        if leaf.op == "get_attr" and str(leaf.target) not in weights:
            weights[str(leaf.target)] = dtype
            leaf.meta["val"] = _cast(leaf.meta["val"], dtype)
            return leaf
        with graph.inserting_before(node):
            cast = graph.call_function(aten._to_copy.default, (leaf,), {"dtype": dtype})
        cast.meta = {**leaf.meta, "val": _cast(leaf.meta["val"], dtype)}
        cast.meta.pop(_STORED, None)
        return cast

    node.args, node.kwargs = pytree.tree_map(read, (node.args, dict(node.kwargs)))


def _types_of(node: fx.Node) -> _Types:
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return _Types(
        of=(node.name, node.target),
        value=tuple(v.dtype if isinstance(v, torch.Tensor) else None for v in pytree.tree_leaves(node.meta.get("val"))),
        reads=tuple(map(_dtype, leaves)),
        said={i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.dtype) and leaf in HALVES},
    )


def _dtype(leaf: Any) -> torch.dtype | None:
    """The type of the tensor that a node stands for."""
    value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def _says_type(node: fx.Node) -> bool:
    return any(isinstance(leaf, torch.dtype) for leaf in pytree.tree_leaves((node.args, dict(node.kwargs))))


def _say_types(node: fx.Node, types: dict[int, torch.dtype]) -> None:
    """Put types in the place of arguments that are types."""
    if types:
        leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
        node.args, node.kwargs = pytree.tree_unflatten([types.get(i, leaf) for i, leaf in enumerate(leaves)], spec)


def _widest(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype


def _narrowest(dtype: torch.dtype, halves: set[Any]) -> torch.dtype:
    """What a float32 beside values in half precision is stored in; float32 where these are of several types."""
    return next(iter(halves)) if dtype == torch.float32 and len(halves) == 1 else dtype


def _like(value: Any, change: Any) -> Any:
    """What a node was traced with, in other types."""
    return pytree.tree_map(
        lambda leaf: _cast(leaf, change(leaf.dtype)) if isinstance(leaf, torch.Tensor) else leaf, value
    )


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    mode = getattr(value, "fake_mode", None)
    if dtype is None or not isinstance(mode, FakeTensorMode) or value.dtype == dtype or not value.is_floating_point():
        return value
    with mode, torch.no_grad():
        return value.to(dtype)


def _names_in(program: Program, types: Collection[torch.dtype]) -> list[str]:
    """The tensors of some types, by name."""
    names = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    return sorted(name for name in names if program.tensor(name).dtype in types)


def _rebuilt(program: Program, graph: fx.Graph, types: Mapping[str, torch.dtype]) -> Program:
    """The program over a graph, some of its tensors in other types, and its interface as the graph says it."""
    module = rebuild(program.module, graph)
    for dtype in dict.fromkeys(types.values()):
        old = {name: program.tensor(name) for name in sorted(types) if types[name] == dtype}
        for name, value in converted_tensors(old, partial(torch.Tensor.to, dtype=dtype)):
            put_tensor(module, name, value)
    nodes = list(module.graph.nodes)
    taken = [node for node in nodes if node.op == "placeholder" and is_tensor(node)]
    return replace(
        program,
        module=rebuild(module, module.graph),
        inputs=_respecified(program.inputs, taken),
        outputs=_respecified(program.outputs, output_nodes(module.graph)),
    )


def _respecified(specs: tuple[TensorSpec, ...], nodes: list[fx.Node]) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, dtype=node.meta["val"].dtype) for spec, node in zip(specs, nodes, strict=True))
