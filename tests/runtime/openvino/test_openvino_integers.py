"""Layers in int8 on OpenVINO: what the program computes, to a step of the grid that the output is on."""

from __future__ import annotations

from types import SimpleNamespace

import foldcut
import numpy as np
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.edit_folds import fold_batch_norms
from foldcut.passes.quantize.grids import choose_grids
from foldcut.passes.quantize.quantize import Rounding, quantize
from foldcut.passes.quantize.ranges import GridKind
from foldcut.passes.quantize.values import quantizable
from foldcut.runtime.openvino.backend import OpenVinoBackend
from foldcut.runtime.predict.integer_kernels import probe_integers
from torch import nn

pytest.importorskip("openvino")
KINDS = [GridKind(), GridKind(dtype=torch.int8), GridKind(dtype=torch.int8, symmetric=True)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bias", ["int32", "float32"])
def test_outputs_are_within_a_step(kind: GridKind, bias: str, nets: SimpleNamespace) -> None:
    net = nets.seeded(lambda: nn.Sequential(nets.conv_bn(3, 16), nets.conv_bn(16, 16), nn.Flatten()).eval())
    folded, _ = fold_batch_norms(foldcut.capture(net, nets.images()))
    layers, samples, backend = list(quantizable(folded)), CalibrationSet.of(nets.images(24)), OpenVinoBackend()
    grids = choose_grids(folded, layers, samples, kind, "minmax")
    limit = probe_integers(backend).weight_limit
    made = quantize(folded, layers, grids, samples, Rounding(limit=limit, bias=bias))
    x = nets.images(8, seed=3) * 2  # values beyond the ranges too
    inputs = {made.inputs[0].name: x.numpy()}
    runner = backend.load(backend.build(to_onnx(made), inputs), inputs)
    runner.run()
    step = list(grids.values())[-1].scale
    apart = np.abs(np.rint((runner.outputs()[0] - made(x).detach().numpy()) / step))
    assert len(np.unique(runner.outputs()[0])) > 20
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01
