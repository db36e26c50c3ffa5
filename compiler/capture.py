"""Capture: an `nn.Module`, an `ExportedProgram`, a `.pt2` or an ONNX file becomes a `Program`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from . import onnx_operator  # noqa: F401 - registers the operator of opaque nodes, for .pt2 files that hold some
from .archive_check import check_exported_file
from .edit import rebuild, take_any_layout
from .errors import CaptureError, named_first_line
from .graph_copy import copied
from .logs import quiet_exporters
from .program import (
    Batch,
    Program,
    TensorSpec,
    as_arguments,
    dim_names,
    dim_text,
    output_nodes,
)
from .verify import compare

if TYPE_CHECKING:
    import onnx

Model: TypeAlias = "nn.Module | torch.export.ExportedProgram | onnx.ModelProto | str | Path"

_WAY_OUT = (
    "keep Python control flow on tensor values out of forward(), or export the model yourself with "
    "torch.export.export(...) and pass the ExportedProgram (or the .pt2 file saved from it)"
)


def capture(model: Model, example: Batch | None = None) -> Program:
    """Capture a trained network into a functional ATen graph with a dynamic batch dimension.

    `model` is a module, a `torch.export.ExportedProgram`, the path of a `.pt2` or `.onnx` file, or an
    `onnx.ModelProto` (both by `import_onnx`). `example` is one batch of inputs (a tensor, a tuple of arguments or a
    dict of keyword arguments), of which two samples are used (a single one twice); for an exported program it may be
    omitted, and for an ONNX model whose only dynamic dimensions are batches. A module in training mode is captured as
    in eval mode, with a warning, and is given back as it came. Weights are copied: training `model` further does not
    change the Program.

    The batch dimension (dim 0 of every tensor input) is dynamic; where the network fixes it, the batch of the
    example stays fixed and a warning says so. The captured graph is run against the module on the example and
    must agree within 1e-4 relative.

    Raises CaptureError, quoting the cause, when torch.export cannot take the model, when it mutates its own state
    (for example batch norm in training mode), or when graph and module disagree.
    """
    if isinstance(model, fx.GraphModule) and any(
        n.op == "call_module" and n.target == "_guards_fn" for n in model.graph.nodes
    ):
        model = copy.deepcopy(model)
    if isinstance(model, nn.Module):
        if example is None:
            raise CaptureError("an example batch is needed to capture a module", hint="pass one batch of inputs")
        return _capture_module(model, _at_least_two(example))
    if is_onnx(model):
        from .onnx_import import import_onnx

        return import_onnx(model, example)  # type: ignore[arg-type]
    if isinstance(model, (str, Path)):
        model = load_exported(Path(model))
    if isinstance(model, torch.export.ExportedProgram):
        return from_exported(model)
    raise CaptureError(
        f"cannot capture a {type(model).__name__}",
        expected="a torch.nn.Module, a torch.export.ExportedProgram, or the path of a .pt2 or .onnx file",
        hint="load the network first; a bare state_dict holds weights but no network",
    )


def is_onnx(model: object) -> bool:
    """Whether the model is an ONNX file's path (by its suffix) or an `onnx.ModelProto`."""
    if isinstance(model, (str, Path)):
        return Path(model).suffix.lower() == ".onnx"
    return type(model).__module__.split(".")[0] == "onnx"


def from_exported(exported: torch.export.ExportedProgram, *, copy_tensors: bool = True) -> Program:
    """A Program from an `ExportedProgram`: decomposed to functional ATen, guards erased, unused buffers left out. Its
    tensors are copied, unless nobody else holds them."""
    with quiet_exporters(), torch.no_grad():
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
        raise CaptureError(f"torch.export returned a {type(module).__name__}", hint=_WAY_OUT)
    graph = copied(module.graph)
    for node in reversed(list(graph.nodes)):
        if (node.op == "get_attr" and not node.users) or (node.op == "call_module" and node.target == "_guards_fn"):
            graph.erase_node(node)
    take_any_layout(graph)
    module = rebuild(module, graph, copy_tensors=copy_tensors)
    return Program(module=module, inputs=_input_specs(module), outputs=_output_specs(module), history=())


