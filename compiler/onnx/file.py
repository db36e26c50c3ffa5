"""Reading ONNX files that nobody vouches for: everything is checked before anything is used."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from ..devices.spilled import stays_in_a_file
from ..support.errors import CaptureError, first_line
from .functions import STANDARD, check_functions, inlined

if TYPE_CHECKING:
    import onnx

#: The oldest operator set that the importer knows the meaning of.
OLDEST_OPSET = 9
#: Weights below this are read at once.
_LEAST_MAPPED_BYTES = 1 << 20
#: Graphs inside graphs (bodies of loops) deeper than this are refused.
_DEEPEST = 8


def read_onnx(
    source: str | Path | bytes | onnx.ModelProto, *, mapped: dict[str, np.ndarray[Any, Any]] | None = None
) -> onnx.ModelProto:
    """The model in a file, in bytes or in a proto, checked, with its external weights loaded and its local functions
    inlined. A proto that is passed in is not changed.

    External data is read from the model's own folder only, and only when every location stays inside it and every
    extent inside its file. Nothing is allocated that the file does not hold. Where `mapped` is given and the weights
    beside the file take gigabytes, those of the graph stay there: they are put into `mapped` by name, read from the
    file where they are used. Writing to one changes no file.

    Raises CaptureError: no such file, not an ONNX model, a model that `onnx.checker` refuses, an opset that is too old
    or too new, tensors whose data does not fit their shape, external data outside the folder.
    """
    with _naming(source):
        model, folder = _parse(source)
        _check_opsets(model)
        check_functions(model)
        for tensor in model_tensors(model):
            _check_tensor(tensor, folder)
        if folder is not None:
            _load_external(model, folder, mapped)
        _check_model(model)
        return inlined(model)


@contextmanager
def _naming(source: str | Path | bytes | onnx.ModelProto) -> Iterator[None]:
    """Errors say which file they are about: there may be two."""
    try:
        yield
    except CaptureError as error:
        if not isinstance(source, (str, Path)) or str(source) in error.message:
            raise
        raise CaptureError(
            f"{source}: {error.message}",
            hint=error.hint,
            node=error.node,
            expected=error.expected,
            actual=error.actual,
            excerpt=error.excerpt,
        ) from error


def check_onnx(source: str | Path, content: bytes) -> bool:
    """Whether all of a model is in its file's `content`. Raises CaptureError for what is no model, and for weights that
    lie elsewhere than in files of its own folder which hold them."""
    import onnx

    with _naming(source):
        model, _ = _parse(content)
        whole = True
        for tensor in model_tensors(model):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                _check_tensor(tensor, Path(source).parent)
                whole = False
    return whole


def tensors(graph: onnx.GraphProto, depth: int = 0) -> Iterator[onnx.TensorProto]:
    """Every constant tensor of a graph, those of nested graphs included. Raises CaptureError when graphs nest too
    deep."""
    if depth > _DEEPEST:
        raise CaptureError(f"graphs nest deeper than {_DEEPEST} levels", hint="no exporter writes such a model")
    _refuse_sparse(graph.sparse_initializer)
    yield from graph.initializer
    for node in graph.node:
        yield from _attribute_tensors(node.attribute, depth)


def model_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every constant tensor of a model, wherever it lies: in the graph, in functions and in training graphs."""
    yield from tensors(model.graph)
    for function in model.functions:
        yield from _attribute_tensors(function.attribute_proto, 0)
        for node in function.node:
            yield from _attribute_tensors(node.attribute, 0)
    for training in model.training_info:
        yield from tensors(training.initialization)
        yield from tensors(training.algorithm)


