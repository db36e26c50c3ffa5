"""Running a Program node by node, in part, or with other weights. Nothing here changes a Program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence, Set
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..support import tally
from ..support.errors import CompilerError
from .cost import value_macs
from .program import HALVES, Batch, Program, is_constant, is_size, is_tensor

#: Node name -> value.
Values = MutableMapping[str, Any]
#: Parameter or buffer name -> tensor used in place of the program's own.
Tensors = Mapping[str, torch.Tensor]


def device_of(program: Program) -> torch.device:
    """Where a program computes: the device of the tensors that it reads, without any that of its inputs."""
    return program.derived(_device)


def _device(program: Program) -> torch.device:
    nodes = list(program.graph.nodes)
    read = [program.constant(n) for n in nodes if n.op == "get_attr"]
    traced = [n.meta["val"] for n in nodes if n.op == "placeholder" and is_tensor(n)]
    return next((t.device for t in (*read, *traced) if isinstance(t, torch.Tensor)), torch.device("cpu"))


def placed(program: Program, batch: Batch) -> Batch:
    """A batch on the device that a program computes on, rounded to half precision where it takes that; the batch itself
    where it is so."""
    device = device_of(program)
    batch = _rounded(program, batch)
    if all(leaf.device == device for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)):
        return batch
    moved: Batch = pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to(device, non_blocking=True), batch)
    return moved


def _rounded(program: Program, batch: Batch) -> Batch:
    """Samples are in float32 where a network was widened to be worked on; as it is stored, it takes half precision."""
    if not any(spec.dtype in HALVES for spec in program.inputs):
        return batch
    leaves, nodes = program.flatten(batch), [n for n in program.graph.nodes if n.op == "placeholder"]
    if all(_fits(leaf, node) for leaf, node in zip(leaves, nodes, strict=True)):
        return batch
    rounded = [
        leaf if _fits(leaf, node) else leaf.to(node.meta["val"].dtype) for leaf, node in zip(leaves, nodes, strict=True)
    ]
    args, kwargs = program.structure(rounded)
    return kwargs or args


def widened_inputs(program: Program, leaves: Sequence[Any]) -> list[Any]:
    """The placeholders' values, those in half precision in float32 where the program takes that."""
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    taken = [node.meta["val"].dtype if is_tensor(node) else None for node in nodes]
    half = [isinstance(leaf, torch.Tensor) and leaf.dtype in HALVES for leaf in leaves]
    pairs = zip(leaves, half, taken, strict=True)
    return [leaf.float() if narrow and dtype == torch.float32 else leaf for leaf, narrow, dtype in pairs]


def _fits(leaf: Any, node: fx.Node) -> bool:
    """Whether an input is not one of float32 where half precision is taken."""
    return not (isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32 and node.meta["val"].dtype in HALVES)


def bind(program: Program, batch: Batch) -> dict[str, Any]:
    """The placeholders' values for one batch, on the program's device."""
    placeholders = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    return dict(zip(placeholders, program.flatten(placed(program, batch)), strict=True))


def evaluate(program: Program, node: fx.Node, values: Mapping[str, Any], tensors: Tensors | None = None) -> Any:
    """The value of one node from the values of its operands."""

    def lookup(operand: fx.Node) -> Any:
        if operand.op != "get_attr":
            return values[operand.name]
        target = str(operand.target)
        if tensors is not None and target in tensors:
            return tensors[target]
        return program.constant(operand)

    if node.op != "call_function":
        raise CompilerError(f"cannot evaluate a {node.op} node", node=node.name)
    args = fx.node.map_arg(node.args, lookup)
    kwargs = fx.node.map_arg(node.kwargs, lookup)
    value = node.target(*args, **kwargs)  # type: ignore[operator]
    tally.count(tally.FORWARD, value_macs(program, node.name, value))
    return value


def run_until(
    program: Program,
    wanted: Iterable[str],
    values: Values,
    tensors: Tensors | None = None,
    *,
    free: bool = True,
) -> dict[str, Any]:
    """Evaluate what `wanted` needs, starting from `values`, and return the wanted values.

    Only ancestors of the wanted nodes that are not in `values` yet are run, in topological order. With `free`, a
    value is dropped from memory as soon as its last reader has run (`values` itself is not changed).
    """
    wanted = list(wanted)
    needed = required(program, wanted, values)
    local = run_nodes(program, needed, values, tensors, keep=set(wanted) if free else {*needed, *values})
    return {name: local[name] for name in wanted} if free else local


def run_nodes(
    program: Program, names: Sequence[str], values: Mapping[str, Any], tensors: Tensors | None, *, keep: Set[str]
) -> dict[str, Any]:
    """Evaluate nodes in the order given, starting from `values`, which is not changed; return what there is then.

    Values that are not to be kept are dropped from memory as soon as their last reader has run."""
    last = {operand.name: name for name in names for operand in program.nodes[name].all_input_nodes}
    dropped: dict[str, list[str]] = {}
    for value, reader in last.items():
        if value not in keep:
            dropped.setdefault(reader, []).append(value)
    local = dict(values)
    for name in names:
        local[name] = evaluate(program, program.nodes[name], local, tensors)
        for value in dropped.get(name, ()):
            local.pop(value, None)
    return local


def required(program: Program, wanted: Iterable[str], known: Mapping[str, Any] | set[str]) -> list[str]:
    """The nodes to run for `wanted`, in topological order, when `known` have values."""
    stack = [program.nodes[name] for name in wanted if name not in known]
    seen = {node.name for node in stack}
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand.op != "get_attr" and operand.name not in known and operand.name not in seen:
                seen.add(operand.name)
                stack.append(operand)
    return sorted(seen, key=program.order.__getitem__)


class ConcreteValues:
    """The values of operands that depend on no input (an index made of constants), at batch 1; sizes as numbers. None
    for what depends on an input. Tensors are on the CPU, where graphs are reasoned about."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known: dict[str, Any] = {}

    def __call__(self, value: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, self._value(value))

    def _value(self, value: Any) -> Any:
        """On the program's device."""
        if not isinstance(value, fx.Node):
            return value
        if is_constant(value):
            return self.program.constant(value)
        if is_size(value):
            return self.program.scalar(value)
        if value.name not in self._known:
            self._known[value.name] = None
            operands = {n.name: self._value(n) for n in value.all_input_nodes}
            if value.op == "call_function" and all(v is not None for v in operands.values()):
                self._known[value.name] = evaluate(self.program, value, operands)
        return self._known[value.name]


def descendants(program: Program, sources: Iterable[str]) -> set[str]:
    """All nodes that depend on one of the sources, the sources themselves left out unless they depend on one."""
    stack = [program.nodes[name] for name in sources]
    seen: set[str] = set()
    while stack:
        for user in stack.pop().users:
            if user.name not in seen:
                seen.add(user.name)
                stack.append(user)
    return seen
