"""Moments against direct computation, and that shards, batches and orders do not matter."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from foldcut.compiler.support.errors import CalibrationError
from foldcut.passes.solve.layers import Layer, find_layers
from foldcut.passes.solve.moments import Moments, check_finite, collect_moments
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.float64]

#: name -> keyword arguments of a Conv2d over 4 channels
CONVS: dict[str, dict[str, object]] = {
    "same": {"out_channels": 6, "kernel_size": 3, "padding": 1},
    "valid": {"out_channels": 5, "kernel_size": 3, "bias": False},
    "strided": {"out_channels": 6, "kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"out_channels": 3, "kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2)},
    "dilated": {"out_channels": 4, "kernel_size": 3, "dilation": (2, 1), "padding": 2},
    "grouped": {"out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 2, "bias": False},
    "depthwise": {"out_channels": 4, "kernel_size": 3, "padding": 1, "groups": 4},
    "multiplier": {"out_channels": 8, "kernel_size": 3, "groups": 4, "stride": 2},
    "pointwise": {"out_channels": 7, "kernel_size": 1},
    "pointwise_strided": {"out_channels": 7, "kernel_size": 1, "stride": 2, "bias": False},
    "pointwise_padded": {"out_channels": 2, "kernel_size": 1, "padding": 1},
    "pointwise_grouped": {"out_channels": 4, "kernel_size": 1, "groups": 2},
}
LINES: dict[str, dict[str, object]] = {
    "line": {"out_channels": 5, "kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2},
    "line_grouped": {"out_channels": 6, "kernel_size": 2, "groups": 3, "bias": False},
}


class Zoo(nn.Module):
    """Every kind of layer, side by side on the same two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleDict({name: nn.Conv2d(4, **options) for name, options in CONVS.items()})
        self.lines = nn.ModuleDict({name: nn.Conv1d(6, **options) for name, options in LINES.items()})
        self.linear, self.unbiased = nn.Linear(7, 5), nn.Linear(7, 3, bias=False)

    def forward(self, image: torch.Tensor, line: torch.Tensor) -> dict[str, torch.Tensor]:
        results = {name: conv(image) for name, conv in self.convs.items()}
        results |= {name: conv(line) for name, conv in self.lines.items()}
        return {**results, "linear": self.linear(line), "unbiased": self.unbiased(line[:, 0])}


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, 6, 7, generator=generator), torch.randn(5, 6, 7, generator=generator)


@pytest.fixture(scope="module")
def zoo(nets: SimpleNamespace, data: tuple[torch.Tensor, torch.Tensor]) -> Program:
    return capture(nets.seeded(Zoo), (data[0][:2], data[1][:2]))


@pytest.fixture(scope="module")
def layers(zoo: Program) -> dict[str, Layer]:
    """By the name of the output that each makes."""
    found, rejects = find_layers(zoo)
    assert not rejects
    named = {layer.weight.split(".")[-2]: layer for layer in found.values()}
    assert set(named) == {*CONVS, *LINES, "linear", "unbiased"}
    return named


def two(value: object) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)  # type: ignore[return-value]


