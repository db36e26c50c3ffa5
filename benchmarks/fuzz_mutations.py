"""The ways in which onnx_fuzz.py damages a model. A case is determined by (seed, case number) alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
from fuzz_models import MODELS
from onnx import TensorProto, helper, numpy_helper

T = TypeVar("T")

_EDGES = [2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63)]
#: Numbers that a size, an axis or an attribute may be replaced by.
NUMBERS = [0, 1, -1, 2, -2, 3, 5, 7, 64, 255, 4096, 65537, *_EDGES]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, 1e-30, 1e30, -1e30, float("inf"), float("nan")]
TEXTS = ["", "NOTSET", "SAME_LOWER", "VALID", "linear", "cubic", "reflect", "x" * 5000, "\x00", "ij->ji"]
NAMES = ["", " ", "forward", "__class__", "training", "a.b", ".", "..", "a\nb", "'; import os", "\u00e9", "n" * 5000]
_OPS = """
    Relu Add Mul Sub Div MatMul Gemm Conv ConvTranspose MaxPool AveragePool GlobalAveragePool Reshape Transpose Concat
    Split Slice Gather GatherND GatherElements ScatterND ScatterElements Expand Tile Pad Resize Shape Size Range Where
    ConstantOfShape TopK NonZero NonMaxSuppression Unique Compress Softmax LayerNormalization BatchNormalization LSTM
    GRU Einsum CumSum Cast Squeeze Unsqueeze Flatten ReduceMean ReduceSum ArgMax OneHot Trilu EyeLike
    QuantizeLinear DequantizeLinear Dropout Identity Pow Erf Clip Mod If Loop Scan SequenceEmpty RandomNormal NoSuchOp
    DepthToSpace
"""
OPS = _OPS.split()


class NothingToDo(Exception):  # noqa: N818 - a draw that does not fit the model: another model is drawn
    """The model has no place for this kind of damage."""


@dataclass(frozen=True)
class Case:
    """A damaged file and what was done to it."""

    number: int
    model: str
    mutation: str
    detail: str
    content: bytes


class _Draw:
    """Seeded choices."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def one(self, items: Sequence[T]) -> T:
        if not items:
            raise NothingToDo
        return items[int(self.rng.integers(len(items)))]

    def two(self, items: Sequence[T]) -> tuple[T, T]:
        if len(items) < 2:
            raise NothingToDo
        first, second = self.rng.choice(len(items), 2, replace=False)
        return items[int(first)], items[int(second)]

    def below(self, limit: int) -> int:
        return int(self.rng.integers(limit))

    def number(self) -> int:
        return self.one(NUMBERS) if self.below(3) else self.below(20) - 4


Mutation = Callable[[onnx.ModelProto, _Draw], str]
_MUTATIONS: dict[str, Mutation] = {}


def make_case(seed: int, number: int) -> Case:
    """The file of a case."""
    draw = _Draw(np.random.default_rng([seed, number]))
    kinds = [*BYTES, *_MUTATIONS]
    mutation = kinds[number % len(kinds)]
    while True:
        name = draw.one(list(MODELS))
        model = MODELS[name]()
        try:
            if mutation in BYTES:
                content, detail = BYTES[mutation](model.SerializeToString(), draw)
            else:
                detail = _MUTATIONS[mutation](model, draw)
                content = model.SerializeToString()
        except NothingToDo:
            continue
        return Case(number, name, mutation, detail, content)


def _mutation(function: Mutation) -> Mutation:
    _MUTATIONS[function.__name__.replace("_", " ")] = function
    return function


def _flips(content: bytes, draw: _Draw) -> tuple[bytes, str]:
    changed, places = bytearray(content), []
    for _ in range(1 + draw.below(8)):
        places.append(draw.below(len(changed)))
        changed[places[-1]] ^= 1 << draw.below(8) if draw.below(2) else 1 + draw.below(255)
    return bytes(changed), f"bytes {sorted(places)}"


