"""What an ONNX file says about itself beside its graph: interface and words, which a rewritten file gives back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

#: A dimension: its size, its name, or None where the file says nothing.
FileDim = int | str | None


#: Operators that round values to integers.
_ROUNDING = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})


@dataclass(frozen=True, kw_only=True)
class OnnxValue:
    """An input or output as the file declares it. `element_type` is a TensorProto.DataType; `shape` None is an
    undeclared rank."""

    name: str
    element_type: int
    shape: tuple[FileDim, ...] | None
    doc_string: str = ""


@dataclass(frozen=True, kw_only=True)
class OnnxSignature:
    """Interface, operator set and words of an ONNX file."""

    inputs: tuple[OnnxValue, ...]
    outputs: tuple[OnnxValue, ...]
    opset: int
    ir_version: int = 0
    domain: str = ""
    model_version: int = 0
    doc_string: str = ""
    graph_name: str = ""
    graph_doc_string: str = ""
    metadata: tuple[tuple[str, str], ...] = field(default=())
    #: Whether it puts values on integer grids. What that means is then read off it unfused: some machines' integer
    #: kernels compute something else.
    quantised: bool = False

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the file fixes, None where an input leaves it open or has no dimensions."""
        leading = [v.shape[0] for v in self.inputs if v.shape]
        sizes = [d for d in leading if isinstance(d, int)]
        return sizes[0] if sizes and len(sizes) == len(leading) else None

    @staticmethod
    def of(model: onnx.ModelProto) -> OnnxSignature:
        """Read it off a model. Inputs that only give an initializer's type (IR version 3) are none."""
        from .file import opset

        weights = {t.name for t in model.graph.initializer}
        return OnnxSignature(
            inputs=tuple(_value(v) for v in model.graph.input if v.name not in weights),
            outputs=tuple(_value(v) for v in model.graph.output),
            opset=opset(model),
            ir_version=model.ir_version,
            domain=model.domain,
            model_version=model.model_version,
            doc_string=model.doc_string,
            graph_name=model.graph.name,
            graph_doc_string=model.graph.doc_string,
            metadata=tuple((p.key, p.value) for p in model.metadata_props),
            quantised=any(node.op_type in _ROUNDING for node in _nodes(model)),
        )

    def write(self, model: onnx.ModelProto, shapes: dict[str, tuple[int | str, ...]]) -> None:
        """Give a rewritten model the words and the declared dimensions of this file, in place.

        `shapes` are the dimensions of inputs and outputs as the rewritten network has them. A dimension that became a
        number stays one; a dimension that the file fixes is fixed again; a dynamic one gets the file's name.
        """
        from onnx import helper

        # no newer than it needs: what reads the file may be old. From version 4 on initializers need not be inputs
        needed = helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
        model.ir_version = max(4, self.ir_version, needed)
        model.domain, model.model_version, model.doc_string = self.domain, self.model_version, self.doc_string
        model.graph.name, model.graph.doc_string = self.graph_name or "main_graph", self.graph_doc_string
        del model.metadata_props[:]
        for key, value in self.metadata:
            model.metadata_props.add(key=key, value=value)
        protos = (*model.graph.input, *model.graph.output)
        for proto, declared in zip(protos, (*self.inputs, *self.outputs), strict=True):
            proto.doc_string = declared.doc_string
            _write_shape(proto, declared.shape, shapes.get(declared.name))


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _value(proto: onnx.ValueInfoProto) -> OnnxValue:
    kind = proto.type.tensor_type
    shape: tuple[FileDim, ...] | None = None
    if kind.HasField("shape"):
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim)
    return OnnxValue(name=proto.name, element_type=kind.elem_type, shape=shape, doc_string=proto.doc_string)


def _write_shape(
    proto: onnx.ValueInfoProto, declared: tuple[FileDim, ...] | None, actual: tuple[int | str, ...] | None
) -> None:
    if declared is None or actual is None or len(declared) != len(actual):
        return
    dims = proto.type.tensor_type.shape.dim
    for dim, wanted, have in zip(dims, declared, actual, strict=True):
        dim.Clear()
        if isinstance(wanted, int):
            dim.dim_value = wanted
        elif isinstance(have, int):
            dim.dim_value = have
        elif wanted:
            dim.dim_param = wanted
