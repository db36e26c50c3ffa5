"""An ONNX model in half precision: what may overflow stays float32, and the result is checked against the original.

ONNX Runtime's own converter is not used. It hands the value between two operators that it keeps in float32 through
float16, which is the overflow that they were kept for, and casts one value twice under one name, which makes the model
illegal. Nor is a converted model checked by running it: on a CPU ONNX Runtime computes it in float32 and leaves the
casts out, so that no overflow shows. What is run instead is the same float32 graph with every value rounded to float16
wherever the converted model stores one: half-precision storage with float32 arithmetic inside each operator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...compiler.support.errors import BackendError, first_line
from ..measure.backend import Array
from ..measure.inputs import InputSpec, check_inputs, session_specs
from ..onnxruntime.backend import create_session

if TYPE_CHECKING:
    import onnx

LARGEST_HALF = 65504.0
_ROWS = 8  # samples in one run: bounds the memory of the activations

#: Accumulate, divide or raise to a power: what loses most in half precision.
_SENSITIVE = frozenset(
    {
        *("AveragePool", "GlobalAveragePool", "GlobalLpPool", "CumSum", "Einsum"),
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum"),
        *("ReduceSumSquare", "BatchNormalization", "GroupNormalization", "InstanceNormalization"),
        *("LayerNormalization", "LpNormalization", "MeanVarianceNormalization", "RMSNormalization"),
        *("Div", "Erf", "Exp", "Log", "LogSoftmax", "Pow", "Reciprocal", "Softmax", "Softplus", "Sqrt"),
    }
)
#: Their attribute, not their inputs, says what they return; or their scales are part of a calibration.
_BY_ATTRIBUTE = frozenset({"to", "dtype", "output_dtype"})
_QUANTISERS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


@dataclass(frozen=True, kw_only=True)
class HalfPrecision:
    """A model converted to half precision; its inputs and outputs have the types that they had.

    `error` is the largest difference to the float32 outputs on the samples, relative to the largest value of that
    output. `kept` says of each operator that stays float32 why, `converted` counts the others; operators on integers
    only are in neither.
    """

    model: bytes = field(repr=False)
    kept: Mapping[str, str]
    converted: int
    error: float


def to_half_precision(
    model: bytes, samples: Mapping[str, Array], *, tolerance: float = 0.01, headroom: float = 4.0
) -> HalfPrecision:
    """Convert a float32 ONNX model to half precision, guided by sample inputs.

    An operator stays float32 when ONNX has no half-precision form of it, or when a value that it reads or writes comes
    within a factor `headroom` of 65,504 on `samples` (one array per input; the first dimension is the batch). When the
    outputs then differ by more than `tolerance` (relative to each output's largest value), reductions, norms, softmax,
    divisions and powers stay float32 as well.

    Raises BackendError: the outputs still differ by more than that (with the figures), the samples do not fit, the
    model has control flow, or ONNX Runtime cannot run it. ValueError: `tolerance` or `headroom` out of range.
    """
    if not tolerance > 0 or not headroom >= 1:
        raise ValueError(f"tolerance must be above 0 and headroom at least 1: {tolerance}, {headroom}")
    graph = _TypedModel(model)
    session = create_session(model)
    pieces = list(_pieces(session_specs(session), samples))
    expected = [_run(session, piece) for piece in pieces]
    del session
    kept = _must_stay(graph, _ranges(graph, pieces), LARGEST_HALF / headroom)
    first = _difference(graph, kept, pieces, expected)
    error = first
    if not first <= tolerance:
        kept = {**_sensitive(graph), **kept}
        error = _difference(graph, kept, pieces, expected)
    if not error <= tolerance:
        raise BackendError(
            "the model cannot be converted to half precision within the tolerance",
            expected=f"outputs within {tolerance:g}, relative to the largest",
            actual=f"{first:.3g}; {error:.3g} with reductions, norms, softmax, divisions and powers in float32",
            hint="build in fp32, or raise the tolerance (TensorRTBackend: half_tolerance) if the task allows it",
        )
    converted = _Rewriter(graph, kept, rounded_only=False).model()
    _run(create_session(converted), pieces[0])  # a model that does not load must not leave this function
    return HalfPrecision(model=converted, kept=kept, converted=len(graph.of_floats()) - len(kept), error=error)


class _TypedModel:
    """A model with the element types of its values. Constants become initializers, so that each has one place."""

    def __init__(self, model: bytes) -> None:
        import onnx

        if len(model) >= onnx.checker.MAXIMUM_PROTOBUF:
            raise BackendError("a model above 2 GB cannot be converted to half precision", hint="build it in fp32")
        try:
            self.proto = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model))
        except Exception as cause:
            raise BackendError(
                f"the model cannot be read: {first_line(cause)}", hint="check the file with onnx.checker"
            ) from cause
        self._lift_constants()
        graph = self.proto.graph
        self.opsets = {entry.domain or "": entry.version for entry in self.proto.opset_import}
        fed = {value.name for value in graph.input}
        # an initializer that is an input too may be overridden, so it is treated as the input that it is
        self.weights = {weight.name: weight for weight in graph.initializer if weight.name not in fed}
        self.nodes: dict[str, onnx.NodeProto] = {}
        for index, node in enumerate(graph.node):
            label = str(node.name) or f"{node.op_type} {index}"
            self.nodes[label if label not in self.nodes else f"{label} ({index})"] = node
        self.types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
        self.types |= {weight.name: weight.data_type for weight in graph.initializer}
        self.on_grids = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        self.on_grids |= {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
        inner = {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}
        for label, node in self.nodes.items():
            if inner & {attribute.type for attribute in node.attribute}:
                raise BackendError(
                    "control flow is not converted to half precision", node=label, hint="build the model in fp32"
                )

    def is_float(self, value: str) -> bool:
        return self.types.get(value) == 1  # TensorProto.FLOAT

    def of_floats(self) -> list[tuple[str, onnx.NodeProto]]:
        """The operators that read or write float32 values, or values of which the type is not known."""
        return [
            (label, node)
            for label, node in self.nodes.items()
            if any(value and self.types.get(value, 0) in (0, 1) for value in (*node.input, *node.output))
        ]

    def _lift_constants(self) -> None:
        graph = self.proto.graph
        kept: list[onnx.NodeProto] = []
        for node in graph.node:
            tensors = [attribute.t for attribute in node.attribute if attribute.name == "value"]
            if node.op_type == "Constant" and node.domain == "" and tensors:
                weight = graph.initializer.add()
                weight.CopyFrom(tensors[0])
                weight.name = node.output[0]
            else:
                kept.append(node)
        del graph.node[:]
        graph.node.extend(kept)


def _must_stay(graph: _TypedModel, ranges: Mapping[str, float], limit: float) -> dict[str, str]:
    """The operators that must stay float32, with the reasons."""
    kept = {}
    for label, node in graph.of_floats():
        slots = half_slots(graph.opsets, node)
        reason = "ONNX has no half-precision form of it" if slots is None else _type_problem(graph, node, slots)
        reason = reason or _range_problem(graph, node, slots or frozenset(), ranges, limit)
        if reason:
            kept[label] = reason
    return kept


def _type_problem(graph: _TypedModel, node: onnx.NodeProto, slots: frozenset[int]) -> str:
    named = [value for value in (*node.input, *node.output) if value]
    if any(not graph.types.get(value) for value in named):
        return "the type of a value that it reads or writes is not known"
    if any(value in graph.on_grids for value in named):
        return "it is computed in integers"  # casts beside QuantizeLinear would end that
    if not any(graph.is_float(value) for index, value in enumerate(node.input) if index in slots):
        return "it reads no float32 value"
    return ""


def _range_problem(
    graph: _TypedModel, node: onnx.NodeProto, slots: frozenset[int], ranges: Mapping[str, float], limit: float
) -> str:
    read = [value for index, value in enumerate(node.input) if index in slots]
    for value in (*read, *node.output):
        # "not <=" so that a range that is not a number counts as too large
        if graph.is_float(value) and not ranges.get(value, 0.0) <= limit:
            return f"'{value}' reaches {ranges[value]:.3g}"
    return ""


def _sensitive(graph: _TypedModel) -> dict[str, str]:
    reason = "it accumulates, divides or raises to a power"
    return {label: reason for label, node in graph.of_floats() if node.op_type in _SENSITIVE}


def half_slots(opsets: Mapping[str, int], node: onnx.NodeProto) -> frozenset[int] | None:
    """The inputs of `node` that turn to float16 when the node does, by ONNX's own schema of the operator; None when it
    cannot return float16. Inputs that the schema fixes as float32 (the scales of Resize) are not among them."""
    import onnx

    fixed = node.op_type in _QUANTISERS or any(attribute.name in _BY_ATTRIBUTE for attribute in node.attribute)
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:
        return None
    variables = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}
    formals = [_formal(schema.inputs, index) for index in range(len(node.input))]
    slots = frozenset(index for index, formal in enumerate(formals) if formal in variables)
    bound = {formals[index] for index in slots}
    constraints = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    for index, value in enumerate(node.output):
        formal = _formal(schema.outputs, index)
        may_be_float = "tensor(float)" in constraints.get(formal, (formal,))
        if value and may_be_float and formal not in bound:
            return None
    return None if fixed or not slots else slots


def _formal(formals: Sequence[Any], index: int) -> str:
    return str(formals[min(index, len(formals) - 1)].type_str)  # the last one may be variadic


class _Rewriter:
    """Writes the model anew, casting each value at most once in each direction.

    With `rounded_only` every tensor stays float32, and what the converted model holds as float16 is rounded to it.
    """

    def __init__(self, graph: _TypedModel, kept: Mapping[str, str], *, rounded_only: bool) -> None:
        self._graph, self._kept, self._rounded_only = graph, kept, rounded_only
        nodes = graph.nodes.values()
        # names of nodes as well: ONNX Runtime refuses a node named like another
        self._taken = set(graph.types) | {name for node in nodes for name in (node.name, *node.output)}
        self._half: dict[str, str] = {}  # a value's name -> the name that it has as float16
        self._unwritten: set[str] = set()  # values of which there is no float32 form yet
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def model(self) -> bytes:
        """The ONNX bytes of the new model."""
        for label, node in self._graph.nodes.items():
            self._add(node, half=label not in self._kept)
        for output in self._graph.proto.graph.output:
            self._as_float(output.name)
        return self._serialise()

    def _add(self, node: onnx.NodeProto, *, half: bool) -> None:
        import onnx

        slots = (half_slots(self._graph.opsets, node) or frozenset()) if half else frozenset()
        new = onnx.NodeProto()
        new.CopyFrom(node)
        for index, value in enumerate(node.input):
            if self._graph.is_float(value):
                new.input[index] = self._as_half(value) if index in slots else self._as_float(value)
        self._nodes.append(new)
        if half:
            for index, value in enumerate(node.output):
                if self._graph.is_float(value):
                    new.output[index] = self._name_half_output(value)

    def _name_half_output(self, value: str) -> str:
        """The name under which a converted operator writes `value`; its own name is left for the float32 form."""
        if self._rounded_only:
            raw = self._new_name(f"{value}_unrounded")
            self._round(raw, value)
            self._half[value] = value
            return raw
        self._half[value] = half = self._new_name(f"{value}_float16")
        self._unwritten.add(value)
        return half

    def _as_half(self, value: str) -> str:
        if value not in self._half:
            self._half[value] = half = self._new_name(f"{value}_float16")
            if value in self._graph.weights:
                self._weights.append(self._half_weight(value, half))
            elif self._rounded_only:
                self._round(value, half)
            else:
                self._cast(value, half, to=10)
        return self._half[value]

    def _as_float(self, value: str) -> str:
        if value in self._unwritten:
            self._unwritten.remove(value)
            self._cast(self._half[value], value, to=1)
        return value

    def _half_weight(self, value: str, name: str) -> onnx.TensorProto:
        from onnx import numpy_helper

        array = numpy_helper.to_array(self._graph.weights[value]).astype(np.float16)
        return numpy_helper.from_array(array.astype(np.float32) if self._rounded_only else array, name)

    def _round(self, source: str, target: str) -> None:
        between = self._new_name(f"{target}_stored")
        self._cast(source, between, to=10)
        self._cast(between, target, to=1)

    def _cast(self, source: str, target: str, *, to: int) -> None:
        from onnx import helper

        self._nodes.append(helper.make_node("Cast", [source], [target], name=self._new_name(f"{target}_cast"), to=to))

    def _new_name(self, wish: str) -> str:
        while wish in self._taken:
            wish += "_"
        self._taken.add(wish)
        return wish

    def _serialise(self) -> bytes:
        import onnx

        new = onnx.ModelProto()
        new.CopyFrom(self._graph.proto)
        read = {value for node in self._nodes for value in node.input} | {value.name for value in new.graph.output}
        fed = {value.name for value in new.graph.input}
        weights = [w for w in new.graph.initializer if w.name in read or w.name in fed] + self._weights
        del new.graph.initializer[:], new.graph.node[:], new.graph.value_info[:]
        new.graph.initializer.extend(weights)
        new.graph.node.extend(self._nodes)
        return bytes(new.SerializeToString())


def _ranges(graph: _TypedModel, pieces: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """The largest magnitude of each float32 value, measured inside ONNX Runtime: nothing but one number per value comes
    out of it, so that memory stays what one inference needs."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    fed = [value.name for value in graph.proto.graph.input]
    values = [v for v in (*fed, *(o for node in graph.nodes.values() for o in node.output)) if graph.is_float(v)]
    probe = onnx.ModelProto()
    probe.CopyFrom(graph.proto)
    del probe.graph.output[:]
    for index, value in enumerate(values):
        magnitude, largest = f"foldcut_magnitude_{index}", f"foldcut_largest_{index}"
        probe.graph.node.append(helper.make_node("Abs", [value], [magnitude]))
        probe.graph.node.append(helper.make_node("ReduceMax", [magnitude], [largest], keepdims=0))
        probe.graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
    session = create_session(bytes(probe.SerializeToString()))
    runs = np.array([_run(session, piece) for piece in pieces], dtype=np.float64)
    measured = dict(zip(values, runs.max(axis=0).tolist(), strict=True))
    weights = {w.name: numpy_helper.to_array(w) for w in graph.weights.values() if graph.is_float(w.name)}
    return measured | {name: float(np.abs(array).max()) if array.size else 0.0 for name, array in weights.items()}


def _difference(
    graph: _TypedModel,
    kept: Mapping[str, str],
    pieces: Sequence[Mapping[str, Array]],
    expected: Sequence[Sequence[Array]],
) -> float:
    """How far the rounded model's outputs are from `expected`, relative to the largest value of each output; infinite
    where a value that was finite is no more."""
    session = create_session(_Rewriter(graph, kept, rounded_only=True).model())
    actual = [_run(session, piece) for piece in pieces]
    worst = 0.0
    for ours, theirs in zip(zip(*actual, strict=True), zip(*expected, strict=True), strict=True):
        pairs = [_finite_pair(a, e) for a, e in zip(ours, theirs, strict=True)]
        largest = max((float(np.abs(e).max(initial=0.0)) for _, e in pairs), default=0.0)
        apart = max((float(np.abs(a - e).max(initial=0.0)) for a, e in pairs), default=0.0)
        worst = max(worst, apart / largest if largest > 0 else apart)
    return worst


def _finite_pair(actual: Array, expected: Array) -> tuple[Array, Array]:
    finite = np.isfinite(expected)
    ours, theirs = actual[finite].astype(np.float64), expected[finite].astype(np.float64)
    return np.where(np.isfinite(ours), ours, np.inf), theirs


def _pieces(specs: Sequence[InputSpec], samples: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """Cut the samples into runs of a few rows, or of as many as the model's batch is fixed to."""
    lengths = {len(array) if np.ndim(array) else -1 for array in samples.values()}
    fixed = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)}
    rows = max(fixed) if fixed else _ROWS
    count = max(lengths, default=0)
    if len(lengths) != 1 or len(fixed) > 1 or count <= rows:
        check_inputs(tuple(specs), samples)
        yield dict(samples)
        return
    for start in range(0, count - rows + 1 if fixed else count, rows):
        piece = {name: array[start : start + rows] for name, array in samples.items()}
        check_inputs(tuple(specs), piece)
        yield piece


def _run(session: Any, piece: Mapping[str, Array]) -> list[Array]:
    try:
        outputs: list[Array] = session.run(None, dict(piece))
    except Exception as cause:
        raise BackendError(
            f"ONNX Runtime could not run the model on the samples: {first_line(cause)}",
            hint="check that the samples' sizes fit each other and the model",
        ) from cause
    return outputs
