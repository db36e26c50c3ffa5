"""Older operator sets: torch.onnx writes 18 and newer, a file that came in older goes out older."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
import pytest
import torch
from foldcut.compiler.export.exporter import to_onnx, to_onnx_model
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from foldcut.compiler.onnx.opset import EXPORTER_OPSET, lower_opset
from foldcut.compiler.onnx.session import reference_session, run_reference
from foldcut.compiler.support.errors import ExportError
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor
VERSIONS = range(9, EXPORTER_OPSET)


@dataclass(frozen=True)
class Case:
    """A function of images and of layers, and the operator sets that have no form of it."""

    run: Callable[..., Any]
    layers: Callable[[], tuple[nn.Module, ...]] = tuple
    refused: tuple[int, ...] = ()


def assigned(x: Tensor) -> Tensor:
    """A part is overwritten."""
    y = x.clone()
    y[:, 1:3, 2] = 1.5
    return y


CASES = {
    "mean": Case(lambda x: x.mean((2, 3))),
    "mean of the last": Case(lambda x: x.mean(-1, keepdim=True)),
    "sum": Case(lambda x: x.sum(1)),
    "largest and least": Case(lambda x: x.amax((1, 2)) - x.amin((1, 2))),
    "norm": Case(lambda x: torch.linalg.vector_norm(x, 2, 1)),
    "product": Case(lambda x: x.prod(1)),
    "logsumexp": Case(lambda x: x.logsumexp(-1)),
    "equal parts": Case(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "unequal parts": Case(lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1)),
    "pad": Case(lambda x: F.pad(x, (1, 2, 0, 1), value=0.5)),
    "reflect": Case(lambda x: F.pad(x, (1, 2, 1, 1), mode="reflect")),
    "clip": Case(lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1)),
    "relu6": Case(F.relu6),
    "softmax": Case(lambda x: x.softmax(-1)),
    "softmax of channels": Case(lambda x: x.softmax(1)),
    "log softmax of rows": Case(lambda x: x.log_softmax(2)),
    "layer norm": Case(lambda x, norm: norm(x), lambda: (nn.LayerNorm(6),)),
    "layer norm of two": Case(lambda x, norm: norm(x), lambda: (nn.LayerNorm((6, 6), bias=False),)),
    "group norm": Case(lambda x, norm: norm(x), lambda: (nn.GroupNorm(2, 4),)),
    "batch norm": Case(lambda x, norm: F.relu(norm(F.relu(x))), lambda: (nn.BatchNorm2d(4),)),
    "hardswish": Case(F.hardswish),
    "hardsigmoid": Case(F.hardsigmoid),
    "mish": Case(F.mish),
    "gelu": Case(F.gelu),
    "gelu by tanh": Case(lambda x: F.gelu(x, approximate="tanh")),
    "squeeze": Case(lambda x: x.mean(2, keepdim=True).squeeze(2).unsqueeze(1).unsqueeze(-1)),
    "topk": Case(lambda x: x.topk(3, -1).values),
    "least": Case(lambda x: x.topk(3, -1, largest=False).values, refused=(9, 10)),
    "argmax": Case(lambda x: x.argmax(1)),
    "nearest": Case(lambda x: F.interpolate(x, scale_factor=2.0), refused=(9, 10)),
    "bilinear": Case(lambda x: F.interpolate(x, (9, 12), mode="bilinear"), refused=(9, 10)),
    "shape": Case(lambda x: x.flatten(1).reshape(x.shape[0], -1, 3).transpose(1, 2)),
    "slice": Case(lambda x: x[:, 1:3, ::2], refused=(9,)),
    "slice without a step": Case(lambda x: x[:, 1:3, :-1]),
    "comparison": Case(lambda x: torch.where(x >= 0.3, x, x * 2) + (x <= -0.3) * 1.0),
    "linear": Case(lambda x, fc: fc(x), lambda: (nn.Linear(6, 5),)),
    "linear of rows": Case(lambda x, fc: fc(x[:, 0, 0]), lambda: (nn.Linear(6, 5, bias=False),)),
    "max pool": Case(lambda x, pool: pool(x), lambda: (nn.MaxPool2d(2),)),
    "average pool with a last part": Case(
        lambda x, pool: pool(x), lambda: (nn.AvgPool2d(4, 3, ceil_mode=True),), refused=(9,)
    ),
    "class token": Case(
        lambda x, fc: torch.cat([fc.weight.expand(x.shape[0], -1, -1), x.mean(1)], 1), lambda: (nn.Linear(6, 1),)
    ),
    "attention": Case(
        lambda x, mix: mix(x[:, 0], x[:, 1], x[:, 2], need_weights=False)[0],
        lambda: (nn.MultiheadAttention(6, 2, batch_first=True),),
    ),
    "einsum": Case(lambda x: torch.einsum("nchw,nchv->ncwv", x, x), refused=(9, 10, 11)),
    "parts with a smaller last": Case(lambda x: torch.cat(x[..., :5].chunk(2, 3)[::-1], 3)),
    "every row": Case(lambda x: torch.stack(x.unbind(2)[::-1], 1)),
    "rounded": Case(lambda x: (x * 3).round(), refused=(9, 10)),
    "celu": Case(F.celu, refused=(9, 10, 11)),
    "elu": Case(F.elu),
    "softplus": Case(F.softplus),
    "positions": Case(lambda x: x + torch.arange(x.shape[0])[:, None, None, None]),
    "triangle": Case(lambda x: x.tril(), refused=(9, 10, 11, 12, 13)),
    "assigned": Case(assigned, refused=(9, 10)),
    "scattered": Case(lambda x: torch.zeros_like(x).scatter(3, x.argsort(3), x), refused=(9, 10)),
    "picked": Case(lambda x: x.take_along_dim(x.argmax(3, keepdim=True), 3), refused=(9, 10)),
    "rolled": Case(lambda x: x.roll(2, 3)),
    "flipped": Case(lambda x: x.flip(3), refused=(9,)),
    "integers": Case(lambda x: (x * 3).long().clamp(0, 2).float(), refused=(9, 10, 11)),
    "equal": Case(lambda x: (x == x.amax(1, keepdim=True)).float(), refused=(9, 10)),
    "powers": Case(lambda x: x**2 + x.abs().sqrt() + 2.0**x),
    "deviation": Case(lambda x: x.std(1, keepdim=True) + x.var((2, 3), keepdim=True)),
    "instance norm": Case(lambda x, norm: norm(x), lambda: (nn.InstanceNorm2d(4, affine=True),)),
    "rms norm": Case(lambda x, norm: norm(x), lambda: (nn.RMSNorm(6),)),
    "prelu": Case(lambda x, relu: relu(x), lambda: (nn.PReLU(4),)),
    "glu": Case(lambda x: F.glu(x, 1)),
    "adaptive": Case(lambda x: F.adaptive_avg_pool2d(x, 3)),
    "max pool with dilation": Case(lambda x: F.max_pool2d(x, 2, 1, dilation=2), refused=(9,)),
    "shuffle": Case(lambda x: F.pixel_shuffle(x, 2), refused=(9, 10)),
    "convolution": Case(lambda x, conv: conv(x), lambda: (nn.Conv2d(4, 4, 3, padding=1, groups=2),)),
    "transposed": Case(lambda x, conv: conv(x), lambda: (nn.ConvTranspose2d(4, 4, 3, 2, 1, 1),)),
    "logical": Case(lambda x: ((x > 0) & ~(x > 1) | (x < -1)).float()),
    "infinite": Case(lambda x: x.masked_fill(x > 0, float("-inf")).softmax(-1).nan_to_num(0.5), refused=(9,)),
    "remainder": Case(lambda x: x.remainder(0.7) + x.fmod(0.7), refused=(9,)),
    "floor division": Case(lambda x: (x / 0.3).floor() + torch.div(x, 0.7, rounding_mode="trunc")),
    "cumulative sum": Case(lambda x: x.cumsum(1), refused=(9, 10)),
}


def images() -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class AllCases(nn.Module):
    """Every case as one output: torch.onnx takes its time for each export."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(case.layers()) for case in CASES.values())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.run(x, *layers) for case, layers in zip(CASES.values(), self.layers, strict=True))


