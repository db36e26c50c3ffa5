"""Layers in int8 for TensorRT: symmetric, no zero points, biases in floating point; built by the TensorRT that is
installed."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import foldcut
import numpy as np
import onnx
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.edit_folds import fold_batch_norms
from foldcut.passes.quantize.grids import choose_grids
from foldcut.passes.quantize.quantize import Rounding, quantize
from foldcut.passes.quantize.ranges import GridKind
from foldcut.passes.quantize.values import quantizable
from foldcut.runtime.onnxruntime.backend import OnnxRuntimeBackend
from foldcut.runtime.predict.integer_kernels import IntegerKernels, probe_integers
from foldcut.runtime.tensorrt.backend import TensorRTBackend
from foldcut.runtime.tensorrt.half_precision import to_half_precision
from onnx import numpy_helper

AVAILABLE = TensorRTBackend().available()
builds_here = pytest.mark.skipif(not AVAILABLE.can_build, reason=AVAILABLE.reason)
WANTED = IntegerKernels(values="int8", symmetric=True, weight_limit=127, bias="float32")


class Built(TensorRTBackend):
    """Builds with TensorRT, whose refusals it passes on, and runs with torch what was built: no GPU is needed."""

    def build(self, model: bytes, inputs: Any = None) -> Any:
        super().build(model, inputs)
        return model

    def load(self, engine: Any, inputs: Mapping[str, Any], *, threads: int = 1) -> Any:
        from foldcut.runtime.torch_eager.backend import TorchBackend

        backend = TorchBackend()
        return backend.load(backend.build(engine, inputs), inputs, threads=threads)


@builds_here
def test_the_integers_that_it_takes_are_found_by_trying() -> None:
    found = probe_integers(Built())
    assert found == WANTED
    assert "zero point" in found.refused


def in_int8(program: foldcut.Program, samples: CalibrationSet) -> foldcut.Program:
    folded, _ = fold_batch_norms(program)
    kind = GridKind(dtype=getattr(torch, WANTED.values), symmetric=WANTED.symmetric)
    layers = list(quantizable(folded))
    grids = choose_grids(folded, layers, samples, kind, "best")
    return quantize(folded, layers, grids, samples, Rounding(limit=WANTED.weight_limit, bias=WANTED.bias))


@pytest.fixture(scope="module")
def made(residual: foldcut.Program, nets: SimpleNamespace) -> bytes:
    return to_onnx(in_int8(residual, CalibrationSet.of(nets.images(24))))


def test_the_file_is_as_it_takes_it(made: bytes) -> None:
    graph = onnx.load_model_from_string(made).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    reads = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    grids = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    weights = [node for node in reads if node.input[0] in constants]
    assert len(weights) >= 6 and len(reads) > len(weights)
    assert all(constants[node.input[2]].dtype == np.int8 and not constants[node.input[2]].any() for node in grids)
    for node in weights:
        axes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        stored, scales = constants[node.input[0]], constants[node.input[1]]
        assert stored.dtype == np.int8 and axes["axis"] == 0 and scales.shape == stored.shape[:1]
        assert (scales > 0).all()
    assert not [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT32]


@builds_here
def test_an_engine_is_built(made: bytes, nets: SimpleNamespace, residual: foldcut.Program) -> None:
    inputs = {residual.inputs[0].name: nets.images(2).numpy()}
    assert TensorRTBackend().build(made, inputs).info.network_layers > 10


@builds_here
def test_int32_biases_it_does_not_take(nets: SimpleNamespace, residual: foldcut.Program) -> None:
    """The reason for biases in floating point."""
    folded, _ = fold_batch_norms(residual)
    layers, samples = list(quantizable(folded)), CalibrationSet.of(nets.images(8))
    grids = choose_grids(folded, layers, samples, GridKind(dtype=torch.int8, symmetric=True), "minmax")
    model = to_onnx(quantize(folded, layers, grids, samples, Rounding(limit=127)))
    with pytest.raises(foldcut.BackendError, match="Int32"):
        TensorRTBackend().build(model, {residual.inputs[0].name: nets.images(2).numpy()})


def test_it_computes_what_the_original_does(made: bytes, nets: SimpleNamespace, residual: foldcut.Program) -> None:
    """By ONNX Runtime, in floating point between the grids."""
    x = nets.images(8, seed=3)
    inputs = {residual.inputs[0].name: x.numpy()}
    runner = OnnxRuntimeBackend().load(made, inputs)
    runner.run()
    found, wanted = runner.outputs()[0], residual(x).detach().numpy()
    assert np.square(found - wanted).sum() < 0.01 * np.square(wanted).sum()


def test_half_precision_leaves_what_is_in_integers(made: bytes, nets: SimpleNamespace) -> None:
    """A cast between a layer and its integers would have it computed in half precision."""
    name = onnx.load_model_from_string(made).graph.input[0].name
    half = to_half_precision(made, {name: nets.images(16).numpy()})
    graph = onnx.load_model_from_string(half.model).graph
    makers = {value: node for node in graph.node for value in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    grids = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert grids
    for node in grids:
        beside = [makers.get(node.input[0])] if node.op_type == "QuantizeLinear" else readers[node.output[0]]
        assert "Cast" not in [other.op_type for other in beside if other is not None]
    layers = [
        node for node in onnx.load_model_from_string(made).graph.node if node.op_type in ("Conv", "Gemm", "MatMul")
    ]
    assert all(half.kept[node.name] == "it is computed in integers" for node in layers)


@builds_here
def test_an_engine_of_half_precision_and_integers_is_built(made: bytes, nets: SimpleNamespace) -> None:
    name = onnx.load_model_from_string(made).graph.input[0].name
    inputs = {name: nets.images(2).numpy()}
    built = TensorRTBackend(precision="fp16", samples={name: nets.images(16).numpy()}).build(made, inputs)
    assert built.info.float32_operators > 6
