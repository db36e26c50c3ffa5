"""Selection with the solve's own ridge: its gains are what the solve gains, and its predictions hold on other rows."""

import math
from dataclasses import replace

import foldcut
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.passes.cut.prune_channels import prune_channels
from foldcut.passes.prune.error_curves import error_curves
from foldcut.passes.prune.select_channels import choose_channels, select_layerwise
from foldcut.passes.prune.submodular import Objective, Selection, select_units, submodularity_bound
from foldcut.passes.solve.closed_form import ridge_level, solve_without
from foldcut.passes.solve.moments import Moments, split_batch_size
from torch import nn

RIDGE = 0.05
Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(seed: int, *, groups: int = 1, units: int = 6, width: int = 2, rows: int = 60) -> Layer:
    """(A as (groups, columns, rows), R, the weights, the columns of each unit); the inputs correlate, not around 0."""
    columns = units * width
    a = normal(columns, columns, seed=seed) @ normal(groups, columns, rows, seed=seed + 1) + 1
    residual = 0.2 * normal(groups, 4, rows, seed=seed + 2)
    return a, residual, normal(groups, 4, columns, seed=seed + 3), torch.arange(columns).view(units, width)


def left(moments: Moments, weight: torch.Tensor, units: torch.Tensor, kept: list[int], bias: bool) -> float:
    """The solve's own objective with some units kept: squared error and penalty, relative to the target's energy."""
    gone = torch.ones(weight.shape[2], dtype=torch.bool)
    gone[units[kept].reshape(-1)] = False
    found = solve_without(moments, weight, gone, ridge=RIDGE, bias=bias)
    paid = (found.weight[:, :, ~gone].square().sum((1, 2)) * RIDGE * ridge_level(moments)[:, 0]).sum()
    return (found.after + float(paid)) / Objective.of(moments, weight, units, bias=bias).energy


def solve_greedily(moments: Moments, weight: torch.Tensor, units: torch.Tensor, bias: bool) -> tuple[list[int], list]:
    """The slow way: each candidate is solved anew at each step."""
    chosen: list[int] = []
    errors = [left(moments, weight, units, [], bias)]
    for _ in range(len(units)):
        rest = [u for u in range(len(units)) if u not in chosen]
        chosen.append(min(rest, key=lambda u: left(moments, weight, units, [*chosen, u], bias)))
        errors.append(left(moments, weight, units, chosen, bias))
    return chosen, errors


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "case", [layer(0), layer(10, groups=3, width=1), layer(20, rows=8), layer(30, units=4, width=3, rows=5)]
)
def test_gains_are_those_of_the_solve(case: Layer, bias: bool) -> None:
    """Also where the rows are fewer than the columns."""
    a, residual, weight, units = case
    moments = Moments.of(a, residual)
    found = select_units([Objective.of(moments, weight, units, bias=bias, ridge=RIDGE)], len(units))
    order, errors = solve_greedily(moments, weight, units, bias)
    assert found.order.tolist() == order
    torch.testing.assert_close(found.errors, torch.tensor(errors, dtype=torch.float64), rtol=1e-7, atol=1e-9)


def held_out(case: Layer, *, bias: bool, ridge: float = RIDGE) -> tuple[Objective, Moments, torch.Tensor, torch.Tensor]:
    """The objective with the last rows held out; the moments of the others; A and T of the held-out rows."""
    a, residual, weight, units = case
    cut = a.shape[2] * 3 // 4
    held = Moments.of(a[:, :, cut:], residual[:, :, cut:])
    fit = Moments.of(a[:, :, :cut], residual[:, :, :cut])
    whole = Objective.of(fit + held, weight, units, bias=bias, ridge=ridge)
    judge = Objective.of(held, weight, units, bias=bias)
    return replace(whole, held=judge), fit, a[:, :, cut:], residual[:, :, cut:] + weight @ a[:, :, cut:]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", [layer(0), layer(10, width=1), layer(20, rows=8)])
def test_predictions_are_errors_on_rows_that_the_fit_has_not_seen(case: Layer, bias: bool) -> None:
    _, _, weight, units = case
    objective, fit, rows, wanted = held_out(case, bias=bias)
    found = select_units([objective], len(units))
    penalty = objective.penalty
    assert penalty is not None
    for count in range(len(units) + 1):
        gone = torch.ones(weight.shape[2], dtype=torch.bool)
        gone[units[found.order[:count]].reshape(-1)] = False
        # the ridge of the prediction is that of all rows, as the solve will have it
        scale = float(penalty[0, 0] / (RIDGE * ridge_level(fit)[0, 0]))
        solved = solve_without(fit, weight, gone, ridge=RIDGE * scale, bias=bias)
        shift = 0 if solved.bias is None else solved.bias.view(weight.shape[0], -1, 1)
        error = ((weight + solved.weight) @ rows + shift - wanted).square().sum() / wanted.square().sum()
        assert float(found.errors[count]) == pytest.approx(float(error), rel=1e-6, abs=1e-9)