def _truncation(content: bytes, draw: _Draw) -> tuple[bytes, str]:
    end = draw.below(len(content))
    return content[:end], f"{end} of {len(content)} bytes left"


def _splice(content: bytes, draw: _Draw) -> tuple[bytes, str]:
    start, to, length = draw.below(len(content)), draw.below(len(content)), 1 + draw.below(200)
    return content[:to] + content[start : start + length] + content[to:], f"{length} bytes from {start} copied to {to}"


def _gap(content: bytes, draw: _Draw) -> tuple[bytes, str]:
    start, length = draw.below(len(content)), 1 + draw.below(64)
    return content[:start] + content[start + length :], f"{length} bytes taken out at {start}"


#: Damage to the file itself.
BYTES: dict[str, Callable[[bytes, _Draw], tuple[bytes, str]]] = {
    "byte flips": _flips,
    "truncation": _truncation,
    "copied bytes": _splice,
    "missing bytes": _gap,
}


def _without_one(elements: Any, draw: _Draw) -> str:
    place = draw.below(len(elements))
    name = str(elements[place].name)
    del elements[place]
    return name


@_mutation
def dropped_node(model: onnx.ModelProto, draw: _Draw) -> str:
    return _without_one(model.graph.node, draw)


@_mutation
def wrong_shape(model: onnx.ModelProto, draw: _Draw) -> str:
    graph = model.graph
    value = draw.one([*graph.input, *graph.output, *(graph.value_info if draw.below(2) else [])])
    dims = value.type.tensor_type.shape.dim
    before = f"{value.name}: {[d.dim_param or d.dim_value for d in dims]}"
    choice = draw.below(4)
    if choice == 0:
        dims.add().dim_value = draw.number()
    elif choice == 1 and len(dims):
        del dims[draw.below(len(dims))]
    elif choice == 2 and draw.below(4) == 0:
        value.type.tensor_type.ClearField("shape")
    elif len(dims):
        draw.one(list(dims)).dim_value = draw.number()
    return f"{before} -> {[d.dim_param or d.dim_value for d in dims]}"


@_mutation
def wrong_type(model: onnx.ModelProto, draw: _Draw) -> str:
    value = draw.one([*model.graph.input, *model.graph.output])
    value.type.tensor_type.elem_type = draw.below(28)
    return f"{value.name} is of type {value.type.tensor_type.elem_type}"


@_mutation
def cycle(model: onnx.ModelProto, draw: _Draw) -> str:
    nodes = model.graph.node
    place = draw.below(len(nodes))
    later = draw.one([o for node in list(nodes)[place:] for o in node.output if o])
    if not nodes[place].input:
        raise NothingToDo
    nodes[place].input[draw.below(len(nodes[place].input))] = later
    return f"{nodes[place].name} reads {later}"


@_mutation
def duplicated_name(model: onnx.ModelProto, draw: _Draw) -> str:
    graph = model.graph
    choice = draw.below(4)
    if choice == 0:
        one, other = draw.two(list(graph.initializer))
        one.name = other.name
        return f"two initializers {one.name}"
    if choice == 1:
        node, other = draw.two(list(graph.node))
        node.name = other.name
        return f"two nodes {node.name}"
    node = draw.one(list(graph.node))
    place = draw.below(len(node.output))
    names = [o for n in graph.node for o in n.output] + [v.name for v in (*graph.input, *graph.initializer)]
    node.output[place] = draw.one(names)
    return f"{node.name} writes {node.output[place]}"


@_mutation
def hostile_name(model: onnx.ModelProto, draw: _Draw) -> str:
    """A name that is legal in a file but may mean something to Python or to torch, in every place where it stands."""
    graph, name = model.graph, draw.one(NAMES)
    if draw.below(4) == 0:
        node = draw.one(list(graph.node))
        node.name = name
        return f"a node is called {name[:20]!r}"
    values = [*graph.input, *graph.output, *graph.initializer]
    old = draw.one([v.name for v in values])
    for value in (*values, *graph.value_info):
        value.name = name if value.name == old else value.name
    for node in graph.node:
        for names in (node.input, node.output):
            for place, found in enumerate(names):
                names[place] = name if found == old else found
    return f"{old} is called {name[:20]!r}"


