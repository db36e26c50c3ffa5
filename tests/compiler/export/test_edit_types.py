"""Networks in half precision become float32 and come back as they were."""

from __future__ import annotations

import foldcut
import pytest
import torch
from foldcut.compiler.export.edit_types import as_measured, as_stored, in_stored_types, input_types, widened
from foldcut.compiler.export.exporter import to_exported, to_onnx
from torch import nn

HALVES = [torch.float16, torch.bfloat16]


class Norm(nn.Module):
    """The norm of language models: in float32 whatever the network is in, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Language(nn.Module):
    """Tokens in, probabilities in float32 out, the table of tokens tied to the last layer."""

    def __init__(self, width: int = 16, tokens: int = 30) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, width)
        self.norm, self.up, self.down = Norm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + self.down(nn.functional.silu(self.up(self.norm(x))))
        return torch.softmax(self.head(x).float(), -1)


def language(dtype: torch.dtype) -> foldcut.Program:
    torch.manual_seed(0)
    return foldcut.capture(Language().eval().to(dtype), torch.randint(0, 30, (2, 5)))


def layers(dtype: torch.dtype) -> foldcut.Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval().to(dtype)
    return foldcut.capture(net, torch.randn(2, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("make", [language, layers])
def test_there_and_back_is_the_same_network(dtype, make):
    program = make(dtype)
    wide = widened(program)
    assert not {t.dtype for t in wide.module.state_dict().values()} & set(HALVES)
    back = as_stored(wide)
    assert back.fingerprint == program.fingerprint
    assert back.inputs == program.inputs and back.outputs == program.outputs
    for each in (wide, back):
        each.check()
    assert as_stored(program) is program and widened(wide) is wide


@pytest.mark.parametrize("dtype", HALVES)
def test_float32_computes_what_half_precision_rounds(dtype):
    program = language(dtype)
    tokens = torch.randint(0, 30, (8, 5), generator=torch.Generator().manual_seed(1))
    ours, theirs = widened(program)(tokens), program(tokens)
    assert ours.dtype == theirs.dtype == torch.float32
    assert 0 < (ours - theirs).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES)
def test_tied_weights_stay_tied(dtype):
    net = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    net["two"].weight = net["one"].weight

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers["two"](self.layers["one"](x))

    program = foldcut.capture(Twice().eval().to(dtype), torch.randn(2, 4, dtype=dtype))
    for each in (widened(program), as_stored(widened(program))):
        assert each.parameter_count() == program.parameter_count() == 16 + 4 + 4
        assert each.shared_storage and len(each.shared_storage) == len(program.shared_storage)


def test_other_networks_are_left_alone():
    program = layers(torch.float32)
    assert widened(program) is program and as_measured(program) is program
    assert input_types(program) == (torch.float32,)


def test_float32_samples_are_rounded_to_what_the_network_takes():
    program = layers(torch.bfloat16)
    samples = torch.randn(3, 8)
    assert torch.equal(program(samples), program(samples.bfloat16()))
    assert in_stored_types(widened(program), [samples])[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_of_a_rewrite_are_stored_like_those_beside_them(dtype):
    wide = widened(layers(dtype))
    change = foldcut.FactorizeLayer(layer="linear_1", scheme="channel", ranks=(2,), full=(4,))
    factors = foldcut.Factorize().plain(wide, [change])
    stored = as_stored(factors)
    stored.check()
    assert {t.dtype for t in stored.module.state_dict().values()} == {dtype}
    assert len(stored.module.state_dict()) == len(wide.module.state_dict()) + 1
    samples = torch.randn(4, 8, dtype=dtype)
    difference = (factors(samples.float()) - stored(samples).float()).abs().max()
    assert stored(samples).dtype == dtype and difference < 0.02
    assert to_exported(stored).module()(samples).dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_integers_are_computed_with_in_float32_between_half_precision(dtype):
    wide = widened(layers(dtype))
    rounded = foldcut.Quantize().shape(wide, [foldcut.QuantizeLayer(layer="linear_1")])
    stored = as_stored(rounded)
    stored.check()
    assert stored.outputs[0].dtype == dtype
    assert {torch.int8, dtype} <= {t.dtype for t in stored.module.state_dict().values()}
    samples = torch.randn(4, 8, dtype=dtype)
    assert (rounded(samples.float()) - stored(samples).float()).abs().max() < 0.05


def test_backends_get_float16_as_it_is_and_float32_for_bfloat16():
    import onnx

    half, brain = (widened(layers(dtype)) for dtype in HALVES)
    assert as_measured(half).inputs[0].dtype == torch.float16
    assert as_measured(brain) is brain
    model = onnx.load_from_string(to_onnx(as_stored(brain)))
    onnx.checker.check_model(model, full_check=True)
    assert {tensor.data_type for tensor in model.graph.initializer} == {onnx.TensorProto.BFLOAT16}


class Bits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).view(torch.int16)


def test_networks_that_read_bits_are_refused():
    program = foldcut.capture(Bits().eval().bfloat16(), torch.randn(2, 4).bfloat16())
    with pytest.raises(foldcut.CaptureError, match="reads the bits"):
        widened(program)
