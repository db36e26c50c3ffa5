"""Rounding by the Gram matrix: never worse than to the nearest, exact on the grid."""

import pytest
import torch
from foldcut.passes.quantize.rounding import Rounded, rounded
from foldcut.passes.solve.moments import Moments


def gram_of(rows: torch.Tensor) -> torch.Tensor:
    """Of rows as (groups, columns, rows)."""
    return Moments.of(rows, torch.zeros(rows.shape[0], 1, rows.shape[2])).gram


def correlated(groups: int = 1, columns: int = 24, count: int = 400) -> torch.Tensor:
    mixed = torch.randn(groups, columns, 5) @ torch.randn(groups, 5, count)
    return (mixed + 0.3 * torch.randn(groups, columns, count)).relu()


def loss(weight: torch.Tensor, found: Rounded, rows: torch.Tensor) -> torch.Tensor:
    """Squared error of each output over the rows."""
    change = weight.double() - found.values.double() * found.scales
    return ((change @ rows.double()) - found.shift.unsqueeze(2)).square().sum(2)


def nearest(weight: torch.Tensor, found: Rounded, rows: torch.Tensor, limit: int) -> torch.Tensor:
    """The same of the nearest integers on the same scales, with the best bias."""
    values = (weight.double() / found.scales).round().clamp(-limit, limit)
    change = (weight.double() - values * found.scales) @ rows.double()
    return (change - change.mean(2, keepdim=True)).square().sum(2)


@pytest.mark.parametrize("limit", [127, 63, 7])
@pytest.mark.parametrize("groups", [1, 3])
def test_no_output_is_worse_than_rounded_to_the_nearest(limit: int, groups: int) -> None:
    rows, weight = correlated(groups), torch.randn(groups, 8, 24)
    found = rounded(weight, gram_of(rows), limit)
    assert found.values.dtype == torch.int8 and int(found.values.abs().max()) <= limit
    ours, plain = loss(weight, found, rows), nearest(weight, found, rows, limit)
    assert bool((ours <= plain * (1 + 1e-4)).all())
    assert float(ours.sum()) < 0.6 * float(plain.sum())  # inputs that go together make up for each other


def test_weights_on_the_grid_stay() -> None:
    values = torch.randint(-63, 64, (1, 6, 20))
    values[:, :, 0] = 63
    scales = torch.rand(1, 6, 1) + 0.1
    found = rounded(values * scales, gram_of(correlated(columns=20)), 63)
    torch.testing.assert_close(found.values.double() * found.scales, (values * scales).double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.shift, torch.zeros_like(found.shift), rtol=0, atol=1e-4)


def test_inputs_that_are_never_active_and_outputs_of_zeros() -> None:
    rows, weight = correlated(), torch.randn(1, 4, 24)
    rows[:, 3:6] = 0
    weight[:, 2] = 0
    found = rounded(weight, gram_of(rows), 127)
    assert bool(found.scales.isfinite().all()) and bool((found.scales > 0).all())
    assert not bool(found.values[:, 2].any())


def test_samples_that_are_all_zero() -> None:
    found = rounded(torch.randn(1, 4, 5), torch.zeros(1, 6, 6, dtype=torch.float64), 127)
    assert bool(found.shift.isfinite().all())
