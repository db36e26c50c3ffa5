"""ONNX in: a file becomes the same functional ATen `Program` that capturing a torch module makes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.fx.traceback import preserve_node_meta

from ..ir.compare import ROUNDED_TOLERANCE, Difference, compare, flatten_outputs
from ..ir.exported_program import from_exported
from ..ir.program import Batch, Program, as_arguments, dtype_name, is_tensor
from ..onnx.call import BORROWED, DTYPES, ELEMENT_TYPES
from ..onnx.file import read_onnx
from ..onnx.fusion import fuse_layer_norms
from ..onnx.normalise import normalised
from ..onnx.session import Session, reference_session, run_reference
from ..onnx.signature import OnnxSignature, OnnxValue
from ..support.errors import CaptureError, CompilerError, first_line
from ..support.quiet_logs import quiet_exporters
from .module import OnnxModule, unsupported

if TYPE_CHECKING:
    import onnx

#: A relative change of single-precision inputs that the rounding of their first layer makes as well.
LAST_DIGITS = 2.0**-20
#: And what no ill-conditioned network excuses.
MOST_ROUNDING = 1e-2
#: The import may differ from ONNX Runtime by this much of an output's largest entry, by the type of the outputs.
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2, torch.float64: 1e-4, torch.float32: 1e-4}
#: A single activation at the example's batch size may take so many bytes.
_LARGEST_ACTIVATION_BYTES = 8 << 30


def import_onnx(
    source: str | Path | bytes | onnx.ModelProto,
    example: Batch | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Program:
    """Import an ONNX model: a path (external weights beside it included), its bytes or a `ModelProto`.

    The graph is checked, its constants folded, and each node rebuilt from ATen operators; nodes outside the table that
    ONNX Runtime can run become opaque calls which export back verbatim and are never pruned. Initializers keep their
    names as parameters, node names stand in the nodes' metadata (`Program.path`), and `Program.origin` holds the
    file's interface, opset, metadata and doc strings for exporting.

    Dynamic dimensions stay dynamic. A batch that the file fixes is made dynamic where the network allows it, and fixed
    again on export. `example` is one batch of inputs; without it values are drawn from N(0, 1) (integers 0 or 1) and
    `sizes` gives dynamic dimensions by name. Two samples are used.

    Weights beside the file that take more than 1 GiB are read from there for as long as the Program lives: leave those
    files as they are (a new file under an old name, by renaming, is no change).

    The Program is run beside ONNX Runtime on the example and must agree within 1e-4 of each output's largest entry
    (2e-2 for half precision and for quantised values, which may round to the other side).

    Raises CaptureError: a damaged or hostile file, operators that cannot be imported (all listed, with node names), an
    example that does not fit, or a Program that computes something else than ONNX Runtime.
    """
    mapped: dict[str, np.ndarray[Any, Any]] = {}
    model = read_onnx(source, mapped=mapped)
    signature = OnnxSignature.of(model)
    graph = normalised(model, mapped)
    del mapped
    fuse_layer_norms(graph)
    _refuse_unsupported(unsupported(graph, signature.opset))
    tolerance = _tolerance(signature)
    module = OnnxModule(graph, signature.opset, initializers=[t.name for t in model.graph.initializer])
    del graph
    inputs = _example(signature, example, sizes or {}, seed)
    reference = _Reference(source if isinstance(source, (str, Path)) else model, signature)
    del model  # the module has the weights; a gigabyte of file need not stay beside it
    failures: list[str] = []
    for mode in _modes(signature):
        arguments = mode.inputs(inputs)
        try:
            program = _traced(module.free_batch(mode.fixed_batch), arguments, mode, signature)
            difference = reference.compare(program, arguments, mode)
        except CompilerError as failure:
            if mode.last:
                raise
            failures.append(failure.message)
            continue
        if _agrees(program, arguments, difference, tolerance):
            if mode.warning:
                warnings.warn(f"{mode.warning}: {failures[0]}", stacklevel=2)
            return program
        if mode.fixed_batch is None:
            raise CaptureError(
                "the imported graph computes something else than ONNX Runtime",
                expected=f"within {tolerance:g} relative",
                actual=difference,
                hint="report the model; a network that draws random numbers cannot be imported",
            )
        failures.append(str(difference))
    raise CaptureError(
        "the model cannot be imported", actual="; ".join(failures)
    )  # pragma: no cover - last mode raises


def _agrees(program: Program, arguments: Sequence[torch.Tensor], difference: Difference, tolerance: float) -> bool:
    """Whether the difference is rounding: within the tolerance, or no more than what the network makes of a change of
    its inputs in the last digits. Deep networks with untrained weights can make a hundred times that of it."""
    if difference.relative <= tolerance:
        return difference.same_structure
    if not difference.relative <= MOST_ROUNDING:
        return False
    generator = torch.Generator().manual_seed(0)
    nudged = tuple(
        a * (1 + LAST_DIGITS * torch.randn(a.shape, generator=generator)).to(a.dtype) if a.is_floating_point() else a
        for a in arguments
    )
    return difference.relative <= compare(program(tuple(arguments)), program(nudged)).relative


@dataclass(frozen=True, kw_only=True)
class _Mode:
    """One way of importing: which dimensions are dynamic, and whether a fixed batch is freed."""

    dims: tuple[dict[int, Any] | None, ...]
    fixed_batch: int | None
    batch: int
    warning: str = ""
    last: bool = False

    def inputs(self, arrays: Sequence[np.ndarray[Any, Any]]) -> tuple[torch.Tensor, ...]:
        """Fresh tensors with the mode's number of samples (torch marks the ones that a failed trace was given)."""
        return tuple(
            torch.from_numpy(_filled(a, self.batch) if dims and 0 in dims else a.copy())
            for a, dims in zip(arrays, self.dims, strict=True)
        )


