"""The optimizer: it finds optima at the Frank-Wolfe rate, keeps weights in their sets, and survives a checkpoint."""

import copy
import io
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from foldcut.compiler.support.errors import CompilerError
from foldcut.passes.frank_wolfe import (
    Constraint,
    FrankWolfe,
    FrankWolfeError,
    GroupKSupport,
    KSparse,
    KSupport,
    LpBall,
    NuclearBall,
    SpectralKSparse,
    SpectralKSupport,
    Subspace,
)
from torch import nn
from torch.optim import lr_scheduler

SETS: list[Constraint] = [
    LpBall(p=1),
    LpBall(p=1.5),
    LpBall(p=2),
    LpBall(p=math.inf),
    KSparse(k=5),
    KSupport(k=5),
    GroupKSupport(k=2),
    NuclearBall(),
    SpectralKSparse(k=2),
    SpectralKSupport(k=2),
    SpectralKSupport(k=2, oracle=Subspace(oversampling=1)),
]
each_set = pytest.mark.parametrize("constraint", SETS, ids=repr)
SHAPE = (6, 2, 2, 2)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 0.01) -> nn.Parameter:
    return nn.Parameter((scale * normal(*SHAPE, seed=seed)).to(dtype))


def set_gradients(weights: list[nn.Parameter], seed: int) -> None:
    for index, w in enumerate(weights):
        w.grad = normal(*w.shape, seed=100 * seed + index).to(w.dtype)


def pull(w: nn.Parameter, target: torch.Tensor) -> torch.Tensor:
    """Half the squared distance, with its gradient set."""
    w.grad = (w.detach() - target).to(w.dtype)
    return w.grad.double().square().sum() / 2


def same_state(one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> bool:
    """Whether two states hold the same keys and bits."""
    pairs = [(a, other[index]) for index, a in one.items()]
    assert one.keys() == other.keys() and all(a.keys() == b.keys() for a, b in pairs)
    return all(bool(torch.as_tensor(a[key] == b[key]).all()) for a, b in pairs for key in a)


# ---- steps


@each_set
def test_it_reaches_the_optimum_at_the_rate_of_frank_wolfe(constraint: Constraint) -> None:
    """The least duality gap of T steps of size 2 / (t + 2) is at most 27/4 diameter^2 / (T + 2) (Jaggi 2013, th. 2)."""
    target, w = normal(*SHAPE, seed=1).double(), weight(dtype=torch.float64)
    optimizer = FrankWolfe([w], lr=1.0, rescale=None, constraint=constraint)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 2 / (t + 2))
    gaps, losses = [], []
    for _ in range(60):
        losses.append(float(pull(w, target)))
        gaps.append(constraint.duality_gap(w, w.detach() - target))
        optimizer.step()
        scheduler.step()
    assert min(gaps) <= 6.75 * constraint.diameter(w) ** 2 / 62
    lower = max(loss - gap for loss, gap in zip(losses, gaps, strict=True))
    # and for the loss itself 2 diameter^2 / (T + 2), against what the gaps prove to be the least loss
    assert losses[-1] - lower <= 2 * constraint.diameter(w) ** 2 / 61 + min(gaps)
    assert losses[-1] < losses[0]


def test_the_optimum_is_the_projection() -> None:
    constraint, target = NuclearBall(radius=2.0), normal(*SHAPE, seed=1).double()
    w = weight(dtype=torch.float64)
    optimizer = FrankWolfe([{"params": [w], "constraint": constraint}], lr=0.1)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 1 / (1 + step / 4)
        pull(w, target)
        optimizer.step()
    best = constraint.project(target)
    assert float((w.detach() - best).norm()) < 0.05 * float(best.norm())


