"""Costs read off the graph: MACs, parameters and bytes, per node and per region."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .program import Program, argument, is_tensor

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Cost:
    """`macs` multiply-accumulates for one sample, `parameters` trained values, `bytes_` weights read plus results
    written."""

    macs: int = 0
    parameters: int = 0
    bytes_: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            macs=self.macs + other.macs,
            parameters=self.parameters + other.parameters,
            bytes_=self.bytes_ + other.bytes_,
        )


def node_macs(program: Program, node: fx.Node) -> int:
    """Multiply-accumulates of one node at batch 1; 0 for everything that is not a contraction."""
    if node.op != "call_function":
        return 0
    rule = _RULES.get(getattr(node.target, "overloadpacket", node.target))
    return rule(program, node) if rule else 0


def region_cost(program: Program, nodes: Iterable[fx.Node]) -> Cost:
    """Cost of a set of nodes; a parameter that several of them read counts once."""
    members = list(nodes)
    constants: dict[int, torch.Tensor] = {}
    written = 0
    for node in members:
        for operand in node.all_input_nodes:
            if operand.op == "get_attr":
                value = program.constant(operand)
                if isinstance(value, torch.Tensor):
                    constants[value.data_ptr() or id(value)] = value
        if is_tensor(node):
            written += math.prod(program.shape(node)) * node.meta["val"].element_size()
    return Cost(
        macs=sum(node_macs(program, n) for n in members),
        parameters=sum(c.numel() for c in constants.values() if isinstance(c, torch.nn.Parameter)),
        bytes_=written + sum(c.numel() * c.element_size() for c in constants.values()),
    )


def program_cost(program: Program) -> Cost:
    """Cost of the whole network."""
    return region_cost(program, (n for n in program.graph.nodes if n.op == "call_function"))


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the entries of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weight_bytes(program: Program) -> int:
    """Bytes of all weights."""
    return tensor_bytes(program.module.state_dict().values())


def call_macs(program: Program, values: Iterable[Any]) -> int:
    """Multiply-accumulates of a run of the whole network on inputs with such values: those of one sample times how much
    larger the first input is that samples are stacked in, also where images are cropped."""
    macs, sizes = program.derived(_call_cost)
    given = zip(sizes, values, strict=False)
    return next((macs * value.numel() // elements for elements, value in given if elements), macs)


def value_macs(program: Program, name: str, value: object) -> int:
    """Multiply-accumulates that one node's value has taken: those at batch 1 times how much larger the value is."""
    found = program.derived(_contractions).get(name)
    if found is None or not isinstance(value, torch.Tensor):
        return 0
    macs, elements = found
    return macs * value.numel() // elements


def _call_cost(program: Program) -> tuple[int, tuple[int, ...]]:
    """Multiply-accumulates at batch 1, and the elements of each input there; 0 where its first dimension is fixed."""
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    stacked = [bool(spec.shape) and isinstance(spec.shape[0], str) for spec in program.inputs]
    sizes = (math.prod(program.shape(node)) if many else 0 for node, many in zip(nodes, stacked, strict=False))
    return program_cost(program).macs, tuple(sizes)


def _contractions(program: Program) -> dict[str, tuple[int, int]]:
    """(multiply-accumulates, elements of the value) at batch 1 of each node that has any of the former."""
    macs = {node.name: node_macs(program, node) for node in program.graph.nodes}
    return {n: (count, max(1, math.prod(program.shape(program.nodes[n])))) for n, count in macs.items() if count}


def _size(program: Program, node: object) -> tuple[int, ...]:
    return program.shape(node) if isinstance(node, fx.Node) and is_tensor(node) else ()


def _convolution(program: Program, node: fx.Node) -> int:
    weight = _size(program, argument(node, 1, "weight"))
    return math.prod(_size(program, node)) * math.prod(weight[1:])


def _transposed_convolution(program: Program, node: fx.Node) -> int:
    weight = _size(program, argument(node, 1, "weight"))
    return math.prod(_size(program, argument(node, 0, "input"))) * math.prod(weight[1:])


def _general_convolution(program: Program, node: fx.Node) -> int:
    transposed = bool(argument(node, 6, "transposed", False))
    return _transposed_convolution(program, node) if transposed else _convolution(program, node)


def _contracts_last_of(index: int, name: str) -> Callable[[Program, fx.Node], int]:
    """Output elements times the length of the last dim of one operand: linear, mm, bmm, matmul, addmm."""

    def rule(program: Program, node: fx.Node) -> int:
        operand = _size(program, argument(node, index, name))
        return math.prod(_size(program, node)) * (operand[-1] if operand else 1)

    return rule


def _attention(program: Program, node: fx.Node) -> int:
    query, key, value = (_size(program, argument(node, i, n)) for i, n in enumerate(("query", "key", "value")))
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(program: Program, node: fx.Node) -> int:
    equation = str(argument(node, 0, "equation")).replace(" ", "")
    operands = argument(node, 1, "tensors")
    sizes: dict[str, int] = {}
    for labels, operand in zip(equation.split("->")[0].split(","), operands, strict=True):
        if "." in labels:  # an ellipsis: bounded below by the output
            return math.prod(_size(program, node))
        sizes.update(zip(labels, _size(program, operand), strict=True))
    return math.prod(sizes.values())


_RULES: dict[object, Callable[[Program, fx.Node], int]] = {
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.conv3d: _convolution,
    aten.convolution: _general_convolution,
    aten.conv_transpose1d: _transposed_convolution,
    aten.conv_transpose2d: _transposed_convolution,
    aten.conv_transpose3d: _transposed_convolution,
    aten.linear: _contracts_last_of(0, "input"),
    aten.matmul: _contracts_last_of(0, "self"),
    aten.mm: _contracts_last_of(0, "self"),
    aten.bmm: _contracts_last_of(0, "self"),
    aten.addmm: _contracts_last_of(1, "mat1"),
    aten.baddbmm: _contracts_last_of(1, "batch1"),
    aten.scaled_dot_product_attention: _attention,
    aten.einsum: _einsum,
}
