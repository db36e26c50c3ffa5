"""Greedy selection from moments: what refitting each candidate would choose, and what a factorisation stumbles over."""

import itertools

import pytest
import torch
from foldcut.passes.prune import submodular
from foldcut.passes.prune.submodular import Objective, select_units, submodularity_bound
from foldcut.passes.solve.closed_form import solve, solve_without
from foldcut.passes.solve.moments import Moments
from torch.nn import functional as F

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int = 0, *, groups: int = 1, units: int = 7, width: int = 1, rows: int = 60) -> Problem:
    """(A as (groups, columns, rows), T as (groups, outputs, rows), the columns of each unit, always kept ones)."""
    mix = normal(units * width, units * width, seed=seed)
    a = mix @ normal(groups, units * width, rows, seed=seed + 1)
    weight = normal(groups, 4, units * width, seed=seed + 2)
    t = weight @ a + 0.3 * normal(groups, 4, rows, seed=seed + 3)
    return a, t, torch.arange(units * width).view(units, width), torch.tensor([], dtype=torch.long)


def patches(seed: int = 0) -> Problem:
    """Patches of a 3x3 convolution over images: nine columns a channel, which depend on each other."""
    image = normal(4, 5, 7, 7, seed=seed)
    columns = F.unfold(F.avg_pool2d(image, 3, 1, 1), 3).transpose(0, 1).reshape(1, 45, -1)
    t = normal(1, 6, 45, seed=seed + 1) @ columns + 0.1 * normal(1, 6, columns.shape[2], seed=seed + 2)
    return columns, t, torch.arange(45).view(5, 9), torch.tensor([], dtype=torch.long)


def objective(problem: Problem) -> Objective:
    a, t, units, always = problem
    cross, energy = a @ t.transpose(1, 2), float(t.square().sum())
    return Objective(gram=a @ a.transpose(1, 2), cross=cross, energy=energy, units=units, always=always)


def left_over(problem: Problem, chosen: list[int]) -> float:
    """The relative error of the best weights on the chosen units' columns, by least squares on the rows themselves."""
    a, t, units, always = problem
    columns = torch.cat([always, *(units[u] for u in chosen)]).long()
    columns = columns[columns >= 0]
    if not len(columns):
        return 1.0
    rows, wanted = a[:, columns].transpose(1, 2), t.transpose(1, 2)
    found = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution
    return float((rows @ found - wanted).square().sum() / t.square().sum())


def mean_error(problems: list[Problem], chosen: list[int]) -> float:
    return sum(left_over(p, chosen) for p in problems) / len(problems)


def refit_greedily(problems: list[Problem], count: int) -> tuple[list[int], list[float]]:
    """The same choice the slow way: every candidate is fitted anew at each step."""
    chosen: list[int] = []
    errors = [mean_error(problems, [])]
    for _ in range(count):
        rest = [u for u in range(len(problems[0][2])) if u not in chosen]
        chosen.append(min(rest, key=lambda u: mean_error(problems, [*chosen, u])))
        errors.append(mean_error(problems, chosen))
    return chosen, errors


