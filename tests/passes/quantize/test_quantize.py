"""Layers in int8: the program computes what the exported file computes, in a plan and out of it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foldcut
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.output_error import output_error
from foldcut.compiler.driver.pipeline import onnx_difference
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.edit_folds import fold_batch_norms
from foldcut.compiler.ir.execute import bind, run_until
from foldcut.compiler.ir.segments import find_segments, is_dequantized
from foldcut.compiler.rewrite.rewrite import Applied
from foldcut.passes.quantize.edit_quantize import quantize_program
from foldcut.passes.quantize.grids import WAYS, best_way, choose_grids
from foldcut.passes.quantize.quantize import Rounding, quantize
from foldcut.passes.quantize.ranges import RANGES, GridKind
from foldcut.passes.quantize.values import quantizable
from foldcut.runtime.measure.backend import resolve_backend
from foldcut.runtime.measure.conditions import Conditions
from foldcut.runtime.probe.latency_probe import LatencyProbe
from onnx import numpy_helper
from torch import nn

KINDS = [GridKind(), GridKind(dtype=torch.int8), GridKind(dtype=torch.int8, symmetric=True)]


def run_plainly(model: bytes, x: torch.Tensor) -> torch.Tensor:
    """By ONNX Runtime, node by node as the standard defines it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def in_int8(program: foldcut.Program, samples: CalibrationSet, kind: GridKind, limit: int = 127) -> foldcut.Program:
    folded, _ = fold_batch_norms(program)
    layers = list(quantizable(folded))
    grids = choose_grids(folded, layers, samples, kind, "best")
    made = quantize(folded, layers, grids, samples, Rounding(limit=limit))
    made.check(folded)
    return made


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("limit", [127, 63])
def test_onnx_computes_the_same_integers(kind: GridKind, limit: int, residual: foldcut.Program, nets: Any) -> None:
    made = in_int8(residual, CalibrationSet.of(nets.images(40)), kind, limit)
    x = nets.images(16, seed=3)
    with torch.no_grad():
        ours = made.module(x)
    theirs = run_plainly(to_onnx(made), x)
    same = (ours - theirs).abs() <= 1e-5 * ours.abs().max()
    # a sum halfway between two integers goes up in the one and down in the other
    assert float(same.all(1).float().mean()) >= 0.8
    assert float((ours - theirs).square().sum() / theirs.square().sum()) < 1e-4


NETWORKS = ["Residual", "PreActivation", "Inverted", "Gated", "Nested", "Downsample"]


@pytest.mark.parametrize("name", NETWORKS)
def test_little_is_lost(name: str, nets: SimpleNamespace) -> None:
    width = 16 if name == "Downsample" else 8
    net = nets.seeded(lambda: nets.image_net(getattr(nets, name)(), channels=width))
    images = nets.images(64)
    program = foldcut.capture(net, images[:2])
    made = in_int8(program, CalibrationSet.of(images), KINDS[0])
    assert output_error(program, made, CalibrationSet.of(nets.images(32, seed=5))) < 3e-3


def test_a_transformer(transformer: foldcut.Program, nets: SimpleNamespace) -> None:
    samples = CalibrationSet.of(nets.tokens(64))
    made = in_int8(transformer, samples, KINDS[0])
    assert output_error(transformer, made, samples) < 3e-3


def test_segments_end_where_integers_are_handed_on(residual: foldcut.Program, nets: SimpleNamespace) -> None:
    made = in_int8(residual, CalibrationSet.of(nets.images(40)), KINDS[0])
    inner = find_segments(made)[:-1]
    assert len(inner) > 2
    assert all(exit_.endswith("_quantized") for segment in inner for exit_ in segment.exits)


def overflowing(counting_backend: Any, limit: int, refuses: str = "") -> Any:
    """Layers in int8 take a quarter of the time, and each change between floats and integers a little. Weights beyond a
    limit are cut off at it, for what kernels without VNNI do; models with an operator may be refused."""

    class Integers(type(counting_backend)):  # type: ignore[misc]
        name = f"integers {limit} {refuses}".strip()

        def build(self, model: bytes, inputs: Any = None) -> Any:
            if refuses in {node.op_type for node in onnx.load_model_from_string(model).graph.node}:
                raise foldcut.BackendError(f"{refuses} is not taken")
            return model

        def load(self, engine: Any, inputs: Any, *, threads: int = 1) -> Any:
            proto = onnx.load_model_from_string(engine)
            for tensor in proto.graph.initializer:
                if tensor.data_type == onnx.TensorProto.INT8:
                    values = np.clip(numpy_helper.to_array(tensor), -limit, limit)
                    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            runner = super().load(proto.SerializeToString(), inputs, threads=threads)
            made = {output: node for node in proto.graph.node for output in node.output}
            convs = [node for node in proto.graph.node if node.op_type == "Conv"]
            integer = [c for c in convs if made.get(c.input[1], c).op_type == "DequantizeLinear"]
            runner.time_ms = 1 + 4.0 * (len(convs) - len(integer)) + len(integer)
            return runner

    return Integers()


