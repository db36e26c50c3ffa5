"""Opaque nodes on their way out: torch.onnx carries each as one node of foldcut's domain, which then becomes the
original node again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import onnx
import torch

from ..onnx import opaque_operator as onnx_operator  # noqa: F401 - registers the operator
from ..onnx.file import opset
from ..onnx.functions import STANDARD
from ..onnx.opaque_node import node_model
from ..support.errors import ExportError, first_line

_DOMAIN = "foldcut"


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch.onnx needs to know about opaque nodes: the `custom_translation_table`."""
    return {torch.ops.foldcut.onnx_node.default: _carried}


def _carried(inputs: Sequence[Any], node: str) -> list[Any]:
    """One node with as many outputs as the original, its text as an attribute."""
    import onnxscript

    count = len(node_model(node).graph.output)
    operator = onnxscript.values.Op(onnxscript.values.Opset(_DOMAIN, 1), f"OnnxNode{count}", _schema(count))
    results = operator(*inputs, node=node)
    return list(results) if isinstance(results, (list, tuple)) else [results]


@lru_cache(maxsize=32)
def _schema(count: int) -> onnx.defs.OpSchema:
    schema = onnx.defs.OpSchema
    kinds = ["float", "double", "float16", "bool", *(f"{u}int{b}" for u in ("", "u") for b in (8, 16, 32, 64))]
    types = [f"tensor({kind})" for kind in kinds]
    variadic = schema.FormalParameterOption.Variadic
    return schema(
        f"OnnxNode{count}",
        _DOMAIN,
        1,
        inputs=[schema.FormalParameter("inputs", "T", param_option=variadic, is_homogeneous=False)],
        outputs=[schema.FormalParameter(f"out{i}", f"T{i}") for i in range(count)],
        type_constraints=[("T", types, ""), *((f"T{i}", types, "") for i in range(count))],
        attributes=[schema.Attribute("node", schema.AttrType.STRING, required=True)],
    )


def restore_nodes(model: onnx.ModelProto) -> None:
    """Put the original nodes back in place of those that carried them, in place, with their constants and domains.

    A node whose meaning differs between its file's opset and the model's is converted; ExportError when onnx cannot.
    """
    nodes = [_restored(model, node) if node.domain == _DOMAIN else node for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for index in reversed([i for i, o in enumerate(model.opset_import) if o.domain == _DOMAIN]):
        del model.opset_import[index]


def _restored(model: onnx.ModelProto, carrier: onnx.NodeProto) -> onnx.NodeProto:
    carried = _at_opset(node_model(onnx.helper.get_attribute_value(carrier.attribute[0]).decode()), opset(model))
    original = onnx.NodeProto()
    original.CopyFrom(carried.graph.node[-1])
    names = {value.name: actual for value, actual in zip(carried.graph.input, carrier.input, strict=True)}
    names |= {value.name: actual for value, actual in zip(carried.graph.output, carrier.output, strict=True)}
    for tensor in carried.graph.initializer:
        names[tensor.name] = f"{carrier.output[0]}_{tensor.name}"
        added = model.graph.initializer.add()
        added.CopyFrom(tensor)
        added.name = names[tensor.name]
    inputs, outputs = [names.get(n, n) for n in original.input], [names.get(n, n) for n in original.output]
    del original.input[:], original.output[:]
    original.input.extend(inputs)
    original.output.extend(outputs)
    for entry in carried.opset_import:
        if entry.domain not in {o.domain for o in model.opset_import} and entry.domain == original.domain:
            model.opset_import.add(domain=entry.domain, version=entry.version)
    return original


def _at_opset(carried: onnx.ModelProto, wanted: int) -> onnx.ModelProto:
    """The node in the meaning that another operator set gives it."""
    node = carried.graph.node[0]
    own = opset(carried)
    if node.domain not in STANDARD or own == wanted:
        return carried
    here, there = (onnx.defs.get_schema(node.op_type, v, "").since_version for v in (own, wanted))
    if here == there:
        return carried
    try:
        converted = onnx.version_converter.convert_version(carried, wanted)
        if len(converted.graph.node) == 1:
            return converted
        reason = "it takes more than one node"
    except Exception as cause:  # the C++ converter raises RuntimeErrors
        reason = first_line(cause)
    raise ExportError(
        f"{node.op_type} of opset {own} has another meaning in opset {wanted}: {reason}",
        node=node.name,
        hint=f"keep the file's own opset {own}",
    )