def test_with_fewer_rows_than_columns_the_fit_explains_everything_and_the_prediction_does_not() -> None:
    objective, *_ = held_out(layer(40, units=20, width=2, rows=16), bias=False, ridge=1e-6)
    found = select_units([objective], 12)
    unseen = select_units([replace(objective, held=None)], 12)
    assert torch.equal(found.order, unseen.order)
    assert float(unseen.errors[-1]) < 1e-3
    assert float(found.errors[-1]) > 20 * float(unseen.errors[-1])


def test_the_guarantee_with_a_ridge_is_that_of_the_rows_that_stand_for_it() -> None:
    """Least squares on [A; sqrt(r) I] with the targets [T; sqrt(r) W0], less what the kept weights pay."""
    a, residual, weight, units = layer(50, rows=8)
    moments = Moments.of(a, residual)
    ridged = Objective.of(moments, weight, units, bias=False, ridge=RIDGE)
    root = float(RIDGE * ridge_level(moments)) ** 0.5
    more = torch.cat([a, root * torch.eye(a.shape[1], dtype=torch.float64).unsqueeze(0)], 2)
    stacked = Moments.of(more, torch.cat([residual, torch.zeros_like(weight)], 2))
    plain = Objective.of(stacked, weight, units, bias=False)
    assert submodularity_bound(ridged) == pytest.approx(submodularity_bound(plain), rel=1e-9)
    assert submodularity_bound(ridged) > 100 * submodularity_bound(Objective.of(moments, weight, units, bias=False))
    found = select_units([ridged], 3, bound=True)
    best = min(left(moments, weight, units, [i, j, k], False) for i in range(6) for j in range(i) for k in range(j))
    gained, most = float(found.errors[0] - found.errors[-1]), float(found.errors[0]) - best
    assert found.guarantee is not None
    assert bool((found.errors.diff() < 0).all())
    assert gained >= found.guarantee * most - root**2 * float(weight.square().sum()) / ridged.energy


@pytest.mark.parametrize("rows", [8, 60])
def test_units_that_nobody_reads_go_for_nothing(rows: int) -> None:
    """One of them tells more than any other, which helps only where those that are read cannot all stay."""
    a, residual, weight, units = layer(60, rows=rows, width=1)
    a = torch.cat([a, a.sum(1, keepdim=True)], 1)
    weight = torch.cat([weight.abs(), torch.zeros(1, 4, 1, dtype=torch.float64)], 2)
    moments, units = Moments.of(a, torch.zeros_like(residual)), torch.arange(7).view(7, 1)
    objective = Objective.of(moments, weight, units, bias=False, ridge=RIDGE)
    found = select_units([objective], 6)
    assert set(found.order.tolist()) == set(range(6))
    assert float(found.errors[-1]) < 1e-12
    assert select_units([objective], 1).order.tolist() == [6]


def test_predictions_without_a_ridge_are_finite_whatever_depends_on_whatever() -> None:
    a, residual, weight, units = layer(70, units=8, width=3, rows=12)
    a[:, 3:6] = a[:, :3]
    a[:, 6:9] = 0
    for dtype in (torch.float64, torch.float32):
        case = (a.to(dtype), residual.to(dtype), weight, units)
        moments, held = (Moments.of(*(x[:, :, :n] for x in case[:2])) for n in (12, 3))
        whole = Objective.of(moments, weight, units, bias=True)
        found = select_units([replace(whole, held=Objective.of(held, weight, units, bias=True))], 8)
        assert bool(found.errors.isfinite().all())
        assert sorted(found.order.tolist()) == list(range(8))


class FlattenLinear(nn.Module):
    """Convolutions, then a linear layer on all positions: far more columns than samples. Channels of the second are
    dead, and one is constant."""

    dead, constant = (1, 4, 5, 9), (12,)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 3, padding=1)
        self.pool = nn.AvgPool2d(2)
        self.middle, self.last = nn.Linear(16 * 9, 30), nn.Linear(30, 10)
        self.second.weight.data *= 3
        self.second.bias.data += 0.2
        for channels, shift in ((self.dead, -1.0), (self.constant, 1.0)):
            self.second.weight.data[list(channels)] = 0
            self.second.bias.data[list(channels)] = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.second(self.pool(torch.relu(self.first(x))))))
        return self.last(torch.relu(self.middle(x.flatten(1))))


