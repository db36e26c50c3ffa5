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
from foldcut.compiler.driver import apply_decisions
from foldcut.compiler.driver.apply_decisions import applied, made, solved, solved_at_the_end
from foldcut.compiler.driver.pipeline_settings import PipelineSettings
from foldcut.compiler.ir.edit import set_tensors
from foldcut.compiler.ir.program import Program
from foldcut.passes.factorize.decision import FactorizeLayer
from foldcut.passes.factorize.select_ranks import RankAnalysis
from foldcut.passes.prune import error_curves as curves_module
from foldcut.passes.prune.channel_budget import ChannelLimits, CutModel, allocate
from foldcut.passes.prune.decision import PruneChannels, UnitCount
from foldcut.passes.prune.error_curves import error_curves
from foldcut.passes.prune.select_channels import select_by_norm
from foldcut.passes.prune.settings import ChannelSettings
from foldcut.passes.solve.resolve_network import Resolved

PRUNE = foldcut.Prune(limits=ChannelLimits(multiple_of=2))
FACTORIZE = foldcut.Factorize(multiple_of=2)


@pytest.fixture(scope="module")
def samples(nets: SimpleNamespace) -> CalibrationSet:
    return CalibrationSet.of(nets.images(40))


@pytest.fixture(scope="module")
def counts(residual: Program) -> list[UnitCount]:
    groups = foldcut.find_units(residual).prunable
    return [UnitCount(group=g.name, count=len(g) // 2, total=len(g)) for g in groups]


@pytest.fixture(scope="module")
def ctx(residual: Program, samples: CalibrationSet, contexts: Any) -> Any:
    return contexts(residual, samples)


@pytest.fixture(scope="module")
def factors(residual: Program, samples: CalibrationSet) -> list[FactorizeLayer]:
    analysis = RankAnalysis(residual, samples, settings=FACTORIZE)
    name, candidate = next(iter(analysis.candidates.items()))
    return [analysis.decision(name, candidate.trial())]


def test_a_mix_chooses_by_the_score(residual: Program, ctx: Any, counts: list[UnitCount]) -> None:
    done = applied(ctx, [replace(PRUNE, score="l1")], counts)
    provenance = foldcut.find_units(residual)
    for group, wanted in zip(provenance.prunable, counts, strict=True):
        expected = select_by_norm(provenance, group, wanted.count, power=1).order
        assert torch.equal(done.report["selections"][group.name].order, expected)


def test_a_mix_that_is_not_to_be_solved_keeps_its_weights(residual: Program, ctx: Any, counts: list[UnitCount]) -> None:
    done = made(ctx, [replace(PRUNE, resolve=False)], counts)
    weights = {float(v) for t in residual.module.state_dict().values() for v in t.flatten()}
    assert all(float(v) in weights for t in done.program.module.state_dict().values() for v in t.flatten()[:4])
    assert list(done.errors) == ["rewritten"]


def test_a_mix_may_go_unpolished(ctx: Any, counts: list[UnitCount]) -> None:
    rewrites = [replace(PRUNE, polish=False)]
    done = applied(ctx, rewrites, counts)
    assert solved(ctx, rewrites, done) is done and done.layers
    assert solved(ctx, [PRUNE], done).program is not done.program


def test_factors_may_stay_as_they_are_cut(ctx: Any, factors: list[FactorizeLayer]) -> None:
    rewrites = [replace(FACTORIZE, resolve=False)]
    done = applied(ctx, rewrites, factors)
    assert solved(ctx, rewrites, done) is done


@pytest.mark.parametrize("setting", ["polish", "resolve"])
def test_settings_that_contradict_each_other_are_refused(setting: str) -> None:
    with pytest.raises(foldcut.CompilerError, match=rf"ChannelSettings\.{setting}=False.*factorize"):
        solved_at_the_end([replace(PRUNE, **{setting: False}), FACTORIZE])  # type: ignore[arg-type]


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
    heights, shapes = curves_module._height, curves_module.select_layerwise

    def height(where_: Any, few: Any, others: Any, group: Any, count: int) -> float:
        return float("nan") if where == "height" and group is broken else heights(where_, few, others, group, count)

    def curves(*arguments: Any, **options: Any) -> Any:
        for group, selection in shapes(*arguments, **options):
            lost = group is broken and where == "curve"
            errors = selection.errors * float("nan") if lost else selection.errors
            yield group, replace(selection, errors=errors)

    monkeypatch.setattr(curves_module, "_height", height)
    monkeypatch.setattr(curves_module, "select_layerwise", curves)
    found = error_curves(provenance, samples, provenance.prunable)
    assert all(bool(curve.isfinite().all()) for curve in found.values())
    model = CutModel.of_macs(provenance, provenance.prunable)
    sizes = [len(g) for g in provenance.prunable]
    counts, met = allocate(model, found, 0.9 * model(sizes), ChannelLimits(multiple_of=1))
    assert met and counts[broken.name] == len(broken)


def test_dropping_blocks_keeps_the_better_weights(
    residual: Program, samples: CalibrationSet, contexts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A re-solve that makes it worse on the samples that judge is undone."""

    def worse(_ctx: Any, student: Program, *_: Any) -> Resolved:
        name = "head.weight"
        changed = {name: 10 * student.module.get_parameter(name).detach()}
        return Resolved(program=set_tensors(student, changed, note="worse"), layers=(), locked=())

    monkeypatch.setattr(apply_decisions, "stored_resolve", worse)
    region = find_regions(residual).blocks[0]
    drop = foldcut.DropBlock(entry=region.entry, exit=region.exit)
    done = made(contexts(residual, samples), [foldcut.Drop()], [drop])
    assert done.errors["re-solved"] == done.errors["rewritten"]
    assert torch.equal(done.program.module.get_parameter("head.weight"), residual.module.get_parameter("head.weight"))
