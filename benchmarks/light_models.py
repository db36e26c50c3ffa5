"""The `light_*` models of the onnx wheel with random weights: the wheel keeps their weights as constant fills."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from foldcut.compiler.onnx.session import reference_session
from onnx import helper, numpy_helper


def light_files() -> list[Path]:
    """The files, the smallest network first (by the number of its weights)."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    return sorted(folder.glob("light_*.onnx"), key=lambda path: (_size(path), path.name))


def _size(path: Path) -> int:
    model = onnx.load(path)
    return sum(int(np.prod(shape)) for _, shape in _fills(model))


def with_random_weights(path: Path, seed: int) -> onnx.ModelProto:
    """The model with each fill (ConstantOfShape of a constant shape) replaced by an initializer of the same name, and
    batch norms with the statistics of an image, so that the outputs are neither the same everywhere nor one-hot."""
    model, rng = onnx.load(path), np.random.default_rng(seed)
    fills = dict(_fills(model))
    uses = _uses(model)
    weights = {name: _random(shape, _roles(name, uses), rng) for name, shape in fills.items()}
    graph = model.graph
    kept = [node for node in graph.node if node.output[0] not in fills]
    read = {name for node in kept for name in node.input}
    shapes_only = {t.name for t in graph.initializer if t.name not in read}
    initializers = [t for t in graph.initializer if t.name in read]
    inputs = [v for v in graph.input if v.name not in shapes_only]
    for name, array in weights.items():
        initializers.append(numpy_helper.from_array(array, name))
        if model.ir_version < 4:  # such files declare their initializers among the inputs
            inputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape))
    for field, values in ((graph.node, kept), (graph.initializer, initializers), (graph.input, inputs)):
        del field[:]
        field.extend(values)
    _set_statistics(model, image(model, seed))
    return model


def image(model: onnx.ModelProto, seed: int) -> np.ndarray:
    """Random patches with a little noise: other than pure noise, they do not average out in the pooling at the end."""
    weights, rng = {t.name for t in model.graph.initializer}, np.random.default_rng(seed)
    value = next(v for v in model.graph.input if v.name not in weights)
    batch, channels, height, width = (d.dim_value for d in value.type.tensor_type.shape.dim)
    patches = rng.standard_normal((batch, channels, 7, 7)).repeat(-(-height // 7), 2).repeat(-(-width // 7), 3)
    noise = rng.standard_normal((batch, channels, height, width))
    return (patches[:, :, :height, :width] + 0.3 * noise).astype(np.float32)


def _set_statistics(model: onnx.ModelProto, sample: np.ndarray) -> None:
    """Means and variances of the batch norms' inputs, in place. In one run: with InstanceNormalization in their places
    every norm sees what it will see once those before it are set."""
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    if not norms:
        return
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for node in probe.graph.node:
        if node.op_type == "BatchNormalization":
            eps = [a for a in node.attribute if a.name == "epsilon"]
            node.op_type = "InstanceNormalization"
            del node.input[3:], node.output[1:], node.attribute[:]
            node.attribute.extend(eps)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in {node.input[0] for node in norms})
    session = reference_session(probe.SerializeToString(), optimise=False)
    results = session.run(None, {session.get_inputs()[0].name: sample})
    seen = dict(zip([o.name for o in session.get_outputs()], results, strict=True))
    constants = {t.name: t for t in model.graph.initializer}
    for node in norms:
        x = seen[node.input[0]]
        for name, values in ((node.input[3], x.mean((0, 2, 3))), (node.input[4], x.var((0, 2, 3)))):
            constants[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))


def _fills(model: onnx.ModelProto) -> Iterator[tuple[str, list[int]]]:
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in constants:
            yield node.output[0], [int(v) for v in numpy_helper.to_array(constants[node.input[0]])]


Uses = Mapping[str, list[tuple[onnx.NodeProto, int]]]


def _uses(model: onnx.ModelProto) -> Uses:
    uses: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            uses.setdefault(name, []).append((node, index))
    return uses


def _roles(name: str, uses: Uses) -> set[tuple[str, int]]:
    """(operator, position) of every reader, looking through Unsqueeze."""
    found: set[tuple[str, int]] = set()
    for node, index in uses.get(name, ()):
        found |= _roles(node.output[0], uses) if node.op_type == "Unsqueeze" else {(node.op_type, index)}
    return found


def _random(shape: list[int], roles: set[tuple[str, int]], rng: np.random.Generator) -> np.ndarray:
    """Scales and variances around 1, biases and means around 0, matrices and kernels by their fan-in: activations then
    keep their size from layer to layer."""
    if roles & {("BatchNormalization", 1), ("BatchNormalization", 4), ("Mul", 1)}:
        values = rng.uniform(0.5, 1.5, shape)
    elif len(shape) < 2:
        values = rng.standard_normal(shape) * 0.1
    else:
        values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    return values.astype(np.float32)