def same_as_refitting(problems: list[Problem], count: int) -> None:
    found = select_units([objective(p) for p in problems], count)
    order, errors = refit_greedily(problems, count)
    assert found.order.tolist() == order
    torch.testing.assert_close(found.errors, torch.tensor(errors, dtype=torch.float64), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_single_columns(seed: int) -> None:
    same_as_refitting([problem(seed)], 7)


@pytest.mark.parametrize("seed", range(2))
def test_units_of_several_columns(seed: int) -> None:
    same_as_refitting([problem(seed, units=5, width=3)], 4)


@pytest.mark.parametrize("seed", range(2))
def test_patches_of_a_convolution(seed: int) -> None:
    same_as_refitting([patches(seed)], 5)


@pytest.mark.parametrize("seed", range(2))
def test_groups_share_a_choice(seed: int) -> None:
    """A unit is the same column of each group."""
    same_as_refitting([problem(seed, groups=3)], 5)


def test_two_consumers_share_a_choice() -> None:
    """The sum of relative errors: a consumer with large outputs has no more say than another."""
    first, second = problem(0, units=6), problem(10, units=6, width=2)
    loud = (second[0], 1000 * second[1], second[2], second[3])
    same_as_refitting([first, loud], 5)
    alone = select_units([objective(first)], 5).order.tolist()
    assert alone != select_units([objective(first), objective(loud)], 5).order.tolist()


def test_more_outputs_than_columns() -> None:
    a, _, units, always = problem(3)
    t = normal(1, 30, 7, seed=1) @ a + normal(1, 30, 60, seed=2)
    same_as_refitting([(a, t, units, always)], 7)


def test_columns_that_always_stay() -> None:
    a, t, _, _ = problem(5, units=8)
    same_as_refitting([(a, t, torch.arange(6).view(6, 1), torch.tensor([6, 7]))], 6)


def test_always_kept_columns_count_from_the_start() -> None:
    a, t, _, _ = problem(5, units=8)
    some = (a, t, torch.arange(6).view(6, 1), torch.tensor([6, 7]))
    errors = select_units([objective(some)], 2).errors
    assert float(errors[0]) == pytest.approx(left_over(some, []), rel=1e-6)
    assert float(errors[0]) < 0.999


def test_units_of_unequal_width() -> None:
    a, t, _, always = problem(6)
    same_as_refitting([(a, t, torch.tensor([[0, 1], [2, -1], [3, 4], [5, 6]]), always)], 4)


def test_a_consumer_that_does_not_see_a_unit() -> None:
    """A unit without columns in one consumer is judged by the other alone."""
    first, second = problem(7, units=3), problem(8, units=4)
    narrow = (first[0], first[1], torch.tensor([[0], [-1], [1], [2]]), first[3])
    same_as_refitting([narrow, second], 4)


def test_moments_of_the_residual_give_the_same_objective() -> None:
    """T = R + A W^T, from moments of R."""
    a, t, units, _ = problem(9, groups=2)
    weight = normal(2, 4, 7, seed=5)
    for bias in (False, True):
        found = Objective.of(Moments.of(a, t - weight @ a), weight, units, bias=bias)
        ones = torch.ones(2, 1, a.shape[2], dtype=torch.float64)
        whole = torch.cat([a, ones], 1)
        assert found.always.tolist() == ([7] if bias else [])
        assert found.energy == pytest.approx(float(t.square().sum()), rel=1e-9)
        torch.testing.assert_close(found.gram, whole @ whole.transpose(1, 2))
        torch.testing.assert_close(found.cross, whole @ t.transpose(1, 2))


def with_dead(seed: int = 0) -> Problem:
    a, t, units, always = problem(seed, units=6, width=2)
    a = a.clone()
    a[:, [2, 3, 8, 9]] = 0
    return a, t, units, always


def test_dead_channels_come_last() -> None:
    found = select_units([objective(with_dead())], 6)
    assert set(found.order[:4].tolist()) == {0, 2, 3, 5}
    assert found.errors.isfinite().all()
    torch.testing.assert_close(found.errors[4:], found.errors[4].expand(3))


def test_partly_dead_units_are_judged_by_what_lives() -> None:
    a, t, units, always = problem(1, units=5, width=3)
    a = a.clone()
    a[:, [0, 4]] = 0
    same_as_refitting([(a, t, units, always)], 5)


def test_nothing_but_dead_channels() -> None:
    a, t, units, always = problem()
    found = select_units([objective((torch.zeros_like(a), t, units, always))], 3)
    assert found.order.tolist() == [0, 1, 2]
    assert found.errors.tolist() == [1.0] * 4


def test_a_target_of_zero() -> None:
    a, t, units, always = problem()
    found = select_units([objective((a, torch.zeros_like(t), units, always))], 3)
    assert found.order.tolist() == [0, 1, 2]
    assert found.errors.tolist() == [0.0] * 4


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_one_of_each_set_of_duplicates_is_enough(width: int, scale: float) -> None:
    a, _, _, always = problem(2, units=4, width=width)
    a = torch.cat([a, scale * a], 1)
    t = normal(1, 5, 8 * width) @ a
    found = select_units([objective((a, t, torch.arange(8 * width).view(8, width), always))], 8)
    assert sorted(u % 4 for u in found.order[:4].tolist()) == [0, 1, 2, 3]
    assert float(found.errors[3]) > 1e-3
    assert float(found.errors[4:].max()) < 1e-7
    assert sorted(found.order.tolist()) == list(range(8))


def test_fewer_rows_than_columns() -> None:
    found = select_units([objective(problem(4, units=30, rows=10))], 30)
    assert found.errors.isfinite().all()
    assert float(found.errors[10:].max()) < 1e-6
    assert len(found.order.unique()) == 30


@pytest.mark.parametrize("seed", range(3))
def test_errors_never_increase(seed: int) -> None:
    for case in (problem(seed, width=2), patches(seed), with_dead(seed), problem(seed, units=20, rows=8)):
        errors = select_units([objective(case)], len(case[2])).errors
        assert bool((errors.diff() <= 1e-12).all())
        assert 0 <= float(errors[-1]) <= float(errors[0]) <= 1


def test_scale_does_not_matter() -> None:
    a, t, units, always = problem(3, units=6, width=2)
    orders = [select_units([objective((s * a, 1e4 / s * t, units, always))], 6).order for s in (1e-4, 1.0, 1e4)]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


def test_the_bound_of_orthogonal_columns_is_one() -> None:
    a = torch.linalg.qr(normal(40, 6)).Q.T.unsqueeze(0) * torch.tensor([1.0, 2, 3, 4, 5, 6]).view(1, 6, 1)
    orthogonal = (a, normal(1, 3, 40, seed=1), torch.arange(6).view(6, 1), torch.tensor([], dtype=torch.long))
    assert submodularity_bound(objective(orthogonal)) == pytest.approx(1)
    found = select_units([objective(orthogonal)], 3, bound=True)
    assert found.ratio_bound == pytest.approx(1)
    assert found.guarantee == pytest.approx(1 - 2.718281828**-1, rel=1e-6)


def test_the_bound_lies_between_zero_and_one() -> None:
    for case in (problem(0), patches(0), with_dead(1), problem(2, groups=2)):
        assert 0 < submodularity_bound(objective(case)) < 1
    doubled = torch.cat([problem(0)[0]] * 2, 1)
    duplicates = (doubled, problem(0)[1], torch.arange(14).view(14, 1), torch.tensor([], dtype=torch.long))
    assert 0 <= submodularity_bound(objective(duplicates)) < 1e-9
    assert select_units([objective(problem(0))], 2).guarantee is None


def true_ratio(case: Problem) -> float:
    """The submodularity ratio itself: over disjoint L and S, the single gains of S on top of L over its joint gain."""
    count = len(case[2])
    ratio = 1.0
    for mask in itertools.product(range(3), repeat=count):
        base, added = ([u for u in range(count) if mask[u] == kind] for kind in (1, 2))
        if len(added) < 2:
            continue
        start = left_over(case, base)
        joint = start - left_over(case, base + added)
        single = sum(start - left_over(case, [*base, u]) for u in added)
        if joint > 1e-9:
            ratio = min(ratio, single / joint)
    return ratio


def beside_a_constant() -> Problem:
    """Candidates orthogonal to each other, each nearly predicted by columns that always stay."""
    basis = torch.linalg.qr(normal(40, 8)).Q.T
    common = basis[0] + basis[1]
    a = torch.stack([basis[0] + 0.05 * basis[2], basis[1] + 0.05 * basis[2], common, basis[0] - basis[1]])
    t = (basis[2] + 0.2 * basis[3]).view(1, 1, -1)
    return a.unsqueeze(0), t, torch.tensor([[0], [1]]), torch.tensor([2])


@pytest.mark.parametrize(
    "case", [problem(0, units=4), problem(1, units=3, width=2), problem(2, units=4, groups=2), beside_a_constant()]
)
def test_the_bound_is_below_the_true_ratio(case: Problem) -> None:
    assert submodularity_bound(objective(case)) <= true_ratio(case) + 1e-9


def slicing(seed: int = 0, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, the residual, the weights and which columns go."""
    a, r, _, _ = problem(seed, groups=groups, units=6)
    weight = normal(groups, 4, 6, seed=seed + 4)
    return a, 0.1 * r, weight, torch.tensor([False, True, False, False, True, False])


@pytest.mark.parametrize("ridge", [0, 1e-3, 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_solving_without_columns_is_no_worse_than_slicing(ridge: float, bias: bool, groups: int) -> None:
    a, r, weight, gone = slicing(groups=groups)
    found = solve_without(Moments.of(a, r), weight, gone, ridge=ridge, bias=bias)
    new = weight + found.weight
    assert not new[:, :, gone].any()
    shift = torch.zeros(groups, 4, 1) if found.bias is None else found.bias.view(groups, 4, 1)
    sliced = r + weight[:, :, gone] @ a[:, gone]
    assert found.before == pytest.approx(float(sliced.square().sum()), rel=1e-9)
    assert found.after == pytest.approx(float((r - found.weight @ a - shift).square().sum()), rel=1e-9)
    assert found.after < found.before


@pytest.mark.parametrize("bias", [False, True])
def test_without_ridge_it_is_least_squares_on_what_stays(bias: bool) -> None:
    a, r, weight, gone = slicing(1, groups=2)
    found = solve_without(Moments.of(a, r), weight, gone, ridge=0, bias=bias)
    rows = a[:, ~gone]
    if bias:
        rows = torch.cat([rows, torch.ones(2, 1, a.shape[2], dtype=torch.float64)], 1)
    wanted = torch.linalg.lstsq(rows.transpose(1, 2), (r + weight @ a).transpose(1, 2)).solution.transpose(1, 2)
    torch.testing.assert_close((weight + found.weight)[:, :, ~gone], wanted[:, :, :4], rtol=0, atol=1e-8)
    if bias:
        assert found.bias is not None
        torch.testing.assert_close(found.bias.view(2, 4), wanted[:, :, 4], rtol=0, atol=1e-8)


@pytest.mark.parametrize("ridge", [0, 1e-3])
@pytest.mark.parametrize("bias", [False, True])
def test_without_a_column_gone_it_is_the_plain_solve(ridge: float, bias: bool) -> None:
    a, r, weight, gone = slicing(2)
    plain = solve(Moments.of(a, r), ridge=ridge, bias=bias)
    found = solve_without(Moments.of(a, r), weight, torch.zeros_like(gone), ridge=ridge, bias=bias)
    assert torch.equal(found.weight, plain.weight)
    assert (found.before, found.after) == (plain.before, plain.after)
    if bias:
        assert found.bias is not None
        assert plain.bias is not None
        assert torch.equal(found.bias, plain.bias)


def test_what_the_others_can_take_over_they_take_over() -> None:
    """A channel that is the sum of two others goes without a trace."""
    a, _, weight, _ = slicing(3)
    a = torch.cat([a[:, :4], (a[:, 0] + a[:, 1]).unsqueeze(1), a[:, 5:]], 1)
    gone = torch.tensor([False, False, False, False, True, False])
    nothing = Moments.of(a, torch.zeros(1, 4, a.shape[2], dtype=torch.float64))
    found = solve_without(nothing, weight, gone, ridge=0, bias=True)
    assert found.after < 1e-12 * found.before
    torch.testing.assert_close((weight + found.weight) @ a, weight @ a, rtol=1e-8, atol=1e-8)


def test_all_columns_gone_leaves_the_bias() -> None:
    a, r, weight, gone = slicing(4)
    found = solve_without(Moments.of(a, r), weight, torch.ones_like(gone), ridge=1e-3, bias=True)
    assert not (weight + found.weight).any()
    assert found.bias is not None
    torch.testing.assert_close(found.bias, (r + weight @ a).mean(2).reshape(-1))


def unequal() -> Problem:
    a, t, _, always = problem(6, units=12)
    return a, t, torch.tensor([[0, 1], [2, -1], [3, 4], [5, 6], [7, -1], [8, 9], [10, 11]]), always


def always_kept() -> Problem:
    a, t, _, _ = problem(5, units=14)
    return a, t, torch.arange(12).view(12, 1), torch.tensor([12, 13])


@pytest.mark.parametrize(
    "problems",
    [
        [problem(0, units=24)],
        [problem(1, units=9, width=3)],
        [patches()],
        [problem(2, units=15, groups=3)],
        [problem(0, units=12), problem(10, units=12, width=2)],
        [unequal()],
        [always_kept()],
    ],
)
def test_few_looked_at(problems: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where few candidates are looked at in a step, the others catch up with what was taken in between: what is said
    of each step is what refitting finds, and hardly more is left than with all looked at."""
    count = len(problems[0][2]) - 1
    whole = select_units([objective(p) for p in problems], count)
    monkeypatch.setattr(submodular, "LOOKED_AT", 3)
    found = select_units([objective(p) for p in problems], count)
    assert sorted(found.order.tolist()) == sorted(set(found.order.tolist()))
    for step in range(count + 1):
        assert float(found.errors[step]) == pytest.approx(
            mean_error(problems, found.order[:step].tolist()), rel=1e-5, abs=1e-7
        )
    assert float(found.errors.sum()) <= 1.05 * float(whole.errors.sum())


def test_few_looked_at_where_gains_only_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orthogonal columns: no gain depends on what was taken, and few looked at choose what all do."""
    columns = torch.linalg.qr(normal(60, 40, seed=1)).Q.T * torch.linspace(1, 3, 40, dtype=torch.float64).unsqueeze(1)
    t = normal(1, 4, 40, seed=2) @ columns
    whole = (columns.unsqueeze(0), t, torch.arange(40).view(40, 1), torch.tensor([], dtype=torch.long))
    expected = select_units([objective(whole)], 30).order.tolist()
    monkeypatch.setattr(submodular, "LOOKED_AT", 5)
    assert select_units([objective(whole)], 30).order.tolist() == expected


def test_a_copy_of_what_was_taken_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies among the candidates that were not looked at come after all that adds something."""
    a, _, _, always = problem(3, units=16)
    a = torch.cat([a, a], 1)
    t = normal(1, 4, 32, seed=1) @ a
    monkeypatch.setattr(submodular, "LOOKED_AT", 4)
    found = select_units([objective((a, t, torch.arange(32).view(32, 1), always))], 20)
    assert sorted(u % 16 for u in found.order[:16].tolist()) == list(range(16))
    assert float(found.errors[16]) == pytest.approx(0.0, abs=1e-6)
