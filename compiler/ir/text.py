"""The deterministic text form of a Program: what golden tests compare, errors quote and fingerprints hash."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .program import dim_names, dim_text, dtype_name

if TYPE_CHECKING:
    from .program import Program


def program_text(program: Program) -> str:
    """Inputs, one line per operation, outputs. Parameters appear where they are used, with their shapes."""
    names = _symbol_names(program)
    lines = [f"input  {spec}" for spec in program.inputs]
    lines += [
        _line(program, n, names) for n in program.graph.nodes if n.op not in {"placeholder", "get_attr", "output"}
    ]
    result = next(n for n in program.graph.nodes if n.op == "output").args[0]
    leaves = [_argument(program, leaf, names) for leaf in pytree.tree_leaves(result)]
    lines += [f"output {spec} = {leaf}" for spec, leaf in zip(program.outputs, leaves, strict=False)]
    return "\n".join(lines) + "\n"


def node_excerpt(program: Program, node: fx.Node, context: int) -> str:
    """The node's line, marked, with `context` lines before and after."""
    names = _symbol_names(program)
    body = [n for n in program.graph.nodes if n.op not in {"get_attr", "output"}]
    if node not in body:
        return f"%{node.name}"
    at = body.index(node)
    around = body[max(0, at - context) : at + context + 1]
    return "\n".join(("> " if n is node else "  ") + _line(program, n, names) for n in around)


def _symbol_names(program: Program) -> dict[str, str]:
    values = (n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder")
    return dim_names(v.shape for v in values if isinstance(v, torch.Tensor))


def _line(program: Program, node: fx.Node, names: dict[str, str]) -> str:
    if node.op == "placeholder":
        return f"input  {node.name}"
    target = _target(node.target)
    operands = [_argument(program, a, names) for a in node.args]
    operands += [f"{k}={_argument(program, v, names)}" for k, v in node.kwargs.items()]
    return f"%{node.name} = {target}({', '.join(operands)}) -> {_value(node.meta.get('val'), names)}"


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).removeprefix("aten.")
        return name.removesuffix(".default")
    return getattr(target, "__name__", str(target))


def _argument(program: Program, value: Any, names: dict[str, str]) -> str:
    if isinstance(value, fx.Node):
        if value.op != "get_attr":
            return f"%{value.name}"
        constant = program.constant(value)
        shape = list(constant.shape) if isinstance(constant, torch.Tensor) else type(constant).__name__
        return f"{value.target}{shape}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(program, v, names) for v in value)}]"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return str(value)


def _value(value: Any, names: dict[str, str]) -> str:
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)}[{', '.join(str(dim_text(d, names)) for d in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_value(v, names) for v in value)})"
    if isinstance(value, torch.SymInt):
        return f"size {dim_text(value, names)}"
    return type(value).__name__
