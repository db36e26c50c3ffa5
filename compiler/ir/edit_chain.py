"""Putting a chain of thinner layers in the place of one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from ..support.errors import RewriteError
from .edit import check_interface, check_same, erase_dead, free_name, infer_shapes, rebuild
from .graph_copy import copied
from .program import Program, argument


@dataclass(frozen=True, kw_only=True)
class Link:
    """One call of a chain: `target` (value, weight, bias, *settings). `name` is what its node and its weight are called
    behind those of the layer that it stands for; the last one's node takes the layer's own name."""

    name: str
    target: Callable[..., Any]
    weight: torch.Tensor = field(repr=False)
    settings: tuple[Any, ...] = ()


def replace_layers(program: Program, chains: Mapping[str, Sequence[Link]], *, note: str) -> Program:
    """Replace each named convolution or linear layer by a chain of calls.

    The first link reads the layer's input, each other one the link before; only the last has the layer's bias, and its
    node keeps the layer's name, whose value it now approximates; each says in its meta which layer it `stands_for`.
    Weights become parameters ``<weight>_<name>``; the old one is left out when nothing else reads it. Shapes are worked
    out anew, the batch stays dynamic. The old Program does not change.

    Raises RewriteError when a node is missing or no such layer, or when the chain's result has another shape or dtype.
    """
    graph = copied(program.graph)
    module = rebuild(program.module, graph)
    nodes = {node.name: node for node in module.graph.nodes}
    added: set[str] = set()
    for name, links in chains.items():
        if name not in nodes or nodes[name].op != "call_function" or len(nodes[name].args) < 2 or not links:
            raise RewriteError(f"no layer {name!r} to replace", hint="apply a plan to the network that it was made for")
        added |= _replace(module, nodes[name], links)
    erase_dead(module.graph)
    result = replace(program, module=rebuild(module, module.graph), history=(*program.history, note))
    infer_shapes(result, added)
    result.graph.lint()
    check_interface(program, result)
    check_same(((program.nodes[n], result.nodes[n]) for n in chains), "a rewrite may not change what a node is")
    return result


def _replace(module: fx.GraphModule, layer: fx.Node, links: Sequence[Link]) -> set[str]:
    """Put the chain in front of the layer and let it take the layer's readers; the names of its nodes."""
    value, bias = layer.args[0], argument(layer, 2, "bias")
    weight = layer.args[1]
    assert isinstance(weight, fx.Node)
    kept = {key: item for key, item in layer.meta.items() if key != "val"} | {"stands_for": layer.name}
    names = set()
    for place, link in enumerate(links):
        last = place == len(links) - 1
        with module.graph.inserting_before(layer):
            stored = module.graph.get_attr(_new_parameter(module, f"{weight.target}_{link.name}", link.weight))
            args = (value, stored, bias if last else None, *link.settings)
            value = module.graph.create_node(
                "call_function", link.target, args, name=None if last else f"{layer.name}_{link.name}"
            )
        value.meta = dict(kept)
        names.add(value.name)
    assert isinstance(value, fx.Node)
    name = layer.name
    layer.replace_all_uses_with(value)
    module.graph.erase_node(layer)
    names.discard(value.name)
    value.name = name
    return names | {name}


def _new_parameter(module: fx.GraphModule, wanted: str, value: torch.Tensor) -> str:
    """Register a parameter beside the one that it stands for, under a name that is free; that name."""
    path, _, leaf = wanted.rpartition(".")
    owner = module.get_submodule(path)
    free = free_name(owner, leaf)
    owner.register_parameter(free, nn.Parameter(value.detach().contiguous()))
    return f"{path}.{free}" if path else free