@_mutation
def attribute_value(model: onnx.ModelProto, draw: _Draw) -> str:
    node = draw.one([n for n in model.graph.node if n.attribute])
    attribute = draw.one(list(node.attribute))
    if attribute.HasField("i"):
        attribute.i = draw.number()
    elif attribute.HasField("f"):
        attribute.f = draw.one(FLOATS)
    elif attribute.HasField("s"):
        attribute.s = draw.one(TEXTS).encode()
    elif attribute.ints and draw.below(3):
        attribute.ints[draw.below(len(attribute.ints))] = draw.number()
    elif attribute.ints:
        _resize(attribute.ints, draw)
    else:
        attribute.name += "_"
    text = helper.printable_attribute(attribute)
    return f"{node.name}: {text[:100]}"


def _resize(numbers: Any, draw: _Draw) -> None:
    if draw.below(2):
        numbers.append(draw.number())
    else:
        numbers.pop()


@_mutation
def attribute_changed(model: onnx.ModelProto, draw: _Draw) -> str:
    """An attribute is lost, becomes another type, or one appears that nobody asked for."""
    choice = draw.below(3)
    node = draw.one([n for n in model.graph.node if n.attribute or choice == 2])
    if choice == 0:
        place = draw.below(len(node.attribute))
        name = node.attribute[place].name
        del node.attribute[place]
        return f"{node.name} has lost {name}"
    names = [a.name for n in model.graph.node for a in n.attribute]
    name = draw.one([a.name for a in node.attribute]) if choice == 1 else draw.one(names)
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    value = draw.one([draw.number() % 2**31, 0.5, "text", [1, 2], [0.5]])
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
    return f"{node.name}: {name} = {value!r}"


@_mutation
def op_type(model: onnx.ModelProto, draw: _Draw) -> str:
    node = draw.one(list(model.graph.node))
    old, node.op_type = node.op_type, draw.one(OPS)
    return f"{node.name}: {old} -> {node.op_type}"


@_mutation
def domain(model: onnx.ModelProto, draw: _Draw) -> str:
    node = draw.one(list(model.graph.node))
    node.domain = draw.one(["com.microsoft", "ai.onnx.ml", "ai.onnx", "my.domain", "ai.onnx.training"])
    if draw.below(2):
        model.opset_import.append(helper.make_opsetid(node.domain, 1 + draw.below(3)))
    return f"{node.name} ({node.op_type}) is in {node.domain}"


@_mutation
def swapped_inputs(model: onnx.ModelProto, draw: _Draw) -> str:
    node = draw.one([n for n in model.graph.node if len(n.input) > 1])
    first, second = draw.two(range(len(node.input)))
    node.input[first], node.input[second] = node.input[second], node.input[first]
    return f"{node.name}: inputs {first} and {second}"


@_mutation
def other_input(model: onnx.ModelProto, draw: _Draw) -> str:
    """An input is another value of the graph, or left out, or one too many."""
    node = draw.one([n for n in model.graph.node if n.input])
    place, choice = draw.below(len(node.input)), draw.below(4)
    values = [o for n in model.graph.node for o in n.output] + [t.name for t in model.graph.initializer]
    name = "" if choice == 0 else draw.one(values)
    if choice == 1:
        node.input.append(name)
    else:
        node.input[place] = name
    return f"{node.name}: inputs {list(node.input)}"


