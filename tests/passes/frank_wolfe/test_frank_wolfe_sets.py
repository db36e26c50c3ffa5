"""The feasible sets: oracles against linear programs, enumeration and solvers; norms against what defines them."""

import itertools
import math

import numpy as np
import pytest
import torch
from foldcut.passes.frank_wolfe import (
    Constraint,
    FrankWolfeError,
    Gram,
    GroupKSupport,
    KSparse,
    KSupport,
    LpBall,
    NuclearBall,
    SpectralKSparse,
    SpectralKSupport,
    Subspace,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

SETS: list[Constraint] = [
    LpBall(p=1),
    LpBall(p=1.2),
    LpBall(p=2),
    LpBall(p=3.5),
    LpBall(p=math.inf),
    KSparse(k=3),
    KSupport(k=3),
    GroupKSupport(k=2),
    NuclearBall(),
    SpectralKSparse(k=2),
    SpectralKSupport(k=2),
    SpectralKSupport(k=2, oracle=Subspace(oversampling=0)),
]
SPECTRAL = [c for c in SETS if isinstance(c, (NuclearBall, SpectralKSparse, SpectralKSupport))]
VECTOR = [c for c in SETS if isinstance(c, (LpBall, KSparse, KSupport))]
each_set = pytest.mark.parametrize("constraint", SETS, ids=repr)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def product(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum())


# ---- oracles


def polytope_minimum(m: np.ndarray, k: int) -> float:
    """min <m, v> over |v|_1 <= k, |v|_inf <= 1, as a linear program in the positive and the negative parts."""
    n = len(m)
    both = np.concatenate([m, -m])
    rows = np.concatenate([np.ones((1, 2 * n)), np.hstack([np.eye(n), np.eye(n)])])
    return float(linprog(both, A_ub=rows, b_ub=[k, *[1] * n]).fun)


@pytest.mark.parametrize(("constraint", "k"), [(LpBall(p=1), 1), (LpBall(p=math.inf), 6), (KSparse(k=3), 3)])
def test_polytope_oracles_solve_the_linear_program(constraint: Constraint, k: int) -> None:
    for seed in range(5):
        m = normal(6, seed=seed)
        best = 2.5 * polytope_minimum(m.numpy(), k)
        v = constraint.with_radius(2.5).lmo(m)
        assert product(m, v) == pytest.approx(best, rel=1e-9)
        assert constraint.dual_norm(m) == pytest.approx(-best / 2.5, rel=1e-9)


@pytest.mark.parametrize("p", [1.2, 1.5, 2.0, 3.5])
def test_the_oracle_of_lp_balls_is_what_a_solver_finds(p: float) -> None:
    m = normal(4).numpy()
    inside = {"type": "ineq", "fun": lambda v: 1 - (np.abs(v) ** p).sum()}
    start = -0.3 * np.sign(m)
    found = minimize(lambda v: m @ v, start, constraints=[inside], method="SLSQP", options={"ftol": 1e-12})
    v = LpBall(p=p).lmo(torch.from_numpy(m))
    assert product(torch.from_numpy(m), v) == pytest.approx(found.fun, rel=1e-6)
    assert float((v.abs() ** p).sum()) == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_support_oracles_are_the_best_of_all_supports(k: int) -> None:
    m = normal(5, 3, seed=k)
    filters = max(float(m[list(chosen)].norm()) for chosen in itertools.combinations(range(5), k))
    assert -product(m, GroupKSupport(k=k).lmo(m)) == pytest.approx(filters)
    entries = max(float(m[:, 0][list(chosen)].norm()) for chosen in itertools.combinations(range(5), k))
    assert -product(m[:, 0], KSupport(k=k).lmo(m[:, 0])) == pytest.approx(entries)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (6, 2, 3, 3)])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_spectral_oracles_are_those_of_the_svd(shape: tuple[int, ...], k: int) -> None:
    m = normal(*shape, seed=k)
    u, s, vh = np.linalg.svd(m.flatten(1).numpy(), full_matrices=False)
    polar, low_rank = u[:, :k] @ vh[:k], u[:, :k] * s[:k] @ vh[:k]
    np.testing.assert_allclose(SpectralKSparse(k=k).lmo(m).flatten(1).numpy(), -polar, atol=1e-9)
    support = SpectralKSupport(k=k, radius=3.0).lmo(m).flatten(1).numpy()
    np.testing.assert_allclose(support, -3 * low_rank / np.linalg.norm(low_rank), atol=1e-9)
    np.testing.assert_allclose(NuclearBall().lmo(m).flatten(1).numpy(), -u[:, :1] @ vh[:1], atol=1e-9)


