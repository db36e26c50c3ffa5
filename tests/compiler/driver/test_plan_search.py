"""The search for a plan: who is asked, and what is found out once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.kept import kept_for
from foldcut.compiler.data.output_error import BROKEN
from foldcut.compiler.driver import plan_search
from foldcut.compiler.driver.plan_search import MOST_ROUGHLY, NEGLIGIBLE, Search, quick_error
from foldcut.compiler.rewrite.budget import Budget
from foldcut.compiler.rewrite.context import Context
from foldcut.compiler.rewrite.rewrite import Offer
from foldcut.compiler.trial import apply_decisions
from foldcut.compiler.trial.apply_decisions import applied
from foldcut.passes.factorize.decision import FactorizeLayer
from foldcut.passes.prune import rewrite
from foldcut.passes.prune.decision import PruneChannels, UnitCount
from foldcut.passes.prune.stored import ORDERS
from torch import nn

ASKED: list[str] = []


class Last(foldcut.Drop):
    """Offers a plan to start from."""

    comes_last = True

    def offer(self, ctx: Context, budget: Budget) -> Offer:
        ASKED.append("last")
        offer = super().offer(ctx, budget)
        return replace(offer, starts=({item: item.proposals[0] for item in offer.items[:1]},))


class Others(foldcut.Prune):
    def offer(self, ctx: Context, budget: Budget) -> Offer:
        ASKED.append("others")
        return super().offer(ctx, budget)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


@pytest.fixture
def search(contexts: Callable[..., Context]) -> Search:
    torch.manual_seed(0)
    rows = torch.randn(24, 8)
    program = foldcut.capture(nn.Sequential(Branch(), Branch(), nn.Linear(8, 4)).eval(), rows[:2])
    ctx = replace(contexts(program, CalibrationSet.of(rows)), goal=foldcut.Macs(0.6))
    ASKED.clear()
    return Search(ctx=ctx, rewrites=[Others(), Last()])


@pytest.mark.parametrize(
    ("error", "target", "asked"),
    [
        (0.9 * NEGLIGIBLE, 0.6, ["last"]),
        (1.1 * MOST_ROUGHLY * NEGLIGIBLE, 0.6, ["last", "others"]),
        (0.0, 0.01, ["last", "others"]),  # it does not reach the target
        (BROKEN, 0.6, ["last", "others"]),
    ],
)
def test_a_plan_that_is_good_enough_spares_the_other_rewrites(
    error: float, target: float, asked: list[str], search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Search, "_tried", lambda self, mix: error)
    search.offer(target)
    assert asked == ASKED
    names = ["prune_channels", "drop_blocks"] if len(asked) > 1 else ["drop_blocks"]
    assert list(search.offers) == names, "in the rewrites' own order"
    assert ("not asked" in search.reasons()) == (len(asked) == 1)


@pytest.mark.parametrize(("careful", "asked"), [(0.9, ["last"]), (1.1, ["last", "others"])])
def test_a_plan_that_may_be_good_enough_is_made(
    careful: float, asked: list[str], search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: it is the result, if it is good enough."""
    made: list[int] = []

    def network(ctx: Context, rewrites: Any, decisions: Any) -> foldcut.Applied:
        made.append(len(decisions))
        return foldcut.Applied(program=ctx.teacher, decisions=decisions, errors={"re-solved": careful * NEGLIGIBLE})

    monkeypatch.setattr(Search, "_tried", lambda self, mix: 2 * NEGLIGIBLE)
    monkeypatch.setattr(plan_search, "made", network)
    search.offer(0.6)
    assert asked == ASKED
    search.made(search.searched(0.6))
    assert len(made) == len(asked)


def test_a_plan_is_measured_and_tried_once(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    search.offer(0.6)
    (start,) = search.offers["drop_blocks"].starts
    counted: dict[str, int] = {"tried": 0, "measured": 0}

    def tried(self: Search, mix: Any) -> float:
        counted["tried"] += 1
        return 0.5

    def ratio(mix: Any) -> float:
        counted["measured"] += 1
        return 0.7

    search._errors.clear()
    search._ratios.clear()
    monkeypatch.setattr(Search, "_tried", tried)
    monkeypatch.setattr(search.budget, "ratio", ratio)
    assert [search._trial(start), search._trial(dict(start))] == [0.5, 0.5]
    assert [search._measure(start), search._measure(dict(start))] == [0.7, 0.7]
    assert counted == {"tried": 1, "measured": 1}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


@pytest.fixture
def pair(contexts: Callable[..., Context]) -> Context:
    torch.manual_seed(0)
    rows = torch.randn(40, 8)
    return replace(contexts(foldcut.capture(Pair().eval(), rows[:2]), CalibrationSet.of(rows)), goal=foldcut.Macs(0.6))


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("units are chosen again")


def test_a_trial_takes_the_units_that_the_offer_has_chosen(pair: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is solved once, behind the last rewrite; what then stands is chosen and solved anew."""
    prune = foldcut.Prune(limits=foldcut.ChannelLimits(multiple_of=1))
    search = Search(ctx=pair, rewrites=[prune])
    search.offer(0.6)
    orders = kept_for(pair.teacher, pair.fit)[ORDERS]
    assert {name: sorted(found.order.tolist()) for name, found in orders.items()} == {
        "first": list(range(16)),
        "second": list(range(16)),
    }
    decisions = [UnitCount(group=name, count=5, total=16) for name in orders]
    quick = pair.for_trials(16)
    monkeypatch.setattr(rewrite, "stored_channels", refuse)
    done = applied(quick, [prune], decisions)
    kept = {decision.group: decision.kept for decision in done.decisions if isinstance(decision, PruneChannels)}
    assert kept == {name: tuple(sorted(found.order[:5].tolist())) for name, found in orders.items()}
    assert not done.layers and quick_error(quick, [prune], decisions) < 1
    with pytest.raises(AssertionError, match="chosen again"):
        applied(pair, [prune], decisions)
    with pytest.raises(AssertionError, match="chosen again"):
        applied(quick, [replace(prune, polish=False)], decisions)  # nothing is solved behind it


def test_a_trial_is_solved_once(pair: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    solves: list[bool] = []
    real = apply_decisions._solved

    def solved(ctx: Context, done: Any, settings: Any) -> Any:
        solves.append(ctx.trial)
        return real(ctx, done, settings)

    class Solving(foldcut.Prune):
        solves_before_next = True

    monkeypatch.setattr(apply_decisions, "_solved", solved)
    rewrites = [Solving(), foldcut.Factorize()]
    decisions = [
        UnitCount(group="first", count=8, total=16),
        FactorizeLayer(layer="linear_1", scheme="channel", ranks=(2,), full=(16,)),
    ]
    for ctx, count in ((pair, 2), (pair.for_trials(16), 1)):
        solves.clear()
        apply_decisions.solved(ctx, rewrites, applied(ctx, rewrites, decisions))
        assert solves == [ctx.trial] * count
