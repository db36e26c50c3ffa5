"""Graphs that take any memory layout: what a kernel returns has other strides with gradients, without, or rewritten."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import onnxruntime
import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.export.exporter import to_exported, to_onnx, to_pt2
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from foldcut.compiler.support.errors import CaptureError
from foldcut.passes.drop.drop_blocks import drop_blocks
from torch import nn
from torch.nn import functional as F

aten = torch.ops.aten
DYNAMIC = ({0: torch.export.Dim.DYNAMIC},)


class MaskedAttention(nn.Module):
    """Attention with a trained mask: while tracing another kernel is chosen for it than when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.randn(1, 4, 6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.expand(n, -1, -1, -1))
        return self.out(y.transpose(1, 2).reshape(n, length, width))


class ChannelsLast(nn.Module):
    """A view that channels_last images allow, and others do not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 25, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().permute(0, 2, 3, 1).view(x.shape[0], -1))


class Bits(nn.Module):
    """Reads the bits of its input: a view that is no reshape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(torch.int32) & 255


def attention() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return MaskedAttention().eval(), torch.randn(2, 6, 16)


def check_everywhere(program: Program, x: torch.Tensor, wanted: torch.Tensor) -> None:
    """The program, its export, the file of that and its ONNX model compute what is wanted, gradients on and off."""
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(program.module(x), wanted)
            exported = to_exported(program)
            torch.testing.assert_close(exported.module()(x), wanted)
            again = capture(torch.export.load(BytesIO(to_pt2(exported))))
            torch.testing.assert_close(again.module(x), wanted)
            session = onnxruntime.InferenceSession(to_onnx(program), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {program.inputs[0].name: x.numpy()})
        np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradients", [False, True])
def test_attention_under_another_kernel(gradients: bool) -> None:
    net, x = attention()
    with torch.set_grad_enabled(gradients):
        program = capture(net, x)
    more = torch.randn(5, 6, 16)
    check_everywhere(program, more, net(more))


@pytest.mark.parametrize("gradients", [False, True])
def test_an_exported_attention_under_another_kernel(gradients: bool) -> None:
    net, x = attention()
    with torch.set_grad_enabled(gradients):
        exported = torch.export.export(net, (x,), dynamic_shapes=DYNAMIC)
    with torch.set_grad_enabled(not gradients):
        program = capture(exported)
    check_everywhere(program, x, net(x))


def test_gradients_flow_through_a_captured_attention() -> None:
    net, x = attention()
    program = capture(net, x)
    program.module(x).square().sum().backward()
    net(x).square().sum().backward()
    torch.testing.assert_close(program.tensor("qkv.weight").grad, net.qkv.weight.grad)


def test_a_view_of_channels_last_images() -> None:
    torch.manual_seed(0)
    net, x = ChannelsLast().eval(), torch.randn(2, 3, 5, 5)
    wanted = net(x.to(memory_format=torch.channels_last))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        net(x)
    check_everywhere(capture(net, x.to(memory_format=torch.channels_last)), x, wanted)


def test_no_view_is_left_in_a_program(transformer: Program) -> None:
    asked = (aten.view.default, aten._unsafe_view.default)
    assert any(n.target is aten.reshape.default for n in transformer.graph.nodes)
    assert not [n for n in transformer.graph.nodes if n.target in asked]
    assert not [n for n in capture(to_exported(transformer)).graph.nodes if n.target in asked]


def test_a_view_of_the_bits_stays_one() -> None:
    net, x = Bits().eval(), torch.randn(2, 4)
    program = capture(net, x)
    assert torch.equal(program(x * 3), net(x * 3))


class Strided(nn.Module):
    """A block that may go, in front of what reads memory by its strides. The value before it lies otherwise."""

    def __init__(self, lay: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.lay = lay
        self.stem, self.inner, self.head = nn.Linear(4, 6), nn.Conv2d(6, 6, 1), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).permute(0, 3, 1, 2)
        x = self.lay(x + self.inner(x))
        return self.head(x.as_strided((x.shape[0], 5, 3, 3), x.stride(), 0).mean((2, 3)))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "in order": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "as it comes": lambda x: x + 0,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_that_is_read_by_strides_is_laid_out_first(name: str) -> None:
    torch.manual_seed(0)
    net = Strided(LAYOUTS[name]).eval()
    with torch.no_grad():
        net.inner.weight.zero_()
        net.inner.bias.zero_()
    program = capture(net, torch.randn(3, 3, 3, 4))
    (region,) = find_regions(program).regions
    smaller = drop_blocks(program, [region])
    for count in (1, 2, 5):
        x = torch.randn(count, 3, 3, 4)
        with torch.no_grad():
            torch.testing.assert_close(program(x), net(x))
        torch.testing.assert_close(smaller(x), program(x))


def test_strides_into_another_tensor_are_refused() -> None:
    net = Strided(lambda x: x[:, :, :, ::2].repeat_interleave(2, 3)[:, :, :, :3])
    with pytest.raises(CaptureError, match="reads memory by strides"):
        capture(net.eval(), torch.randn(3, 3, 3, 4))