def cut(seed: int, samples: int, count: int) -> tuple[FlattenLinear, foldcut.compiler.ir.program.Program, Selection]:
    """The second convolution cut to so many channels."""
    torch.manual_seed(seed)
    net, images = FlattenLinear().eval(), torch.randn(samples, 1, 12, 12)
    provenance = foldcut.find_units(foldcut.capture(net, images[:2]))
    group = next(g for g in provenance.prunable if len(g) == 16)
    choice = choose_channels(provenance, CalibrationSet.of(images), {group.name: count})
    return net, prune_channels(provenance, choice.removed, choice.tensors).program, choice.selections[group.name]


@pytest.mark.parametrize("samples", [12, 40, 100])
@pytest.mark.parametrize("seed", range(3))
def test_dead_channels_go_first_and_for_nothing(seed: int, samples: int) -> None:
    idle = {*FlattenLinear.dead, *FlattenLinear.constant}
    net, smaller, selection = cut(seed, samples, 16 - len(idle))
    assert not idle & set(selection.order.tolist())
    assert float(selection.errors[-1]) < 1e-10
    fresh = torch.randn(64, 1, 12, 12)
    torch.testing.assert_close(smaller(fresh), net(fresh), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("samples", [40, 100])
def test_the_error_is_that_of_unseen_samples(samples: int) -> None:
    """Within a factor of two, on average over five networks; the fit itself left a thousandth of it."""
    ratios = []
    for seed in range(5):
        net, smaller, selection = cut(seed, samples, 5)
        fresh = torch.randn(256, 1, 12, 12)
        middle = net.pool(torch.relu(net.second(net.pool(torch.relu(net.first(fresh)))))).flatten(1)
        kept = net.pool(torch.relu(_conv(smaller, net, fresh))).flatten(1)
        wanted = middle @ net.middle.weight.T + net.middle.bias
        found = kept @ smaller.module.get_parameter("middle.weight").T + smaller.module.get_parameter("middle.bias")
        true = float((found - wanted).square().sum() / (wanted - net.middle.bias).square().sum())
        ratios.append(math.log(float(selection.errors[-1]) / true))
    assert abs(sum(ratios)) / len(ratios) < math.log(2)


def _conv(smaller: foldcut.compiler.ir.program.Program, net: FlattenLinear, images: torch.Tensor) -> torch.Tensor:
    weight, bias = (smaller.module.get_parameter(f"second.{name}") for name in ("weight", "bias"))
    inner = net.pool(torch.relu(net.first(images)))
    return nn.functional.conv2d(inner, weight, bias, padding=1)


def test_curves_count_dead_channels_for_nothing() -> None:
    """Error curves for budgets, from the original network's moments."""
    torch.manual_seed(0)
    net, images = FlattenLinear().eval(), torch.randn(40, 1, 12, 12)
    provenance = foldcut.find_units(foldcut.capture(net, images[:2]))
    group = next(g for g in provenance.prunable if len(g) == 16)
    ((_, selection),) = select_layerwise(provenance, CalibrationSet.of(images), [group], {group.name: 16})
    assert set(selection.order[11:].tolist()) == {*FlattenLinear.dead, *FlattenLinear.constant}
    assert float(selection.errors[11]) < 1e-10
    assert float(selection.errors[8]) > 1e-6


def test_the_height_of_a_curve_is_measured_where_there_is_an_error() -> None:
    """Three quarters of the channels are dead: half of them could go without any."""
    torch.manual_seed(0)
    net, images = FlattenLinear().eval(), torch.randn(40, 1, 12, 12)
    net.second.weight.data[4:] = 0
    net.second.bias.data[4:] = -1
    provenance = foldcut.find_units(foldcut.capture(net, images[:2]))
    group = next(g for g in provenance.prunable if len(g) == 16)
    curve = error_curves(provenance, CalibrationSet.of(images), [group])[group.name]
    assert float(curve[4:].max()) < 1e-9
    assert 1e-6 < float(curve[2]) < float(curve[0]) < 10


def test_no_view_of_a_held_out_sample_is_fitted_to() -> None:
    """Each sample holds its own number."""
    numbers = torch.arange(45.0).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    for views in ((), (foldcut.horizontal_flip,), (foldcut.horizontal_flip, foldcut.horizontal_flip)):
        samples = CalibrationSet.of(numbers).with_views(views)
        together = samples.views_together()
        assert len(together) == 45 * (1 + len(views))
        for most in (64, 7, 1):
            size = split_batch_size(together, most)
            batches = [set(batch.flatten().tolist()) for batch in together.batches(size)]
            held = set().union(*batches[3::4])
            assert held
            assert not held & set().union(*(b for i, b in enumerate(batches) if i % 4 != 3))
