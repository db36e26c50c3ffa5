"""Capture: an `nn.Module`, an `ExportedProgram`, a `.pt2` or an ONNX file becomes a `Program`."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.ao.quantization.fx._decomposed  # registers what .pt2 files may hold
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..archives.archive_check import check_exported_file
from ..export.edit_device import on_cpu
from ..ir.compare import compare
from ..ir.exported_program import WAY_OUT, from_exported
from ..ir.graph_copy import copied
from ..ir.program import Batch, Program, as_arguments
from ..onnx import opaque_operator  # noqa: F401 - registers the operator of opaque nodes, which .pt2 files may hold
from ..support.errors import CaptureError, named_first_line, plural
from ..support.one_at_a_time import alone
from ..support.quiet_logs import quiet_exporters
from .module_state import check_weights, device_of_model, eval_mode, name_keywords, on_the_cpu, restored, unwrapped

if TYPE_CHECKING:
    import onnx

Model: TypeAlias = "nn.Module | torch.export.ExportedProgram | onnx.ModelProto | str | Path"

#: Numbers of samples that a captured network is tried with beside the two that it was traced with.
_OTHER_BATCHES = (1, 5)
#: A network that bounds its batch above this has no branch on it: sizes end somewhere.
_LARGEST_BATCH = 2**31


def capture(model: Model, example: Batch | None = None) -> Program:
    """Capture a trained network as a functional ATen graph with a dynamic batch dimension.

    Dimension 0 of every tensor input becomes dynamic. Where the network fixes its batch size, the captured graph
    keeps the batch size of the example, with a warning. The graph is run beside the module on the example, and with 1
    and 5 samples where the batch is dynamic. The outputs must agree within 1e-4, relative to the largest output,
    compared in float64. A module in training mode is captured as in eval mode, with a warning, and is returned to the
    state it was in. Weights are copied: training `model` further does not change the result. Calls from several
    threads run one after the other.

    Arguments:
        model: An `nn.Module`, a `torch.export.ExportedProgram`, the path of a ``.pt2`` or ``.onnx`` file, or an
            `onnx.ModelProto`.
        example: One batch of inputs: a tensor, a tuple of positional or a dict of keyword arguments. Required for a
            module. Two of its samples are used; a single sample is used twice. May be omitted for an exported
            program, and for an ONNX model whose only dynamic dimensions are batches.

    Returns:
        The captured `Program`.

    Raises:
        CaptureError: If the model cannot be exported or read, does not run on the example, branches on the batch
            size, changes its own state, or computes something else than the captured graph.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        >>> program = foldcut.capture(net, torch.randn(2, 8))
        >>> print(program.inputs[0], "->", program.outputs[0])
        input_1: float32[batch, 8] -> output: float32[batch, 4]
        >>> program(torch.randn(5, 8)).shape
        torch.Size([5, 4])
    """
    with alone():
        return _capture(model, example)


def _capture(model: Model, example: Batch | None) -> Program:
    if isinstance(model, nn.Module):
        model = unwrapped(model)
    if isinstance(model, fx.GraphModule) and any(
        n.op == "call_module" and n.target == "_guards_fn" for n in model.graph.nodes
    ):
        model = copied(model)
    if isinstance(model, nn.Module):
        if example is None:
            raise CaptureError("an example batch is needed to capture a module", hint="pass one batch of inputs")
        return _capture_module(model, _at_least_two(example))
    if is_onnx(model):
        from ..onnx_import.importer import import_onnx

        return import_onnx(model, example)  # type: ignore[arg-type]
    model = opened(model)
    if isinstance(model, torch.export.ExportedProgram):
        return _from_foreign(model)
    raise CaptureError(
        f"cannot capture a {type(model).__name__}",
        expected="a torch.nn.Module, a torch.export.ExportedProgram, or the path of a .pt2 or .onnx file",
        hint="load the network first; a bare state_dict holds weights but no network",
    )


def opened(model: Model) -> Model:
    """What a `.pt2` file holds in the place of its path, so that it is looked through and read once; every other model
    as it is. Raises CaptureError."""
    return load_exported(Path(model)) if isinstance(model, (str, Path)) and not is_onnx(model) else model


def is_onnx(model: object) -> bool:
    """Whether the model is an ONNX file's path (by its suffix) or an `onnx.ModelProto`."""
    if isinstance(model, (str, Path)):
        return Path(model).suffix.lower() == ".onnx"
    return type(model).__module__.split(".")[0] == "onnx"