@each_set
@pytest.mark.parametrize("rescale", ["gradient", "fast_gradient", "diameter", None])
def test_a_step_goes_toward_the_vertex_by_what_the_rescaling_says(constraint: Constraint, rescale: Any) -> None:
    constraint, w = constraint.with_radius(3.0), weight(dtype=torch.float64)
    old = w.detach().clone()
    optimizer = FrankWolfe([w], lr=0.01, rescale=rescale, constraint=constraint)
    set_gradients([w], 1)
    assert w.grad is not None
    vertex, length = constraint.lmo(w.grad), float(w.grad.norm())
    factor = {
        "gradient": length / float((old - vertex).norm()),
        "fast_gradient": 2 * length / constraint.diameter(w),
        "diameter": 1 / constraint.diameter(w),
        None: 1.0,
    }[rescale]
    optimizer.step()
    torch.testing.assert_close(w.detach(), old + 0.01 * factor * (vertex - old), rtol=1e-6, atol=1e-9)
    if rescale == "gradient":
        assert float((w.detach() - old).norm()) == pytest.approx(0.01 * length)


@pytest.mark.parametrize("magnitude", [1e6, 1e30])
def test_a_step_never_goes_beyond_the_vertex(magnitude: float) -> None:
    w, constraint = weight(), SpectralKSupport(k=2, radius=3.0)
    set_gradients([w], 1)
    assert w.grad is not None
    w.grad *= magnitude
    vertex = constraint.lmo(w.grad)
    FrankWolfe([w], lr=0.5, constraint=constraint).step()
    torch.testing.assert_close(w.detach(), vertex, rtol=1e-3, atol=1e-4)
    assert constraint.norm(w) <= 3.0


def test_momentum_and_dampening_are_those_of_sgd() -> None:
    """Without a set the steps are SGD's; with one the momentum is the same."""
    ours, theirs, held = weight(), weight(), weight()
    settings = {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}
    groups = [{"params": [ours]}, {"params": [held], "constraint": KSupport(k=3, radius=5.0), "weight_decay": 0.0}]
    mine, reference = FrankWolfe(groups, **settings), torch.optim.SGD([theirs], **settings)
    momentum = torch.zeros(SHAPE)
    for step in range(5):
        set_gradients([ours], step)
        theirs.grad, held.grad = ours.grad, ours.grad
        momentum = 0.9 * momentum + (0.7 if step else 1.0) * ours.grad
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(mine.state[held]["momentum_buffer"], momentum)


@each_set
def test_many_weights_move_as_each_would_alone(constraint: Constraint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldcut.passes.frank_wolfe.update.STACKED", 100)
    together = [weight(seed) for seed in range(5)]
    alone = [copy.deepcopy(w) for w in together]
    sets = [constraint.with_radius(1.0 + seed) for seed in range(5)]
    one = FrankWolfe([{"params": [w], "constraint": c} for w, c in zip(together, sets, strict=True)], momentum=0.9)
    each = [FrankWolfe([w], constraint=c, momentum=0.9) for w, c in zip(alone, sets, strict=True)]
    for step in range(4):
        set_gradients(together, step)
        set_gradients(alone, step)
        one.step()
        for optimizer in each:
            optimizer.step()
    for w, other in zip(together, alone, strict=True):
        torch.testing.assert_close(w, other)


# ---- feasibility


@each_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [0.02, 0.9])
def test_weights_are_in_their_sets_after_each_step(constraint: Constraint, dtype: torch.dtype, lr: float) -> None:
    constraint = constraint.with_radius(0.7)
    weights = [weight(seed, dtype) for seed in range(2)]
    optimizer = FrankWolfe([{"params": weights, "constraint": constraint}], lr=lr, momentum=0.5, rescale="diameter")
    # always the same direction, so that the weights end up at a vertex
    set_gradients(weights, 1)
    for _ in range(25):
        optimizer.step()
        for w in weights:
            assert constraint.norm(w) <= 0.7
    if lr == 0.9:
        assert constraint.norm(weights[0]) > 0.6


