"""What a model wants to be called with, before it is captured."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..data.input_binding import ForwardInputs
from ..ir.program import Batch, as_arguments
from ..onnx.call import DTYPES
from ..onnx.file import input_types
from .capture import is_onnx, opened
from .module_state import check_weights, eval_mode, restored, unwrapped

_ORDERED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def needed_inputs(model: Any) -> ForwardInputs | None:
    """The inputs that a model takes, read off forward(), the file or the exported program; None when that does not
    say. Raises CaptureError for a file that cannot be read, and for a module without weights."""
    if is_onnx(model):
        types = input_types(model)
        known = {name: DTYPES[number] for name, number in types.items() if number in DTYPES}
        return ForwardInputs(names=tuple(types), required=frozenset(types), dtypes=known)
    model = opened(model)
    if isinstance(model, torch.export.ExportedProgram):
        return _of_exported(model)
    if not isinstance(model, nn.Module):
        return None
    inner = unwrapped(model)
    check_weights(inner)
    return _of_module(inner)


def _of_module(model: nn.Module) -> ForwardInputs | None:
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return None
    kinds = {p.kind for p in parameters}
    able = {p.name: p.default is inspect.Parameter.empty or _takes_tensors(p.default) for p in parameters}
    return ForwardInputs(
        names=tuple(p.name if able[p.name] else None for p in parameters if p.kind in _ORDERED),
        keywords=frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and able[p.name]),
        required=frozenset(
            p.name
            for p in parameters
            if p.default is inspect.Parameter.empty and p.kind in (*_ORDERED, inspect.Parameter.KEYWORD_ONLY)
        ),
        more=inspect.Parameter.VAR_POSITIONAL in kinds,
        more_names=inspect.Parameter.VAR_KEYWORD in kinds,
        dtype=_float_dtype(model),
        run=lambda batch: _run(model, batch),
    )


def _takes_tensors(default: Any) -> bool:
    """Whether a parameter with such a default may be meant for a tensor: flags, numbers and texts are options."""
    return default is None or isinstance(default, torch.Tensor)


def _float_dtype(model: nn.Module) -> torch.dtype | None:
    """The floating-point type of all weights; None where there are several or none."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _run(model: nn.Module, batch: Batch) -> Any:
    """The outputs as in eval mode. The model and the random numbers of the caller are left as they were."""
    args, kwargs = as_arguments(batch)
    with eval_mode(model, warn=False), restored(model), torch.no_grad():
        return model(*args, **kwargs)


def _of_exported(exported: torch.export.ExportedProgram) -> ForwardInputs | None:
    """By name where every input is one tensor, else their number."""
    names = [str(name) for name in exported.graph_signature.user_inputs]
    spec = exported.call_spec.in_spec
    args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec) if spec is not None else ((), {})
    if len(args) + len(kwargs) != len(names):
        return ForwardInputs.of(len(args)) if args and not kwargs else None
    called = [*names[: len(args)], *map(str, kwargs)]
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    dtypes = {
        name: values[own].dtype
        for name, own in zip(called, names, strict=True)
        if isinstance(values.get(own), torch.Tensor)
    }
    return ForwardInputs(names=tuple(called), required=frozenset(called), dtypes=dtypes)
