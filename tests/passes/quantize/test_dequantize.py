"""Quantised networks back in floating point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foldcut
import numpy as np
import onnx
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.output_error import output_error
from foldcut.compiler.export.exporter import to_exported, to_onnx_model
from foldcut.compiler.ir.edit_folds import fold_batch_norms
from foldcut.passes.quantize.edit_dequantize import dequantize_program
from foldcut.passes.quantize.grids import choose_grids
from foldcut.passes.quantize.quantize import Rounding, quantize
from foldcut.passes.quantize.ranges import GridKind
from foldcut.passes.quantize.values import quantizable
from onnx import numpy_helper, parser


def in_int8(program: foldcut.Program, samples: CalibrationSet, kind: GridKind) -> tuple[foldcut.Program, ...]:
    folded, _ = fold_batch_norms(program)
    layers = list(quantizable(folded))
    grids = choose_grids(folded, layers, samples, kind, "minmax")
    return folded, quantize(folded, layers, grids, samples, Rounding(limit=127))


@pytest.mark.parametrize("kind", [GridKind(), GridKind(dtype=torch.int8, symmetric=True)], ids=str)
def test_floats_are_near_and_every_layer_can_be_cut_again(kind: GridKind, residual: foldcut.Program, nets: Any) -> None:
    folded, rounded = in_int8(residual, CalibrationSet.of(nets.images(40)), kind)
    assert not foldcut.find_units(rounded).prunable
    again = dequantize_program(rounded)
    again.check(rounded)
    assert not [node for node in again.graph.nodes if "quantized_decomposed" in str(node.target)]
    assert again.parameter_count() == folded.parameter_count()
    assert len(foldcut.find_units(again).prunable) == len(foldcut.find_units(folded).prunable)
    assert len(foldcut.find_regions(again).regions) == len(foldcut.find_regions(folded).regions)
    unseen = CalibrationSet.of(nets.images(32, seed=5))
    assert output_error(folded, again, unseen) < 1e-3
    assert output_error(rounded, again, unseen) < 1e-2


def test_both_forms_of_a_model_come_back_in_their_form(residual: foldcut.Program, nets: Any) -> None:
    _, rounded = in_int8(residual, CalibrationSet.of(nets.images(40)), GridKind())
    x = nets.images(4, seed=5)
    wanted = dequantize_program(rounded)(x)
    found = foldcut.dequantize(to_exported(rounded))
    assert isinstance(found, torch.export.ExportedProgram)
    torch.testing.assert_close(found.module()(x), wanted)
    model = foldcut.dequantize(to_onnx_model(rounded))
    assert isinstance(model, onnx.ModelProto)
    assert not [node for node in model.graph.node if "quantize" in node.op_type.lower()]
    torch.testing.assert_close(foldcut.capture(model)(x), wanted, rtol=1e-4, atol=1e-5)


def grid_model(zero: int, first: str = "") -> onnx.ModelProto:
    found = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> net (float[n, 6] x) => (float[n, 6] y) {{
        wd = DequantizeLinear <axis = 1> (w, ws, wz) h = MatMul (x, wd) {first}
        q = QuantizeLinear (h, s, z) d = DequantizeLinear (q, s, z) y = MatMul (d, wd) }}"""
    )
    constants = {
        "w": np.diag([100, -100, 50, 25, 10, -10]).astype(np.int8),
        "ws": np.full(6, 0.01, np.float32),
        "wz": np.zeros(6, np.int8),
        "s": np.float32(0.0125),
        "z": np.uint8(zero),
    }
    found.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return found


def test_a_grid_from_zero_on_stays_a_clip() -> None:
    """Tools leave out a ReLU in front of such a grid: without the clip another network would come out."""
    x = torch.linspace(-5, 5, 60).reshape(10, 6)
    scale = torch.tensor([1, -1, 0.5, 0.25, 0.1, -0.1])
    clipped = foldcut.capture(foldcut.dequantize(grid_model(0)))
    torch.testing.assert_close(clipped(x), (x * scale).clamp(0, 255 * 0.0125) * scale)
    free = foldcut.capture(foldcut.dequantize(grid_model(128)))
    torch.testing.assert_close(free(x), x * scale * scale)


def test_what_is_not_quantised_is_said(residual: foldcut.Program) -> None:
    with pytest.raises(foldcut.CaptureError, match="nothing is quantised with QuantizeLinear"):
        foldcut.dequantize(to_exported(residual))


def test_the_command_plans_a_quantised_file_anew(tmp_path: Path) -> None:
    from foldcut.compiler.cli.main import app
    from typer.testing import CliRunner

    path = tmp_path / "int8.onnx"
    onnx.save(grid_model(0), path)
    kept, anew = (CliRunner().invoke(app, ["inspect", str(path), *flag]) for flag in ([], ["--dequantize"]))
    assert kept.exit_code == anew.exit_code == 0, anew.output
    assert "wd" in anew.output or "w" in anew.output
    assert kept.output != anew.output
