"""Writing a Program: `ExportedProgram`, `.pt2` and ONNX, with the original input and output names and a dynamic
batch."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from ..ir.cost import tensor_bytes, weight_bytes
from ..ir.program import Program, is_tensor
from ..onnx.file import OLDEST_OPSET
from ..onnx.file import opset as written_opset
from ..onnx.model_file import MAX_PROTOBUF_BYTES, MODEL, WEIGHTS, OnnxFile, OnnxModel, fits_a_message
from ..support.atomic_files import Content, StoredFile, temporary_folder, write_folder
from ..support.errors import ExportError, named_first_line
from ..support.quiet_logs import quiet_exporters
from .direct import as_it_is, direct_translations, integer_translations
from .edit_at_hand import exported_at_hand
from .edit_device import on_cpu
from .registry import filled_once
from .shortcuts import nothing_twice

if TYPE_CHECKING:
    import onnx

#: The newest operator set that torch.onnx writes whatever the network: of newer ones it writes some networks only.
NEWEST_OPSET = 25
#: Smaller constants stay in the file: they are shapes and scales that readers look at.
_INLINE_BYTES = 1024


def to_exported(program: Program) -> torch.export.ExportedProgram:
    """The Program as a `torch.export.ExportedProgram` with the same dynamic dimensions.

    It is on the CPU, wherever the Program computes. Raises ExportError, quoting torch, when the graph does not export
    again.
    """
    program = on_cpu(program)
    args, kwargs, dynamic = _example(program)
    made = exported_at_hand(program, args, kwargs)
    return _traced(program, args, kwargs, dynamic) if made is None else made


def _traced(program: Program, args: Any, kwargs: Any, dynamic: Any) -> torch.export.ExportedProgram:
    """By torch.export, where the graph at hand is not certain to be what that gives."""
    try:
        with quiet_exporters(), torch.no_grad():  # as at capture: gradients change kernels, and these the strides
            exported = torch.export.export(program.module, args, kwargs, dynamic_shapes=dynamic)
    except Exception as cause:
        raise ExportError(
            f"torch.export refused the rewritten network: {named_first_line(cause)}",
            hint="report the model: every captured program should export again",
        ) from cause
    for node in exported.graph.nodes:
        node.meta.pop("from_node", None)  # holds addresses of this process, which would end up in the file
    return exported


def to_pt2(exported: torch.export.ExportedProgram) -> Content:
    """The content of a `.pt2` file, loadable with `torch.export.load`: in a temporary file where the weights are above
    2 GB."""
    weights = (*exported.state_dict.values(), *exported.constants.values())
    if not fits_a_message(tensor_bytes(t for t in weights if isinstance(t, torch.Tensor))):
        folder = temporary_folder()
        path = Path(folder.name) / "model.pt2"
        with quiet_exporters():
            torch.export.save(exported, path)
        return StoredFile(path, folder)
    buffer = BytesIO()
    with quiet_exporters():
        torch.export.save(exported, buffer)
    return buffer.getvalue()


def to_onnx(
    program: Program, *, opset: int | None = None, exported: torch.export.ExportedProgram | None = None
) -> OnnxModel:
    """The Program as an ONNX model (torch.onnx, dynamo), constants folded and batch norm merged into convolutions.

    Input and output names and dynamic dims are the Program's. A Program that came from an ONNX file goes out with the
    file's opset, metadata, doc strings, fixed dims and names of dynamic dims; opaque nodes go out as they came in.
    `opset` asks for another one; None takes the file's, or the exporter's default. Values that survive the exporter's
    optimiser keep their node names. Weights are embedded; above 2 GB the model is an `OnnxFile` in a temporary folder,
    with its weights beside it.

    Raises ExportError, quoting torch.onnx, when an operator has no ONNX form (in that opset).
    """
    if fits_a_message(weight_bytes(program)):
        return bytes(to_onnx_model(program, opset=opset, exported=exported).SerializeToString())
    folder = temporary_folder()
    path = Path(folder.name) / MODEL
    model = to_onnx_model(program, opset=opset, exported=exported, weights=path.with_name(WEIGHTS))
    path.write_bytes(model.SerializeToString())
    return OnnxFile(path, folder)


def save_onnx(
    program: Program, path: str | Path, *, opset: int | None = None, inline_bytes: int = MAX_PROTOBUF_BYTES
) -> tuple[Path, ...]:
    """Write the Program as an ONNX file; weights above `inline_bytes` in all go to ``<name>.data`` beside it.

    Both files are written under temporary names and renamed together; other files of the folder stay. Returns the
    paths, the model first. Raises ExportError and OutputError.
    """
    path = Path(path)
    files: dict[str, Content] = {}
    with temporary_folder() as folder:
        weights = Path(folder) / f"{path.name}.data" if weight_bytes(program) > inline_bytes else None
        model = to_onnx_model(program, opset=opset, weights=weights)
        if weights is not None and weights.is_file():
            files[weights.name] = StoredFile(weights)
        files[path.name] = bytes(model.SerializeToString())
        write_folder(path.parent, files)
    return tuple(path.parent / name for name in reversed(files))


def target_opset(program: Program, opset: int | None) -> int | None:
    """The opset that a program is exported in: the one asked for, else that of its file; None is the exporter's."""
    if opset is not None:
        return opset
    return program.origin.opset if program.origin else None


