"""What cannot be quantised, or not well: each said in words, with what to do, and nothing made by half."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import foldcut
import onnxruntime
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.rewrite.context import Context
from foldcut.passes.quantize.edit_quantize import LEAST_SCALE, ValueGrid, quantize_program
from foldcut.passes.quantize.grids import choose_grids
from foldcut.passes.quantize.quantize import Rounding, plain_integers, quantize
from foldcut.passes.quantize.ranges import GridKind
from torch import nn

GRIDS = (("input_1", 0.03, 128), ("relu", 0.02, 0))
LAYER = foldcut.QuantizeLayer(layer="linear", grids=GRIDS)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture
def net() -> nn.Sequential:
    """To be changed."""
    return layers()


@pytest.fixture(scope="module")
def program(nets: SimpleNamespace) -> foldcut.Program:
    return foldcut.capture(nets.seeded(layers), torch.ones(2, 6))


def ways(
    program: foldcut.Program, samples: torch.Tensor, how: Rounding, ranges: str = "minmax"
) -> dict[str, foldcut.Program]:
    """Both layers in int8 by each of the ways there are to round weights."""
    layers, data = ["linear", "linear_1"], CalibrationSet.of(samples)
    grids = choose_grids(program, layers, data, GridKind(), ranges)
    plain = plain_integers(program, layers, grids, how)
    return {
        "plain": quantize_program(program, grids, plain, note="int8"),
        "whole": quantize(program, layers, grids, data, how),
    }


@pytest.mark.parametrize("bias", ["int32", "float32"])
@pytest.mark.parametrize("spread", [1.0, 1e-6])
def test_outputs_without_weights_keep_their_bias(net: nn.Sequential, bias: str, spread: float) -> None:
    """Those of a batch norm whose factor is zero: by a scale of next to nothing the bias would be lost."""
    first: Any = net[0]
    with torch.no_grad():
        first.weight[:2] = 0
        first.weight[2] = 1e-30
        first.weight[3, 0] = 1e-12
        first.bias[:4] = torch.tensor([0.7, 0.0, -0.5, 0.9])
    samples = torch.randn(40, 6) * spread
    for name, made in ways(foldcut.capture(net, samples[:2]), samples, Rounding(limit=63, bias=bias)).items():
        found, wanted = made(samples).detach(), net(samples).detach()
        assert float((found - wanted).abs().max()) < 0.03, name
        session = onnxruntime.InferenceSession(to_onnx(made), providers=["CPUExecutionProvider"])
        theirs = torch.from_numpy(session.run(None, {"input_1": samples.numpy()})[0])
        torch.testing.assert_close(theirs, found, rtol=0, atol=0.01)  # it may round biases itself
        for key, tensor in made.module.state_dict().items():
            assert not key.endswith("_scales") or bool((tensor >= LEAST_SCALE).all() & tensor.isfinite().all()), key


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse", "entropy", "each", "best"])
def test_values_that_are_always_zero(net: nn.Sequential, ranges: str) -> None:
    with torch.no_grad():
        net[0].weight.zero_()  # type: ignore[union-attr,operator]
        net[0].bias.fill_(-1.0)  # type: ignore[union-attr,operator]
    samples = torch.randn(20, 6)
    for name, made in ways(foldcut.capture(net, samples[:2]), samples, Rounding(limit=127), ranges).items():
        torch.testing.assert_close(made(samples).detach(), net(samples).detach(), atol=1e-3, rtol=0, msg=name)


def test_one_sample_warns_and_works(program: foldcut.Program) -> None:
    with pytest.warns(UserWarning, match="those of a single sample.*give a few hundred samples"):
        found = ways(program, torch.ones(1, 6), Rounding(limit=127))
    for made in found.values():
        torch.testing.assert_close(made(torch.ones(1, 6)), program(torch.ones(1, 6)), atol=0.02, rtol=0)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_weights_that_are_not_finite(net: nn.Sequential, value: float, part: str) -> None:
    """Those of the last layer: nothing that is looked at shows them."""
    with torch.no_grad():
        getattr(net[2], part).view(-1)[1] = value
    program, samples = foldcut.capture(net, torch.randn(2, 6)), CalibrationSet.of(torch.randn(20, 6))
    grids = choose_grids(program, ["linear_1"], samples, GridKind(), "minmax")
    how = Rounding(limit=127)
    calls: list[Callable[[], Any]] = [
        lambda: plain_integers(program, ["linear_1"], grids, how),
        lambda: quantize(program, ["linear_1"], grids, samples, how),
    ]
    for call in calls:
        with pytest.raises(foldcut.CompilerError, match="are not finite") as caught:
            call()
        assert caught.value.node == "linear_1" and caught.value.hint


@pytest.mark.parametrize("late", [False, True])
def test_values_that_are_not_numbers_are_named(late: bool) -> None:
    """Also when they come after others: NaN is neither less nor more."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.fc(torch.sqrt(x)))

    samples = torch.rand(80, 4)
    samples[70 if late else 0] = -1
    net = Root().eval()
    program = foldcut.capture(net, torch.rand(2, 4))
    with pytest.raises(foldcut.CalibrationError, match="not finite") as caught:
        choose_grids(program, ["linear"], CalibrationSet.of(samples), GridKind(), "minmax")
    assert caught.value.node == "sqrt" and caught.value.hint


