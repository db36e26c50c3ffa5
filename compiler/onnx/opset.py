"""Writing a model in an older operator set: what torch.onnx emits at opset 18, said in the words of opset 9 to 17.

torch's exporter knows no operator set below 18, and a file that came in at opset 13 has to go out at opset 13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..support.errors import ExportError
from .file import OLDEST_OPSET
from .functions import STANDARD

#: The oldest operator set that torch.onnx writes by itself.
EXPORTER_OPSET = 18
Nodes = list[onnx.NodeProto]


class Lowering:
    """One graph on its way down: its constants, its ranks, and fresh names. Rules return the nodes that stand for
    one."""

    def __init__(self, model: onnx.ModelProto, opset: int) -> None:
        self.graph, self.opset = model.graph, opset
        self.constants = {t.name: t for t in model.graph.initializer}
        values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
        self.ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}
        self.ranks |= {t.name: len(t.dims) for t in model.graph.initializer}
        self.sizes = {
            v.name: [d.dim_value if d.HasField("dim_value") else None for d in v.type.tensor_type.shape.dim]
            for v in values
        }
        self.types = {v.name: v.type.tensor_type.elem_type for v in values}
        self.types |= {t.name: t.data_type for t in model.graph.initializer}
        self._taken = {o for n in model.graph.node for o in n.output} | set(self.constants)

    def fresh(self, name: str) -> str:
        """A value name that nobody has."""
        candidate, number = name, 0
        while candidate in self._taken:
            number += 1
            candidate = f"{name}_{number}"
        self._taken.add(candidate)
        return candidate

    def constant(self, array: Any, like: str, dtype: Any = None) -> str:
        """A new initializer; returns its name."""
        tensor = numpy_helper.from_array(np.asarray(array, dtype=dtype), self.fresh(f"{like}_const"))
        self.graph.initializer.append(tensor)
        self.constants[tensor.name] = tensor
        self.ranks[tensor.name] = len(tensor.dims)
        return str(tensor.name)

    def scalar(self, value: float, node: onnx.NodeProto) -> str:
        """A scalar of the type of the node's first input."""
        dtype = helper.tensor_dtype_to_np_dtype(self.types.get(node.input[0], onnx.TensorProto.FLOAT))
        return self.constant(value, node.output[0], dtype)

    def known(self, node: onnx.NodeProto, index: int) -> list[Any] | None:
        """The elements of a constant input; None where it is left out. Raises ExportError when data computes it."""
        if len(node.input) <= index or not node.input[index]:
            return None
        tensor = self.constants.get(node.input[index])
        if tensor is None:
            raise self.refusal(node, f"its input {index} is computed")
        return list(numpy_helper.to_array(tensor).reshape(-1).tolist())

    def rank(self, node: onnx.NodeProto) -> int:
        """Rank of the first input. Raises ExportError when nobody knows it."""
        if node.input[0] not in self.ranks:
            raise self.refusal(node, "the rank of its input is not known")
        return self.ranks[node.input[0]]

    def refusal(self, node: onnx.NodeProto, reason: str = "") -> ExportError:
        """The error that says that the model needs a newer operator set."""
        return ExportError(
            f"{node.op_type} cannot be written in opset {self.opset}{': ' + reason if reason else ''}",
            node=node.name or node.output[0],
            hint=f"ask for opset {EXPORTER_OPSET} or newer (opset={EXPORTER_OPSET})",
        )


Rule = Callable[[Lowering, onnx.NodeProto], Nodes]
_RULES: dict[str, list[tuple[int, Rule]]] = {}


def below(opset: int, *ops: str) -> Callable[[Rule], Rule]:
    """Enter a rule that applies to operators when the target lies below `opset`."""

    def enter(rule: Rule) -> Rule:
        for op in ops:
            _RULES.setdefault(op, []).append((opset, rule))
        return rule

    return enter