@pytest.mark.parametrize("turns", [True, False], ids=["inside", "at a vertex"])
@pytest.mark.parametrize("rescale", ["diameter", None])
def test_norms_are_computed_rarely(monkeypatch: pytest.MonkeyPatch, turns: bool, rescale: Any) -> None:
    """Each costs a full decomposition: a bound goes along instead, also where a weight stays at the boundary."""
    calls: list[int] = []
    original = SpectralKSupport.gauges
    monkeypatch.setattr(SpectralKSupport, "gauges", lambda self, w: calls.append(1) or original(self, w))
    w, constraint = weight(), SpectralKSupport(k=2, radius=3.0)
    optimizer = FrankWolfe([w], lr=0.02, rescale=rescale, constraint=constraint)
    for step in range(700):
        set_gradients([w], step if turns else 0)
        optimizer.step()
    assert 1 <= len(calls) <= 32
    assert (2.7 if not turns else 0) < constraint.norm(w) <= 3.0


def test_weights_outside_are_refused_until_they_are_made_feasible() -> None:
    inside, outside = weight(0), weight(1, scale=100.0)
    optimizer = FrankWolfe([{"params": [inside, outside], "constraint": NuclearBall(radius=2.0)}])
    before = [inside.detach().clone(), outside.detach().clone()]
    set_gradients([inside, outside], 1)
    with pytest.raises(FrankWolfeError, match=r"make_feasible(.|\n)*") as error:
        optimizer.step()
    assert error.value.node == "group 0[1]"
    assert torch.equal(inside, before[0]) and torch.equal(outside, before[1])
    assert optimizer.make_feasible() == 1
    assert torch.equal(inside, before[0])
    torch.testing.assert_close(outside.detach(), NuclearBall(radius=2.0).pull_in(before[1]))
    optimizer.step()


def test_make_feasible_can_project() -> None:
    w, constraint = weight(scale=100.0), KSparse(k=4, radius=2.0)
    nearest = constraint.project(w.detach())
    optimizer = FrankWolfe([w], constraint=constraint)
    assert optimizer.make_feasible(project=True) == 1
    torch.testing.assert_close(w.detach(), nearest)
    assert constraint.norm(w) <= 2.0 and optimizer.make_feasible() == 0


def test_what_others_write_to_a_weight_is_noticed() -> None:
    w, constraint = weight(), LpBall(p=2, radius=2.0)
    optimizer = FrankWolfe([w], constraint=constraint)
    set_gradients([w], 1)
    optimizer.step()
    with torch.no_grad():
        w.mul_(1e3)
    with pytest.raises(FrankWolfeError, match="not in its set"):
        optimizer.step()
    with torch.no_grad():
        w.mul_(1e-3)
    optimizer.step()
    # and a set that shrinks meanwhile
    optimizer.param_groups[0]["constraint"] = constraint.with_radius(constraint.norm(w) / 2)
    with pytest.raises(FrankWolfeError, match="not in its set"):
        optimizer.step()
    assert optimizer.make_feasible() == 1
    optimizer.step()


# ---- checkpoints, schedules, AMP


def mixed(seed: int = 0, lr: float = 0.1) -> tuple[list[nn.Parameter], FrankWolfe]:
    weights = [weight(seed), weight(seed + 1), weight(seed + 2, torch.bfloat16), nn.Parameter(torch.zeros(5))]
    groups = [
        {"params": weights[:2], "constraint": SpectralKSupport(k=2, radius=0.5, oracle=Subspace(oversampling=1))},
        {"params": [weights[2]], "constraint": SpectralKSparse(k=2, radius=0.3, oracle=Subspace(oversampling=1))},
        {"params": [weights[3]], "weight_decay": 0.01},
    ]
    return weights, FrankWolfe(groups, lr=lr, momentum=0.9)


def run(weights: list[nn.Parameter], optimizer: FrankWolfe, steps: Iterable[int]) -> None:
    for step in steps:
        set_gradients(weights, step)
        optimizer.step()