@each_set
@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), radius=st.floats(0.1, 50), magnitude=st.sampled_from([1e-30, 1.0, 1e25]))
def test_oracles_are_feasible_and_no_point_of_the_set_is_better(
    constraint: Constraint, seed: int, radius: float, magnitude: float
) -> None:
    constraint = constraint.with_radius(radius)
    m = normal(5, 2, 3, seed=seed) * magnitude
    v = constraint.lmo(m)
    assert constraint.norm(v) == pytest.approx(radius, rel=1e-9)
    assert abs(constraint.oracle_gap(m, v)) < 1e-9
    assert constraint.duality_gap(v, m) == pytest.approx(0, abs=1e-9 * radius * constraint.dual_norm(m))
    other = constraint.pull_in(normal(5, 2, 3, seed=seed + 1) * 1e3)
    assert constraint.norm(other) <= radius * (1 + 1e-12)
    assert product(m, v) <= product(m, other) * (1 + 1e-9)
    assert constraint.duality_gap(other, m) >= 0
    assert float((v - other).norm()) <= constraint.diameter(v) * (1 + 1e-9)


@each_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_oracles_keep_shape_and_dtype(constraint: Constraint, dtype: torch.dtype) -> None:
    m = normal(6, 2, 3, 3).to(dtype)
    v = constraint.with_radius(2.0).lmo(m)
    assert (v.shape, v.dtype) == (m.shape, dtype)
    assert constraint.with_radius(2.0).contains(v)
    assert abs(constraint.with_radius(2.0).oracle_gap(m, v)) < (1e-6 if dtype is torch.float32 else 1e-2)


@each_set
def test_a_zero_gradient_has_a_vertex_and_always_the_same(constraint: Constraint) -> None:
    constraint = constraint.with_radius(2.0)
    v = constraint.lmo(torch.zeros(5, 7))
    assert constraint.norm(v) == pytest.approx(2.0)
    assert torch.equal(v, constraint.lmo(torch.zeros(5, 7)))


def test_of_equal_magnitudes_the_first_is_taken() -> None:
    m = torch.tensor([0.0, 2.0, -2.0, 2.0, 1.0, -2.0])
    assert LpBall(p=1).lmo(m).tolist() == [0, -1, 0, 0, 0, 0]
    assert KSparse(k=2).lmo(m).tolist() == [0, -1, 1, 0, 0, 0]
    assert KSupport(k=4).lmo(m).nonzero().flatten().tolist() == [1, 2, 3, 5]
    assert KSupport(k=3).lmo(m).nonzero().flatten().tolist() == [1, 2, 3]
    filters = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    assert GroupKSupport(k=2).lmo(filters).abs().sum(1).nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("constraint", SPECTRAL, ids=repr)
def test_small_singular_values_of_float32_matrices_count(constraint: Constraint) -> None:
    """Down to 1e-5 of the largest: a Gram matrix in float32 would lose them."""
    values = torch.tensor([1.0, 1e-5, 1e-9, 1e-9, 1e-9], dtype=torch.float64)
    m = (orthogonal(5) * values @ orthogonal(9, seed=1)[:5]).float()
    v = constraint.lmo(m)
    assert constraint.oracle_gap(m, v) < 1e-6
    if isinstance(constraint, SpectralKSparse):
        np.testing.assert_allclose(torch.linalg.svdvals(v).numpy(), [1, 1, 0, 0, 0], atol=1e-5)
        assert abs(product((orthogonal(5)[:, 1:2] @ orthogonal(9, seed=1)[1:2]), v.double()) + 1) < 1e-3


@pytest.mark.parametrize("constraint", [NuclearBall, SpectralKSparse, SpectralKSupport])
def test_warm_started_subspace_iteration_follows_a_turning_momentum(constraint: type[Constraint]) -> None:
    kind = {} if constraint is NuclearBall else {"k": 3}
    warm = constraint(oracle=Subspace(), **kind)  # type: ignore[call-arg]
    m, basis = normal(16, 40), None
    for step in range(30):
        m = 0.9 * m + 0.4 * normal(16, 40, seed=step)
        found = warm.unit_vertices(m.unsqueeze(0), basis)
        basis = found.bases
        assert basis is not None and basis.shape == (1, 16, 7 if kind else 5)
        assert warm.norm(found.points[0]) <= 1 + 1e-9
        assert -1e-9 <= warm.oracle_gap(m, found.points[0]) < 0.05
    # the momentum stands still: the iteration converges
    for _ in range(80):
        found = warm.unit_vertices(m.unsqueeze(0), found.bases)
    assert warm.oracle_gap(m, found.points[0]) < 1e-4