@pytest.fixture(scope="module")
def backend(counting_backend: Any) -> Any:
    return overflowing(counting_backend, 63)


@pytest.fixture(scope="module")
def net(nets: SimpleNamespace) -> nn.Module:
    return nets.seeded(lambda: nets.ResNet(2, 8))  # type: ignore[no-any-return]


def compiled(net: nn.Module, images: torch.Tensor, backend: Any, **options: Any) -> foldcut.Compiled:
    return foldcut.compile(
        net,
        images,
        goal=foldcut.Latency(0.5),
        **{"rewrites": ("quantize",), **options},
        backend=backend,
        mimic=False,
        progress=False,
        cache=False,
    )


@pytest.fixture(scope="module")
def made(net: nn.Module, nets: SimpleNamespace, backend: Any, quick_measurement: None) -> foldcut.Compiled:
    return compiled(net, nets.images(60), backend)


def test_a_goal_is_reached_by_integers(made: foldcut.Compiled) -> None:
    assert made.report.met
    assert {type(decision) for decision in made.plan.decisions} == {foldcut.QuantizeLayer}
    convs = [n for n in made.program.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    assert sum(is_dequantized(node.args[1]) for node in convs) == len(made.plan.decisions) >= 3
    details = made.report.to_dict()["details"]["quantize"]
    assert details["weight_limit"] == 63 and 0.5 < details["share_of_macs"] <= 1
    assert "weights up to 63" in details["kernels"]
    assert "weights up to 127" in details["why_no_finer"] and "outputs differ" in details["why_no_finer"]
    assert made.report.output_errors["quantize"] < 0.01


def test_a_plan_with_its_weights_gives_the_same(
    made: foldcut.Compiled, net: nn.Module, nets: SimpleNamespace, tmp_path: Path
) -> None:
    folder = made.save(tmp_path / "out")
    images = nets.images(8)
    again = foldcut.apply(net, folder / "plan.json", example=images[:2], progress=False)
    torch.testing.assert_close(again.module(images), made.module(images), rtol=0, atol=0)
    loaded = foldcut.load(folder)
    assert loaded.plan.decisions == made.plan.decisions
    torch.testing.assert_close(loaded.module(images), made.module(images), rtol=0, atol=1e-6)


def test_a_plan_with_data_gives_it_anew(made: foldcut.Compiled, net: nn.Module, nets: SimpleNamespace) -> None:
    again = foldcut.apply(net, made.plan, calibration=nets.images(60), mimic=False, cache=False, progress=False)
    assert again.output_errors["quantize"] < 0.01
    assert again.program.parameter_count() == made.program.parameter_count()


def test_what_a_plan_cannot_be(net: nn.Module, nets: SimpleNamespace) -> None:
    program = foldcut.capture(net, nets.images(2))
    rewrite = foldcut.Quantize()
    with pytest.raises(foldcut.RewriteError, match="no layer 'conv2d_99' to quantise"):
        rewrite.requires(program, [foldcut.QuantizeLayer(layer="conv2d_99")])
    with pytest.raises(foldcut.CompilerError, match="bits=4"):
        foldcut.QuantizeLayer(layer="conv2d", bits=4)
    with pytest.raises(foldcut.RewriteError, match="ranges come from data"):
        rewrite.plain(program, [foldcut.QuantizeLayer(layer="conv2d")])


@pytest.mark.parametrize(
    ("limit", "refuses", "why"), [(127, "QuantizeLinear", "is not taken"), (20, "", "outputs differ")]
)
def test_a_backend_without_int8(
    limit: int,
    refuses: str,
    why: str,
    net: nn.Module,
    nets: SimpleNamespace,
    counting_backend: Any,
    quick_measurement: None,
) -> None:
    """Nothing is quantised: alone that is an error, beside other rewrites these are used."""
    backend = overflowing(counting_backend, limit, refuses)
    with pytest.raises(foldcut.GoalError, match="nothing can be done towards") as caught:
        compiled(net, nets.images(20), backend)
    assert "does not compute int8 layers as ONNX defines them" in str(caught.value.hint)
    assert why in str(caught.value.hint)
    mixed = compiled(net, nets.images(20), backend, rewrites=("drop_blocks", "quantize"))
    assert {decision.kind for decision in mixed.plan.decisions} == {"drop_blocks"}
    assert any(why in reject for reject in mixed.report.rejects)


def test_a_single_sample_compiles_with_a_warning(
    net: nn.Module, nets: SimpleNamespace, backend: Any, quick_measurement: None
) -> None:
    with pytest.warns(UserWarning, match="those of a single sample"):
        made = compiled(net, nets.images(1), backend)
    assert made.report.met and made.plan.decisions


def test_other_goals_are_not_served(net: nn.Module, nets: SimpleNamespace) -> None:
    with pytest.raises(foldcut.GoalError, match="rewrites"):
        foldcut.compile(net, nets.images(20), goal=foldcut.Macs(0.5), rewrites=("quantize",), progress=False)


def test_the_chosen_program_is_exported_as_it_is(made: foldcut.Compiled, nets: SimpleNamespace) -> None:
    x = nets.images(4, seed=9)
    ours = made.module(x).detach()
    theirs = run_plainly(made.files["model.onnx"], x)
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(np.abs(theirs.numpy()).max())


@pytest.fixture(scope="module")
def rounded(residual: foldcut.Program, nets: SimpleNamespace) -> Applied:
    """The network with weights up to 63, which are exact on any machine."""
    made = in_int8(residual, CalibrationSet.of(nets.images(40)), KINDS[0], 63)
    return Applied(program=made, before_last=Applied(program=residual))


def exported_difference(done: Applied, model: bytes, samples: CalibrationSet) -> float:
    probe = LatencyProbe(done.program, model, resolve_backend("onnxruntime"), samples, Conditions())
    with closing(probe):
        return onnx_difference(done, model, probe, samples)


def test_an_export_may_round_to_the_other_side(rounded: Applied, nets: SimpleNamespace) -> None:
    samples = CalibrationSet.of(nets.images(8, seed=4))
    model = onnx.load_from_string(to_onnx(rounded.program))
    assert exported_difference(rounded, model.SerializeToString(), samples) < 0.02
    # scales of another size compute something else, which no rounding explains
    with pytest.raises(foldcut.ExportError, match="at most 2 times what rounding changes"):
        exported_difference(rounded, with_other_scales(model), samples)


def with_other_scales(model: onnx.ModelProto) -> bytes:
    for scale in (tensor for tensor in model.graph.initializer if "_int8" not in tensor.name and not tensor.dims):
        value = numpy_helper.to_array(scale)
        if value.dtype == np.float32:
            scale.CopyFrom(numpy_helper.from_array(value * np.float32(1.5), scale.name))
    return bytes(model.SerializeToString())


def test_without_rounding_an_export_is_held_to_the_digits(rounded: Applied, nets: SimpleNamespace) -> None:
    assert rounded.before_last is not None
    plain, samples = rounded.before_last, CalibrationSet.of(nets.images(8, seed=4))
    assert exported_difference(plain, to_onnx(plain.program), samples) < 1e-5
    with pytest.raises(foldcut.ExportError, match=r"within 0\.001 relative"):
        exported_difference(plain, to_onnx(rounded.program), samples)


class Pooled(nn.Module):
    """A stem with a max pooling, and a shortcut that is cut and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.last = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.stem(x).relu(), 2)
        shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        joined: torch.Tensor = self.last((self.wide(x) + shortcut).relu())
        return joined


def test_what_is_only_moved_stays_on_its_grid(nets: SimpleNamespace, tmp_path: Path) -> None:
    program = foldcut.capture(nets.seeded(Pooled).eval(), nets.images(2))
    made = in_int8(program, CalibrationSet.of(nets.images(24)), KINDS[0], 63)
    relu, pooled, padded = (f"{name}_quantized" for name in ("relu", "max_pool2d", "pad"))
    stored = {name: node.args[1:3] for name, node in made.nodes.items() if name.endswith("_quantized")}
    assert stored[relu] == stored[pooled] == stored[padded]
    assert stored[relu] != stored["relu_1_quantized"]
    # rounding what is rounded changes nothing: the moved values are those before
    with torch.no_grad():
        values = run_until(made, ["max_pool2d", "max_pool2d_dequantized"], bind(made, nets.images(4, seed=3)))
    assert torch.equal(values["max_pool2d"], values["max_pool2d_dequantized"])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(to_onnx(made), options, providers=["CPUExecutionProvider"])
    fused = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    # the sum and the pooling are computed in integers
    assert "QLinearAdd" in fused and "Add" not in fused
    pooling = next(place for place, op in enumerate(fused) if op.endswith("MaxPool"))
    assert "DequantizeLinear" not in fused[fused.index("QLinearConv") : pooling]


def test_a_network_that_came_rounded_may_round_to_the_other_side(rounded: Applied, nets: SimpleNamespace) -> None:
    came, samples = Applied(program=rounded.program), CalibrationSet.of(nets.images(8, seed=4))
    assert exported_difference(came, to_onnx(came.program), samples) < 0.02
    model = onnx.load_model_from_string(to_onnx(came.program))
    with pytest.raises(foldcut.ExportError, match=r"within 0\.02 relative(.|\n)*foldcut\.dequantize"):
        exported_difference(came, with_other_scales(model), samples)


@pytest.mark.parametrize("outliers", [0.0, 30.0])
def test_the_best_way_of_taking_ranges_is_that_of_the_network(
    outliers: float, residual: foldcut.Program, nets: SimpleNamespace
) -> None:
    images = nets.images(32)
    images[::8, 0, 0, 0] += outliers
    folded, _ = fold_batch_norms(residual)
    layers, samples = list(quantizable(folded)), CalibrationSet.of(images)

    def lost(way: str) -> float:
        grids = choose_grids(folded, layers, samples, KINDS[0], way)
        return output_error(folded, quantize_program(folded, grids, {}, note=way), samples)

    errors = {way: lost(way) for way in WAYS}
    assert errors["best"] == min(errors.values()) < max(errors.values())
    assert lost(best_way(folded, layers, samples, KINDS[0])) == min(errors[way] for way in RANGES)