def _from_foreign(exported: torch.export.ExportedProgram) -> Program:
    """`from_exported` for what others have made, or changed since; on the CPU, wherever its weights are."""
    device_of_model(exported)
    try:
        return on_cpu(from_exported(exported))
    except CaptureError:
        raise
    except Exception as cause:  # a graph that does not fit together fails wherever torch first notices
        raise CaptureError(
            f"the exported network cannot be traced: {named_first_line(cause)}",
            hint="export it again with torch.export.export; the file is damaged, or another version of torch wrote it",
        ) from cause


def _capture_module(model: nn.Module, example: Batch) -> Program:
    check_weights(model)
    model = on_the_cpu(model)
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, as_arguments(example))
    with eval_mode(model), restored(model), torch.no_grad():
        name_keywords(model, kwargs)
        try:
            reference = model(*args, **kwargs)
        except Exception as cause:
            raise CaptureError(
                f"the model does not run on the example batch: {named_first_line(cause)}",
                actual=_describe(example),
                hint="check shape, dtype and number of inputs; a tuple goes in as arguments, a dict as keywords",
            ) from cause
        exported = _export(model, args, kwargs)
        _check_batch_range(exported)
        program = from_exported(exported)
        for gradients in (False, True):  # attention kernels differ, and with them the strides of what they return
            _check(program, (args, kwargs), reference, count=2, gradients=gradients)
        _check_other_batches(model, program, args, kwargs)
    return program


def _check(program: Program, inputs: Any, reference: Any, *, count: int, gradients: bool = False) -> None:
    """Raise CaptureError unless the graph runs and computes what the module computed."""
    args, kwargs = inputs
    try:
        with torch.set_grad_enabled(gradients):
            found = program.module(*args, **kwargs)
    except Exception as cause:  # an operator raises whatever it raises
        raise CaptureError(
            f"the captured graph does not run with {plural(count, 'sample')}: {named_first_line(cause)}", hint=WAY_OUT
        ) from cause
    difference = compare(reference, found)
    if difference.relative > 1e-4 or not difference.same_structure:
        raise CaptureError(
            f"the captured graph does not compute what the model computes with {plural(count, 'sample')}",
            expected="relative difference at most 1e-4 on the example batch",
            actual=difference,
            hint="a model that draws random numbers, depends on earlier calls or branches on the batch size cannot be "
            "captured",
        )


def _check_batch_range(exported: torch.export.ExportedProgram) -> None:
    """Raise CaptureError when the network was traced for some batch sizes only."""
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, torch.Tensor) or value.dim() == 0:
            continue
        size = value.shape[0]
        found = exported.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
        if found is not None and (found.upper < _LARGEST_BATCH or found.lower > 2):
            raise CaptureError(
                "forward() takes another way for other numbers of samples",
                expected="one graph for any batch size",
                actual=f"a graph for batches of {found.lower} to {found.upper}",
                hint="keep conditions on the batch size out of forward(); name the mode of operators that choose one "
                "by size (torch.cdist has compute_mode)",
            )