def _filled(array: np.ndarray[Any, Any], batch: int) -> np.ndarray[Any, Any]:
    """So many samples: those of the array, then the same with their elements moved on, so that no two are alike and a
    network that mixes its samples shows."""
    flat = array.reshape(len(array), -1)
    parts = [np.roll(flat, shift, axis=1) for shift in range(-(-batch // len(array)))]
    return np.concatenate(parts)[:batch].reshape(batch, *array.shape[1:])


def _modes(signature: OnnxSignature) -> list[_Mode]:
    """Everything dynamic that the file leaves open; then the batch alone; then nothing."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes = [v.shape or () for v in signature.inputs]
    declared = tuple({i: dynamic for i, d in enumerate(s) if not isinstance(d, int)} or None for s in shapes)
    leading = {s[0] for s in shapes if s}
    modes: list[_Mode] = []
    if all(isinstance(d, int) for d in leading):
        if len(leading) == 1:
            fixed = int(next(iter(leading)) or 0)
            freed = tuple({**(d or {}), 0: dynamic} if s else None for d, s in zip(declared, shapes, strict=True))
            modes.append(_Mode(dims=freed, fixed_batch=fixed, batch=2 * fixed))
        what = "the batch size stays fixed, so the network can be run, measured and inspected but not compiled"
        modes.append(_Mode(dims=declared, fixed_batch=None, batch=0, warning=what, last=True))
        return modes
    modes.append(_Mode(dims=declared, fixed_batch=None, batch=2))
    batch_only = tuple({0: dynamic} if s and not isinstance(s[0], int) else None for s in shapes)
    if batch_only != declared:
        what = "only the batch stays dynamic; other dimensions are fixed at the example's sizes"
        modes.append(_Mode(dims=batch_only, fixed_batch=None, batch=2, warning=what))
    what = "the network fixes its batch size; the imported graph runs at the example's batch size only"
    modes.append(_Mode(dims=tuple(None for _ in shapes), fixed_batch=None, batch=0, warning=what, last=True))
    return modes


def _traced(module: OnnxModule, arguments: tuple[torch.Tensor, ...], mode: _Mode, signature: OnnxSignature) -> Program:
    try:
        with quiet_exporters(), torch.no_grad(), preserve_node_meta():
            exported = torch.export.export(module, arguments, dynamic_shapes=(mode.dims,), strict=False)
            program = from_exported(exported, copy_tensors=False)
    except CompilerError:
        raise
    except Exception as cause:  # torch.export raises many unrelated types
        raise _innermost(cause) from cause
    _check_activations(program)
    names = [v.name for v in signature.inputs], [v.name for v in signature.outputs]
    return replace(
        program,
        inputs=tuple(replace(spec, name=name) for spec, name in zip(program.inputs, names[0], strict=True)),
        outputs=tuple(replace(spec, name=name) for spec, name in zip(program.outputs, names[1], strict=True)),
        origin=signature,
    )


def _innermost(cause: BaseException) -> CaptureError:
    """The importer's own error where torch has wrapped one, else one that quotes torch."""
    link: BaseException | None = cause
    while link is not None:
        if isinstance(link, CaptureError):
            return link
        link = link.__cause__ or link.__context__
    return CaptureError(
        f"torch.export cannot trace the imported graph: {first_line(cause)}",
        hint="a shape that depends on the data cannot be followed",
    )


def _check_activations(program: Program) -> None:
    """Refuse a network whose values would not fit into memory, before anything runs it."""
    for node in program.graph.nodes:
        if is_tensor(node) and node.op == "call_function":
            value = node.meta["val"]
            size = math.prod(program.shape(node, batch=2)) * value.element_size()
            if size > _LARGEST_ACTIVATION_BYTES:
                raise CaptureError(
                    "a value of the network does not fit into memory",
                    node=program.path(node) or node.name,
                    actual=f"{size / 1e9:.1f} GB for {list(program.shape(node, batch=2))}",
                    hint="the file is damaged, or the example is too large",
                )


class _Reference:
    """The file in ONNX Runtime. The session is made when it is first needed, and once."""

    def __init__(self, source: str | Path | onnx.ModelProto, signature: OnnxSignature) -> None:
        self._source, self._signature = source, signature
        self._session: Session | None = None

    def compare(self, program: Program, arguments: tuple[torch.Tensor, ...], mode: _Mode) -> Difference:
        """The worst output over the example, run in pieces of the file's own batch where that is fixed."""
        try:
            ours = flatten_outputs(program(arguments))
        except CompilerError:
            raise
        except Exception as cause:  # what tracing did not notice: an index out of range, a type that an operator lacks
            raise CaptureError(
                f"the imported graph does not run on the example: {first_line(cause)}",
                hint="the file is damaged, or the example does not fit it",
            ) from cause
        step = mode.fixed_batch
        if step is None:
            return compare(self._run(arguments), ours)
        pieces = [self._run(tuple(a[i : i + step] for a in arguments)) for i in range(0, mode.batch, step)]
        theirs = [torch.cat(parts) if parts[0].dim() else parts[0] for parts in zip(*pieces, strict=True)]
        return compare(theirs, ours)

    def _run(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self._session is None:
            source = self._source
            content = str(source) if isinstance(source, (str, Path)) else source.SerializeToString()
            self._session = reference_session(content, optimise=not self._signature.quantised)
        names = [v.name for v in self._signature.inputs]
        outputs = run_reference(self._session, {n: a.numpy() for n, a in zip(names, arguments, strict=True)})
        try:
            return [torch.from_numpy(np.asarray(o, order="C")) for o in outputs]
        except TypeError as cause:
            raise CaptureError(
                f"an output has a type that torch does not know: {first_line(cause)}",
                hint="strings and sequences cannot be returned",
            ) from cause


def _tolerance(signature: OnnxSignature) -> float:
    if signature.quantised:
        return ROUNDED_TOLERANCE
    types = [DTYPES.get(v.element_type, torch.float32) for v in (*signature.inputs, *signature.outputs)]
    return max((TOLERANCE[t] for t in types if t in TOLERANCE), default=1e-4)


def _refuse_unsupported(found: Mapping[str, Sequence[str]]) -> None:
    if not found:
        return
    lines = [
        f"{op} ({len(nodes)}: {', '.join(nodes[:3])}{', ...' if len(nodes) > 3 else ''})"
        for op, nodes in sorted(found.items())
    ]
    raise CaptureError(
        f"{sum(map(len, found.values()))} nodes cannot be imported: {'; '.join(lines)}",
        hint="control flow, sequences and custom operators have to be resolved when the model is exported",
    )


def _example(
    signature: OnnxSignature, example: Batch | None, sizes: Mapping[str, int], seed: int
) -> list[np.ndarray[Any, Any]]:
    """One array for each input, in the file's order, checked against what the file declares."""
    if example is None:
        generator = np.random.default_rng(seed)
        return [_drawn(value, sizes, generator) for value in signature.inputs]
    args, kwargs = as_arguments(example)
    names = [v.name for v in signature.inputs]
    if kwargs and set(kwargs) != set(names):
        raise CaptureError("the example's inputs are not the model's", expected=names, actual=sorted(kwargs))
    given = [kwargs[name] for name in names] if kwargs else list(args)
    if len(given) != len(names):
        raise CaptureError("the example has another number of inputs", expected=names, actual=len(given))
    return [_checked(value, tensor) for value, tensor in zip(signature.inputs, given, strict=True)]


def _checked(value: OnnxValue, tensor: Any) -> np.ndarray[Any, Any]:
    if not isinstance(tensor, torch.Tensor) or ELEMENT_TYPES.get(tensor.dtype) != value.element_type:
        raise CaptureError(
            f"the example for {value.name!r} has the wrong type",
            expected=DTYPES.get(value.element_type, value.element_type),
            actual=getattr(tensor, "dtype", type(tensor).__name__),
        )
    shape = value.shape
    fits = shape is None or (
        len(shape) == tensor.dim()
        and all(not isinstance(d, int) or d == s for d, s in list(zip(shape, tensor.shape, strict=True))[1:])
    )
    if not fits or tensor.numel() == 0:
        raise CaptureError(
            f"the example for {value.name!r} has the wrong shape", expected=shape, actual=list(tensor.shape)
        )
    array = _as_array(value, tensor.detach().cpu().contiguous())
    if shape and isinstance(shape[0], int):
        array = np.resize(array, (shape[0], *array.shape[1:]))
    return np.asarray(array)


def _drawn(value: OnnxValue, sizes: Mapping[str, int], generator: np.random.Generator) -> np.ndarray[Any, Any]:
    shape = []
    for axis, dim in enumerate(value.shape or ()):
        size = (
            dim
            if isinstance(dim, int)
            else sizes.get(str(dim), sizes.get(f"{value.name}.{axis}", 2 if axis == 0 else 0))
        )
        if size < 1:
            raise CaptureError(
                f"dimension {axis} ({dim or 'unnamed'}) of {value.name!r} is dynamic and no size is known for it",
                hint="pass an example batch (on the command line: --calib DATA or --input-shape C,H,W)",
            )
        shape.append(size)
    if math.prod(shape) * 8 > _LARGEST_ACTIVATION_BYTES:
        raise CaptureError(f"the input {value.name!r} does not fit into memory", actual=shape)
    dtype = DTYPES.get(value.element_type)
    if dtype is None:
        raise CaptureError(f"torch has no type for the input {value.name!r}", actual=f"ONNX type {value.element_type}")
    if dtype.is_floating_point:
        drawn = torch.from_numpy(generator.standard_normal(shape)).to(dtype)
    elif dtype == torch.bool:
        drawn = torch.ones(shape, dtype=dtype)
    else:
        drawn = torch.from_numpy(generator.integers(0, 2, size=shape)).to(dtype)
    return _as_array(value, drawn)


def _as_array(value: OnnxValue, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype in BORROWED.values():
        raise CaptureError(
            f"inputs of type {dtype_name(tensor.dtype)} cannot be handed to ONNX Runtime",
            node=value.name,
            hint="let the file take float32 and cast inside",
        )
    return np.asarray(tensor.numpy())
