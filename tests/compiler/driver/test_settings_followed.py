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
from foldcut.compiler.driver.pipeline_settings import PipelineSettings
from foldcut.compiler.ir.edit import set_tensors
from foldcut.compiler.ir.program import Program
from foldcut.compiler.trial import apply_decisions
from foldcut.compiler.trial.apply_decisions import applied, made, solved, solved_at_the_end
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


class ThreadsSeen:
    """Wraps a backend: with how many threads, and on batches of how many, networks are run."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.seen: set[tuple[int, int]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def load(self, engine: Any, inputs: Any, *, threads: int = 1) -> Any:
        self.seen.add((len(next(iter(inputs.values()))), threads))
        return self._inner.load(engine, inputs, threads=threads)


def perceptron() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).eval()


def mirrored(batch: Any) -> Any:
    return batch.flip(1)


OF_SETTINGS: dict[str, Any] = {"batch": 3, "threads": 2, "seed": 5, "views": (mirrored,)}
OF_CALL: dict[str, Any] = {"batch": 2, "threads": 1, "seed": 6, "views": ()}
QUICK: dict[str, Any] = {"mimic": False, "progress": False, "cache": False}


@pytest.mark.usefixtures("quick_measurement")
@pytest.mark.parametrize("call", ["compile", "sweep"])
@pytest.mark.parametrize("arguments", [{}, OF_CALL], ids=["settings", "arguments"])
def test_what_a_call_leaves_open_its_settings_say(call: str, arguments: Any, counting_backend: Any) -> None:
    """They were replaced without a word by what the call has when nothing is passed."""
    backend, goal = ThreadsSeen(counting_backend), foldcut.Channels(0.5)
    options = {**QUICK, **arguments, "backend": backend, "settings": PipelineSettings(**OF_SETTINGS)}
    if call == "compile":
        made = foldcut.compile(perceptron(), torch.randn(40, 8), goal=goal, **options)
    else:
        made = foldcut.sweep(perceptron(), torch.randn(40, 8), goals=[goal], **options).points[0].compiled  # type: ignore[assignment]
    wanted = OF_SETTINGS | arguments
    used = made.outcome.settings
    assert {name: getattr(used, name) for name in wanted} == wanted
    assert backend.seen == {(wanted["batch"], wanted["threads"])}
    assert (made.report.seed, made.report.batch) == (wanted["seed"], wanted["batch"])
    assert made.report.calibration["fit"] == 32 * (1 + len(wanted["views"]))


@pytest.mark.parametrize("arguments", [{}, {"seed": 6, "views": ()}], ids=["settings", "arguments"])
def test_what_apply_leaves_open_its_settings_say(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = perceptron(), torch.randn(40, 8)
    cut = PruneChannels(group="0", kept=tuple(range(16)), total=32)
    fingerprint = foldcut.capture(net, data[:2]).fingerprint
    plan = foldcut.Plan(decisions=(cut,), goal=foldcut.Channels(0.5), fingerprint=fingerprint, predicted={})
    seen: list[Any] = []
    honest = PipelineSettings.context

    def context(self: PipelineSettings, *given: Any) -> Any:
        seen.append(honest(self, *given))
        return seen[-1]

    monkeypatch.setattr(PipelineSettings, "context", context)
    foldcut.apply(net, plan, calibration=data, settings=PipelineSettings(**OF_SETTINGS), **QUICK, **arguments)
    wanted = OF_SETTINGS | arguments
    assert seen[0].seed == wanted["seed"]
    assert len(seen[0].sets.fit) == 32 * (1 + len(wanted["views"]))


@pytest.mark.usefixtures("quick_measurement")
def test_made_samples_take_the_seed_of_the_settings(counting_backend: Any) -> None:
    net = perceptron()
    wanted = foldcut.SynthesisSettings(count=20, input_shape=(8,))
    options: dict[str, Any] = {**QUICK, "goal": foldcut.Channels(0.5), "backend": counting_backend}
    with pytest.warns(UserWarning, match="no data were given"):
        by_settings, by_argument, plain = (
            foldcut.compile(net, wanted, **options, **seeded).report.calibration["fingerprint"]
            for seeded in ({"settings": PipelineSettings(seed=5)}, {"seed": 5}, {})
        )
    assert by_settings == by_argument != plain