def lower_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Rewrite `model`, in opset 18, to an older one, in place; nodes of other domains stay as they are. Same function
    up to rounding. Raises ExportError naming the node that has no older form."""
    if opset < OLDEST_OPSET:
        raise ExportError(f"opset {opset} is too old", expected=f"opset {OLDEST_OPSET} or newer")
    lowering = Lowering(model, opset)
    nodes = [low for node in list(model.graph.node) for low in _lowered(lowering, node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input} | {o.name for o in model.graph.output}
    unused = [t for t in model.graph.initializer if t.name not in read]
    for tensor in unused:
        model.graph.initializer.remove(tensor)
    for domain in model.opset_import:
        if domain.domain in STANDARD:
            domain.version = opset
    return model


def _lowered(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    if node.domain not in STANDARD:
        return [node]
    _positive_axis(lowering, node)
    nodes: Nodes = [node]
    for boundary, rule in sorted(_RULES.get(node.op_type, ()), key=lambda entry: -entry[0]):
        if lowering.opset < boundary and len(nodes) == 1 and nodes[0].op_type == node.op_type:
            nodes = rule(lowering, nodes[0])
    for low in nodes:
        gap = _gap(lowering, low)
        if gap is not None:
            raise lowering.refusal(low, gap)
    return nodes


def _gap(lowering: Lowering, node: onnx.NodeProto) -> str | None:
    """What the operator set has no word for: the operator, an attribute or a type; None where nothing is missing."""
    if not onnx.defs.has(node.op_type, lowering.opset, ""):
        return ""
    schema = onnx.defs.get_schema(node.op_type, lowering.opset, "")
    for given in node.attribute:
        if given.name not in schema.attributes:
            return f"its attribute {given.name}"
    for index, name in enumerate(node.input):
        if index >= schema.max_input:
            return f"its input {index}"
        number = lowering.types.get(name, onnx.TensorProto.UNDEFINED)
        kind = f"tensor({onnx.TensorProto.DataType.Name(number).lower()})"
        if number and kind not in schema.inputs[min(index, len(schema.inputs) - 1)].types:
            return f"values of type {kind}"
    return None


def _positive_axis(lowering: Lowering, node: onnx.NodeProto) -> None:
    """Axes count from the end since opset 11 only."""
    if lowering.opset >= 11:
        return
    for attribute in node.attribute:
        if attribute.name == "axis" and attribute.i < 0:
            attribute.i += lowering.rank(node)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value, or the default."""
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def remade(node: onnx.NodeProto, inputs: Sequence[str], drop: Sequence[str] = (), **attributes: Any) -> onnx.NodeProto:
    """The node with other inputs and attributes; None leaves an attribute out."""
    kept = [a for a in node.attribute if a.name not in {*drop, *attributes}]
    made = helper.make_node(node.op_type, inputs, node.output, name=node.name)
    made.attribute.extend(kept)
    made.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items() if v is not None)
    return made


