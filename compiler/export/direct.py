"""The export without decompositions: operators that torch.onnx takes as they are, and some that it could."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..ir.graph_copy import copied

aten = torch.ops.aten


def as_it_is(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A copy that the exporter does not decompose.

    Decomposing traces the network twice more and takes half of an export. The exporter only takes apart operators that
    it has no translation for; where there are none the model is the same, and where there are it says so.
    """
    same = copy.copy(exported)
    same._graph_module = copied(exported.graph_module)  # the exporter puts in casts of its own
    same.run_decompositions = lambda *_args, **_options: same
    return same


def direct_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operators that decomposing would turn into others, put into these at once."""
    return {aten.adaptive_avg_pool2d.default: _pooled_to_one}


def _pooled_to_one(value: Any, output_size: Sequence[int]) -> Any:
    """The mean over height and width, which is what pooling to one position is. Other sizes are not translated."""
    from onnxscript import opset18

    if list(output_size) != [1, 1]:
        raise NotImplementedError(f"pooling to {list(output_size)} positions")
    axes: Any = opset18.Constant(value_ints=[-1, -2])
    return opset18.ReduceMean(value, axes, keepdims=1)
