"""The closed form: what numpy would find, and what a least-squares solver would stumble over."""

import numpy as np
import pytest
import torch
from foldcut.passes.solve.closed_form import Correction, solve
from foldcut.passes.solve.moments import Moments
from hypothesis import given
from hypothesis import strategies as st


def problem(
    seed: int, *, groups: int = 1, rows: int = 50, columns: int = 6, outputs: int = 4, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A as (groups, columns, rows), R as (groups, outputs, rows)) in float64, A of the given rank."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(groups, columns, rows, generator=generator, dtype=torch.float64)
    if rank is not None:
        mix = torch.randn(groups, columns, rank, generator=generator, dtype=torch.float64)
        a = mix @ a[:, :rank]
    return a, torch.randn(groups, outputs, rows, generator=generator, dtype=torch.float64)


def remaining(a: torch.Tensor, r: torch.Tensor, correction: Correction) -> float:
    """Squared error with the correction applied, from the rows themselves."""
    change = correction.weight @ a
    if correction.bias is not None:
        change = change + correction.bias.view(len(a), -1, 1)
    return float((r - change).square().sum())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_without_ridge_it_is_least_squares(bias: bool, groups: int) -> None:
    a, r = problem(0, groups=groups)
    correction = solve(Moments.of(a, r), ridge=0, bias=bias)
    for g in range(groups):
        rows = a[g].T.numpy()
        if bias:
            rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        wanted = np.linalg.lstsq(rows, r[g].T.numpy(), rcond=None)[0].T
        np.testing.assert_allclose(correction.weight[g].numpy(), wanted[:, :6], atol=1e-8)
        if bias:
            assert correction.bias is not None
            np.testing.assert_allclose(correction.bias.view(groups, -1)[g].numpy(), wanted[:, 6], atol=1e-8)
    assert (correction.bias is None) != bias


def test_a_small_ridge_comes_near_least_squares() -> None:
    a, r = problem(1)
    exact, near = (solve(Moments.of(a, r), ridge=ridge, bias=True) for ridge in (0, 1e-10))
    torch.testing.assert_close(near.weight, exact.weight, rtol=0, atol=1e-7)


def test_the_ridge_is_that_of_the_formula() -> None:
    """(G + ridge * mean diag(G) I) D = A^T R, the bias unpenalised."""
    a, r = problem(2)
    ridge = 0.1
    correction = solve(Moments.of(a, r), ridge=ridge, bias=True)
    rows = np.concatenate([a[0].T.numpy(), np.ones((50, 1))], axis=1)
    gram = rows.T @ rows
    penalty = np.full(7, ridge * np.diag(gram)[:6].mean())
    penalty[6] = 0
    wanted = np.linalg.solve(gram + np.diag(penalty), rows.T @ r[0].T.numpy()).T
    np.testing.assert_allclose(correction.weight[0].numpy(), wanted[:, :6], atol=1e-9)
    assert correction.bias is not None
    np.testing.assert_allclose(correction.bias.numpy(), wanted[:, 6], atol=1e-9)


def test_a_larger_ridge_changes_less() -> None:
    a, r = problem(3)
    norms = [float(solve(Moments.of(a, r), ridge=ridge, bias=False).weight.norm()) for ridge in (0, 1e-2, 1, 100)]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 0.05 * norms[0]


