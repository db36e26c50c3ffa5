"""Which constants of a file are trained weights, and how they keep their names and their ties through folding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

#: Operators that only arrange elements: a weight behind one is the same weight.
_MOVES = frozenset({"Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose", "Cast"})
#: Where an operator holds weights, whatever way they came into the file.
_ROLES: dict[str, tuple[int, ...]] = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (0, 1, 2),
    "BatchNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "RMSNormalization": (1,),
    "PRelu": (1,),
}
#: Inputs that hold statistics, not trained values.
_STATISTICS = {"BatchNormalization": (3, 4)}


class Weights:
    """The float initializers of a graph. Folding must not compute with them (a table that is gathered is a smaller
    parameter than the result; the compiler folds what pays) nor copy one that several nodes read."""

    def __init__(self, graph: gs.Graph) -> None:
        self._roots = {name: name for name, tensor in graph.tensors().items() if _is_trained(tensor)}

    def stays(self, node: gs.Node) -> bool:
        """Whether folding has to leave the node in the graph. Asked for each foldable node, in order."""
        held = [t for t in node.inputs if t.name in self._roots]
        if not held:
            return False
        alone = held[0] is node.inputs[0] and len(held) == 1 and len(held[0].outputs) == 1
        if node.op in _MOVES and alone and len(node.outputs) == 1:
            self._roots[node.outputs[0].name] = self._roots[held[0].name]
            return False
        return True

    def restore_names(self, graph: gs.Graph) -> None:
        """Folded arrangements of an initializer get the initializer's name, in place."""
        import onnx_graphsurgeon as gs

        tensors = graph.tensors()
        for name, tensor in tensors.items():
            root = self._roots.get(name, name)
            if isinstance(tensor, gs.Constant) and root != name and root not in tensors:
                tensor.name = root


def bypass_identities(graph: gs.Graph) -> None:
    """Let the readers of an Identity of a constant read the constant, in place: exporters write equal or tied weights
    once, with an Identity for each other name."""
    import onnx_graphsurgeon as gs

    kept = {id(t) for t in graph.outputs}
    for node in graph.nodes:
        if node.op != "Identity" or id(node.outputs[0]) in kept or not isinstance(node.inputs[0], gs.Constant):
            continue
        copy, source = node.outputs[0], node.inputs[0]
        for reader in list(copy.outputs):
            reader.inputs = [source if t is copy else t for t in reader.inputs]


def trained_names(graph: gs.Graph, initializers: Iterable[str]) -> set[str]:
    """The constants that are parameters: the file's own float initializers and what stands where operators have their
    weights; running statistics are none, nor are single numbers."""
    own = set(initializers)
    statistics: set[str] = set()
    for node in graph.nodes:
        statistics |= {t.name for i, t in enumerate(node.inputs) if i in _STATISTICS.get(node.op, ())}
        own |= {t.name for i, t in enumerate(node.inputs) if i in _ROLES.get(node.op, ())}
    return {name for name, tensor in graph.tensors().items() if name in own - statistics and _is_trained(tensor)}


def _is_trained(tensor: Any) -> bool:
    import onnx_graphsurgeon as gs

    if not isinstance(tensor, gs.Constant) or math.prod(tensor.shape) <= 1:
        return False
    kind = getattr(tensor.dtype, "kind", "")
    return kind == "f" or str(tensor.dtype) in {"bfloat16", "16"}