def _with_any_layout(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A copy that can be traced again whatever strides its kernels give this time."""
    same = copy.copy(exported)
    same._graph_module = copied(exported.graph_module)
    take_any_layout(same.graph_module.graph)
    return same


def _capture_module(model: nn.Module, example: Batch) -> Program:
    args, kwargs = as_arguments(example)
    with _eval_mode(model), torch.no_grad():
        try:
            reference = model(*args, **kwargs)
        except Exception as cause:
            raise CaptureError(
                f"the model does not run on the example batch: {named_first_line(cause)}",
                actual=_describe(example),
                hint="check shape, dtype and number of inputs; a tuple goes in as arguments, a dict as keywords",
            ) from cause
        program = from_exported(_export(model, args, kwargs))
    for gradients in (False, True):  # attention kernels differ, and with them the strides of what they return
        _check(program, args, kwargs, reference, gradients=gradients)
    return program


def _check(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], reference: Any, *, gradients: bool) -> None:
    """Raise CaptureError unless the graph runs on the example and computes what the module computed."""
    try:
        with torch.set_grad_enabled(gradients):
            found = program.module(*args, **kwargs)
    except Exception as cause:  # an operator raises whatever it raises
        raise CaptureError(
            f"the captured graph does not run on the example batch: {named_first_line(cause)}",
            hint=_WAY_OUT,
        ) from cause
    difference = compare(reference, found)
    if difference.relative > 1e-4 or not difference.same_structure:
        raise CaptureError(
            "the captured graph does not compute what the model computes",
            expected="relative difference at most 1e-4 on the example batch",
            actual=difference,
            hint="a model that draws random numbers or depends on earlier calls cannot be captured",
        )


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    """Dynamic batch first; where the network fixes it, static, with a warning. Non-strict first, then strict."""
    failures: list[Exception] = []
    for dynamic in (True, False):
        for strict in (False, True):
            try:
                with quiet_exporters():
                    # a failed attempt leaves marks of dynamic dims on the tensors it was given
                    fresh_args, fresh_kwargs = pytree.tree_map(_fresh, (args, kwargs))
                    dims = _batch_dims(args, kwargs) if dynamic else None
                    exported = torch.export.export(model, fresh_args, fresh_kwargs, dynamic_shapes=dims, strict=strict)
            except Exception as cause:  # torch.export raises many unrelated types: all of them end in CaptureError
                failures.append(cause)
                continue
            if not dynamic:
                warnings.warn(
                    "the network fixes its batch size; the captured graph runs at the example's batch size only. "
                    f"The dynamic capture said: {named_first_line(failures[0])}",
                    stacklevel=4,
                )
            return exported
    refusal = failures[-2]  # the non-strict, static attempt: the most permissive one
    raise CaptureError(f"torch.export cannot take the model: {named_first_line(refusal)}", hint=_WAY_OUT) from refusal


def _fresh(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _batch_dims(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | tuple[Any, ...]:
    def spec(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            return {0: torch.export.Dim.DYNAMIC}
        return None

    shapes = pytree.tree_map(spec, args)
    if not kwargs:
        return tuple(shapes)
    if args:
        raise CaptureError("a batch is either a tuple of arguments or a dict of keyword arguments, not both")
    return dict(pytree.tree_map(spec, kwargs))


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
        return torch.export.load(path)
    except Exception as cause:
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
        if leaf.shape[0] == 0:
            raise CaptureError(
                "the example batch is empty",
                actual=f"shape {list(leaf.shape)}",
                hint="pass at least one sample",
            )
        return leaf[:2].clone() if leaf.shape[0] >= 2 else torch.cat([leaf, leaf])

    result: Batch = pytree.tree_map(two, example)
    return result


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode inside, as they were outside."""
    training = [m for m in model.modules() if m.training]
    if training:
        warnings.warn(
            "the model is in training mode; it is captured as in eval mode (call model.eval() to silence this)",
            stacklevel=4,
        )
    for module in training:
        module.training = False
    # the fused attention of torch's own modules zeroes padded rows, which the exported graph does not
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in training:
            module.training = True


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
    labels = _output_names(module, len(leaves))
    return tuple(_spec(label, n, names) for label, n in zip(labels, leaves, strict=True))


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


def _describe(example: Batch) -> str:
    return ", ".join(
        f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
        for leaf in pytree.tree_leaves(example)
    )