@_mutation
def outputs(model: onnx.ModelProto, draw: _Draw) -> str:
    """The graph declares other outputs, or a node writes more or fewer."""
    graph, choice = model.graph, draw.below(4)
    names = [o for n in graph.node for o in n.output] + [v.name for v in (*graph.input, *graph.initializer)]
    node = draw.one(list(graph.node))
    if choice == 0:
        graph.output.append(helper.make_tensor_value_info(draw.one(names), TensorProto.FLOAT, None))
        return f"another output {graph.output[-1].name}"
    if choice == 1:
        graph.output[0].name = draw.one(names)
        return f"the first output is {graph.output[0].name}"
    if choice == 2:
        node.output.append("surplus")
        return f"{node.name} writes one more"
    name = node.output.pop()
    return f"{node.name} does not write {name}"


@_mutation
def initializer_dims(model: onnx.ModelProto, draw: _Draw) -> str:
    tensor = draw.one(list(model.graph.initializer))
    if tensor.dims and draw.below(2) == 0:  # data and shape agree, but the network expects another one
        array = numpy_helper.to_array(draw.one(list(model.graph.initializer)))
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    elif tensor.dims and draw.below(3):
        tensor.dims[draw.below(len(tensor.dims))] = draw.number()
    else:
        tensor.dims.append(draw.number())
    return f"{tensor.name}: {list(tensor.dims)}"


@_mutation
def initializer_dtype(model: onnx.ModelProto, draw: _Draw) -> str:
    tensor = draw.one(list(model.graph.initializer))
    if draw.below(2):
        tensor.data_type = draw.below(28)
        return f"{tensor.name} is of type {tensor.data_type}"
    dtype = draw.one([np.float16, np.float64, np.int32, np.int64, np.int8, np.uint8, np.bool_, np.complex64])
    with np.errstate(all="ignore"):
        array = numpy_helper.to_array(tensor).astype(dtype)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return f"{tensor.name} was converted to {np.dtype(dtype)}"


@_mutation
def initializer_values(model: onnx.ModelProto, draw: _Draw) -> str:
    """Another size, axis or index; not-a-number among the weights."""
    tensor = draw.one([t for t in model.graph.initializer if t.data_type == TensorProto.INT64 or draw.below(4) == 0])
    array = np.array(numpy_helper.to_array(tensor))
    if array.size == 0:
        raise NothingToDo
    place, kind = draw.below(array.size), array.dtype.kind
    value = draw.one(FLOATS) if kind == "f" else draw.number() if array.dtype.itemsize == 8 else draw.below(100)
    with np.errstate(all="ignore"):
        array.reshape(-1)[place] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return f"{tensor.name}[{place}] = {value}"


@_mutation
def deleted_initializer(model: onnx.ModelProto, draw: _Draw) -> str:
    return _without_one(model.graph.initializer, draw)


@_mutation
def opset(model: onnx.ModelProto, draw: _Draw) -> str:
    """Another opset or IR version than the one that the graph is written in."""
    if draw.below(5) == 0:
        model.ir_version = draw.one([0, 1, 3, 7, 9, 13, 14, 100, 2**40])
        return f"IR version {model.ir_version}"
    model.opset_import[0].version = draw.one([*range(6, 30), 0, -1, 2**40])
    return f"opset {model.opset_import[0].version}"


@_mutation
def external_data(model: onnx.ModelProto, draw: _Draw) -> str:
    """Weights that claim to lie in another file."""
    tensor = draw.one([t for t in model.graph.initializer if t.raw_data])
    places = ["", "/etc/passwd", "../../etc/passwd", "weights.bin", ".", "model.onnx", "C:\\x", "a/../../x", "\x00"]
    info = {"location": draw.one(places), "offset": str(draw.number()), "length": str(draw.number())}
    if draw.below(3) == 0:
        del info["length"]
    if draw.below(2):
        tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in info.items():
        tensor.external_data.add(key=key, value=value)
    return f"{tensor.name}: {info}"


@_mutation
def order(model: onnx.ModelProto, draw: _Draw) -> str:
    """Nodes out of order."""
    first, second = draw.two(range(len(model.graph.node)))
    nodes = list(model.graph.node)
    nodes[first], nodes[second] = nodes[second], nodes[first]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return f"nodes {first} and {second}"
