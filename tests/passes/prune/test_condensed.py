"""Groups that one layer reads together: one factorisation says what each group's own would."""

from dataclasses import replace

import pytest
import torch
from foldcut.passes.prune.condensed import CondensedObjective, SharedColumns
from foldcut.passes.prune.submodular import Objective, select_units, submodularity_bound
from foldcut.passes.solve.moments import Moments


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def concatenation(
    seed: int, *, groups: int = 1, rows: int = 80, dead: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(A, R, W) of a layer that reads 12 columns; the inputs correlate, not around 0."""
    a = normal(12, 12, seed=seed) @ normal(groups, 12, rows, seed=seed + 1) + 1
    if dead is not None:
        a[:, dead], a[:, dead + 1] = 0, 3
    return a, 0.2 * normal(groups, 4, rows, seed=seed + 2), normal(groups, 4, 12, seed=seed + 3)


def objective(case: tuple[torch.Tensor, ...], units: torch.Tensor, *, bias: bool, ridge: float = 0.02) -> Objective:
    a, residual, weight = case
    cut = a.shape[2] * 3 // 4
    held = Moments.of(a[:, :, cut:], residual[:, :, cut:])
    whole = Moments.of(a[:, :, :cut], residual[:, :, :cut]) + held
    gain = torch.tensor([1.0, 2.0, 0.5, 0.0]).expand(weight.shape[0], 4)
    made = Objective.of(whole, weight, units, bias=bias, gain=gain, ridge=ridge)
    return replace(made, held=Objective.of(held, weight, units, bias=bias, gain=gain))


def shared(case: tuple[torch.Tensor, ...], *, bias: bool, ridge: float = 0.02) -> SharedColumns:
    return SharedColumns(objective(case, torch.zeros(0, 1, dtype=torch.long), bias=bias, ridge=ridge))


UNITS = (
    torch.arange(0, 5).view(5, 1),
    torch.arange(5, 11).view(3, 2),
    torch.tensor([[3, 4, -1], [7, 9, 11], [0, -1, -1]]),
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize(
    "case", [concatenation(0), concatenation(10, groups=3), concatenation(20, rows=9), concatenation(30, dead=3)]
)
def test_a_group_is_chosen_as_from_a_factorisation_of_its_own(
    case: tuple[torch.Tensor, ...], units: torch.Tensor, bias: bool
) -> None:
    alone, found = objective(case, units, bias=bias), shared(case, bias=bias).objective(units)
    assert isinstance(found, CondensedObjective)
    assert found.gram.shape[1] == int((units >= 0).sum())
    assert torch.equal(found.silent, alone.silent)
    assert torch.equal(found.unread, alone.unread)
    for count in (len(units), len(units) - 1):
        ours, theirs = select_units([found], count), select_units([alone], count)
        assert torch.equal(ours.order, theirs.order)
        torch.testing.assert_close(ours.errors, theirs.errors, rtol=1e-6, atol=1e-9)
        ours, theirs = (select_units([replace_judged(o)], count) for o in (found, alone))
        torch.testing.assert_close(ours.errors, theirs.errors, rtol=1e-6, atol=1e-9)


def replace_judged(objective: Objective) -> Objective:
    """Without rows that judge: the errors are the objective's own."""
    if isinstance(objective, CondensedObjective):
        return replace(objective, removal=None)
    return replace(objective, held=None)


def test_the_guarantee_of_a_group_is_never_below_that_of_all_columns() -> None:
    case, units = concatenation(40), UNITS[0]
    found = shared(case, bias=True).objective(units)
    assert found is not None
    assert submodularity_bound(found) >= submodularity_bound(objective(case, units, bias=True)) > 0


def test_columns_that_say_the_same_without_a_ridge_have_no_inverse() -> None:
    a, residual, weight = concatenation(50)
    a[:, 7] = a[:, 2]
    assert shared((a, residual, weight), bias=True, ridge=0.0).objective(UNITS[0]) is None
    assert shared((a, residual, weight), bias=True, ridge=0.01).objective(UNITS[0]) is not None
