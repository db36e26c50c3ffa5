"""ONNX graphs before importing: constants folded within bounds, dead nodes gone, sorted, biases with their products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..support.errors import CaptureError, first_line
from .file import checkable
from .weights import Weights, bypass_identities

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

#: Branches whose condition is constant are opened so many levels deep.
_DEEPEST_BRANCH = 9
#: A folded constant may take so many bytes, all together four times as many.
_LARGEST_BYTES = 1 << 30
#: Operators whose result can be far larger than the product of their inputs' sizes.
_GROWING = frozenset(
    {"ConstantOfShape", "Expand", "Tile", "Range", "OneHot", "Pad", "Resize", "Upsample", "EyeLike", "AffineGrid"}
    | {"CenterCropPad", "Col2Im", "ConvTranspose", "MaxUnpool", "DFT", "STFT", "RoiAlign", "MaxRoiPool", "ImageDecoder"}
    | {"HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix"}
)
#: Operators that must run each time, or that may run for ever.
_NOT_CONSTANT = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
    | {"Loop", "Scan", "If"}
)


def normalised(model: onnx.ModelProto, mapped: Mapping[str, np.ndarray[Any, Any]] | None = None) -> gs.Graph:
    """The model as a sorted onnx-graphsurgeon graph without constant subgraphs and dead nodes.

    Nothing is folded that needs more than 1 GiB or draws random numbers, nor arithmetic on float initializers, which
    keep their names and number. Quantised weights stay quantised. `mapped` are the values of weights that the model
    does not hold, by name.
    Raises CaptureError for a graph with a cycle and for what onnx-graphsurgeon cannot read.
    """
    import onnx_graphsurgeon as gs

    _quiet()
    try:
        graph = gs.import_onnx(model)
        tensors = graph.tensors()
        for name, values in (mapped or {}).items():
            if name in tensors:  # else nothing reads it
                tensors[name].values, tensors[name].data_location = values, None
        graph.ir_version = max(8, model.ir_version)  # older versions want every initializer among the inputs
        _type_constants(graph)
        graph.toposort()
        bypass_identities(graph)
        weights = Weights(graph)
        sizes = _inferred_sizes(model)
        for _ in range(_DEEPEST_BRANCH):
            branches = {id(node) for node in graph.nodes if node.op == "If"}
            _fold(graph, sizes, weights)
            if branches == {id(node) for node in graph.nodes if node.op == "If"}:
                break  # none was opened
        graph.cleanup(remove_unused_node_outputs=False, remove_unused_graph_inputs=False).toposort()
        weights.restore_names(graph)
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


def _type_constants(graph: gs.Graph) -> None:
    """Constants that are written as plain numbers become tensors: graphsurgeon would take floats for doubles."""
    import onnx_graphsurgeon as gs

    for node in graph.nodes:
        for name in ("value_float", "value_floats") if node.op == "Constant" else ():
            if name in node.attrs:
                array = np.asarray(node.attrs[name], dtype=np.float32)
                node.attrs = {"value": gs.Constant(f"{node.outputs[0].name}_value", array)}


def _inferred_sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Elements of each value whose shape ONNX infers to be fixed."""
    import onnx

    try:
        inferred = onnx.shape_inference.infer_shapes(checkable(model), data_prop=True)
    except Exception:  # graphs that contradict themselves: importing finds out where
        return {}
    sizes = {}
    for value in inferred.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            sizes[value.name] = math.prod(d.dim_value for d in dims)
    return sizes


class _Budget:
    """Decides what is folded: graphsurgeon asks for each node whose inputs are constant, in order."""

    def __init__(self, graph: gs.Graph, inferred: Mapping[str, int]) -> None:
        self._inferred, self._graph_type = inferred, type(graph)
        self._left = 4 * _LARGEST_BYTES
        self._bounds: dict[str, int] = {}

    def excluded(self, node: gs.Node) -> bool:
        """Whether the node stays: it is to run each time, or its result may be too large."""
        if node.op in _NOT_CONSTANT or any(isinstance(v, self._graph_type) for v in node.attrs.values()):
            return True
        bounds = {t.name: self._bound(node, t.name) for t in node.outputs if t.name}
        size = 8 * sum(b for b in bounds.values() if b is not None)
        if None in bounds.values() or size > min(self._left, 2 * _LARGEST_BYTES):
            return True
        self._left -= size
        self._bounds |= {name: bound for name, bound in bounds.items() if bound is not None}
        return False

    def _bound(self, node: gs.Node, output: str) -> int | None:
        """At most so many elements; None where nobody knows. No other operator makes more elements than there are
        combinations of its inputs' elements, of which NonZero gives the coordinates."""
        if output in self._inferred:
            return self._inferred[output]
        if node.op in _GROWING:
            return _grown(node)
        given = [t for t in node.inputs if not t.is_empty()]
        counts = [
            math.prod(t.shape) if isinstance(t.shape, (list, tuple)) and hasattr(t, "values") else None for t in given
        ]
        known = [self._bounds.get(t.name) if c is None else c for t, c in zip(given, counts, strict=True)]
        return None if None in known else 8 * math.prod(max(1, k) for k in known if k is not None)


def _fold(graph: gs.Graph, inferred: Mapping[str, int], weights: Weights) -> None:
    def rule() -> Callable[[gs.Node], bool]:
        budget = _Budget(graph, inferred)
        return lambda node: weights.stays(node) or budget.excluded(node)

    options: dict[str, Any] = {
        "fold_shapes": False,  # the file's own shapes may hold a fixed batch
        "recurse_subgraphs": False,  # it would not ask there; a branch that is chosen is folded the next time
        "size_threshold": _LARGEST_BYTES,
    }
    with _silent_runtime():
        try:
            graph.fold_constants(error_ok=False, should_exclude_node=rule(), **options)
        except Exception:  # one constant that does not compute: fold the others one by one
            graph.fold_constants(partitioning="recursive", should_exclude_node=rule(), **options)


@contextmanager
def _silent_runtime() -> Iterator[None]:
    """graphsurgeon folds in ONNX Runtime sessions of its own, which write warnings to the terminal."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)


def _grown(node: gs.Node) -> int | None:
    """An upper bound of the result's elements where constants give it directly, else None."""
    try:
        numbers = [_small(t) for t in node.inputs]
        if node.op == "ConstantOfShape" and numbers[0] is not None:
            return math.prod(int(v) for v in numbers[0])
        if node.op in {"Expand", "Tile"} and numbers[1] is not None:
            return math.prod(node.inputs[0].values.shape) * math.prod(max(1, int(v)) for v in numbers[1])
        if node.op == "Range" and all(n is not None for n in numbers):
            start, limit, delta = (float(n[0]) for n in numbers if n is not None)
            return int(abs(limit - start) / abs(delta) + 1)
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