def _check_other_batches(model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """`_check` for other numbers of samples, where the batch is dynamic: a branch on it is gone from the graph."""
    for count in _OTHER_BATCHES if program.batch_symbols else ():
        inputs = pytree.tree_map(partial(_repeated, count=count), (args, kwargs))
        try:
            reference = model(*inputs[0], **inputs[1])
        except Exception:
            continue
        _check(program, inputs, reference, count=count)


def _repeated(leaf: Any, count: int) -> Any:
    """So many samples, those of the example in turns. What is no batch stays."""
    if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
        return leaf
    return leaf[torch.arange(count, device=leaf.device) % leaf.shape[0]]


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    """Dynamic batch first; where the network fixes it, static, with a warning. Non-strict first, then strict."""
    if args and kwargs:
        raise CaptureError("a batch is either a tuple of arguments or a dict of keyword arguments, not both")
    failures: list[Exception] = []
    for dynamic in (True, False):
        for strict in (False, True):
            try:
                with quiet_exporters():
                    # a failed attempt leaves marks of dynamic dims on the tensors it was given
                    fresh_args, fresh_kwargs = pytree.tree_map(_fresh, (args, kwargs))
                    dims = _batch_dims((fresh_args, fresh_kwargs)) if dynamic else None
                    exported = torch.export.export(
                        model,
                        fresh_args,
                        fresh_kwargs,
                        dynamic_shapes=dims,  # type: ignore[arg-type]  # a ShapesCollection is taken too
                        strict=strict,
                    )
            except Exception as cause:  # torch.export raises many unrelated types: all of them end in CaptureError
                failures.append(cause)
                continue
            if not dynamic:
                warnings.warn(
                    "the network fixes its batch size; the captured graph runs at the example's batch size only. "
                    f"The dynamic capture said: {named_first_line(failures[0])}",
                    stacklevel=5,
                )
            return exported
    refusal = failures[-2]  # the non-strict, static attempt: the most permissive one
    raise CaptureError(f"torch.export cannot take the model: {named_first_line(refusal)}", hint=WAY_OUT) from refusal


def _fresh(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _batch_dims(inputs: Any) -> torch.export.ShapesCollection:
    """The first dimension of every tensor, wherever it stands among the arguments."""
    shapes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            shapes[leaf] = {0: torch.export.Dim.DYNAMIC}
    return shapes


def load_exported(path: Path) -> torch.export.ExportedProgram:
    """What a `.pt2` file holds. Raises CaptureError."""
    if not path.is_file():
        raise CaptureError(f"no such file: {path}", hint="pass the path of a .pt2 file saved with torch.export.save")
    if path.suffix != ".pt2":
        raise CaptureError(
            f"cannot read {path.name} as a network",
            expected="a .pt2 or .onnx file",
            actual=path.suffix or "no suffix",
            hint="a .pt state_dict holds weights without a network: pass package.module:callable and --weights",
        )
    check_exported_file(path)
    try:
        with quiet_exporters(), path.open("rb") as file:  # as a file: torch takes no path that is not UTF-8
            return torch.export.load(file)
    except Exception as cause:  # a file that was tampered with raises whatever its readers raise
        raise CaptureError(
            f"{path} is not a readable .pt2 file: {named_first_line(cause)}",
            hint="save it again with torch.export.save",
        ) from cause


def _at_least_two(example: Batch) -> Batch:
    """torch.export takes a batch of one for a constant, so the example has at least two samples; at most two are
    used."""

    def two(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
            return leaf
        if leaf.layout != torch.strided:
            raise CaptureError("an input is not a dense tensor", actual=leaf.layout, hint="give it as x.to_dense()")
        if leaf.shape[0] == 0:
            raise CaptureError(
                "the example batch is empty",
                actual=f"shape {list(leaf.shape)}",
                hint="pass at least one sample",
            )
        return leaf[:2].clone() if leaf.shape[0] >= 2 else torch.cat([leaf, leaf])

    result: Batch = pytree.tree_map(two, example)
    return result


def _describe(example: Batch) -> str:
    return ", ".join(
        f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
        for leaf in pytree.tree_leaves(example)
    )
