"""How long a compile will take: what each stage has to do, and that the stages are those that come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.plan.search_time import SearchTime
from foldcut.compiler.rewrite import forecast as forecasts
from foldcut.compiler.rewrite.context import Context
from foldcut.compiler.rewrite.forecast import compile_forecast, foresee, size_words
from foldcut.compiler.rewrite.work import Work
from foldcut.compiler.support.progress import WholeProgress
from foldcut.compiler.support.whole import Forecast
from foldcut.passes.mimic.settings import expected_mimic_s

MIX: tuple[foldcut.Rewrite, ...] = (foldcut.Drop(), foldcut.Prune(), foldcut.Factorize(), foldcut.Quantize())


def trained(pass_s: float) -> float:
    """A training of a thousand passes."""
    return 1000 * pass_s


def untrained(pass_s: float) -> float:
    """No training."""
    return 0.0 * pass_s


@pytest.fixture
def ctx(residual: foldcut.Program, nets: SimpleNamespace, contexts: Callable[..., Context]) -> Callable[..., Context]:
    samples = CalibrationSet.of(nets.images(40))
    return lambda goal, **options: contexts(residual, samples, goal=goal, **options)


def seconds(forecast: Forecast) -> dict[str, float]:
    return {name: stage.seconds for name, stage in forecast.stages.items()}


def test_what_hangs_on_the_network_grows_with_its_forward_pass(ctx: Callable[..., Context]) -> None:
    """All but measurements and exports, which have a time of their own."""
    fast, slow = (
        seconds(compile_forecast(ctx(foldcut.Blocks(1)), [foldcut.Drop()], lambda pass_s: 1000 * pass_s, pass_s))
        for pass_s in (0.01, 0.1)
    )
    assert list(fast) == [
        "export",
        "measure original",
        "choose",
        "re-solve",
        "mimic",
        "measure",
        "profile",
        "test",
        "report",
    ]
    assert fast["mimic"] == 10.0 and slow["mimic"] == 100.0
    for stage in ("choose", "re-solve", "test"):
        assert slow[stage] == pytest.approx(10 * fast[stage])
    assert fast["export"] == slow["export"] and slow["measure"] == 35.0


def test_stages_with_nothing_to_do_are_not_foreseen(ctx: Callable[..., Context]) -> None:
    found = compile_forecast(ctx(foldcut.Channels(0.5)), [foldcut.Prune()], untrained, 0.01)
    assert "mimic" not in found.stages and "try plans" not in found.stages
    alone = compile_forecast(ctx(foldcut.Blocks(1)), [foldcut.Drop()], untrained, 0.01)
    # what chooses channels is part of the re-solve
    assert found.stages["re-solve"].seconds > 2 * alone.stages["re-solve"].seconds


def test_where_int8_may_do_the_others_may_not_be_asked(ctx: Callable[..., Context]) -> None:
    goal = foldcut.Latency(0.5)
    mixed = compile_forecast(ctx(goal), MIX, untrained, 0.01)
    stages = mixed.stages
    assert [name for name, stage in stages.items() if stage.least_s == 0.0] == [
        "measure savings",
        "choose",
        "offer channels",
        "offer ranks",
    ]
    assert stages["try plans"].least_s == pytest.approx(stages["try plans"].seconds / 4)
    floating = compile_forecast(ctx(goal), MIX[:3], untrained, 0.01)
    assert all(stage.least_s is None or stage.least_s > 0 for stage in floating.stages.values())
    assert floating.stages["try plans"].least_s == floating.stages["try plans"].seconds
    assert mixed.least_s < floating.least_s


def test_a_bound_on_the_search_bounds_the_forecast(ctx: Callable[..., Context]) -> None:
    goal = foldcut.Latency(0.5)
    free, bounded = (
        compile_forecast(ctx(goal, time=SearchTime(limit)), MIX[:3], untrained, 1.0).stages for limit in (None, 60)
    )
    assert sum(free[name].seconds for name in ("try plans", "measure plan")) > 60
    assert sum(bounded[name].seconds for name in ("try plans", "measure plan")) == pytest.approx(60)


def test_an_own_rewrite_need_not_say_anything(ctx: Callable[..., Context]) -> None:
    class Own(foldcut.Rewrite):
        name = "own"

    assert Own().work(ctx(foldcut.Macs(0.5))) == {}
    assert "try plans" in compile_forecast(ctx(foldcut.Macs(0.5)), [Own()], untrained, 0.01).stages


def test_work_adds_up() -> None:
    work = Work(passes=3) + Work(passes=4, seconds=2)
    assert work == Work(passes=7, seconds=2) and work.takes_s(0.5) == 5.5


def test_a_training_is_expected_to_take_no_longer_than_it_may() -> None:
    brief = foldcut.MimicSettings(iterations=10, batch_size=4)
    assert expected_mimic_s(None, 1000, 0.5) == 0
    assert expected_mimic_s(brief, 1000, 0.5) == 40
    assert expected_mimic_s(replace(brief, macs=30_000), 1000, 0.5) == 10
    assert expected_mimic_s(replace(brief, seconds=3), 1000, 0.5) == 3


def test_the_size_of_the_work_in_words(ctx: Callable[..., Context]) -> None:
    found = ctx(foldcut.Blocks(1))
    macs, parameters = (forecasts._short(n) for n in (3_650_000, 999))
    assert (macs, parameters) == ("3.65 M", "999")
    assert size_words(found).startswith("40 samples to fit, 40 to judge, 40 to test; ")
    assert size_words(found).endswith(f" MACs a sample, {forecasts._short(found.teacher.parameter_count())} parameters")


def test_nothing_is_timed_where_nobody_watches(ctx: Callable[..., Context], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(ctx: Context) -> float:
        raise AssertionError("it was timed")

    monkeypatch.setattr(forecasts, "timed_pass_s", never)
    foresee(ctx(foldcut.Blocks(1)), [foldcut.Drop()], untrained)
    with pytest.raises(AssertionError, match="it was timed"):
        foresee(ctx(foldcut.Blocks(1), progress=WholeProgress(lambda line: None)), [foldcut.Drop()], untrained)


class Watched(WholeProgress):
    """What is shown, kept."""

    def __init__(self) -> None:
        self.said: list[str] = []
        super().__init__(self.said.append)
        self.seen: list[float] = []

    def _changed(self, now: float, stage: str, far: str) -> None:
        self.seen.append(self.whole.fraction(now))


@pytest.mark.usefixtures("quick_measurement")
@pytest.mark.parametrize(
    ("goal", "rewrites", "maybe"),
    [
        (foldcut.Blocks(1), None, ()),
        (foldcut.Channels(0.5), None, ()),
        (foldcut.Ranks(keep=0.5), None, ()),
        (foldcut.Macs(0.8), ("prune_channels", "factorize"), ()),
        (foldcut.Latency(0.9), ("drop_blocks", "prune_channels", "factorize"), ()),
        (foldcut.Latency(0.9), None, ("measure savings", "choose", "offer channels", "offer ranks", "weigh integers")),
    ],
    ids=str,
)
def test_the_stages_that_are_foreseen_are_those_that_come(
    goal: foldcut.Goal, rewrites: Any, maybe: tuple[str, ...], nets: SimpleNamespace, counting_backend: Any
) -> None:
    """A stage with another name than foreseen would be waited for in vain."""
    watched, net = Watched(), nets.seeded(nets.ResNet)
    brief = foldcut.MimicSettings(iterations=8, batch_size=4, checks=1)
    options: dict[str, Any] = {"rewrites": rewrites, "mimic": brief, "backend": counting_backend, "cache": False}
    try:
        foldcut.compile(net, nets.images(40), goal=goal, progress=watched, **options)
    except foldcut.GoalError as unmet:
        assert unmet.best is not None, unmet
    assert watched.whole.forecast is not None
    missing = set(watched.whole.forecast.stages) - set(watched.whole.lines)
    assert missing <= set(maybe)
    assert "samples to fit" in watched.said[0] and watched.said[1].startswith("about ") and len(watched.said) == 2
    assert all(after >= before for before, after in pairwise(watched.seen)) and 0.3 < watched.seen[-1] < 1
    assert not any(line.running for line in watched.whole.lines.values())


def test_a_sweep_is_one_whole(nets: SimpleNamespace, counting_backend: Any) -> None:
    watched, net = Watched(), nets.seeded(nets.ResNet)
    goals = [foldcut.Channels(0.75), foldcut.Channels(0.5)]
    options: dict[str, Any] = {"mimic": False, "backend": counting_backend, "progress": watched}
    foldcut.sweep(net, nets.images(40), goals=goals, **options)
    assert (watched.whole.part, watched.whole.parts, watched.whole.part_name) == (2, 2, str(goals[1]))
    heads = [line.split(": about ")[0] for line in watched.said if ": about " in line]
    assert heads == list(map(str, goals)) and len(watched.said) == 3  # the samples are said once
    assert all(after >= before for before, after in pairwise(watched.seen)) and watched.seen[-1] > 0.5


def test_a_plan_that_is_solved_again_is_foreseen(nets: SimpleNamespace, counting_backend: Any) -> None:
    net, samples = nets.seeded(nets.ResNet), nets.images(40)
    options: dict[str, Any] = {"mimic": False, "cache": False}
    made = foldcut.compile(net, samples, goal=foldcut.Blocks(1), backend=counting_backend, progress=False, **options)
    watched = Watched()
    foldcut.apply(net, made.plan, calibration=samples, progress=watched, **options)
    assert watched.whole.forecast is not None
    assert list(watched.whole.forecast.stages) == ["re-solve", "test"]
    assert list(watched.whole.lines) == ["capture", "compare data", "re-solve", "test"]