@pytest.mark.parametrize("kind", [SpectralKSparse, SpectralKSupport])
@pytest.mark.parametrize("k", [1, 3])
def test_a_basis_that_fits_badly_costs_optimality_but_not_feasibility(
    kind: type[SpectralKSparse | SpectralKSupport], k: int
) -> None:
    m = normal(12, 30)
    worst = torch.linalg.svd(m).U[:, -k:].unsqueeze(0)
    constraint = kind(k=k, oracle=Subspace(oversampling=0))
    point = constraint.unit_vertices(m.unsqueeze(0), worst).points[0]
    assert constraint.norm(point) == pytest.approx(1)
    assert 0.2 < constraint.oracle_gap(m, point) < 1


@each_set
def test_a_stack_is_solved_as_each_of_its_members(constraint: Constraint) -> None:
    stack = normal(3, 5, 2, 3)
    points = constraint.unit_vertices(stack).points
    for member, point in zip(stack, points, strict=True):
        torch.testing.assert_close(point, constraint.lmo(member))
    expected = torch.tensor([constraint.norm(member) for member in stack], dtype=torch.float64)
    torch.testing.assert_close(constraint.gauges(stack), expected)


# ---- norms


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_the_k_support_norm_is_its_variational_form(k: int) -> None:
    """min sum x_i^2 / theta_i over 0 <= theta <= 1, sum theta <= k (Argyriou et al.), by a solver."""
    for seed in range(3):
        x = normal(5, seed=seed).numpy() * [3, 1, 1, 0.5, 0.1]
        limit = {"type": "ineq", "fun": lambda t: k - t.sum()}
        found = minimize(
            lambda t, x=x: (x**2 / t).sum(),
            np.full(5, 0.999 * k / 5),
            jac=lambda t, x=x: -(x**2) / t**2,
            bounds=[(1e-6, 1)] * 5,
            constraints=[limit],
            method="SLSQP",
            options={"ftol": 1e-13, "maxiter": 500},
        )
        assert KSupport(k=k).norm(torch.from_numpy(x)) == pytest.approx(math.sqrt(found.fun), rel=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_norm_of_the_polytope_is_the_gauge_of_its_vertices(k: int) -> None:
    """min sum lambda with sum lambda_j v_j = x over all k-sparse sign vectors v_j, a linear program."""
    vertices = []
    for chosen in itertools.combinations(range(4), k):
        for sign in itertools.product([-1.0, 1.0], repeat=k):
            vertex = np.zeros(4)
            vertex[list(chosen)] = sign
            vertices.append(vertex)
    x = normal(4, seed=k)
    found = linprog(np.ones(len(vertices)), A_eq=np.array(vertices).T, b_eq=x.numpy())
    assert KSparse(k=k).norm(x) == pytest.approx(found.fun, rel=1e-9)


def test_equal_entries_leave_the_k_support_norm_defined() -> None:
    """Where the inequalities of the formula hold with equality, rounding decides which hold."""
    for n, k in [(9, 3), (9, 2), (7, 7), (6, 1)]:
        assert KSupport(k=k).norm(torch.full((n,), 0.1)) == pytest.approx(0.1 * n / math.sqrt(k), rel=1e-6)
    for k in range(1, 9):
        assert KSupport(k=k).norm(torch.zeros(9)) == 0
        alone = torch.tensor([3.0] + [0.0] * 8)
        assert KSupport(k=k).norm(alone) == pytest.approx(3)


@each_set
@settings(max_examples=10)
@given(seed=st.integers(0, 10_000))
def test_norm_and_dual_norm_are_norms_in_duality(constraint: Constraint, seed: int) -> None:
    a, b = normal(4, 6, seed=seed), normal(4, 6, seed=seed + 1)
    for norm in (constraint.norm, constraint.dual_norm):
        assert norm(a + b) <= (norm(a) + norm(b)) * (1 + 1e-12)
        assert norm(-3 * a) == pytest.approx(3 * norm(a))
    assert abs(product(a, b)) <= constraint.norm(a) * constraint.dual_norm(b) * (1 + 1e-12)
    # the bounds that radii and the feasibility of the optimizer rest on
    assert float(a.norm()) <= constraint.norm(a) * constraint.half_width(a.shape) * (1 + 1e-12)
    noise = 1e-3 * (2 * torch.rand(a.shape, generator=torch.Generator().manual_seed(seed)).double() - 1)
    growth = 1e-3 * constraint.rounding_growth(a.shape) * constraint.norm(a)
    assert constraint.norm(a * (1 + noise)) <= constraint.norm(a) + growth * (1 + 1e-9)


def test_the_ends_of_the_k_families_are_the_classic_balls() -> None:
    w = normal(4, 3, 2)
    vector, matrix = w.flatten(), w.flatten(1)
    nuclear, spectral = (float(torch.linalg.matrix_norm(matrix, order)) for order in ("nuc", 2))
    assert KSupport(k=1).norm(w) == pytest.approx(float(vector.norm(p=1)))
    assert KSupport(k=24).norm(w) == pytest.approx(float(vector.norm()))
    assert KSparse(k=1).norm(w) == pytest.approx(float(vector.norm(p=1)))
    assert KSparse(k=24).norm(w) == pytest.approx(float(vector.abs().max()))
    assert GroupKSupport(k=1).norm(w) == pytest.approx(float(matrix.norm(dim=1).sum()))
    assert GroupKSupport(k=4).norm(w) == pytest.approx(float(vector.norm()))
    assert GroupKSupport(k=2).norm(vector) == pytest.approx(KSupport(k=2).norm(vector))
    assert NuclearBall().norm(w) == pytest.approx(nuclear)
    assert SpectralKSupport(k=1).norm(w) == pytest.approx(nuclear)
    assert SpectralKSupport(k=4).norm(w) == pytest.approx(float(matrix.norm()))
    assert SpectralKSparse(k=1).norm(w) == pytest.approx(nuclear)
    assert SpectralKSparse(k=4).norm(w) == pytest.approx(spectral)
    torch.testing.assert_close(KSupport(k=1).lmo(w), LpBall(p=1).lmo(w))
    torch.testing.assert_close(KSupport(k=24).lmo(w), LpBall(p=2).lmo(w))
    torch.testing.assert_close(SpectralKSupport(k=1).lmo(w), NuclearBall().lmo(w))
    torch.testing.assert_close(SpectralKSupport(k=4).lmo(w), LpBall(p=2).lmo(w))
    # a vector is a matrix of one row
    assert NuclearBall().norm(vector) == pytest.approx(float(vector.norm()))
    assert LpBall(p=1.5).norm(torch.tensor(-2.0)) == 2


@pytest.mark.parametrize("constraint", VECTOR, ids=repr)
def test_vector_sets_do_not_see_order_or_sign(constraint: Constraint) -> None:
    w = normal(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    flip = torch.where(normal(12, seed=2) < 0, -1.0, 1.0)
    assert constraint.norm(w[order] * flip) == pytest.approx(constraint.norm(w))
    torch.testing.assert_close(constraint.lmo(w[order] * flip), constraint.lmo(w)[order] * flip)
    torch.testing.assert_close(constraint.lmo(w.view(3, 4)).flatten(), constraint.lmo(w))


@pytest.mark.parametrize("constraint", SPECTRAL, ids=repr)
def test_spectral_sets_do_not_see_rotations(constraint: Constraint) -> None:
    w, left, right = normal(5, 8), orthogonal(5), orthogonal(8)
    assert constraint.norm(left @ w @ right) == pytest.approx(constraint.norm(w))
    torch.testing.assert_close(constraint.lmo(left @ w @ right), left @ constraint.lmo(w) @ right)
    torch.testing.assert_close(constraint.lmo(w.mT), constraint.lmo(w).mT)
    conv = w.view(5, 2, 2, 2)
    torch.testing.assert_close(constraint.lmo(conv).flatten(1), constraint.lmo(w))
    memory = conv.to(memory_format=torch.channels_last)
    torch.testing.assert_close(constraint.lmo(memory), constraint.lmo(conv))


# ---- projections and radii

CLOSED = [
    LpBall(p=1),
    LpBall(p=2),
    LpBall(p=math.inf),
    KSparse(k=3),
    KSupport(k=1),
    KSupport(k=20),
    GroupKSupport(k=1),
    GroupKSupport(k=4),
    NuclearBall(),
    SpectralKSparse(k=2),
    SpectralKSupport(k=1),
    SpectralKSupport(k=4),
]


@pytest.mark.parametrize("constraint", CLOSED, ids=repr)
@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.01, 0.3, 1.0, 5.0, 1e3]))
def test_projections_are_the_nearest_points(constraint: Constraint, seed: int, scale: float) -> None:
    """P is the projection of w where no point of the set has a larger product with w - P than P itself."""
    constraint = constraint.with_radius(1.7)
    w = scale * normal(4, 5, seed=seed)
    p = constraint.project(w)
    assert constraint.norm(p) <= 1.7 * (1 + 1e-9)
    away = w - p
    assert product(away, p) == pytest.approx(1.7 * constraint.dual_norm(away), rel=1e-7, abs=1e-9)
    torch.testing.assert_close(constraint.project(p), p)