def patches(image: Array, name: str) -> list[Array]:
    """A of each group, (rows, columns), by loops: the definition of a convolution."""
    options = CONVS.get(name) or LINES[name]
    if name in LINES:
        image = image[:, :, None, :]
    flat = (lambda v, height: (height, v)) if name in LINES else (lambda v, _height: two(v))
    kh, kw = flat(options["kernel_size"], 1)
    sh, sw = flat(options.get("stride", 1), 1)
    ph, pw = flat(options.get("padding", 0), 0)
    dh, dw = flat(options.get("dilation", 1), 1)
    padded = np.pad(image, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    height = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    groups = int(options.get("groups", 1))  # type: ignore[call-overload]
    per = image.shape[1] // groups
    return [
        np.array(
            [
                padded[n, g * per : (g + 1) * per, y * sh : y * sh + dh * kh : dh, x * sw : x * sw + dw * kw : dw]
                .copy()
                .ravel()
                for n in range(len(padded))
                for y in range(height)
                for x in range(width)
            ]
        )
        for g in range(groups)
    ]


def direct_rows(name: str, data: tuple[torch.Tensor, torch.Tensor]) -> list[Array]:
    image, line = (d.double().numpy() for d in data)
    if name == "linear":
        return [line.reshape(-1, 7)]
    if name == "unbiased":
        return [line[:, 0]]
    return patches(line if name in LINES else image, name)


@pytest.mark.parametrize("name", [*CONVS, *LINES, "linear", "unbiased"])
def test_moments_equal_direct_computation(
    zoo: Program, layers: dict[str, Layer], data: tuple[torch.Tensor, torch.Tensor], name: str
) -> None:
    layer = layers[name]
    moments = collect_moments(zoo, {layer.node: layer}, CalibrationSet.of(data), batch_size=2)[layer.node]
    weight = zoo.module.get_parameter(layer.weight).detach().double().numpy()
    rows = direct_rows(name, data)
    assert moments.gram.shape[0] == moments.cross.shape[0] == len(rows) == layer.groups
    per = len(weight) // len(rows)
    for g, a in enumerate(rows):
        ones = np.concatenate([a, np.ones((len(a), 1))], axis=1)
        outputs = a @ weight[g * per : (g + 1) * per].reshape(per, -1).T
        np.testing.assert_allclose(moments.gram[g].numpy(), ones.T @ ones, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(moments.cross[g].numpy(), ones.T @ outputs, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(moments.energy[g].numpy(), np.square(outputs).sum(0), rtol=1e-4)
        assert moments.rows == len(a)
    assert moments.error() == pytest.approx(float(moments.energy.sum()))


@pytest.mark.parametrize("name", [*CONVS, *LINES, "linear", "unbiased"])
def test_rows_times_weights_are_the_layers_outputs(
    zoo: Program, layers: dict[str, Layer], data: tuple[torch.Tensor, torch.Tensor], name: str
) -> None:
    """`rows`, `matrix` and `outputs` agree on the order of rows, columns and groups."""
    layer = layers[name]
    value = data[0] if name in CONVS else data[1][:, 0] if name == "unbiased" else data[1]
    weight = layer.matrix(zoo.module.get_parameter(layer.weight).detach())
    product = torch.bmm(weight, layer.rows(zoo, value))
    if layer.bias is not None:
        product += zoo.module.get_parameter(layer.bias).detach().view(layer.groups, -1, 1)
    torch.testing.assert_close(layer.outputs(zoo(data)[name]), product, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("every", [2, 3, 7, 1000])
@pytest.mark.parametrize("name", [*CONVS, *LINES, "linear", "unbiased"])
def test_thinned_rows_are_those_of_all(
    zoo: Program, layers: dict[str, Layer], data: tuple[torch.Tensor, torch.Tensor], name: str, every: int
) -> None:
    layer = layers[name]
    value = data[0] if name in CONVS else data[1][:, 0] if name == "unbiased" else data[1]
    rows, outputs = layer.rows(zoo, value), layer.outputs(zoo(data)[name])
    assert layer.extent(zoo, value) == rows.shape[1:]
    assert torch.equal(layer.rows(zoo, value, every), rows[:, :, ::every])
    assert torch.equal(layer.outputs(zoo(data)[name], every), outputs[:, :, ::every])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_streaming_equals_one_batch(
    zoo: Program, layers: dict[str, Layer], data: tuple[torch.Tensor, torch.Tensor], batch_size: int
) -> None:
    by_node = {layer.node: layer for layer in layers.values()}
    whole = collect_moments(zoo, by_node, CalibrationSet.of(data), batch_size=5)
    parts = collect_moments(zoo, by_node, CalibrationSet.of(data), batch_size=batch_size)
    assert set(whole) == set(parts) == set(by_node)
    for name, moments in whole.items():
        torch.testing.assert_close(parts[name].gram, moments.gram, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(parts[name].cross, moments.cross, rtol=1e-5, atol=1e-4)
        assert parts[name].rows == moments.rows


def test_only_the_layers_asked_for(
    zoo: Program, layers: dict[str, Layer], data: tuple[torch.Tensor, torch.Tensor]
) -> None:
    by_node = {layer.node: layer for layer in layers.values()}
    wanted = [layers["linear"].node]
    assert list(collect_moments(zoo, by_node, CalibrationSet.of(data), names=wanted)) == wanted


@given(data=st.data())
def test_sharded_moments_add_up(data: st.DataObject) -> None:
    groups, columns, outputs, rows = (data.draw(st.integers(1, top)) for top in (3, 5, 4, 12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    a = torch.randn(groups, columns, rows, generator=generator, dtype=torch.float64)
    r = torch.randn(groups, outputs, rows, generator=generator, dtype=torch.float64)
    cut = data.draw(st.integers(0, rows))
    whole = Moments.of(a, r)
    parts = Moments.of(a[:, :, :cut], r[:, :, :cut]) + Moments.of(a[:, :, cut:], r[:, :, cut:])
    assert parts.rows == whole.rows == rows
    for name in ("gram", "cross", "energy"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 99))
def test_the_error_of_a_change_is_that_of_the_rows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64)
    r = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    delta = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    ones = torch.cat([a, a.new_ones(2, 1, 9)], dim=1)
    wanted = (r - delta.transpose(1, 2) @ ones).square().sum(2)
    torch.testing.assert_close(Moments.of(a, r).error_after(delta), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("columns", [5, 127, 150])
def test_gram_matrices_are_symmetric_bit_for_bit(columns: int) -> None:
    """Products of matrices are so only nearly: several processes send one triangle."""
    rows = torch.randn(2, columns, 1000)
    gram = Moments.of(rows, rows[:, :3]).gram
    assert torch.equal(gram, gram.mT)
    assert torch.allclose(gram[:, :columns, :columns], rows.double() @ rows.double().mT, rtol=1e-4, atol=1e-2)


def test_sums_are_in_float64() -> None:
    """Ten million small numbers onto a large one: float32 sums would lose them."""
    big, small = torch.full((1, 1, 1), 4096.0), torch.full((1, 1, 1), 0.25)
    residual = torch.zeros(1, 1, 1)
    total = Moments.of(big, residual)
    for _ in range(64):
        total = total + Moments.of(small, residual)
    assert total.gram.dtype == torch.float64
    assert float(total.gram[0, 0, 0]) == 4096.0**2 + 64 * 0.0625


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_refused(value: float, nets: SimpleNamespace) -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(torch.log(x * 0 - 1) if math.isnan(value) else torch.exp(x * 0 + 1000))

    # capture compares outputs, NaN with NaN included, so the network as such is fine
    program = capture(nets.seeded(Overflowing), nets.images())
    layers, _ = find_layers(program)
    with pytest.raises(CalibrationError, match="activations are not finite") as caught:
        collect_moments(program, layers, CalibrationSet.of(nets.images(4)))
    assert caught.value.node == "conv2d"
    assert "> %conv2d" in str(caught.value.excerpt)
    assert "float32" in str(caught.value.hint)


def test_finite_moments_pass(residual: Program) -> None:
    check_finite(Moments.of(torch.ones(1, 2, 3), torch.ones(1, 1, 3)), residual, "conv2d")
