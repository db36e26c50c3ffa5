"""The integers of a program are those that runtimes compute: value by value, but for sums that lie between two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foldcut
import onnx
import onnxruntime
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.export.exporter import to_onnx_model
from foldcut.compiler.ir.edit_folds import fold_batch_norms
from foldcut.passes.quantize.edit_quantize import ValueGrid, quantize_program
from foldcut.passes.quantize.grids import choose_grids
from foldcut.passes.quantize.quantize import Rounding, quantize
from foldcut.passes.quantize.ranges import GridKind
from foldcut.passes.quantize.values import quantizable
from foldcut.runtime.measure.backend import resolve_backend
from foldcut.runtime.predict.integer_kernels import probe_integers
from torch import fx

KINDS = [GridKind(), GridKind(dtype=torch.int8), GridKind(dtype=torch.int8, symmetric=True)]
#: A sum this near to the middle between two integers may be rounded to either. Float32 sums of another order.
TIE = 1e-3


@pytest.fixture(scope="module", params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> GridKind:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def in_int8(kind: GridKind, residual: foldcut.Program, nets: SimpleNamespace) -> foldcut.Program:
    """With weights that this machine's ONNX Runtime multiplies exactly."""
    folded, _ = fold_batch_norms(residual)
    layers, samples = list(quantizable(folded)), CalibrationSet.of(nets.images(24))
    limit = probe_integers(resolve_backend("onnxruntime")).weight_limit
    grids = choose_grids(folded, layers, samples, kind, "percentile")
    return quantize(folded, layers, grids, samples, Rounding(limit=limit))


def is_stored(node: fx.Node) -> bool:
    return "quantized_decomposed.quantize_per_tensor" in str(node.target)


@dataclass
class Compared(fx.Interpreter):  # type: ignore[misc]
    """Runs a program; behind each value that is stored it goes on with the integers of a runtime, and counts how many
    of its own are others: no difference hides behind one before it."""

    program: foldcut.Program
    theirs: list[torch.Tensor]
    off: int = 0
    far: int = 0
    values: int = 0
    most: int = 0

    def __post_init__(self) -> None:
        super().__init__(self.program.module)

    def run_node(self, n: fx.Node) -> Any:
        ours = super().run_node(n)
        if not is_stored(n):
            return ours
        theirs = self.theirs.pop(0)
        assert theirs.dtype == ours.dtype and theirs.shape == ours.shape
        apart = (ours.int() - theirs.int()).abs()
        place = self.env[n.args[0]] / n.args[1]
        between = (place - place.floor() - 0.5).abs()
        self.values += apart.numel()
        self.off += int((apart > 0).sum())
        self.far += int(((apart > 0) & (between > TIE)).sum())
        self.most = max(self.most, int(apart.max()))
        return theirs


def integers_of(model: onnx.ModelProto, x: torch.Tensor, *, fused: bool, folder: Path) -> tuple[list[Any], set[str]]:
    """What ONNX Runtime stores, in the order of the file, and the operators that it runs."""
    stored = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    types = {i.name: i.data_type for i in model.graph.initializer}
    kinds = [types[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in zip(stored, kinds, strict=True)
    )
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED if fused else levels.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(folder / "run.onnx")
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(stored, {session.get_inputs()[0].name: x.numpy()})
    run = {node.op_type for node in onnx.load(folder / "run.onnx").graph.node}
    return [torch.from_numpy(value) for value in found], run


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_onnxruntime_stores_the_same(
    fused: bool, spread: float, kind: GridKind, in_int8: foldcut.Program, nets: SimpleNamespace, tmp_path: Path
) -> None:
    """Also where values leave the ranges (`spread`): both cut them off at the same integer."""
    x = nets.images(8, seed=3) * spread
    theirs, run = integers_of(to_onnx_model(in_int8), x, fused=fused, folder=tmp_path)
    if kind.dtype == torch.uint8:  # int8 values it computes in integers on some machines only
        assert ("QLinearConv" in run) == fused
    compared = Compared(in_int8, theirs)
    with torch.no_grad():
        compared.run(x)
    assert not compared.theirs and compared.values > 10_000
    assert compared.most <= 1
    assert compared.off <= 0.0005 * compared.values
    assert compared.far == 0


@pytest.mark.parametrize("bounds", [(0, 127), (-100, 90)], ids=str)
def test_bounds_within_a_type_are_kept(bounds: tuple[int, int]) -> None:
    """Other tools leave out a bit of the values: QuantizeLinear alone would go to the ends of its type."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    dtype = torch.uint8 if bounds[0] == 0 else torch.int8
    grid = ValueGrid(scale=0.01, zero_point=0, dtype=dtype)
    program = quantize_program(foldcut.capture(net, torch.randn(2, 6)), {"relu": grid}, {}, note="int8")
    for node in program.graph.nodes:
        if "quantized_decomposed" in str(node.target):
            node.args = (*node.args[:3], *bounds, dtype)
    program.module.recompile()
    model, x = to_onnx_model(program), torch.randn(50, 6) * 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(program(x).detach(), theirs)
    torch.testing.assert_close(foldcut.capture(model)(x).detach(), theirs)
