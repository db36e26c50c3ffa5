"""ONNX graphs before importing: constants folded within bounds, dead nodes gone, sorted, biases with their products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CaptureError, first_line

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

#: A folded constant may take so many bytes, all together four times as many.
_LARGEST_BYTES = 1 << 30
#: Operators whose result can be far larger than the file that asks for it.
_GROWING = frozenset({"ConstantOfShape", "Expand", "Tile", "Range", "OneHot", "Pad", "Resize", "Upsample", "EyeLike"})
#: Operators that must run each time, or that may run for ever.
_NOT_CONSTANT = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
    | {"Loop", "Scan", "If"}
)


def normalised(model: onnx.ModelProto) -> gs.Graph:
    """The model as a sorted onnx-graphsurgeon graph without constant subgraphs and dead nodes.

    Nothing is folded that needs more than 1 GiB or draws random numbers. Quantised weights stay quantised.
    Raises CaptureError for a graph with a cycle and for what onnx-graphsurgeon cannot read.
    """
    import onnx_graphsurgeon as gs

    _quiet()
    try:
        graph = gs.import_onnx(model)
        graph.ir_version = max(8, model.ir_version)  # older versions want every initializer among the inputs
        graph.toposort()
        _fold(graph)
        graph.cleanup(remove_unused_node_outputs=False, remove_unused_graph_inputs=False).toposort()
        _merge_biases(graph)
    except CaptureError:
        raise
    except Exception as cause:  # graphsurgeon raises assertion and key errors on broken graphs
        raise CaptureError(
            f"the graph does not hold together: {first_line(cause)}",
            hint="check the file with onnx.checker; a cycle or a missing value is damage",
        ) from cause
    return graph


def _quiet() -> None:
    from onnx_graphsurgeon.logger import G_LOGGER

    G_LOGGER.severity = G_LOGGER.CRITICAL


def _fold(graph: gs.Graph) -> None:
    budget = 4 * _LARGEST_BYTES

    def excluded(node: gs.Node) -> bool:
        nonlocal budget
        if node.op in _NOT_CONSTANT or any(isinstance(v, type(graph)) for v in node.attrs.values()):
            return True
        if node.op not in _GROWING:
            return False
        size = _grown_bytes(node)
        if size is None or size > min(budget, _LARGEST_BYTES):
            return True
        budget -= size
        return False

    options: dict[str, Any] = {
        "fold_shapes": False,  # the file's own shapes may hold a fixed batch
        "size_threshold": _LARGEST_BYTES,
        "should_exclude_node": excluded,
    }
    with _silent_runtime():
        try:
            graph.fold_constants(error_ok=False, **options)
        except Exception:  # one constant that does not compute: fold the others one by one
            budget = 4 * _LARGEST_BYTES
            graph.fold_constants(partitioning="recursive", **options)


@contextmanager
def _silent_runtime() -> Iterator[None]:
    """graphsurgeon folds in ONNX Runtime sessions of its own, which write warnings to the terminal."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)


def _grown_bytes(node: gs.Node) -> int | None:
    """An upper bound of the result's bytes where constants give it directly, else None."""
    try:
        numbers = [_small(t) for t in node.inputs]
        if node.op == "ConstantOfShape" and numbers[0] is not None:
            return 8 * math.prod(int(v) for v in numbers[0])
        if node.op in {"Expand", "Tile"} and numbers[1] is not None:
            return int(node.inputs[0].values.nbytes) * math.prod(max(1, int(v)) for v in numbers[1])
        if node.op == "Range" and all(n is not None for n in numbers):
            start, limit, delta = (float(n[0]) for n in numbers if n is not None)
            return 8 * int(abs(limit - start) / abs(delta) + 1)
    except (AttributeError, IndexError, ValueError, OverflowError, ZeroDivisionError):
        return None
    return None


def _small(tensor: Any) -> list[Any] | None:
    values = getattr(tensor, "values", None)
    if values is None or values.size > 64:
        return None
    return list(np.asarray(values).reshape(-1).tolist())


def _merge_biases(graph: gs.Graph) -> None:
    """MatMul by a constant matrix, then Add of a constant vector: one linear layer, as exporters of linear layers over
    more than two dimensions write it. The MatMul gets the vector as a third input, which the importer reads."""
    import onnx_graphsurgeon as gs

    outputs = {id(t) for t in graph.outputs}
    for node in graph.nodes:
        if node.op != "MatMul" or len(node.inputs) != 2 or not isinstance(node.inputs[1], gs.Constant):
            continue
        product, weight = node.outputs[0], node.inputs[1]
        if len(weight.shape) != 2 or len(product.outputs) != 1 or id(product) in outputs:
            continue
        add = product.outputs[0]
        others = [t for t in add.inputs if t is not product]
        if add.op != "Add" or len(others) != 1 or not isinstance(others[0], gs.Constant):
            continue
        if list(others[0].shape) != [weight.shape[1]]:
            continue
        node.inputs.append(others[0])
        result = add.outputs[0]
        add.inputs.clear()
        add.outputs.clear()
        node.outputs = [result]
    graph.cleanup(remove_unused_node_outputs=False, remove_unused_graph_inputs=False)