def test_sets_without_a_closed_form_say_so() -> None:
    w = 10 * normal(4, 5)
    for constraint in (LpBall(p=1.5), KSupport(k=3), GroupKSupport(k=2), SpectralKSupport(k=2)):
        with pytest.raises(FrankWolfeError, match="pull_in"):
            constraint.project(w)
        assert constraint.norm(constraint.pull_in(w)) == pytest.approx(1)
        inside = constraint.pull_in(w) / 2
        assert constraint.project(inside) is inside and constraint.pull_in(inside) is inside


@each_set
def test_the_diameter_is_reached_and_the_initial_radius_follows_from_it(constraint: Constraint) -> None:
    w = normal(4, 9, seed=3)
    radius = constraint.initial_radius(w, 5.0)
    fitted = constraint.with_radius(radius)
    assert fitted.diameter(w) == pytest.approx(2 * 5.0 * float(w.norm()))
    assert fitted.initial_radius(w, norm=2.0) == pytest.approx(radius * 2 * 2.0 / float(w.norm()))
    # two opposite vertices that far apart: of the unit vector, or of all ones, or of a matrix of equal values
    candidates = [torch.zeros(4, 9).double(), torch.ones(4, 9).double(), torch.eye(4, 9).double()]
    candidates[0][0, 0] = 1
    reach = max(float((fitted.lmo(m) - fitted.lmo(-m)).norm()) for m in candidates)
    assert reach == pytest.approx(fitted.diameter(w))


