"""What settings ask for is done on every path, or refused; what is not finite wins nothing; no stage makes it worse."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.driver import channel_pipeline, drop_pipeline
from foldcut.passes.prune.error_curves import error_curves
from foldcut.passes.prune.settings import ChannelSettings
from foldcut.compiler.driver.drop_pipeline import cut_blocks
from foldcut.compiler.driver.joint_rewrite import JointSettings, apply_changes, judged, replay
from foldcut.compiler.driver.pipeline_settings import PipelineSettings
from foldcut.compiler.ir.edit import set_tensors
from foldcut.compiler.ir.program import Program
from foldcut.compiler.plan.decision import Decision
from foldcut.compiler.support.progress import StageClock
from foldcut.passes.drop.recoverability import RecoverabilitySettings
from foldcut.passes.factorize.decision import FactorizeLayer
from foldcut.passes.factorize.select_ranks import RankAnalysis, RankSettings
from foldcut.passes.prune.channel_budget import ChannelLimits, CutModel, allocate
from foldcut.passes.prune.decision import PruneChannels
from foldcut.passes.prune.select_channels import select_by_norm
from foldcut.passes.solve.resolve_network import Resolved, ResolveSettings

PLAIN = JointSettings(
    resolve=ResolveSettings(),
    channels=ChannelSettings(limits=ChannelLimits(multiple_of=2)),
    ranks=RankSettings(multiple_of=2),
    recoverability=RecoverabilitySettings(),
)


def with_channels(**settings: Any) -> JointSettings:
    return replace(PLAIN, channels=replace(PLAIN.channels, **settings))


@pytest.fixture(scope="module")
def samples(nets: SimpleNamespace) -> CalibrationSet:
    return CalibrationSet.of(nets.images(40))


@pytest.fixture(scope="module")
def counts(residual: Program) -> dict[str, int]:
    return {g.name: len(g) // 2 for g in foldcut.find_units(residual).prunable}


@pytest.fixture(scope="module")
def factors(residual: Program, samples: CalibrationSet) -> list[FactorizeLayer]:
    analysis = RankAnalysis(residual, samples, settings=PLAIN.ranks)
    name, candidate = next(iter(analysis.candidates.items()))
    return [analysis.decision(name, candidate.trial())]


def test_a_mix_chooses_by_the_score(residual: Program, samples: CalibrationSet, counts: dict[str, int]) -> None:
    applied = apply_changes(residual, samples, with_channels(score="l1"), counts=counts)
    provenance = foldcut.find_units(residual)
    for group in provenance.prunable:
        expected = select_by_norm(provenance, group, counts[group.name], power=1).order
        assert torch.equal(applied.selections[group.name].order, expected)


def test_a_mix_that_is_not_to_be_solved_keeps_its_weights(
    residual: Program, samples: CalibrationSet, counts: dict[str, int]
) -> None:
    applied = apply_changes(residual, samples, with_channels(resolve=False), counts=counts)
    weights = {float(v) for t in residual.module.state_dict().values() for v in t.flatten()}
    assert all(float(v) in weights for t in applied.program.module.state_dict().values() for v in t.flatten()[:4])
    assert list(judged(residual, applied, samples)[1]) == ["rewritten"]


def test_a_mix_may_go_unpolished(residual: Program, samples: CalibrationSet, counts: dict[str, int]) -> None:
    applied = apply_changes(residual, samples, with_channels(polish=False), counts=counts)
    assert applied.program is applied.rewritten and applied.layers
    polished = apply_changes(residual, samples, PLAIN, counts=counts)
    assert polished.program is not polished.rewritten


def test_factors_may_stay_as_they_are_cut(
    residual: Program, samples: CalibrationSet, factors: list[FactorizeLayer]
) -> None:
    settings = replace(PLAIN, ranks=replace(PLAIN.ranks, resolve=False))
    applied = apply_changes(residual, samples, settings, ranks=factors)
    assert applied.program is applied.rewritten


@pytest.mark.parametrize("setting", ["polish", "resolve"])
def test_settings_that_contradict_each_other_are_refused(
    setting: str, residual: Program, samples: CalibrationSet, factors: list[FactorizeLayer]
) -> None:
    group = next(g for g in foldcut.find_units(residual).prunable if g.name.startswith("blocks.1"))
    cut = PruneChannels(group=group.name, kept=(0, 1, 2, 3), total=len(group))
    decisions: list[Decision] = [cut, *factors]
    with pytest.raises(foldcut.CompilerError, match=rf"ChannelSettings\.{setting}=False.*factorize"):
        replay(residual, decisions, samples, with_channels(**{setting: False}))


def test_a_replay_refuses_before_anything_is_solved(residual_net: Any, nets: SimpleNamespace) -> None:
    program = foldcut.capture(residual_net, nets.images(2))
    region = find_regions(program).blocks[0]
    group = next(g for g in foldcut.find_units(program).prunable if g.name.startswith("blocks.2"))
    decisions = (
        foldcut.DropBlock(entry=region.entry, exit=region.exit, path=region.path),
        PruneChannels(group=group.name, kept=(0, 1), total=len(group)),
    )
    plan = foldcut.Plan(decisions=decisions, goal=foldcut.Macs(0.5), fingerprint=program.fingerprint, predicted={})
    settings = PipelineSettings(channels=ChannelSettings(polish=False))
    with pytest.raises(foldcut.CompilerError, match=r"ChannelSettings\.polish=False .* drop_blocks"):
        foldcut.apply(residual_net, plan, calibration=nets.images(20), settings=settings, mimic=False, cache=False)


@pytest.mark.parametrize("where", ["height", "curve"])
def test_a_group_whose_error_is_no_number_is_not_cut_first(
    where: str, residual: Program, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    provenance = foldcut.find_units(residual)
    broken = provenance.prunable[0]
    heights, shapes = channel_pipeline._height, channel_pipeline.select_layerwise

    def height(where_: Any, few: Any, others: Any, group: Any, count: int) -> float:
        return float("nan") if where == "height" and group is broken else heights(where_, few, others, group, count)

    def curves(*arguments: Any, **options: Any) -> Any:
        for group, selection in shapes(*arguments, **options):
            lost = group is broken and where == "curve"
            errors = selection.errors * float("nan") if lost else selection.errors
            yield group, replace(selection, errors=errors)

    monkeypatch.setattr(channel_pipeline, "_height", height)
    monkeypatch.setattr(channel_pipeline, "select_layerwise", curves)
    found = error_curves(provenance, samples, provenance.prunable)
    assert all(bool(curve.isfinite().all()) for curve in found.values())
    model = CutModel.of_macs(provenance, provenance.prunable)
    sizes = [len(g) for g in provenance.prunable]
    counts, met = allocate(model, found, 0.9 * model(sizes), ChannelLimits(multiple_of=1))
    assert met and counts[broken.name] == len(broken)


def test_dropping_blocks_keeps_the_better_weights(
    residual: Program, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A re-solve that makes it worse on the samples that judge is undone."""

    def worse(_store: Any, _teacher: Program, student: Program, *_: Any, **__: Any) -> Resolved:
        name = "head.weight"
        changed = {name: 10 * student.module.get_parameter(name).detach()}
        return Resolved(program=set_tensors(student, changed, note="worse"), layers=(), locked=())

    monkeypatch.setattr(drop_pipeline, "stored_resolve", worse)
    made = cut_blocks(
        residual,
        find_regions(residual),
        samples,
        samples,
        foldcut.Blocks(1),
        None,  # type: ignore[arg-type]
        recoverability=RecoverabilitySettings(),
        resolve=ResolveSettings(),
        solve_samples=40,
        clock=StageClock(),
    )
    assert made.errors["re-solved"] == made.errors["dropped"]
    assert torch.equal(made.program.module.get_parameter("head.weight"), residual.module.get_parameter("head.weight"))
