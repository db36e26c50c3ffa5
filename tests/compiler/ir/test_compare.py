"""Comparing outputs."""

import math

import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.output_error import errors_by_output, output_error
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.compare import compare, flatten_outputs, relative_error
from torch import nn


def test_figures_of_a_known_difference() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    difference = compare(a, b)
    assert difference.absolute == pytest.approx(0.5)
    assert difference.relative == pytest.approx(0.125)
    assert difference.cosine == pytest.approx(27 / (5 * math.hypot(3, 4.5)))
    assert relative_error(a, b) == pytest.approx(0.25 / 25)


def test_equal_outputs() -> None:
    outputs = {"a": torch.randn(3), "b": (torch.zeros(2), torch.tensor([1, 2]))}
    difference = compare(outputs, outputs)
    assert (difference.absolute, difference.relative) == (0, 0)
    assert difference.cosine == pytest.approx(1)
    assert relative_error(outputs, outputs) == 0


def test_the_worst_output_counts() -> None:
    a = (torch.tensor([100.0]), torch.tensor([1.0]))
    b = (torch.tensor([101.0]), torch.tensor([1.5]))
    assert compare(a, b).absolute == pytest.approx(1)
    assert compare(a, b).relative == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), (torch.zeros(2), torch.zeros(2))),
    ],
)
def test_other_structure_is_infinitely_far(a: object, b: object) -> None:
    difference = compare(a, b)
    assert not difference.same_structure
    assert difference.relative == math.inf
    assert "differ in number, shape or dtype" in str(difference)


def test_nan_and_infinity() -> None:
    nan, one = torch.tensor([math.nan]), torch.tensor([1.0])
    assert compare(nan, nan).absolute == 0
    assert compare(one, nan).absolute == math.inf
    assert compare(one, torch.tensor([math.inf])).absolute == math.inf


def test_an_infinite_entry_hides_nothing() -> None:
    """Masked logits: the others count as if it were not there."""
    for masked in (math.inf, -math.inf, math.nan):
        a, b = torch.tensor([masked, 1.0, 2.0]), torch.tensor([masked, 1.0, 5.0])
        assert compare(a, b).relative == 1.5
        assert compare(a, b).cosine == compare(a[1:], b[1:]).cosine < 1
        assert compare(a, a).relative == 0
        assert compare(a, a).cosine == pytest.approx(1)
        assert compare(a, torch.tensor([0.0, 1.0, 2.0])).relative == math.inf


def test_a_zero_reference() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert compare(zero, one).relative == 1
    assert relative_error(zero, zero) == 0
    assert relative_error(zero, one) == math.inf


def test_only_tensors_are_flattened_in_order() -> None:
    first, second = torch.zeros(1), torch.ones(1)
    assert flatten_outputs({"a": first, "b": [None, 3, second]}) == [first, second]


def test_errors_by_output() -> None:
    """Each output by its own energy; the error of all together lies between them."""

    class Two(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"near": x * 100.0, "far": x * self.scale}

    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    before, after = (capture(Two(scale).eval(), x) for scale in (2.0, 1.0))
    samples = CalibrationSet.of(x)
    assert errors_by_output(before, after, samples, batch_size=4) == {"near": 0.0, "far": pytest.approx(0.25)}
    assert 0 < output_error(before, after, samples) < 0.25
