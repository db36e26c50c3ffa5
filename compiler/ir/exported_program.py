"""An `ExportedProgram` becomes a `Program`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..support.errors import CaptureError, first_line
from ..support.quiet_logs import quiet_exporters
from .edit import rebuild, take_any_layout
from .graph_copy import copied
from .program import Program, TensorSpec, dim_names, dim_text, is_tensor, output_nodes

#: What helps a network that torch.export cannot take.
WAY_OUT = (
    "keep Python control flow on tensor values out of forward(), or export the model yourself with "
    "torch.export.export(...) and pass the ExportedProgram (or the .pt2 file saved from it)"
)


def from_exported(exported: torch.export.ExportedProgram, *, copy_tensors: bool = True) -> Program:
    """A Program from an `ExportedProgram`: decomposed to functional ATen, guards erased, unused buffers left out. Its
    tensors are copied, unless nobody else holds them."""
    with quiet_exporters(), torch.no_grad():
        _check_structures(exported)
        decomposed = _with_any_layout(exported).run_decompositions({})
    # what is written to shows only once the graph is functional
    signature = decomposed.graph_signature
    mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if mutated:
        raise CaptureError(
            f"the network changes its own state or its inputs when it runs: {', '.join(mutated[:4])}",
            hint="call model.eval() before exporting; a network that counts or caches has to return its state",
        )
    module = decomposed.module(check_guards=False)
    if not isinstance(module, fx.GraphModule):
        raise CaptureError(f"torch.export returned a {type(module).__name__}", hint=WAY_OUT)
    graph = copied(module.graph)
    for node in reversed(list(graph.nodes)):
        if (node.op == "get_attr" and not node.users) or (node.op == "call_module" and node.target == "_guards_fn"):
            graph.erase_node(node)
    take_any_layout(graph)
    module = rebuild(module, graph, copy_tensors=copy_tensors)
    return Program(module=module, inputs=_input_specs(module), outputs=_output_specs(module), history=())


def _check_structures(exported: torch.export.ExportedProgram) -> None:
    """Raise CaptureError for inputs and outputs that a `.pt2` file cannot hold: at the end it would be too late."""
    for spec in (exported.call_spec.in_spec, exported.call_spec.out_spec):
        try:
            pytree.treespec_dumps(spec)
        except NotImplementedError as cause:
            raise CaptureError(
                f"an input or output has a structure that cannot be saved: {first_line(cause)}",
                hint="take and return tuples, lists and dicts, or register the type with torch.utils._pytree",
            ) from cause


def _with_any_layout(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A copy that can be traced again whatever strides its kernels give this time."""
    same = copy.copy(exported)
    same._graph_module = copied(exported.graph_module)
    take_any_layout(same.graph_module.graph)
    return same


def _input_specs(module: fx.GraphModule) -> tuple[TensorSpec, ...]:
    nodes = [n for n in module.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)]
    names = dim_names(n.meta["val"].shape for n in nodes)
    return tuple(_spec(n.name, n, names) for n in nodes)


def _output_specs(module: fx.GraphModule) -> tuple[TensorSpec, ...]:
    placeholders = [
        n for n in module.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)
    ]
    names = dim_names(n.meta["val"].shape for n in placeholders)
    leaves = output_nodes(module.graph)
    result = next(n for n in module.graph.nodes if n.op == "output").args[0]
    others = [str(n) for n in pytree.tree_leaves(result) if n is not None and not _is_tensor_node(n)]
    if others or not leaves:
        raise CaptureError(
            "the network returns a number that is no tensor" if others else "the network returns no tensor",
            node=others[0] if others else None,
            hint="return tensors; a size can be read off them",
        )
    labels = _output_names(module, len(leaves))
    return tuple(_spec(label, n, names) for label, n in zip(labels, leaves, strict=True))


def _is_tensor_node(leaf: Any) -> bool:
    return isinstance(leaf, fx.Node) and is_tensor(leaf)


def _spec(label: str, node: fx.Node, names: dict[str, str]) -> TensorSpec:
    value = node.meta["val"]
    return TensorSpec(name=label, shape=tuple(dim_text(d, names) for d in value.shape), dtype=value.dtype)


def _output_names(module: fx.GraphModule, count: int) -> list[str]:
    """Dict keys where the model returns a dict, else output or output_0, output_1 ..."""
    indexed = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    spec = getattr(module, "_out_spec", None)
    if spec is None:
        return indexed
    paths = [
        path for path, _ in pytree.tree_leaves_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    ]
    if len(paths) != count or not all(paths):
        return indexed
    keys = [".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path in paths]
    return keys if all(not key[0].isdigit() for key in keys) and len(set(keys)) == count else indexed