def test_the_ridge_is_relative_to_the_scale_of_the_inputs() -> None:
    a, r = problem(4)
    plain, scaled = (solve(Moments.of(a * s, r), ridge=0.1, bias=False).weight for s in (1, 1000))
    torch.testing.assert_close(scaled * 1000, plain, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("ridge", [0, 1e-6, 1e-3, 1])
def test_no_residual_no_change(ridge: float) -> None:
    a, r = problem(5)
    correction = solve(Moments.of(a, torch.zeros_like(r)), ridge=ridge, bias=True)
    assert not correction.weight.any()
    assert correction.bias is not None
    assert not correction.bias.any()
    assert correction.before == correction.after == 0


@pytest.mark.parametrize("ridge", [0, 1e-9, 1e-3])
def test_what_the_layer_can_express_is_recovered(ridge: float) -> None:
    a, _ = problem(6)
    wanted = torch.randn(1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    r = wanted @ a + shift.view(1, -1, 1)
    correction = solve(Moments.of(a, r), ridge=ridge, bias=True)
    assert correction.after <= max(1e-9, 1e-4 * (ridge > 1e-6)) * correction.before
    torch.testing.assert_close(correction.weight, wanted, rtol=0, atol=1e-2)


@pytest.mark.parametrize("ridge", [0, 1e-3])
@pytest.mark.parametrize(
    "case", ["few rows", "low rank", "duplicate columns", "dead columns", "all dead", "one row", "constant column"]
)
def test_rank_deficient_problems(case: str, ridge: float) -> None:
    a, r = problem(7, rows=10 if case == "few rows" else 40, columns=20, rank=5 if case == "low rank" else None)
    if case == "duplicate columns":
        a[:, 10:] = a[:, :10]
    if case == "dead columns":
        a[:, ::2] = 0
    if case == "all dead":
        a[:] = 0
    if case == "one row":
        a, r = a[:, :, :1], r[:, :, :1]
    if case == "constant column":
        a[:, 3] = 1
    correction = solve(Moments.of(a, r), ridge=ridge, bias=True)
    assert correction.weight.isfinite().all()
    assert correction.bias is not None
    assert correction.bias.isfinite().all()
    assert correction.after <= correction.before
    left = remaining(a, r, correction)
    assert left <= correction.before * (1 + 1e-9)
    assert correction.after == pytest.approx(left, rel=1e-6, abs=1e-6 * correction.before)
    if case in {"dead columns", "all dead"}:
        dead = (a == 0).all(2)[0]
        assert float(correction.weight[:, :, dead].abs().max()) <= (0 if ridge else 1e-12)


def test_dead_columns_do_not_hide_small_inputs() -> None:
    a, r = problem(10)
    a[:, ::2] = 0
    plain, small = (solve(Moments.of(a * s, r), ridge=0, bias=False) for s in (1, 1e-6))
    assert plain.after < plain.before
    assert small.after == pytest.approx(plain.after)


def test_without_ridge_a_deficient_problem_gets_the_least_change() -> None:
    a, r = problem(8, rows=10, columns=20)
    correction = solve(Moments.of(a, r), ridge=0, bias=False)
    wanted = np.linalg.lstsq(a[0].T.numpy(), r[0].T.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(correction.weight[0].numpy(), wanted, atol=1e-6)
    assert correction.after <= 1e-6 * correction.before


@given(data=st.data())
def test_the_error_never_grows(data: st.DataObject) -> None:
    groups, columns, outputs, rows = (data.draw(st.integers(1, top)) for top in (3, 8, 5, 20))
    a, r = problem(
        data.draw(st.integers(0, 999)),
        groups=groups,
        columns=columns,
        outputs=outputs,
        rows=rows,
        rank=data.draw(st.none() | st.integers(1, min(rows, columns))),
    )
    scale, level = (10.0 ** data.draw(st.integers(-6, 6)) for _ in range(2))
    a, r = (a * scale).float(), (r * level).float()
    ridge, bias = data.draw(st.sampled_from([0.0, 1e-9, 1e-3, 1.0])), data.draw(st.booleans())
    correction = solve(Moments.of(a, r), ridge=ridge, bias=bias)
    assert correction.weight.shape == (groups, outputs, columns)
    assert correction.weight.isfinite().all()
    assert 0 <= correction.after <= correction.before
    assert remaining(a.double(), r.double(), correction) <= correction.before * (1 + 1e-4)


def test_outputs_are_solved_each_for_itself() -> None:
    a, r = problem(9)
    r[:, 1] = 0
    correction = solve(Moments.of(a, r), ridge=1e-3, bias=True)
    alone = solve(Moments.of(a, r[:, :1]), ridge=1e-3, bias=True)
    torch.testing.assert_close(correction.weight[:, :1], alone.weight)
    assert not correction.weight[:, 1].any()
    assert correction.bias is not None
    assert float(correction.bias[1]) == 0