@pytest.mark.parametrize(("lr", "turns"), [(0.1, True), (1e-4, False)], ids=["turning", "toward a vertex"])
def test_a_resumed_run_goes_on_bit_for_bit(lr: float, turns: bool) -> None:
    """Also where weights at the boundary are brought back inside from time to time."""
    before, after = (range(20), range(20, 40)) if turns else ([0] * 40, [0] * 5)
    weights, optimizer = mixed(lr=lr)
    run(weights, optimizer, before)
    file = io.BytesIO()
    torch.save({"weights": [w.detach() for w in weights], "optimizer": optimizer.state_dict()}, file)
    run(weights, optimizer, after)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, resumed = mixed(seed=50, lr=lr)
    with torch.no_grad():
        for w, value in zip(others, saved["weights"], strict=True):
            w.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    run(others, resumed, after)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert same_state(optimizer.state_dict()["state"], resumed.state_dict()["state"])


def test_a_state_of_other_sets_is_refused() -> None:
    w = weight()
    state = FrankWolfe([w], constraint=KSupport(k=2)).state_dict()
    for other in (KSupport(k=3), KSupport(k=2, radius=2.0), None):
        with pytest.raises(FrankWolfeError, match="other sets"):
            FrankWolfe([w], constraint=other).load_state_dict(state)


def test_the_optimizer_can_be_copied() -> None:
    weights, optimizer = mixed()
    run(weights, optimizer, range(3))
    others, twin = copy.deepcopy((weights, optimizer))
    run(weights, optimizer, range(3, 6))
    run(others, twin, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=12),
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    ],
)
def test_schedulers_drive_it(make: Callable[[FrankWolfe], lr_scheduler.LRScheduler]) -> None:
    w, target = weight(), normal(*SHAPE, seed=1)
    optimizer = FrankWolfe([w], lr=0.1, momentum=0.5, constraint=SpectralKSupport(k=2, radius=2.0))
    scheduler, rates, first = make(optimizer), set(), float(pull(w, target))
    for _ in range(10):
        pull(w, target)
        optimizer.step()
        scheduler.step()
        rates.add(round(scheduler.get_last_lr()[0], 12))
    assert len(rates) > 2 and float(pull(w, target)) < first