def to_onnx_model(
    program: Program,
    *,
    opset: int | None = None,
    exported: torch.export.ExportedProgram | None = None,
    weights: Path | None = None,
) -> onnx.ModelProto:
    """What `to_onnx` gives, as a ModelProto; its weights are written to the file `weights`, where one is given, one
    after the other, and the model refers to that."""
    from onnx_ir.external_data import unload_from_model

    from ..onnx.opset import EXPORTER_OPSET, lower_opset
    from .verbatim import restore_nodes, translations

    target = target_opset(program, opset)
    exported = exported or to_exported(program)
    version = None if target is None else max(target, EXPORTER_OPSET)
    table = translations() | integer_translations()
    try:
        with quiet_exporters(), torch.no_grad(), filled_once(), nothing_twice():
            try:
                result = _translated(as_it_is(exported), version, table | direct_translations())
            except Exception:  # an operator that has an ONNX form only once it is decomposed
                result = _translated(exported, version, table)
    except Exception as cause:
        raise ExportError(
            f"torch.onnx cannot express the network: {named_first_line(cause)}",
            hint="an operator without an ONNX form has to be replaced in the model, or another opset given",
        ) from cause
    _name_signature(result.model.graph, program)
    if weights is not None:
        unload_from_model(result.model, weights.parent, weights.name, size_threshold_bytes=_INLINE_BYTES)
    model = result.model_proto
    _check_opset(model, version)
    if target is not None and target < EXPORTER_OPSET:
        lower_opset(model, target)
    restore_nodes(model)
    if program.origin is not None:
        program.origin.write(model, {s.name: s.shape for s in (*program.inputs, *program.outputs)})
    return model


def _check_opset(model: onnx.ModelProto, asked: int | None) -> None:
    """Raise ExportError when torch.onnx wrote another operator set than it was asked for, by the network's file or by a
    setting: it says so in its log only, and the model mixes the two."""
    written = written_opset(model)
    if asked is not None and written not in {0, asked}:
        raise ExportError(
            f"the network cannot be written in opset {asked}: torch.onnx gave opset {written}",
            hint=f"ask for another one, from {OLDEST_OPSET} to {NEWEST_OPSET}: PipelineSettings(opset={NEWEST_OPSET})",
        )


def _translated(exported: torch.export.ExportedProgram, opset: int | None, table: dict[Any, Any]) -> Any:
    result = torch.onnx.export(
        exported,
        (),
        dynamo=True,
        verbose=False,
        opset_version=opset,
        optimize=False,
        custom_translation_table=table,
    )
    assert result is not None  # None only with a file path
    _clear_names(result.model.graph)
    result.optimize()
    _of_one_type(result.model.graph)
    return result


def _of_one_type(graph: Any) -> None:
    """Weights of a convolution that reads bfloat16 are in bfloat16: the exporter's optimiser merges batch norms into
    them in float32 and leaves them so, which is no model."""
    import onnx_ir as ir

    for node in graph:
        if node.op_type not in {"Conv", "ConvTranspose"} or node.outputs[0].dtype != ir.DataType.BFLOAT16:
            continue
        for value in node.inputs[1:]:
            if value is not None and value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
                array = value.const_value.numpy().astype(ir.DataType.BFLOAT16.numpy())
                value.const_value = ir.tensor(array, dtype=ir.DataType.BFLOAT16, name=value.name)
                value.type = ir.TensorType(ir.DataType.BFLOAT16)


def _clear_names(graph: Any) -> None:
    """Rename weights whose names the exporter makes up for values of its own (a file that torch.onnx wrote has them
    too): its optimiser would take the one for the other."""
    for name, value in list(graph.initializers.items()):
        if re.fullmatch(r"val_\d+", name):
            value.name = f"{name}_weight"


def _name_signature(graph: Any, program: Program) -> None:
    """Give inputs, outputs and dynamic dims the Program's names (torch has its own: s77 for batch).

    An inner value that already has the name of an output gives way: ONNX wants names unique.
    """
    import onnx_ir as ir

    if program.origin is not None:  # in a file, an output of an input's name is that input
        given = {spec.name: value for value, spec in zip(graph.inputs, program.inputs, strict=True)}
        for index, spec in enumerate(program.outputs):
            graph.outputs[index] = given.get(spec.name, graph.outputs[index])
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
