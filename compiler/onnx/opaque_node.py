"""`foldcut::onnx_node`: an ONNX node that foldcut has no ATen form for, run by ONNX Runtime and exported back verbatim.

The node travels in the graph as text: a model of one node, its small constants inside. Nothing flows back through
it, and to the analyses it is an unknown operator: what feeds it and what it feeds keeps all its channels.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper, shape_inference

from ..support.errors import CaptureError
from . import opaque_operator as onnx_operator  # noqa: F401 - registers the operator
from .call import BORROWED, DTYPES, ELEMENT_TYPES, Constant, OnnxCall, Sizes, Unsupported
from .file import model_tensors
from .functions import STANDARD
from .session import reference_session, run_reference

#: Constants of so many whole numbers, or so many others, travel inside the node, so that shapes that depend on them
#: are known. Larger ones are weights, and the first input is what the node works on: these stay parameters.
_INLINE_NUMBERS = {"i": 512, "u": 512, "b": 512, "f": 16}
#: The domain whose operators ONNX Runtime brings along.
ORT_DOMAIN = "com.microsoft"
_OPAQUE_DOMAINS = (*STANDARD, ORT_DOMAIN, "ai.onnx.ml")

#: Nodes whose outputs or inputs are not tensors, or that hold graphs.
_NEVER = frozenset(
    {
        "If",
        "Loop",
        "Scan",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceLength",
        "SequenceMap",
        "SplitToSequence",
        "ConcatFromSequence",
        "Optional",
        "OptionalGetElement",
        "OptionalHasElement",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
        "StringNormalizer",
        "TfIdfVectorizer",
        "ImageDecoder",
    }
)


def can_be_opaque(op: str, domain: str, opset: int) -> bool:
    """Whether ONNX Runtime may know the operator as a function from tensors to tensors."""
    if op in _NEVER or domain not in _OPAQUE_DOMAINS:
        return False
    return domain not in STANDARD or onnx.defs.has(op, opset, "")


def opaque(call: OnnxCall) -> list[torch.Tensor | None]:
    """The outputs of a node through `foldcut::onnx_node`. Raises Unsupported when ONNX Runtime does not know the node
    or its values have no torch type."""
    text, tensors = _describe(call)
    for output in _typed(text).graph.output:
        if output.type.tensor_type.elem_type in DTYPES:
            _element_type(DTYPES[output.type.tensor_type.elem_type])
    results = iter(torch.ops.foldcut.onnx_node(tensors, text))
    return [next(results) if output.name else None for output in call.node.outputs]


def _describe(call: OnnxCall) -> tuple[str, list[torch.Tensor]]:
    names, tensors, constants = [], [], []
    for index, value in enumerate(call.inputs):
        if value is None:
            names.append("")
            continue
        names.append(f"in{index}")
        if isinstance(value, Constant) and index and _is_setting(value.array):
            constants.append(numpy_helper.from_array(np.asarray(value.array, order="C"), f"in{index}"))
        elif isinstance(value, Sizes) and all(isinstance(v, (int, float)) for v in value.values.reshape(-1)):
            array = value.values.astype(np.int64 if value.dtype == torch.int64 else np.float32)
            constants.append(numpy_helper.from_array(array, f"in{index}"))
        else:
            tensors.append(call.tensor(index))
    inputs = [
        helper.make_tensor_value_info(name, _element_type(tensor.dtype), _declared(tensor))
        for name, tensor in zip((n for n in names if n and n not in {c.name for c in constants}), tensors, strict=True)
    ]
    outputs = [f"out{i}" if output.name else "" for i, output in enumerate(call.node.outputs)]
    node = helper.make_node(call.node.op, names, outputs, name=call.node.name, domain=call.node.domain or "")
    node.attribute.extend(_attributes(call))
    graph = helper.make_graph([node], "node", inputs, [onnx.ValueInfoProto(name=o) for o in outputs if o], constants)
    domains = {"": call.opset, node.domain: call.opset if node.domain in STANDARD else 1}
    model = helper.make_model(
        graph, ir_version=10, opset_imports=[helper.make_opsetid(d, v) for d, v in domains.items()]
    )
    return base64.b64encode(model.SerializeToString(deterministic=True)).decode(), tensors


def _is_setting(array: np.ndarray[Any, Any]) -> bool:
    return array.size <= _INLINE_NUMBERS.get(array.dtype.kind, 0)


def _declared(tensor: torch.Tensor) -> list[int | None]:
    """The shape that the node's model declares. Lists keep their length, which ONNX wants to know (the sizes of a
    Resize); all else stays open, so that one text serves every size."""
    sizes = list(tensor.shape) if tensor.dim() == 1 else [None] * tensor.dim()
    return [s if isinstance(s, int) else None for s in sizes]


def _element_type(dtype: torch.dtype) -> int:
    if dtype not in ELEMENT_TYPES or dtype in BORROWED.values():
        raise Unsupported(f"{dtype} values between torch and ONNX Runtime")
    return ELEMENT_TYPES[dtype]


def _attributes(call: OnnxCall) -> list[onnx.AttributeProto]:
    import onnx_graphsurgeon as gs

    found = []
    for name, value in call.node.attrs.items():
        if isinstance(value, gs.Tensor):
            value = numpy_helper.from_array(np.asarray(value.values))
        if isinstance(value, (gs.Graph, gs.Node.AttributeRef)):
            raise Unsupported(f"the attribute {name} is a graph")
        found.append(helper.make_attribute(name, value))
    return found


def node_model(text: str) -> onnx.ModelProto:
    """The model of one node behind the text that an opaque node carries."""
    try:
        model = onnx.ModelProto.FromString(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, TypeError) as cause:
        raise CaptureError(f"an opaque node holds no ONNX node: {cause}") from cause
    outside = any(t.data_location == onnx.TensorProto.EXTERNAL for t in model_tensors(model))
    if outside or model.functions or len(model.graph.node) != 1:  # the text may come from a file
        raise CaptureError(
            "an opaque node holds more than one ONNX node with its constants", hint="the file is damaged"
        )
    return model


@lru_cache(maxsize=256)
def _session(text: str) -> Any:
    return reference_session(_typed(text).SerializeToString(), optimise=False)


@lru_cache(maxsize=256)
def _typed(text: str) -> onnx.ModelProto:
    """The model of one node with the types of its outputs, as far as ONNX infers them."""
    model = node_model(text)
    try:
        return shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # an operator of another domain: ONNX Runtime infers by itself
        return model


def run_node(inputs: Sequence[torch.Tensor], node: str) -> list[torch.Tensor]:
    """The outputs of the node behind the text, from ONNX Runtime on the CPU, where the inputs are. Raises CaptureError
    when it does not run."""
    device = inputs[0].device if inputs else torch.device("cpu")
    arrays = [t.detach().cpu().contiguous().numpy() for t in inputs]
    # copies, of the canonical type of their size: ONNX Runtime gives a ulonglong, which torch does not know
    return [torch.from_numpy(value.astype(np.dtype(value.dtype.str))).to(device) for value in _run(arrays, node)]


def _run(arrays: Sequence[np.ndarray[Any, Any]], node: str) -> list[np.ndarray[Any, Any]]:
    names = [i.name for i in node_model(node).graph.input]
    return run_reference(_session(node), dict(zip(names, arrays, strict=True)))


def infer_node(inputs: Sequence[torch.Tensor], node: str) -> list[torch.Tensor]:
    """Types and shapes: from ONNX's own inference, symbolic dimensions by name; a size that depends on the data becomes
    a new symbol. What ONNX does not infer is tried on zeros at two sizes."""
    shapes, symbols = _named_shapes(inputs)
    outputs = _inferred(node, shapes)
    if outputs is None:
        return _tried(inputs, node)
    results = []
    for dtype, dims in outputs:
        sizes = [d if isinstance(d, int) else symbols[d] if d in symbols else _new_size() for d in dims]
        results.append(torch.empty(sizes, dtype=dtype, device="cpu" if not inputs else inputs[0].device))
    return results


def _new_size() -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size()


def _named_shapes(inputs: Sequence[torch.Tensor]) -> tuple[tuple[tuple[int | str, ...], ...], dict[str, torch.SymInt]]:
    symbols: dict[str, torch.SymInt] = {}
    shapes: list[tuple[int | str, ...]] = []
    for tensor in inputs:
        sizes: list[Any] = list(tensor.shape)
        symbols |= {str(s): s for s in sizes if not isinstance(s, int)}
        shapes.append(tuple(s if isinstance(s, int) else str(s) for s in sizes))
    return tuple(shapes), symbols


@lru_cache(maxsize=1024)
def _inferred(text: str, shapes: tuple[tuple[int | str, ...], ...]) -> list[tuple[torch.dtype, list[int | str]]] | None:
    """(dtype, dims) of each output, None when ONNX does not know them."""
    model = node_model(text)
    for value, shape in zip(model.graph.input, shapes, strict=True):
        number = value.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(value.name, number, list(shape)))
    try:
        inferred = shape_inference.infer_shapes(model, data_prop=True, strict_mode=True)
    except Exception:  # not one of ONNX's own operators
        return None
    found: list[tuple[torch.dtype, list[int | str]]] = []
    for output in inferred.graph.output:
        kind = output.type.tensor_type
        if kind.elem_type not in DTYPES or not kind.HasField("shape"):
            return None
        dims: list[int | str] = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim]
        found.append((DTYPES[kind.elem_type], dims))
    return found


def _tried(inputs: Sequence[torch.Tensor], node: str) -> list[torch.Tensor]:
    """Shapes from two runs on zeros with different symbols: equal sizes are fixed, the others follow an input's."""
    candidates = [s for t in inputs for s in t.shape if isinstance(s, torch.SymInt)]
    runs = []
    for shift in (0, 1):
        zeros = [
            np.zeros([_concrete(s, shift) for s in t.shape], helper.tensor_dtype_to_np_dtype(ELEMENT_TYPES[t.dtype]))
            for t in inputs
        ]
        runs.append(_run(zeros, node))
    results = []
    for first, second in zip(*runs, strict=True):
        sizes: list[Any] = []
        for a, b in zip(first.shape, second.shape, strict=True):
            match = next((c for c in candidates if (_concrete(c, 0), _concrete(c, 1)) == (a, b)), None)
            sizes.append(a if a == b else match if match is not None else _new_size())
        results.append(torch.empty(sizes, dtype=DTYPES[helper.np_dtype_to_tensor_dtype(first.dtype)]))
    return results


def _concrete(size: int | torch.SymInt, shift: int) -> int:
    """A size as a number: every symbol at the value that it was traced with, plus `shift`."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    hints = size.node.shape_env.backed_var_to_val
    return int(expr.xreplace({s: int(hints.get(s, 2)) + shift for s in expr.free_symbols}))
