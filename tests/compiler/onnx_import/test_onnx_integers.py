"""QuantizeLinear and DequantizeLinear come in as torch's own operators, and go out as they came."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from foldcut.compiler.analysis.provenance import find_units
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.segments import is_dequantized
from foldcut.compiler.onnx.session import reference_session, run_reference
from foldcut.compiler.onnx_import.importer import import_onnx
from onnx import numpy_helper, parser

TYPES = {"uint8": np.uint8, "int8": np.int8}


def model(
    nodes: str, constants: dict[str, np.ndarray], outputs: str = "float[n, 4, 8, 8] y", opset: int = 17
) -> onnx.ModelProto:
    """A network of images, from ONNX's text form."""
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> net (float[n, 3, 8, 8] x) => ({outputs}) {{ {nodes} }}'
    found = parser.parse_model(text)
    found.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return found


def layer(values: str = "uint8", *, zero: int = 3, channels: bool = True, weight_zero: int = 0) -> onnx.ModelProto:
    """A convolution of integers. All steps are powers of two, so that sums are exact and ties fall alike."""
    chance = np.random.default_rng(0)
    dtype = TYPES[values]
    scales = np.exp2(chance.integers(-8, -5, 4)).astype(np.float32) if channels else np.float32(2**-6)
    zeros = np.full(np.shape(scales), weight_zero)
    constants = {
        "s": np.float32(2**-4),
        "z": np.asarray(zero, dtype),
        "w": chance.integers(-100, 100, (4, 3, 3, 3)).astype(np.int8),
        "ws": np.asarray(scales),
        "wz": zeros.astype(np.int8),
        "b": chance.integers(-50, 50, 4).astype(np.int32),
        "bs": np.asarray(scales * np.float32(2**-4)),
        "bz": np.zeros(np.shape(scales), np.int32),
    }
    return model(
        """xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z)
        wd = DequantizeLinear <axis = 0> (w, ws, wz) bd = DequantizeLinear <axis = 0> (b, bs, bz)
        c = Conv <pads = [1, 1, 1, 1]> (xd, wd, bd)
        cq = QuantizeLinear (c, s, z) y = DequantizeLinear (cq, s, z)""",
        constants,
    )


def plainly(found: onnx.ModelProto | bytes, x: torch.Tensor) -> np.ndarray:
    content = found if isinstance(found, bytes) else found.SerializeToString()
    return run_reference(reference_session(content, optimise=False), {"x": x.numpy()})[0]


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("values", TYPES)
@pytest.mark.parametrize("channels", [True, False])
@pytest.mark.parametrize("weight_zero", [0, 100])
def test_a_layer_of_integers_is_the_same_in_torch_and_on_its_way_out(
    values: str, channels: bool, weight_zero: int
) -> None:
    source = layer(values, channels=channels, weight_zero=weight_zero)
    program = import_onnx(source)
    assert not [n for n in program.graph.nodes if "onnx_node" in str(n.target)]
    x = images()
    np.testing.assert_array_equal(program(x).numpy(), plainly(source, x))
    written = to_onnx(program)
    np.testing.assert_array_equal(plainly(written, x), plainly(source, x))
    ops = Counter(node.op_type for node in onnx.load_model_from_string(written).graph.node)
    assert (ops["QuantizeLinear"], ops["Conv"]) == (2, 1)
    assert ops["DequantizeLinear"] in (2, 4)  # an exporter may fold weights with zero points of their own


def test_integers_end_where_their_type_ends() -> None:
    x = torch.full((1, 3, 8, 8), 1e6)
    source = layer()
    assert np.abs(plainly(source, x)).max() <= 255 / 16
    np.testing.assert_array_equal(import_onnx(source)(x).numpy(), plainly(source, x))


def test_ties_go_to_the_even_integer() -> None:
    source = model(
        "q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)",
        {"s": np.float32(1), "z": np.uint8(0)},
        "float[n, 3, 8, 8] y",
    )
    x = (torch.arange(192.0).reshape(1, 3, 8, 8) + 0.5).clamp(max=200)
    np.testing.assert_array_equal(import_onnx(source)(x).numpy(), x.round().numpy())


def test_a_quantised_network_is_kept_as_it_is_and_nothing_near_is_cut() -> None:
    program = import_onnx(layer())
    assert sum(is_dequantized(node) for node in program.graph.nodes) == 4
    assert not find_units(program).prunable


@pytest.mark.parametrize("scale", [0.0, -0.1, np.inf, np.nan])
def test_scales_that_are_none_stay_with_onnx_runtime(scale: float) -> None:
    """What becomes of values there is the runtime's own affair."""
    source = model(
        "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) y = Relu (d)",
        {"s": np.float32(scale), "z": np.uint8(0)},
        "float[n, 3, 8, 8] y",
    )
    program = import_onnx(source)
    assert not [node for node in program.graph.nodes if "quantized_decomposed" in str(node.target)]
    assert sum("onnx_node" in str(node.target) for node in program.graph.nodes) == 2


def test_scales_that_are_computed_stay_with_onnx_runtime() -> None:
    source = model(
        """m = ReduceMax <keepdims = 0> (x) s = Abs (m) q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)
        y = Relu (d)""",
        {"z": np.uint8(0)},
        "float[n, 3, 8, 8] y",
    )
    program = import_onnx(source)
    assert sum("onnx_node" in str(node.target) for node in program.graph.nodes) == 2
    x = images()
    np.testing.assert_allclose(program(x).numpy(), plainly(source, x))