@pytest.fixture(scope="module")
def program() -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return capture(AllCases().eval(), images())


@pytest.fixture(scope="module")
def written(program: Program) -> dict[str, tuple[onnx.ModelProto, Tensor]]:
    """Case -> its part of the model that torch.onnx writes, and what torch computes."""
    model = to_onnx_model(program, opset=EXPORTER_OPSET)
    extractor = onnx.utils.Extractor(model)
    outputs = zip(CASES, program.outputs, program(images()), strict=True)
    return {name: (extractor.extract_model(["x"], [spec.name]), y) for name, spec, y in outputs}


def lowered(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """A copy of the model in an older operator set."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return lower_opset(copy, opset)


@pytest.mark.parametrize("name", CASES)
def test_an_older_operator_set_computes_the_same(written: dict[str, tuple[onnx.ModelProto, Tensor]], name: str) -> None:
    model, expected = written[name]
    refused = []
    for opset in VERSIONS:
        try:
            older = lowered(model, opset)
        except ExportError as error:
            refused.append(opset)
            assert error.node in {n.name for n in model.graph.node}
            assert f"opset={EXPORTER_OPSET}" in str(error)
            continue
        assert [(o.domain, o.version) for o in older.opset_import] == [("", opset)]
        onnx.checker.check_model(older, full_check=True)
        y = run_reference(reference_session(older.SerializeToString()), {"x": images().numpy()})[0]
        torch.testing.assert_close(
            torch.from_numpy(y), expected, rtol=1e-4, atol=1e-4, msg=lambda m, opset=opset: f"opset {opset}: {m}"
        )
    assert tuple(refused) == CASES[name].refused


def test_a_file_goes_out_in_the_operator_set_that_was_asked_for(residual: Program) -> None:
    model = onnx.load_model_from_string(to_onnx(residual, opset=13))
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 13)]
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = run_reference(reference_session(model.SerializeToString()), {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(y), residual(x), rtol=1e-4, atol=1e-4)


def test_an_operator_set_before_the_oldest_is_refused(written: dict[str, tuple[onnx.ModelProto, Tensor]]) -> None:
    with pytest.raises(ExportError, match="opset 8 is too old"):
        lowered(written["mean"][0], 8)
