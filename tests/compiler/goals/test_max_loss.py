"""`MaxLoss`: the fastest network that keeps within a loss in the user's metric."""

import json
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.goals.max_loss import MOST_FINISHED, MOST_SEARCHES, NARROW
from foldcut.compiler.metric.reading import Loss
from foldcut.compiler.plan.goal import read_goal
from foldcut.compiler.plan.tried import Found, Tried
from foldcut.compiler.report.page import report_page
from torch import nn

pytestmark = pytest.mark.usefixtures("quick_measurement")


class Networks:
    """In place of the search: a plan at ratio r has the error (1 - r) ** 2, and its network loses what `loss` says."""

    def __init__(self, loss: Callable[[float], Loss | None], fastest: float = 0.0) -> None:
        self.loss, self.fastest = loss, fastest
        self.searched_at: list[float] = []
        self.finished_at: list[float] = []
        self.reason = ""

    def offer(self, target: float) -> None:
        assert 0 < target < 1

    def searched(self, ratio: float) -> Found:
        self.searched_at.append(ratio)
        reached = max(ratio, self.fastest)
        best = Tried(mix={"plan": reached}, error=(1 - reached) ** 2, ratio=reached)  # type: ignore[dict-item]
        return Found(best=best, met=reached <= ratio, tried=(best,), scales={})

    def finished(self, found: Found) -> Any:
        self.finished_at.append(found.best.ratio)
        made = SimpleNamespace(ratio=found.best.ratio, errors={"mimicked": found.best.error})
        return made, self.loss(found.best.ratio)

    def unchanged(self, reason: str) -> Any:
        self.reason = reason
        return SimpleNamespace(ratio=1.0)


def sought(networks: Any, bound: float) -> float:
    made, met = foldcut.MaxLoss(bound).sought(networks)
    assert met
    assert len(networks.finished_at) <= MOST_FINISHED and len(networks.searched_at) <= MOST_SEARCHES
    return float(made.ratio)  # type: ignore[attr-defined]


@pytest.mark.parametrize("bound", [0.5, 1.0, 2.0, 5.0, 10.0])
@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize("error", [None, 0.1], ids=["plain", "sampled"])
def test_the_fastest_that_holds_is_found(bound: float, power: int, error: float | None) -> None:
    """Losses that grow with what is cut, faster or slower: what comes back holds, and is near the fastest that does."""

    def loss(ratio: float) -> Loss:
        return Loss(value=20 * (1 - ratio) ** power, error=error)

    found = sought(Networks(loss), bound)
    best = 1 - (max(0.0, bound - 1.645 * (error or 0.0)) / 20) ** (1 / power)
    assert loss(found).most <= bound
    assert found - max(0.25, best) < 0.1


def test_nothing_that_is_faster_holds() -> None:
    networks = Networks(lambda ratio: Loss(value=9.0))
    assert sought(networks, 0.5) == 1.0
    assert networks.reason == "nothing that is faster keeps within metric loss at most 0.5"
    assert networks.finished_at[0] < networks.finished_at[-1] > 0.9


def test_all_hold() -> None:
    assert sought(Networks(lambda ratio: Loss(value=-1.0)), 0.0) < 0.25 + 2 * NARROW


def test_what_cannot_be_reached_is_not_looked_for_again() -> None:
    networks = Networks(lambda ratio: Loss(value=0.0), fastest=0.6)
    assert sought(networks, 1.0) == 0.6
    assert networks.finished_at.count(0.6) == 1


def test_a_plan_that_loses_more_than_one_that_failed_is_not_finished() -> None:
    """The error of plans stands for the metric: it grows below 0.8 and is the same above."""

    class Flat(Networks):
        def searched(self, ratio: float) -> Found:
            found = super().searched(ratio)
            best = Tried(mix=found.best.mix, error=0.1, ratio=found.best.ratio)
            return Found(best=best, met=True, tried=(best,), scales={})

    networks = Flat(lambda ratio: Loss(value=5.0))
    assert sought(networks, 1.0) == 1.0
    assert len(networks.finished_at) == 1 < len(networks.searched_at)


@pytest.mark.parametrize(("error", "holds"), [(1e-3, True), (1e-1, False)])
def test_where_the_metric_says_nothing_the_error_decides(error: float, holds: bool) -> None:
    class Silent(Networks):
        def finished(self, found: Found) -> Any:
            made, _ = super().finished(found)
            made.errors = {"re-solved": error}
            return made, None

    assert (sought(Silent(lambda ratio: None), 1.0) < 1.0) == holds


def test_a_network_that_cannot_be_read_counts_by_those_that_could() -> None:
    """The second read fails; its error is below that of the first, which held."""
    calls = iter(range(99))
    networks = Networks(lambda ratio: None if next(calls) else Loss(value=0.0))
    assert sought(networks, 1.0) < 1.0 and len(networks.finished_at) > 1


