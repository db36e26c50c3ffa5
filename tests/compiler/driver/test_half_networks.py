"""Networks in float16 and bfloat16 are compiled: solved in float32, written back as they came."""

from __future__ import annotations

from pathlib import Path

import foldcut
import onnx
import pytest
import torch
from torch import nn

QUICK = foldcut.MimicSettings(iterations=6, batch_size=16, checks=2, bfloat16=False)
OPTIONS = {"progress": False, "cache": False}
HALVES = [torch.float16, torch.bfloat16]
#: bfloat16 is measured in float32, and says so.
MEASURED = "ignore:the network is in bfloat16:UserWarning"
pytestmark = [
    pytest.mark.usefixtures("quick_measurement"),
    pytest.mark.filterwarnings(MEASURED),
    pytest.mark.filterwarnings("ignore:.*little is left:UserWarning"),
]


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        parts = self.qkv(self.norm(x)).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


def layers() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(
        80, 16
    )


def images() -> tuple[nn.Module, torch.Tensor]:
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Residual(16), Residual(16)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)), torch.randn(80, 3, 6, 6)


def tokens() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(Attention(), Attention(), nn.LayerNorm(16), nn.Linear(16, 4)), torch.randn(80, 5, 16)


def made(make, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net, samples = make()
    return net.eval().to(dtype), samples.to(dtype)


CASES = [
    (layers, foldcut.Channels(0.6)),
    (layers, foldcut.Ranks(keep=0.5)),
    (images, foldcut.Blocks(1)),
    (images, foldcut.Macs(0.7)),
    (tokens, foldcut.Blocks(1)),
    (tokens, foldcut.Ranks(keep=0.5)),
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("make", "goal"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_the_result_is_in_the_type_of_the_original(make, goal, dtype):
    net, samples = made(make, dtype)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    out = foldcut.compile(net, samples, goal=goal, mimic=QUICK, **OPTIONS)
    floats = [v for v in out.module.state_dict().values() if v.is_floating_point()]
    assert {v.dtype for v in floats} == {dtype}
    assert out.module(samples[:3]).dtype == net(samples[:3]).dtype == dtype
    assert {t.data_type for t in onnx.load_from_string(out.onnx).graph.initializer if t.data_type != 7} == {
        onnx.helper.np_dtype_to_tensor_dtype(torch.zeros(1, dtype=torch.float16).numpy().dtype)
        if dtype == torch.float16
        else onnx.TensorProto.BFLOAT16
    }
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    # as good as the same network in float32, but for what the types round
    wide = foldcut.compile(net.float(), samples.float(), goal=goal, mimic=QUICK, **OPTIONS)
    assert wide.plan.decisions == out.plan.decisions
    assert out.report.output_error < 1.2 * wide.report.output_error + 1e-3


@pytest.mark.parametrize("dtype", HALVES)
def test_the_plan_is_that_of_the_network_as_it_is_stored(dtype, tmp_path: Path):
    net, samples = made(layers, dtype)
    out = foldcut.compile(net, samples, goal=foldcut.Channels(0.5), mimic=False, **OPTIONS)
    assert out.plan.fingerprint == foldcut.capture(net, samples[:2]).fingerprint
    out.save(tmp_path)
    wanted = out.module(samples)
    assert torch.equal(foldcut.load(tmp_path).module(samples), wanted)
    again = foldcut.apply(net, tmp_path / "plan.json", example=samples[:2], mimic=False, **OPTIONS)
    assert torch.equal(again.module(samples), wanted)
    solved = foldcut.apply(net, out.plan, calibration=samples, mimic=False, **OPTIONS)
    assert torch.equal(solved.module(samples), wanted)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_metric_sees_networks_in_their_own_type(dtype):
    net, samples = made(layers, dtype)
    seen: list[torch.dtype] = []

    def metric(module: nn.Module) -> float:
        seen.append(module(samples[:4]).dtype)
        return 1.0

    foldcut.compile(net, samples, goal=foldcut.Channels(0.5), mimic=False, evaluate=metric, **OPTIONS)
    assert seen == [dtype, dtype]


@pytest.mark.filterwarnings("default:the network is in bfloat16:UserWarning")
def test_bfloat16_says_what_was_measured():
    net, samples = made(layers, torch.bfloat16)
    with pytest.warns(UserWarning, match="latencies are those of the same network in float32"):
        out = foldcut.compile(net, samples, goal=foldcut.Channels(0.5), mimic=False, **OPTIONS)
    assert any("in bfloat16" in words for words in out.report.warnings)


def test_float32_samples_do_for_a_network_in_bfloat16():
    net, samples = made(layers, torch.bfloat16)
    with pytest.warns(UserWarning, match="float32 to bfloat16"):
        out = foldcut.compile(net, samples.float(), goal=foldcut.Channels(0.5), mimic=False, **OPTIONS)
    assert out.module(samples[:2]).dtype == torch.bfloat16


def test_samples_are_made_in_the_type_of_the_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval().bfloat16()
    settings = foldcut.SynthesisSettings(count=16, input_shape=(3, 12, 12), iterations=2)
    with pytest.warns(UserWarning, match="no data were given"):
        samples = foldcut.synthesise(net, settings, progress=False, cache=False)
        out = foldcut.compile(net, settings, goal=foldcut.Channels(0.5), mimic=False, **OPTIONS)
    assert samples.leaves[0].dtype == out.module(samples.leaves[0]).dtype == torch.bfloat16


def test_an_onnx_file_in_float16_stays_so(tmp_path: Path):
    from foldcut.compiler.export.exporter import to_onnx

    net, samples = made(layers, torch.float16)
    path = tmp_path / "net.onnx"
    path.write_bytes(to_onnx(foldcut.capture(net, samples[:2])))
    out = foldcut.compile(path, samples, goal=foldcut.Channels(0.5), mimic=False, **OPTIONS)
    model = onnx.load_from_string(out.onnx)
    assert {t.data_type for t in model.graph.initializer} == {onnx.TensorProto.FLOAT16}
    assert out.report.file_bytes["before"] > out.report.file_bytes["after"]
