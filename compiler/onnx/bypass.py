"""Bypassing regions in an exported ONNX file: how the latency of a plan is probed without exporting each variant.

Weights do not change latency, so a probe needs no re-solve: the regions are cut out of the original's ONNX
graph by the value names, which torch.onnx takes from the Program's nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .model_file import OnnxModel, changed_like, structure_of

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


def onnx_without(model: OnnxModel, regions: Iterable[tuple[str, str]]) -> OnnxModel | None:
    """The ONNX model with every (entry, exit) bypassed, or None when the exporter kept no value of such a name."""
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(structure_of(model))
    graph.ir_version = max(8, graph.ir_version or 0)  # older versions want every initializer among the inputs
    tensors = graph.tensors()
    stands_for: dict[str, str] = {}
    for entry, exit_ in regions:
        while entry in stands_for:
            entry = stands_for[entry]
        if entry not in tensors or exit_ not in tensors:
            return None
        _redirect(graph, tensors[exit_], tensors[entry])
        stands_for[exit_] = entry
    graph.cleanup().toposort()
    return changed_like(model, gs.export_onnx(graph, do_type_check=False))


def _redirect(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    for node in list(old.outputs):
        node.inputs = [new if tensor is old else tensor for tensor in node.inputs]
    graph.outputs = [new if tensor is old else tensor for tensor in graph.outputs]
