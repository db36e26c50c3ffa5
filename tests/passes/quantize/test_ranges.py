"""Ranges from streamed histograms."""

import foldcut
import pytest
import torch
from foldcut.passes.quantize.ranges import RANGES, GridKind, Histogram, histograms
from torch import nn


@pytest.fixture(scope="module")
def program() -> foldcut.Program:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return foldcut.capture(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(2, 6))


@pytest.mark.parametrize("kind", [GridKind(), GridKind(dtype=torch.int8), GridKind(dtype=torch.int8, symmetric=True)])
@pytest.mark.parametrize("ends", [(0.0, 1e-44), (-1e-44, 0.0), (-3e38, 3e38), (0.0, 0.0), (-1.0, -1.0)])
def test_ranges_at_the_ends_of_single_precision(kind: GridKind, ends: tuple[float, float]) -> None:
    """A scale that a file holds as zero would make infinities of all values."""
    grid = kind.over(*ends)
    assert float(torch.tensor(grid.scale)) >= torch.finfo(torch.float32).tiny
    assert bool(grid.rounded(torch.tensor([0.0, *ends])).isfinite().all())


def test_they_do_not_depend_on_the_batches(program: foldcut.Program) -> None:
    samples = foldcut.CalibrationSet.of(torch.randn(50, 6))
    one, other = (histograms(program, ["linear", "relu"], samples, batch_size=size) for size in (7, 50))
    for name in one:
        assert (one[name].low, one[name].high) == (other[name].low, other[name].high)
        assert torch.equal(one[name].counts, other[name].counts)
        assert float(one[name].counts.sum()) == 50 * 8


def test_one_sample_says_little(program: foldcut.Program) -> None:
    with pytest.warns(UserWarning, match="those of a single sample"):
        found = histograms(program, ["relu"], foldcut.CalibrationSet.of(torch.randn(1, 6)), batch_size=4)
    assert float(found["relu"].counts.sum()) == 8


def test_what_overflows_is_named(program: foldcut.Program) -> None:
    samples = torch.randn(8, 6)
    samples[3] = 3.4e38 * program.module.get_parameter("0.weight").detach()[0].sign()
    with pytest.raises(foldcut.CalibrationError, match="not finite") as caught:
        histograms(program, ["linear"], foldcut.CalibrationSet.of(samples), batch_size=4)
    assert caught.value.node == "linear"


def histogram(values: torch.Tensor) -> Histogram:
    low, high = float(values.min()), float(values.max())
    return Histogram(low=low, high=high, counts=torch.histc(values, 2048, low, high).double())


KINDS = [GridKind(), GridKind(dtype=torch.int8), GridKind(dtype=torch.int8, symmetric=True)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", RANGES)
def test_zero_is_exact_and_what_is_inside_half_a_step_away(name: str, kind: GridKind) -> None:
    values = torch.randn(20_000) * 2 + 1
    grid = RANGES[name](histogram(values), kind)
    assert float(grid.rounded(torch.zeros(1))) == 0.0
    low, high = ((end - grid.zero_point) * grid.scale for end in (grid.low, grid.high))
    inside = values[(values > low) & (values < high)]
    assert float((grid.rounded(inside) - inside).abs().max()) <= grid.scale * 0.5001
    assert len(inside) > 0.99 * len(values)
    assert (grid.zero_point == 0) >= kind.symmetric


def test_a_few_outliers_do_not_take_the_range() -> None:
    values = torch.cat([torch.rand(100_000), torch.tensor([40.0])])
    found = histogram(values)
    grids = {name: way(found, GridKind()) for name, way in RANGES.items()}
    errors = {name: float((grid.rounded(values[:-1]) - values[:-1]).square().mean()) for name, grid in grids.items()}
    assert errors["percentile"] < 0.01 * errors["minmax"]
    lost = {name: float((grid.rounded(values) - values).square().sum()) for name, grid in grids.items()}
    assert lost["mse"] <= min(lost.values()) * 1.01


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_value_that_is_always_the_same(value: float) -> None:
    found = Histogram(low=value, high=value, counts=torch.tensor([5.0] + [0.0] * 2047, dtype=torch.float64))
    for way in RANGES.values():
        for kind in KINDS:
            grid = way(found, kind)
            assert float(grid.rounded(torch.tensor([value]))) == pytest.approx(value, rel=0.01)


def test_the_divergence_is_that_of_its_definition() -> None:
    """By hand: two bins to an integer, one value beyond the range."""
    counts = torch.zeros(2048, dtype=torch.float64)
    counts[:512] = torch.arange(1, 513, dtype=torch.float64)
    counts[2000] = 1
    found = Histogram(low=0.0, high=2048.0, counts=counts)
    entropy, whole = RANGES["entropy"](found, GridKind()), RANGES["minmax"](found, GridKind())
    assert whole.scale == pytest.approx(2048 / 255)
    # a range that ends where the values do keeps each integer's neighbours apart; one value more or less is nothing
    assert 400 <= entropy.scale * 255 <= 700
