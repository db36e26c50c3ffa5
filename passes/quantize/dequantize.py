"""Quantised models back in floating point."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...compiler.export.exporter import to_exported, to_onnx_model
from ...compiler.frontend.capture import Model, capture, is_onnx
from ...compiler.ir.program import Batch, Program
from ...compiler.ir.segments import is_dequantized
from ...compiler.support.errors import CaptureError
from .edit_dequantize import dequantize_program

if TYPE_CHECKING:
    import onnx


def dequantize(model: Model, example: Batch | None = None) -> onnx.ModelProto | torch.export.ExportedProgram:
    """A model in floating point from one that is quantised with QuantizeLinear and DequantizeLinear.

    Weights become the float32 values that are read from the integers, and values are no longer rounded, so that the
    network can be cut, solved and quantised anew. A value that was stored with zero at the lower end of its grid stays
    clipped to the grid's range: that stood for a ReLU. The outputs differ from those of `model` by what rounding did.

    Arguments:
        model: A quantised model: the path of an ONNX file or a ``.pt2`` file, an `onnx.ModelProto`, an
            `torch.export.ExportedProgram` or an `nn.Module` with ``quantized_decomposed`` operators.
        example: One batch of inputs, as for `capture`.

    Returns:
        An `onnx.ModelProto` for an ONNX model, with its interface, opset and metadata; else a
        `torch.export.ExportedProgram`.

    Raises:
        CaptureError: If the model cannot be captured, or if nothing in it is quantised in that form.
        ExportError: If the result cannot be exported.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> samples = torch.randn(40, 8)
        >>> layer = foldcut.QuantizeLayer(layer="linear", grids=(("input_1", 0.03, 128), ("relu", 0.02, 0)))
        >>> rounded = foldcut.Quantize().plain(foldcut.capture(net, samples[:2]), [layer])
        >>> again = foldcut.dequantize(rounded.module, samples[:2]).module()
        >>> bool((again(samples) - net(samples)).abs().max() < 0.1)
        True
    """
    program = capture(model, example)
    if not any(is_dequantized(node) for node in program.graph.nodes):
        raise CaptureError(
            "nothing is quantised with QuantizeLinear and DequantizeLinear",
            hint="a model in floating point is compiled as it is; files with QLinearConv and its kin are written again "
            "in the QDQ format by the tool that made them",
        )
    made: Program = dequantize_program(program)
    return to_onnx_model(made) if is_onnx(model) else to_exported(made)