def test_grad_scaler_skips_steps_that_overflow() -> None:
    w = weight()
    optimizer = FrankWolfe([w], lr=0.1, constraint=LpBall(p=2, radius=5.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = w.detach().clone()
    scaler.scale((w * math.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(w, before) and scaler.get_scale() == 2.0
    optimizer.zero_grad()
    scaler.scale((w - 1).square().sum()).backward()
    scaler.step(optimizer)
    plain = nn.Parameter(before.clone())
    (plain - 1).square().sum().backward()
    FrankWolfe([plain], lr=0.1, constraint=LpBall(p=2, radius=5.0)).step()
    assert torch.equal(w, plain)


def test_it_trains_under_autocast() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(8, 3), normal(32, 8)
    optimizer = FrankWolfe(
        [{"params": [net.weight], "constraint": NuclearBall(radius=5.0)}, {"params": [net.bias]}], 0.1
    )
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(x), x[:, :3].argmax(1))
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_a_step_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    weights, optimizer = mixed()
    run(weights, optimizer, range(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_without_gradient_are_left_alone() -> None:
    weights, optimizer = mixed()
    before = [w.detach().clone() for w in weights]
    set_gradients(weights, 1)
    weights[0].grad = None
    optimizer.step()
    assert torch.equal(weights[0], before[0]) and weights[0] not in optimizer.state
    assert not any(torch.equal(w, old) for w, old in zip(weights[1:], before[1:], strict=True))
    set_gradients(weights, 2)
    optimizer.step()
    assert not torch.equal(weights[0], before[0])


def test_a_gradient_of_zero_moves_nothing() -> None:
    for constraint in SETS:
        w = weight()
        before = w.detach().clone()
        w.grad = torch.zeros_like(w)
        FrankWolfe([w], constraint=constraint.with_radius(3.0)).step()
        assert torch.equal(w, before)


def test_oracle_gaps_are_told() -> None:
    weights, optimizer = mixed()
    run(weights, optimizer, range(1))
    assert all(abs(gap) < 1e-2 for gap in optimizer.oracle_gaps().values())
    run(weights, optimizer, range(1, 10))
    gaps = optimizer.oracle_gaps()
    assert list(gaps) == ["group 0[0]", "group 0[1]", "group 1"]
    assert all(-1e-2 < gap < 0.2 for gap in gaps.values())


# ---- closures and bad input


def test_a_closure_is_evaluated_and_its_loss_returned() -> None:
    w = weight()
    optimizer = FrankWolfe([w], constraint=LpBall(p=2, radius=3.0))

    def closure() -> float:
        optimizer.zero_grad()
        loss = (w - 1).square().sum()
        loss.backward()
        return float(loss.detach())

    first = optimizer.step(closure)
    assert first is not None and optimizer.step(closure) < first  # type: ignore[operator]


def test_a_closure_that_is_none_is_refused() -> None:
    w = weight()
    before, optimizer = w.detach().clone(), FrankWolfe([w], constraint=LpBall(p=2, radius=3.0))
    with pytest.raises(FrankWolfeError, match="a function"):
        optimizer.step((w - 1).square().sum())
    with pytest.raises(FrankWolfeError, match="left no gradients"):
        optimizer.step(lambda: float((w.detach() - 1).square().sum()))
    assert torch.equal(w, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": 1.5, "rescale": None}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"dampening": -0.1}, "dampening"),
        ({"weight_decay": -1e-3}, "weight_decay"),
        ({"rescale": "gradients"}, "rescale"),
        ({"constraint": 3.0}, "constraint"),
        ({"constraint": SpectralKSupport(k=7)}, "k is out of range"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CompilerError, match=message):
        FrankWolfe([weight()], **({"constraint": LpBall()} | settings))


def test_a_group_that_is_refused_is_not_added() -> None:
    optimizer = FrankWolfe([weight()], constraint=LpBall())
    with pytest.raises(FrankWolfeError):
        optimizer.add_param_group({"params": [weight()], "constraint": KSupport(k=1000)})
    with pytest.raises(FrankWolfeError):
        optimizer.add_param_group({"params": [torch.zeros(3, dtype=torch.complex64, requires_grad=True)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [1, 3])
def test_gradients_that_are_not_finite_change_nothing(bad: float, place: int) -> None:
    weights, optimizer = mixed()
    run(weights, optimizer, range(2))
    before = copy.deepcopy(([w.detach() for w in weights], optimizer.state_dict()["state"]))
    set_gradients(weights, 3)
    gradient = weights[place].grad
    assert gradient is not None
    gradient.view(-1)[2] = bad
    with pytest.raises(FrankWolfeError, match="not finite") as error:
        optimizer.step()
    assert error.value.node == {1: "group 0[1]", 3: "group 2"}[place]
    assert all(torch.equal(w, old) for w, old in zip(weights, before[0], strict=True))
    assert same_state(optimizer.state_dict()["state"], before[1])


def test_a_learning_rate_that_leaves_its_range_changes_nothing() -> None:
    w = weight()
    before, optimizer = w.detach().clone(), FrankWolfe([w], lr=0.5, rescale=None, constraint=LpBall())
    set_gradients([w], 1)
    optimizer.param_groups[0]["lr"] = 1.2
    with pytest.raises(FrankWolfeError, match="lr"):
        optimizer.step()
    assert torch.equal(w, before)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = FrankWolfe(table.parameters(), constraint=LpBall(p=2, radius=100.0))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(FrankWolfeError, match="sparse"):
        optimizer.step()
