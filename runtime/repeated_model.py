"""One ONNX model several times over in one model: how the time of a part is told from the cost of running anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


def repeated(model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """`count` copies of a model of fixed shapes, each with weights of its own, as one model of the same inputs.

    One behind the other where the only output has the shape and type of the only input; else side by side on the same
    inputs, outputs added up where they are floating-point. The time of `count` copies less that of one is the time of
    `count` - 1 copies without what a call costs: dispatch, the change of memory layout at inputs and outputs.

    Weights differ in the last digits, for a runtime computes equal things once and keeps equal weights once.
    """
    import onnx

    chained = _chains(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:], result.graph.output[:]
    ends: dict[str, list[str]] = {value.name: [] for value in model.graph.output}
    source = {value.name: value.name for value in model.graph.input}
    for index in range(count):
        prefix = f"copy{index}_"
        copy = onnx.compose.add_prefix(model, prefix)
        for name, before in source.items():
            result.graph.node.append(onnx.helper.make_node("Identity", [before], [prefix + name]))
        result.graph.node.extend(copy.graph.node)
        result.graph.initializer.extend(_varied(tensor, index) for tensor in copy.graph.initializer)
        for name in ends:
            ends[name].append(prefix + name)
        if chained:
            source = dict.fromkeys(source, prefix + model.graph.output[0].name)
    for value in model.graph.output:
        _collect(result, value, ends[value.name][-1:] if chained else ends[value.name])
    return result


def _chains(model: onnx.ModelProto) -> bool:
    inputs, outputs = model.graph.input, model.graph.output
    return len(inputs) == len(outputs) == 1 and inputs[0].type == outputs[0].type


def _varied(tensor: onnx.TensorProto, index: int) -> onnx.TensorProto:
    """The same tensor; floats of a later copy a little larger."""
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    if index == 0 or values.ndim == 0 or values.dtype not in (np.float32, np.float64):
        return tensor
    return numpy_helper.from_array((values * values.dtype.type(1 + index / 4096)), tensor.name)


def _collect(result: onnx.ModelProto, output: onnx.ValueInfoProto, copies: list[str]) -> None:
    """Make the sum of the copies' values, or else each of them, an output."""
    import onnx

    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    if output.type.tensor_type.elem_type not in floats:
        for name in copies:
            value = result.graph.output.add()
            value.CopyFrom(output)
            value.name = name
        return
    total = copies[0]
    for index, name in enumerate(copies[1:]):
        added = f"sum{index}_{output.name}"
        result.graph.node.append(onnx.helper.make_node("Add", [total, name], [added]))
        total = added
    value = result.graph.output.add()
    value.CopyFrom(output)
    value.name = total