def _attribute_tensors(attributes: Iterable[onnx.AttributeProto], depth: int) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        _refuse_sparse([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else attribute.sparse_tensors)
        if attribute.HasField("g"):
            yield from tensors(attribute.g, depth + 1)
        for nested in attribute.graphs:
            yield from tensors(nested, depth + 1)


def _refuse_sparse(found: Sequence[onnx.SparseTensorProto]) -> None:
    """A sparse tensor is small in the file and as large as its shape says where it is used."""
    if found:
        raise CaptureError(
            "sparse initializers are not supported",
            actual=", ".join(s.values.name for s in found[:3]),
            hint="store the weights dense",
        )


def opset(model: onnx.ModelProto) -> int:
    """The version of the standard operators that the model is written in."""
    return max((o.version for o in model.opset_import if o.domain in STANDARD), default=0)


def _parse(source: str | Path | bytes | onnx.ModelProto) -> tuple[onnx.ModelProto, Path | None]:
    import onnx

    if isinstance(source, onnx.ModelProto):
        return source, None
    folder = None
    if not isinstance(source, bytes):
        path = Path(source)
        folder = path.parent
        try:
            source = path.read_bytes()
        except OSError as cause:
            raise CaptureError(f"cannot read {path}: {cause.strerror}", hint="give the path of an ONNX file") from cause
    model = onnx.ModelProto()
    try:
        model.ParseFromString(source)
    except Exception as cause:  # protobuf's DecodeError, and whatever else a broken message raises
        raise CaptureError(
            f"not an ONNX model: {first_line(cause)}", hint="the file is truncated, damaged or of another format"
        ) from cause
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise CaptureError("the file holds no graph", hint="it is empty, damaged or of another format")
    return model, folder


def _check_opsets(model: onnx.ModelProto) -> None:
    from onnx import defs

    version, newest = opset(model), defs.onnx_opset_version()
    if not OLDEST_OPSET <= version <= newest:
        raise CaptureError(
            "the model's operator set is not one that can be read",
            expected=f"opset {OLDEST_OPSET} to {newest}",
            actual=f"opset {version}" if version else "no opset",
            hint="convert it with onnx.version_converter" if version < OLDEST_OPSET else "install a newer onnx",
        )


def _check_tensor(tensor: onnx.TensorProto, folder: Path | None) -> None:
    """The data must fit the shape before anyone allocates by the shape."""
    import onnx

    wanted = _bytes_of(tensor)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if folder is None:
            raise CaptureError(
                f"the weights of {tensor.name!r} lie outside the model",
                hint="pass the path of the file, not its bytes, or load the external data first",
            )
        held = _external_extent(tensor, folder)
    elif tensor.HasField("raw_data"):
        held = len(tensor.raw_data)
    else:
        return  # typed fields: onnx.checker compares their number with the shape
    if held != wanted:
        raise CaptureError(
            f"the data of {tensor.name!r} does not fit its shape",
            expected=f"{wanted} bytes for {list(tensor.dims)}",
            actual=f"{held} bytes",
            hint="the file is damaged",
        )


def _bytes_of(tensor: onnx.TensorProto) -> int:
    import onnx

    size = 1
    for dim in tensor.dims:
        if dim < 0:
            raise CaptureError(f"{tensor.name!r} has a negative dimension", actual=list(tensor.dims))
        size *= dim
    narrow = {
        onnx.TensorProto.INT4,
        onnx.TensorProto.UINT4,
        getattr(onnx.TensorProto, "FLOAT4E2M1", -1),
    }
    if tensor.data_type in narrow:
        return (size + 1) // 2
    quarter = {getattr(onnx.TensorProto, "INT2", -1), getattr(onnx.TensorProto, "UINT2", -1)}
    if tensor.data_type in quarter:
        return (size + 3) // 4
    try:
        return int(size) * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, ValueError) as cause:
        raise CaptureError(
            f"{tensor.name!r} has an unknown data type", actual=tensor.data_type, hint="the file is damaged"
        ) from cause


def _external_extent(tensor: onnx.TensorProto, folder: Path) -> int:
    """Bytes that the tensor takes in its file, after the file has been found to lie in the folder and to hold them."""
    info = {entry.key: entry.value for entry in tensor.external_data}
    location = info.get("location", "")
    path = PurePosixPath(location.replace("\\", "/"))
    inside = location and not path.is_absolute() and not {":", "\0"} & set(location) and ".." not in path.parts
    target = (folder / path).resolve() if inside else folder
    if not inside or not target.is_relative_to(folder.resolve()):
        raise CaptureError(
            f"the weights of {tensor.name!r} lie outside the model's folder",
            expected="a file beside the model",
            actual=repr(location),
            hint="do not trust this file; weights have to lie in the model's own folder",
        )
    if not target.is_file():
        raise CaptureError(
            f"the weights of {tensor.name!r} are missing", actual=str(folder / path), hint="put the file there"
        )
    try:
        offset = int(info.get("offset", 0))
        held = target.stat().st_size - offset
        length = int(info.get("length", held))
    except ValueError as cause:
        raise CaptureError(f"{tensor.name!r} has no valid extent in its file: {cause}") from cause
    if offset < 0 or length < 0 or length > held:
        raise CaptureError(
            f"the weights of {tensor.name!r} reach past the end of {target.name}",
            expected=f"{offset} + {length} bytes",
            actual=f"{target.stat().st_size} bytes",
            hint="the file is truncated",
        )
    return length


