"""Layer norms that exporters wrote out in pieces (opsets before 17) become one operator again.

A pruned or re-solved network has to keep a norm a norm: its mean runs over all channels, which ATen says in one
operator and nine elementwise nodes do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


def fuse_layer_norms(graph: gs.Graph) -> int:
    """Replace every ``(x - mean) / sqrt(mean((x - mean)^2) + eps) * scale [+ bias]`` over the last dimension by
    LayerNormalization, in place; returns how many there were. Exact up to rounding. A piece that anything else reads
    stays as it is."""
    import onnx_graphsurgeon as gs

    kept = {id(t) for t in graph.outputs}
    count = 0
    for node in list(graph.nodes):
        found = _match(node, kept) if node.op == "ReduceMean" else None
        if found is None:
            continue
        source, scale, bias, epsilon, last = found
        fused = gs.Node(
            op="LayerNormalization",
            name=last.name,
            attrs={"axis": -1, "epsilon": epsilon},
            inputs=[source, scale, *([] if bias is None else [bias])],
            outputs=[last.outputs[0]],
        )
        last.outputs = []
        graph.nodes.append(fused)
        count += 1
    if count:
        graph.cleanup(remove_unused_node_outputs=False, remove_unused_graph_inputs=False).toposort()
    return count


def _match(mean: gs.Node, kept: set[int]) -> tuple[Any, Any, Any, float, gs.Node] | None:
    """(input, scale, bias, epsilon, last node) of a layer norm that begins with this mean."""
    source = mean.inputs[0]
    if not _over_last(mean):
        return None
    centre = _only(mean, "Sub", kept)
    if centre is None or centre.inputs[0] is not source or centre.inputs[1] is not mean.outputs[0]:
        return None
    if id(centre.outputs[0]) in kept:
        return None
    readers = list(centre.outputs[0].outputs)
    square = next((n for n in readers if _is_square(n, centre.outputs[0])), None)
    divide = next((n for n in readers if n.op == "Div" and n.inputs[0] is centre.outputs[0]), None)
    if square is None or divide is None or {id(n) for n in readers} != {id(square), id(divide)}:
        return None
    epsilon = _epsilon(mean, square, divide, kept)
    if epsilon is None:
        return None
    scaled = _only(divide, "Mul", kept)
    scale = None if scaled is None else _vector(scaled, divide.outputs[0])
    if scaled is None or scale is None:
        return None
    moved = _only(scaled, "Add", kept)
    bias = None if moved is None else _vector(moved, scaled.outputs[0])
    if bias is not None and list(bias.shape) != list(scale.shape):
        bias = None
    return source, scale, bias, epsilon, scaled if bias is None or moved is None else moved


def _epsilon(mean: gs.Node, square: gs.Node, divide: gs.Node, kept: set[int]) -> float | None:
    """What is added to the mean square before its root divides; None where the pieces between are others."""
    variance = _only(square, "ReduceMean", kept)
    if variance is None or _axes(variance) != _axes(mean):
        return None
    shifted = _only(variance, "Add", kept)
    root = _only(shifted, "Sqrt", kept)
    if shifted is None or root is None:
        return None
    divides = divide.inputs[1] is root.outputs[0] and _only(root, "Div", kept) is not None
    return _number(shifted, variance.outputs[0]) if divides else None


def _only(node: gs.Node | None, op: str, kept: set[int]) -> gs.Node | None:
    """The one node that reads the first output, when it is of this operator."""
    if node is None or not node.outputs or id(node.outputs[0]) in kept:
        return None
    readers = {id(n): n for n in node.outputs[0].outputs}
    found = next(iter(readers.values())) if len(readers) == 1 else None
    return found if found is not None and found.op == op else None


def _axes(node: gs.Node) -> list[int]:
    """The reduced axes, where they are constant and the dimensions are kept."""
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        axes = getattr(node.inputs[1], "values", None)
    return [] if axes is None or not node.attrs.get("keepdims", 1) else [int(a) for a in axes]


def _over_last(node: gs.Node) -> bool:
    axes, shape = _axes(node), node.inputs[0].shape
    return axes == [-1] or (shape is not None and axes == [len(shape) - 1])


def _is_square(node: gs.Node, value: Any) -> bool:
    if node.op == "Mul":
        return all(t is value for t in node.inputs)
    exponent = getattr(node.inputs[1], "values", None) if node.op == "Pow" and node.inputs[0] is value else None
    return exponent is not None and exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2.0


def _constant(node: gs.Node, value: Any) -> Any:
    """The other operand, when it is a constant."""
    import onnx_graphsurgeon as gs

    others = [t for t in node.inputs if t is not value]
    return others[0] if len(others) == 1 and isinstance(others[0], gs.Constant) else None


def _number(node: gs.Node, value: Any) -> float | None:
    found = _constant(node, value)
    if found is None or found.values.size != 1:
        return None
    return float(np.asarray(found.values).reshape(-1)[0])


def _vector(node: gs.Node, value: Any) -> Any:
    found = _constant(node, value)
    return found if found is not None and len(found.shape) == 1 and found.shape[0] > 1 else None