def test_sums_that_leave_32_bits_are_refused() -> None:
    net = nn.Linear(70_000, 1, bias=False).eval()
    with torch.no_grad():
        net.weight.fill_(0.5)
    program = foldcut.capture(net, torch.ones(2, 70_000))
    grids = {"input_1": ValueGrid(scale=0.01, zero_point=0)}
    with pytest.raises(foldcut.RewriteError, match="32 bits") as caught:
        plain_integers(program, ["linear"], grids, Rounding(limit=127))
    assert caught.value.node == "linear" and "ignore=('linear',)" in str(caught.value.hint)
    assert plain_integers(program, ["linear"], grids, Rounding(limit=63))


KERNELS = [
    *({"bits": bits} for bits in (4, 16, "8", 8.5, None, True)),
    *({"weight_limit": limit} for limit in (0, -63, 128, 63.5, "63", None)),
    *({"values": values} for values in ("int4", "float32", "", None, 8)),
    *({"symmetric": symmetric} for symmetric in ("no", None, 1)),
    *({"bias": bias} for bias in ("int8", None, 32)),
    {"symmetric": True},
    *({"layer": layer} for layer in ("", None, 3)),
    {"path": 3},
]
BAD_GRIDS = [
    *([["relu", scale, 0]] for scale in (0.0, -0.1, float("nan"), float("inf"), 1e-50, "0.1", None, True)),
    *([["relu", 0.1, zero]] for zero in (-1, 256, 0.5, "0", None, True)),
    *([grid] for grid in ([], ["relu", 0.1], ["relu", 0.1, 0, 0], [3, 0.1, 0], "abc", 3, None)),
    [["relu", 0.1, 0], ["relu", 0.2, 0]],
    3,
    None,
]


@pytest.mark.parametrize("damage", [*KERNELS, *({"grids": grids} for grids in BAD_GRIDS), {"error": "little"}], ids=str)
def test_a_decision_that_is_none(damage: dict[str, Any]) -> None:
    plan = foldcut.Plan(decisions=(LAYER,), goal=foldcut.Latency(0.5), fingerprint="abc", predicted={}).to_dict()
    assert foldcut.Plan.from_dict(plan).decisions == (LAYER,)
    with pytest.raises(foldcut.PlanError, match="not a plan") as caught:
        foldcut.Plan.from_dict({**plan, "decisions": [{**LAYER.to_dict(), **damage}]})
    assert caught.value.hint


def test_grids_of_symmetric_values_have_zero_in_the_middle() -> None:
    signed = {"values": "int8", "symmetric": True}
    assert foldcut.QuantizeLayer(layer="linear", grids=(("relu", 0.1, 0),), **signed).value_grids["relu"].low == -128  # type: ignore[arg-type]
    with pytest.raises(foldcut.CompilerError, match="zero point of relu"):
        foldcut.QuantizeLayer(layer="linear", grids=(("relu", 0.1, 1),), **signed)  # type: ignore[arg-type]
    with pytest.raises(foldcut.RewriteError, match="unsigned"):
        GridKind(dtype=torch.uint8, symmetric=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ranges": "widest"},
        {"ranges": None},
        *({"samples": samples} for samples in (1, 2.5, "16", None, True)),
        {"equalise": "yes"},
        *({"rows_per_column": rows} for rows in (0, -1, 1.5, "50")),
        *({"ignore": ignore} for ignore in ("linear", 3, (3,), None)),
        *({"kernels": kernels} for kernels in (63, "uint8", {"weight_limit": 63})),
        {"refused": 3},
    ],
    ids=str,
)
def test_settings_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(foldcut.CompilerError) as caught:
        foldcut.Quantize(**wrong)
    assert next(iter(wrong)) in caught.value.message and caught.value.hint


OTHER = foldcut.QuantizeLayer(layer="linear_1", grids=(("relu", 0.02, 0),))
WRONG_PLANS = {
    "no layer 'conv2d_9'": [LAYER, foldcut.QuantizeLayer(layer="conv2d_9", grids=GRIDS)],
    "two decisions are about 'linear'": [LAYER, LAYER],
    "kernels of one backend": [LAYER, foldcut.QuantizeLayer(layer="linear_1", grids=OTHER.grids, weight_limit=63)],
}


@pytest.mark.parametrize("message", WRONG_PLANS)
@pytest.mark.parametrize("way", ["requires", "shape", "plain", "apply"])
def test_plans_that_are_none_of_the_network(
    message: str, way: str, program: foldcut.Program, contexts: Callable[..., Context]
) -> None:
    rewrite, before = foldcut.Quantize(), copy.deepcopy(program.module.state_dict())
    more = [contexts(program, CalibrationSet.of(torch.randn(8, 6)))] if way == "apply" else []
    with pytest.raises(foldcut.RewriteError, match=message) as caught:
        getattr(rewrite, way)(program, WRONG_PLANS[message], *more)
    assert caught.value.hint
    assert before.keys() == program.module.state_dict().keys()


def test_grids_that_are_missing_or_at_odds(program: foldcut.Program) -> None:
    rewrite = foldcut.Quantize()
    assert rewrite.plain(program, [LAYER, OTHER])
    missing = foldcut.QuantizeLayer(layer="linear", grids=GRIDS[:1])
    with pytest.raises(foldcut.RewriteError, match="no range is known") as caught:
        rewrite.plain(program, [missing])
    assert caught.value.node == "relu"
    at_odds = foldcut.QuantizeLayer(layer="linear_1", grids=(("relu", 0.04, 0),))
    with pytest.raises(foldcut.RewriteError, match="other grids"):
        rewrite.plain(program, [LAYER, at_odds])
