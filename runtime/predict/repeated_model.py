"""One ONNX model several times over in one model: how the time of a part is separated from the cost of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


def repeated(model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """`count` copies of a model of fixed shapes, each with weights of its own, as one model of the same inputs.

    One behind the other where the only output has the shape and type of the only input; else side by side on the same
    inputs, and of each copy's outputs only a little goes out: the means of a map's channels, the first entry of
    anything else. The time of `count` copies less that of one is the time of `count` - 1 copies without what a call
    costs: dispatch, the change of memory layout at inputs and outputs.

    Weights differ in the last digits, for a runtime computes equal things once and keeps equal weights once.
    """
    import onnx

    chained = _chains(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:], result.graph.output[:]
    source = {value.name: value.name for value in model.graph.input}
    for index in range(count):
        prefix = f"copy{index}_"
        copy = onnx.compose.add_prefix(model, prefix)
        for name, before in source.items():
            result.graph.node.append(onnx.helper.make_node("Identity", [before], [prefix + name]))
        result.graph.node.extend(copy.graph.node)
        result.graph.initializer.extend(_varied(tensor, index) for tensor in copy.graph.initializer)
        if chained:
            source = dict.fromkeys(source, prefix + model.graph.output[0].name)
        else:
            for value in copy.graph.output:
                _let_out(result, value)
    if chained:
        result.graph.output.extend(copy.graph.output)
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


def _let_out(result: onnx.ModelProto, value: onnx.ValueInfoProto) -> None:
    """Make a little of a value an output: not much to copy, and of a map nothing that asks for another layout."""
    from onnx import TensorProto, helper, numpy_helper

    kind, name = value.type.tensor_type, f"part_of_{value.name}"
    sizes = [dim.dim_value for dim in kind.shape.dim]
    rank, shape = len(sizes), [1] * len(sizes)
    if rank == 4 and kind.elem_type == TensorProto.FLOAT:
        shape[:2] = sizes[:2]
        result.graph.node.append(helper.make_node("GlobalAveragePool", [value.name], [name]))
    elif rank:
        bounds = {f"{name}_from": np.zeros(rank, np.int64), f"{name}_to": np.ones(rank, np.int64)}
        result.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in bounds.items())
        result.graph.node.append(helper.make_node("Slice", [value.name, *bounds], [name]))
    else:
        name = value.name
    result.graph.output.append(helper.make_tensor_value_info(name, kind.elem_type, shape))
