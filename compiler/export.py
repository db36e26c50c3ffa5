"""Writing a Program: `ExportedProgram`, `.pt2` and ONNX, with the original input and output names and a dynamic
batch."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import ExportError, named_first_line
from .logs import quiet_exporters
from .program import Program, is_tensor

#: Protobuf cannot hold more in one message; larger models need their weights beside the file.
MAX_PROTOBUF_BYTES = 2_000_000_000


def to_exported(program: Program) -> torch.export.ExportedProgram:
    """The Program as a `torch.export.ExportedProgram` with the same dynamic dimensions.

    Raises ExportError, quoting torch, when the graph does not export again.
    """
    args, kwargs, dynamic = _example(program)
    try:
        with quiet_exporters():
            return torch.export.export(program.module, args, kwargs, dynamic_shapes=dynamic)
    except Exception as cause:
        raise ExportError(
            f"torch.export refused the rewritten network: {named_first_line(cause)}",
            hint="report the model: every captured program should export again",
        ) from cause


def to_pt2(exported: torch.export.ExportedProgram) -> bytes:
    """The content of a `.pt2` file, loadable with `torch.export.load`."""
    buffer = BytesIO()
    with quiet_exporters():
        torch.export.save(exported, buffer)
    return buffer.getvalue()


def to_onnx(
    program: Program, *, opset: int | None = None, exported: torch.export.ExportedProgram | None = None
) -> bytes:
    """The Program as an ONNX model (torch.onnx, dynamo), constants folded and batch norm merged into convolutions.

    Input and output names and dynamic dims are the Program's; `opset` None takes the exporter's default. Values that
    survive the exporter's optimiser keep their node names. Weights are embedded.

    Raises ExportError, quoting torch.onnx, when an operator has no ONNX form, and for models above 2 GB.
    """
    size = sum(t.numel() * t.element_size() for t in program.module.state_dict().values())
    if size > MAX_PROTOBUF_BYTES:
        raise ExportError(
            "the weights do not fit into one ONNX file",
            expected="at most 2 GB",
            actual=f"{size / 1e9:.2f} GB",
            hint="save the .pt2 file and convert it with external data",
        )
    exported = exported or to_exported(program)
    try:
        with quiet_exporters():
            result = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                optimize=True,
            )
    except Exception as cause:
        raise ExportError(
            f"torch.onnx cannot express the network: {named_first_line(cause)}",
            hint="an operator without an ONNX form has to be replaced in the model, or another opset given",
        ) from cause
    assert result is not None  # None only with a file path
    _name_signature(result.model.graph, program)
    return bytes(result.model_proto.SerializeToString())


def _name_signature(graph: Any, program: Program) -> None:
    """Give inputs, outputs and dynamic dims the Program's names (torch has its own: s77 for batch).

    An inner value that already has the name of an output gives way: ONNX wants names unique.
    """
    import onnx_ir as ir

    named = [*zip(graph.inputs, program.inputs, strict=True), *zip(graph.outputs, program.outputs, strict=True)]
    wanted = {spec.name: value for value, spec in named}
    for node in graph:
        for value in node.outputs:
            if value.name in wanted and wanted[value.name] is not value:
                value.name = f"{value.name}_inner"
    for value, spec in named:
        value.name = spec.name
        value.shape = ir.Shape([dim if isinstance(dim, int) else str(dim) for dim in spec.shape])


def _example(program: Program) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """(args, kwargs, dynamic_shapes) for exporting the Program again; the values are zeros."""
    leaves: list[Any] = []
    dims: list[Any] = []
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        if not is_tensor(node):
            leaves.append(node.meta.get("val"))
            dims.append(None)
            continue
        value = node.meta["val"]
        leaves.append(torch.zeros(program.shape(node, batch=2), dtype=value.dtype, device=value.device))
        dims.append({i: torch.export.Dim.DYNAMIC for i, d in enumerate(value.shape) if not isinstance(d, int)} or None)
    spec = getattr(program.module, "_in_spec", None)
    if spec is None:
        return tuple(leaves), {}, tuple(dims)
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    arg_dims, kwarg_dims = pytree.tree_unflatten(dims, spec)
    return args, kwargs, (dict(kwarg_dims) if kwargs else tuple(arg_dims))