@pytest.mark.parametrize("loss", [-0.1, math.nan, math.inf, True, "1", None])
def test_losses_that_are_none(loss: Any) -> None:
    with pytest.raises(foldcut.GoalError, match="is not a goal"):
        foldcut.MaxLoss(loss)


def test_it_is_written_and_read() -> None:
    goal = foldcut.MaxLoss(0.5)
    assert read_goal(json.loads(json.dumps(goal.to_dict()))) == goal
    assert str(goal) == "metric loss at most 0.5" and goal.words() == "as fast as a loss of 0.5 in the metric allows"


@pytest.fixture(scope="module")
def net(nets: SimpleNamespace) -> nn.Module:
    torch.manual_seed(0)
    return nets.ResNet(3, 8).eval()


def likeness(net: nn.Module, images: torch.Tensor) -> Any:
    """A metric: 100 where the outputs are the network's own, less the farther they are off."""
    with torch.no_grad():
        own = net(images)

    @torch.no_grad()
    def evaluate(module: nn.Module) -> float:
        return float(100 - 100 * (module(images) - own).square().sum() / own.square().sum())

    return evaluate


def run(net: nn.Module, nets: SimpleNamespace, loss: float, evaluate: Any, **options: Any) -> foldcut.Compiled:
    limits = foldcut.ChannelLimits(multiple_of=2)
    settings = foldcut.PipelineSettings(channels=foldcut.ChannelSettings(limits=limits))
    usual: Any = {"mimic": False, "progress": False, "cache": False, "settings": settings}
    goal = foldcut.MaxLoss(loss)
    return foldcut.compile(net, nets.images(48), goal=goal, evaluate=evaluate, **(usual | options))


def test_a_network_keeps_within_its_loss(net: nn.Module, nets: SimpleNamespace, work_backend: Any) -> None:
    """More may be lost, and the network is faster; what the report says is what the metric says of the result."""
    evaluate = likeness(net, nets.images(40, seed=7))
    options: Any = {"backend": work_backend, "rewrites": ("prune_channels",)}
    tight, loose = (run(net, nets, loss, evaluate, **options) for loss in (0.01, 2.0))
    for made, bound in ((tight, 0.01), (loose, 2.0)):
        metric = made.report.metric
        assert metric["before"] == pytest.approx(100, abs=1e-3) and metric["loss"] <= bound
        assert metric["after"] == pytest.approx(evaluate(made.module), abs=1e-6)
        assert metric["calls"] <= 1 + len(metric["finalists"]) <= 1 + MOST_FINISHED
        assert min(f["ratio"] for f in metric["finalists"] if f["most"] <= bound) < 1
        assert made.report.met and made.plan.goal == foldcut.MaxLoss(bound)
    assert loose.report.latency["ratio"] < tight.report.latency["ratio"] < 1
    assert "and read by the metric" in report_page(loose.report.to_dict())


def test_the_network_that_is_read_is_the_one_that_goes_out(
    net: nn.Module, nets: SimpleNamespace, work_backend: Any
) -> None:
    """After training, which is not done again."""
    evaluate = likeness(net, nets.images(40, seed=7))
    settings = foldcut.MimicSettings(iterations=3)
    made = run(net, nets, 2.0, evaluate, backend=work_backend, rewrites=("drop_blocks",), mimic=settings)
    losses = [f["loss"] for f in made.report.metric["finalists"]]
    assert made.report.metric["loss"] in losses and made.report.met
    assert made.outcome.applied.trained


def test_the_original_comes_back_where_nothing_holds(
    net: nn.Module, nets: SimpleNamespace, work_backend: Any, tmp_path: Any
) -> None:
    evaluate = likeness(net, nets.images(40, seed=7))
    options: Any = {"backend": work_backend, "rewrites": ("prune_channels",)}
    with pytest.warns(UserWarning, match="nothing that is faster keeps within metric loss at most 1e-09"):
        made = run(net, nets, 1e-9, evaluate, **options)
    images = nets.images(6, seed=3)
    torch.testing.assert_close(made.module(images), net(images), rtol=1e-4, atol=1e-5)
    assert made.report.met and made.plan.decisions == () and made.report.latency["ratio"] == pytest.approx(1)
    assert any("the network is as it was" in warning for warning in made.report.warnings)
    made.save(tmp_path / "out")
    assert foldcut.load(tmp_path / "out").report.metric["loss"] == 0
    again = foldcut.apply(net, tmp_path / "out" / "plan.json", example=images)
    assert torch.equal(again.module(images), made.module(images))


def test_a_metric_that_fails_leaves_it_to_the_error(net: nn.Module, nets: SimpleNamespace, work_backend: Any) -> None:
    def evaluate(module: nn.Module) -> float:
        raise ValueError("no data today")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = run(net, nets, 1.0, evaluate, backend=work_backend, rewrites=("prune_channels",))
    assert sum("no data today" in str(warning.message) for warning in caught) == 1
    assert made.report.metric["loss"] is None and made.report.metric["calls"] == 1
    judged = list(made.report.output_errors.values())[-1]
    assert judged <= 2e-3