def _load_external(model: onnx.ModelProto, folder: Path, mapped: dict[str, np.ndarray[Any, Any]] | None) -> None:
    import onnx

    try:
        outside = [t for t in model_tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL]
        if mapped is not None and stays_in_a_file(sum(map(_bytes_of, outside))):
            heavy = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL and _large(t)]
            mapped.update((tensor.name, _mapped(tensor, folder)) for tensor in heavy)
        for tensor in outside:
            if mapped is None or tensor.name not in mapped:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
    except Exception as cause:  # the helper has checks of its own and raises what it likes
        raise CaptureError(f"cannot read the external weights: {first_line(cause)}") from cause


def _large(tensor: onnx.TensorProto) -> bool:
    """Whether a weight is worth a map of its own, and of a type that numpy reads as it lies."""
    import onnx

    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return _bytes_of(tensor) >= _LEAST_MAPPED_BYTES and kind.kind in "fiub" and kind.isbuiltin == 1


def _mapped(tensor: onnx.TensorProto, folder: Path) -> np.ndarray[Any, Any]:
    import onnx

    info = {entry.key: entry.value for entry in tensor.external_data}
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(
        folder / info["location"], kind, mode="c", offset=int(info.get("offset", 0)), shape=tuple(tensor.dims)
    )


def _check_model(model: onnx.ModelProto) -> None:
    import onnx

    try:
        onnx.checker.check_model(checkable(model), full_check=False)
    except Exception as cause:  # ValidationError, or a RuntimeError out of the C++ part
        raise CaptureError(
            f"onnx.checker refuses the model: {first_line(cause)}", hint="export the model again"
        ) from cause


def checkable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as onnx's checks and inference get it: itself, or a copy that they can take.

    Large weights are replaced by inputs of the same type, so that checking does not serialise gigabytes; they were
    compared with their shapes before. Inputs and outputs of undeclared rank, which ONNX Runtime takes and the checker
    does not, get any shape.
    """
    import onnx

    external = onnx.TensorProto.EXTERNAL
    heavy = {t.name for t in model.graph.initializer if len(t.raw_data) > 1024 or t.data_location == external}
    if not heavy and not any(map(_shapeless, (*model.graph.input, *model.graph.output))):
        return model
    light = _without_payload(model, heavy)
    for value in filter(_shapeless, (*light.graph.input, *light.graph.output)):
        value.type.tensor_type.shape.SetInParent()
    return light


def _shapeless(value: onnx.ValueInfoProto) -> bool:
    return value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")


def _without_payload(model: onnx.ModelProto, heavy: Container[str]) -> onnx.ModelProto:
    import onnx

    light = onnx.ModelProto()
    for descriptor, value in model.ListFields():
        if descriptor.name != "graph":
            _copy_field(light, descriptor.name, value)
    for descriptor, value in model.graph.ListFields():
        if descriptor.name != "initializer":
            _copy_field(light.graph, descriptor.name, value)
    declared = {i.name for i in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name not in heavy:
            light.graph.initializer.append(tensor)
        elif tensor.name not in declared:
            light.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    return light


def _copy_field(target: Any, name: str, value: Any) -> None:
    current = getattr(target, name)
    if hasattr(current, "MergeFrom") or hasattr(current, "extend"):
        current.MergeFrom(value)
    else:
        setattr(target, name, value)


def input_types(source: str | Path | onnx.ModelProto) -> dict[str, int]:
    """The inputs of a model, graph inputs that no initializer fills, by name, with ONNX's number of the type of each.
    Raises CaptureError."""
    with _naming(source):
        model, _ = _parse(source)
    weights = {t.name for t in model.graph.initializer}
    return {v.name: v.type.tensor_type.elem_type for v in model.graph.input if v.name not in weights}