# ---- bad input


@pytest.mark.parametrize("radius", [0, -1.0, math.nan, math.inf, "3"])
def test_a_radius_that_is_none_is_refused(radius: float) -> None:
    with pytest.raises(FrankWolfeError, match="radius"):
        LpBall(radius=radius)


def test_what_is_out_of_range_is_refused() -> None:
    for p in (0.5, -1, math.nan):
        with pytest.raises(FrankWolfeError, match="p is out of range"):
            LpBall(p=p)
    for k in (0, -2, 1.5, True):
        with pytest.raises(FrankWolfeError, match="k is out of range"):
            SpectralKSupport(k=k)  # type: ignore[arg-type]
    w = normal(4, 9)
    for constraint in (KSupport(k=37), KSparse(k=37), GroupKSupport(k=5), SpectralKSparse(k=5), SpectralKSupport(k=5)):
        for call in (constraint.lmo, constraint.norm, constraint.dual_norm, constraint.diameter):
            with pytest.raises(FrankWolfeError, match="1 <= k <= "):
                call(w)
    for bad in (torch.arange(4), torch.zeros(0, 3), torch.tensor([1.0, math.nan])):
        with pytest.raises(FrankWolfeError):
            LpBall().lmo(bad)
    with pytest.raises(FrankWolfeError, match="initialisation"):
        LpBall().initial_radius(torch.zeros(3))
    with pytest.raises(FrankWolfeError, match="sweeps"):
        Subspace(sweeps=0)


def test_sets_compare_by_value() -> None:
    assert SpectralKSupport(k=2) == SpectralKSupport(k=2, oracle=Gram()) != SpectralKSupport(k=2, oracle=Subspace())
    assert len({KSupport(k=2), KSupport(k=2), KSupport(k=3), KSparse(k=2)}) == 3
    assert KSupport(k=2, radius=3).with_radius(1.0) == KSupport(k=2)