@below(18, "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum")
@below(18, "ReduceLogSumExp", "ReduceSumSquare")
@below(13, "ReduceSum", "Squeeze", "Unsqueeze")
def _axes_as_attribute(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    axes = lowering.known(node, 1)
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        return [helper.make_node("Identity", [node.input[0]], node.output, name=node.name)]
    if axes and lowering.opset < 11 and min(axes) < 0:
        rank = lowering.rank(node) + (len(axes) if node.op_type == "Unsqueeze" else 0)
        axes = [a % rank for a in axes]
    return [remade(node, [node.input[0]], drop=["noop_with_empty_axes"], axes=axes or None)]


@below(18, "Split")
def _split_count(_lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    """Equal parts are what older versions do when no sizes are given; torch gives sizes for unequal ones."""
    return [remade(node, node.input, drop=["num_outputs"])]


@below(13, "Split")
def _split_sizes(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    return [remade(node, [node.input[0]], split=lowering.known(node, 1))]


@below(18, "Pad")
def _pad_everywhere(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    axes, pads = lowering.known(node, 3), lowering.known(node, 1)
    if axes is None or pads is None:
        return [node]
    rank, half = lowering.rank(node), len(axes)
    full = [0] * (2 * rank)
    for i, axis in enumerate(axes):
        full[axis % rank], full[rank + axis % rank] = pads[i], pads[half + i]
    return [remade(node, [node.input[0], lowering.constant(full, node.output[0], np.int64), *node.input[2:3]])]


@below(11, "Pad")
def _pad_by_attributes(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    value = lowering.known(node, 2)
    return [remade(node, [node.input[0]], pads=lowering.known(node, 1), value=float(value[0]) if value else 0.0)]


@below(18, "Resize")
def _resize_plain(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    if attribute(node, "antialias", 0) or attribute(node, "axes") or lowering.opset < 11:
        raise lowering.refusal(node)
    inputs = list(node.input)
    if lowering.opset < 13:  # region and scales may not be left out, only be empty
        for index in (1, 2):
            if len(inputs) <= index or not inputs[index]:
                inputs[index : index + 1] = [lowering.constant([], node.output[0], np.float32)]
    return [remade(node, inputs, drop=["antialias", "axes", "keep_aspect_ratio_policy"])]


@below(11, "Clip")
def _clip_by_attributes(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    low, high = lowering.known(node, 1), lowering.known(node, 2)
    return [remade(node, [node.input[0]], min=float(low[0]) if low else None, max=float(high[0]) if high else None)]


@below(13, "Softmax", "LogSoftmax")
def _softmax_last(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    """Before opset 13 softmax runs over everything from its axis on: the axis has to be the last one."""
    rank = lowering.rank(node)
    axis = attribute(node, "axis", -1) % rank
    if axis == rank - 1:
        return [remade(node, node.input, axis=axis)]
    order = list(range(rank))
    order[axis], order[-1] = order[-1], order[axis]
    moved, done = lowering.fresh(f"{node.output[0]}_moved"), lowering.fresh(f"{node.output[0]}_last")
    return [
        helper.make_node("Transpose", [node.input[0]], [moved], perm=order),
        helper.make_node(node.op_type, [moved], [done], name=node.name, axis=rank - 1),
        helper.make_node("Transpose", [done], node.output, perm=order),
    ]


@below(14, "Reshape")
def _reshape(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    constant = node.input[1] in lowering.constants  # a computed shape has no zeros unless the data is empty
    if attribute(node, "allowzero", 0) and constant and 0 in (lowering.known(node, 1) or []):
        raise lowering.refusal(node, "a dimension of size 0")
    return [remade(node, node.input, drop=["allowzero"])]


@below(15, "Shape")
def _shape_slice(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    start, end = attribute(node, "start", 0), attribute(node, "end")
    if not start and end is None:
        return [remade(node, node.input, drop=["start"])]
    whole = lowering.fresh(f"{node.output[0]}_all")
    nodes = [helper.make_node("Shape", node.input, [whole], name=node.name)]
    end = lowering.rank(node) if end is None else end
    if lowering.opset < 10:
        nodes.append(helper.make_node("Slice", [whole], node.output, starts=[start], ends=[end], axes=[0]))
        return nodes
    bounds = [lowering.constant([v], node.output[0], np.int64) for v in (start, end, 0)]
    nodes.append(helper.make_node("Slice", [whole, *bounds], node.output))
    return nodes


@below(10, "Slice")
def _slice_by_attributes(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    steps = lowering.known(node, 4)
    if steps and any(s != 1 for s in steps):
        raise lowering.refusal(node, "a step")
    starts, ends, axes = (lowering.known(node, i) for i in (1, 2, 3))
    if axes:
        axes = [a % lowering.rank(node) for a in axes]
    return [remade(node, [node.input[0]], starts=starts, ends=ends, axes=axes)]


@below(14, "BatchNormalization")
def _inference_only(_lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    return [remade(node, node.input, drop=["training_mode"])]


@below(12, "ArgMax", "ArgMin")
def _first_index(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    if attribute(node, "select_last_index", 0):
        raise lowering.refusal(node)
    return [remade(node, node.input, drop=["select_last_index"])]


@below(11, "TopK")
def _largest(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    if not attribute(node, "largest", 1):
        raise lowering.refusal(node, "the smallest elements")
    inputs = node.input if lowering.opset >= 10 else [node.input[0]]
    k = None if lowering.opset >= 10 else int((lowering.known(node, 1) or [1])[0])
    return [remade(node, inputs, drop=["largest", "sorted"], k=k)]


@below(11, "Gemm")
def _gemm_bias(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    """The third input of Gemm is optional since opset 11 only."""
    if len(node.input) > 2:
        return [node]
    return [remade(node, [*node.input[:2], lowering.scalar(0.0, node)])]


@below(10, "MaxPool", "AveragePool")
def _whole_windows(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    if attribute(node, "ceil_mode", 0) or any(d != 1 for d in attribute(node, "dilations", ())):
        raise lowering.refusal(node, "partial or dilated windows")
    return [remade(node, node.input, drop=["ceil_mode", "dilations"])]


@below(12, "GreaterOrEqual", "LessOrEqual")
def _negated(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    """a >= b is not a < b (both are false of NaN, which torch.onnx's own form of them does not tell apart either)."""
    other = lowering.fresh(f"{node.output[0]}_not")
    opposite = "Less" if node.op_type == "GreaterOrEqual" else "Greater"
    return [
        helper.make_node(opposite, node.input, [other]),
        helper.make_node("Not", [other], node.output, name=node.name),
    ]


@below(16, "ScatterND", "ScatterElements")
def _plain_scatter(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    if attribute(node, "reduction", b"none") != b"none":
        raise lowering.refusal(node, "a reduction")
    return [remade(node, node.input, drop=["reduction"])]


@below(14, "HardSwish")
def _hard_swish(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    gate = lowering.fresh(f"{node.output[0]}_gate")
    return [
        helper.make_node("HardSigmoid", node.input, [gate], alpha=1 / 6, beta=0.5),
        helper.make_node("Mul", [node.input[0], gate], node.output, name=node.name),
    ]


@below(18, "Mish")
def _mish(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    soft, gate = lowering.fresh(f"{node.output[0]}_soft"), lowering.fresh(f"{node.output[0]}_gate")
    return [
        helper.make_node("Softplus", node.input, [soft]),
        helper.make_node("Tanh", [soft], [gate]),
        helper.make_node("Mul", [node.input[0], gate], node.output, name=node.name),
    ]


@below(17, "LayerNormalization")
def _layer_norm(lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    """y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * scale + bias, over the dimensions from `axis` on."""
    if any(node.output[1:]):
        raise lowering.refusal(node, "mean and deviation as outputs")
    rank = lowering.rank(node)
    axes = list(range(attribute(node, "axis", -1) % rank, rank))
    out = node.output[0]
    mean, centred, square, variance, shifted, deviation, unit, scaled = (
        lowering.fresh(f"{out}_{part}")
        for part in ("mean", "centred", "square", "variance", "shifted", "deviation", "unit", "scaled")
    )
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else ""
    nodes = [
        helper.make_node("ReduceMean", [node.input[0]], [mean], axes=axes, keepdims=1),
        helper.make_node("Sub", [node.input[0], mean], [centred]),
        helper.make_node("Mul", [centred, centred], [square]),
        helper.make_node("ReduceMean", [square], [variance], axes=axes, keepdims=1),
        helper.make_node("Add", [variance, lowering.scalar(attribute(node, "epsilon", 1e-5), node)], [shifted]),
        helper.make_node("Sqrt", [shifted], [deviation]),
        helper.make_node("Div", [centred, deviation], [unit]),
        helper.make_node("Mul", [unit, node.input[1]], [scaled if bias else out], name=node.name),
    ]
    if bias:
        nodes.append(helper.make_node("Add", [scaled, bias], [out]))
    return nodes


@below(12, "Constant")
def _tensor_constant(_lowering: Lowering, node: onnx.NodeProto) -> Nodes:
    """Lists and numbers as constants came with opset 12."""
    plain = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    for a in node.attribute:
        if a.name in plain:
            array = np.asarray(helper.get_attribute_value(a), dtype=plain[a.name])
            return [helper.make_node("Constant", [], node.output, name=node.name, value=numpy_helper.from_array(array))]
    return [node]
