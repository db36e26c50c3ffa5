"""All rewrites under one latency goal: proposals of every kind, the search for a mix, and the mix put into effect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..passes.drop_blocks import drop_blocks, entry_exit
from ..passes.factorize import Factors, factorize, factorize_for_timing
from ..passes.prune_channels import prune_channels
from ..passes.recoverability import QUICK_RESOLVE, RecoverabilitySettings
from ..passes.resolve_network import LayerError, ResolveSettings
from ..passes.select_ranks import Option, RankAnalysis, RankSettings
from ..passes.submodular import Selection
from ..passes.targets import Kept
from .analysis_store import NOTHING_KEPT, AnalysisStore
from .calibration_set import CalibrationSet
from .channel_pipeline import ChannelSettings, channel_decision
from .drop_pipeline import choose
from .errors import GoalError, Reject
from .joint_proposals import Offered, offered_cuts, offered_drops, offered_ranks
from .joint_search import MOST_MIXES, Found, MixSearch
from .latency_probe import LatencyProbe
from .plan import Decision, DropBlock, FactorizeLayer, Latency, PruneChannels
from .program import Program
from .progress import Progress, StageClock, silent
from .proposals import Mix
from .provenance import Provenance, find_units
from .rank_choice import search_plan
from .rank_pipeline import latency_menu, rank_trials
from .regions import find_regions
from .rewritten import Rewritten, TriedPlan
from .stored_latency import StoredLatency
from .stored_passes import stored_channels, stored_factors, stored_rank_analysis, stored_resolve
from .unit_groups import UnitGroup, surplus_units
from .verify import output_error

#: Samples that a plan is put into effect with while plans are compared.
TRIAL_SAMPLES = 128


@dataclass(frozen=True, kw_only=True)
class JointSettings:
    """The settings of each rewrite, of the re-solve, and of the look at which regions recover."""

    resolve: ResolveSettings
    channels: ChannelSettings
    ranks: RankSettings
    recoverability: RecoverabilitySettings


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A mix in effect: the program before and after the last re-solve, its decisions in the order of application, and
    what later stages ask for."""

    rewritten: Program
    program: Program
    decisions: tuple[Decision, ...]
    kept: Mapping[str, Kept] = field(repr=False)
    selections: Mapping[str, Selection] = field(repr=False)
    layers: tuple[LayerError, ...]
    locked: tuple[Reject, ...]


def mix_shape(teacher: Program, mix: Mix) -> Program:
    """The network that a mix leads to, with weights that are good for timing only."""
    drops, counts, ranks = _by_kind(mix)
    program = drop_blocks(teacher, drops)
    if counts:
        provenance = find_units(program)
        program = prune_channels(provenance, surplus_units(_groups(provenance, counts), counts)).program
    return factorize_for_timing(program, ranks)


def apply_mix(
    teacher: Program,
    mix: Mix,
    calibration: CalibrationSet,
    settings: JointSettings,
    *,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> Applied:
    """Put a mix into effect: drop, re-solve what stands for the dropped blocks, select and remove channels of what is
    left, factorise, and solve all of it once more toward the original network.

    Each step looks at the activations that the steps before it leave. Layers that a step has solved keep their weights
    where the last re-solve finds nothing better; the output error on the first samples never grows by that re-solve.
    """
    drops, counts, ranks = _by_kind(mix)
    pairs = entry_exit(drops)
    program = drop_blocks(teacher, drops)
    decisions: list[Decision] = [*drops]
    kept: Mapping[str, Kept] = {}
    selections: Mapping[str, Selection] = {}
    if drops and (counts or ranks):
        program = stored_resolve(
            store, teacher, program, calibration, pairs, settings=QUICK_RESOLVE, progress=progress
        ).program
    if counts:
        program, kept, selections, cuts = _pruned(program, counts, calibration, settings, progress, store)
        decisions += cuts
    if ranks:
        program = _factorised(program, ranks, calibration, settings, progress, store)
        decisions += ranks
    resolved = stored_resolve(
        store,
        teacher,
        program,
        calibration,
        pairs,
        kept=kept,
        replaced=[decision.layer for decision in ranks],
        settings=settings.resolve,
        progress=progress,
    )
    return Applied(
        rewritten=program,
        program=resolved.program,
        decisions=tuple(decisions),
        kept=kept,
        selections=selections,
        layers=resolved.layers,
        locked=resolved.locked,
    )


def _pruned(
    program: Program,
    counts: Mapping[str, int],
    calibration: CalibrationSet,
    settings: JointSettings,
    progress: Progress,
    store: AnalysisStore,
) -> tuple[Program, Mapping[str, Kept], Mapping[str, Selection], list[PruneChannels]]:
    provenance = find_units(program)
    choice = stored_channels(
        store,
        provenance,
        calibration,
        counts,
        variant=settings.channels.variant,
        stream_target=settings.channels.stream_target,
        settings=settings.resolve,
        progress=progress,
    )
    pruned = prune_channels(provenance, choice.removed, choice.tensors)
    cuts = [channel_decision(g, choice.selections[g.name]) for g in _groups(provenance, counts)]
    return pruned.program, pruned.kept, choice.selections, cuts


def _factorised(
    program: Program,
    ranks: Sequence[FactorizeLayer],
    calibration: CalibrationSet,
    settings: JointSettings,
    progress: Progress,
    store: AnalysisStore,
) -> Program:
    """Factors cut out of what the layers now see."""
    chosen = {d.layer: Option(scheme=d.scheme, ranks=d.ranks, macs=0, error=d.error or 0.0) for d in ranks}
    free = replace(settings.ranks, ignore=())

    def compute() -> list[Factors]:
        # options are not looked for: they are given
        given = {name: (option,) for name, option in chosen.items()}
        analysis = RankAnalysis(program, calibration, settings=free, resolve=settings.resolve, only=chosen, given=given)
        return analysis.factors(chosen, progress=progress)

    factors = stored_factors(store, program, calibration, ranks, compute, settings=free, resolve=settings.resolve)
    return factorize(program, factors)


def _by_kind(mix: Mix) -> tuple[list[DropBlock], dict[str, int], list[FactorizeLayer]]:
    """What a mix drops, in the order offered; the units that it leaves of each group; what it factorises."""
    drops, error = [], 0.0
    for item, proposal in mix.items():
        if item.kind == "drop_blocks":
            error += proposal.error
            drops.append(replace(proposal.change, error=error))
    counts = {item.name: proposal.change for item, proposal in mix.items() if item.kind == "prune_channels"}
    return drops, counts, [proposal.change for item, proposal in mix.items() if item.kind == "factorize"]


def _groups(provenance: Provenance, counts: Mapping[str, int]) -> list[UnitGroup]:
    """The groups to be cut: those that dropping has left as they were."""
    return [g for g in provenance.prunable if counts.get(g.name, len(g)) < len(g)]


def cut_jointly(
    teacher: Program,
    calibration: CalibrationSet,
    held_out: CalibrationSet,
    goal: Latency,
    probe: LatencyProbe,
    rewrites: Sequence[str],
    *,
    settings: JointSettings,
    clock: StageClock,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> Rewritten:
    """Reach a latency goal by the best mix of `rewrites`: dropped regions, removed channels, factorised layers.

    Every kind offers what it can save and what that is predicted to cost; the mix is an integer programme's, corrected
    by what plans turned out to lose after a quick re-solve and to save on the backend (`MixSearch`). The errors
    are those of the outputs on `held_out`, relative: after the rewrites, each with its own closed form, and after the
    re-solve of the whole. Raises GoalError when nothing can be changed towards the goal.
    """
    latency = StoredLatency(store, probe)
    offered = _offered(teacher, calibration, goal, latency, rewrites, settings, clock, progress, store)
    items = [item for offer in offered for item in offer.items]
    rejects = [reject for offer in offered for reject in offer.rejects]
    quick = replace(settings, resolve=QUICK_RESOLVE)
    few = calibration.take(slice(0, TRIAL_SAMPLES))
    done, most = 0, len(rewrites) + MOST_MIXES * (1 + len(rewrites))

    def measure(mix: Mix) -> float:
        with clock.stage("measure plan"):
            ratio: float = latency.kept("mix", [_changes(mix)], lambda: probe.against(mix_shape(teacher, mix)).high)
        return ratio

    def trial(mix: Mix) -> float:
        nonlocal done
        done += 1
        progress("try plans", done, max(done, most))
        with clock.stage("try plans"):
            return store.value(
                "mix trial",
                [teacher, few, held_out, quick, _changes(mix)],
                lambda: output_error(teacher, apply_mix(teacher, mix, few, quick).program, held_out),
            )

    found = MixSearch(items, goal.share, measure=measure, trial=trial).run()
    if not found.best.mix:
        raise GoalError(f"nothing can be done towards {goal}", hint=_reasons(rejects))
    with clock.stage("re-solve"):
        applied = apply_mix(teacher, found.best.mix, calibration, settings, progress=progress, store=store)
    errors = {
        "rewritten": output_error(teacher, applied.rewritten, held_out),
        "re-solved": output_error(teacher, applied.program, held_out),
    }
    if errors["re-solved"] > errors["rewritten"]:
        applied = replace(applied, program=applied.rewritten)
        errors["re-solved"] = errors["rewritten"]
    return Rewritten(
        program=applied.program,
        decisions=applied.decisions,
        met=found.met,
        rejects=(*rejects, *applied.locked),
        errors=errors,
        layers=applied.layers,
        kept=applied.kept,
        provenance=next((offer.provenance for offer in offered if offer.provenance is not None), None),
        selections=applied.selections,
        tried=tried_plans(found),
    )


def tried_plans(found: Found) -> tuple[TriedPlan, ...]:
    """What a search has tried, as plain figures."""
    return tuple(
        TriedPlan(
            ratio=plan.ratio,
            error=plan.error,
            counts=dict(Counter(item.kind for item in plan.mix)),
            chosen=plan is found.best,
        )
        for plan in found.tried
    )


def _changes(mix: Mix) -> list[Any]:
    """What a mix does, to be known again by."""
    return [[item.kind, item.name, proposal.change] for item, proposal in mix.items()]


def _offered(
    teacher: Program,
    calibration: CalibrationSet,
    goal: Latency,
    latency: StoredLatency,
    rewrites: Sequence[str],
    settings: JointSettings,
    clock: StageClock,
    progress: Progress,
    store: AnalysisStore,
) -> list[Offered]:
    """What each of the rewrites can do for the goal."""
    offered = []
    if "drop_blocks" in rewrites:
        regions = find_regions(teacher)
        choice = choose(
            teacher,
            regions,
            calibration,
            goal,
            latency.probe,
            settings=settings.recoverability,
            clock=clock,
            progress=progress,
            store=store,
        )
        offered.append(replace(offered_drops(choice), rejects=regions.rejects))
    if "prune_channels" in rewrites:
        with clock.stage("offer channels"):
            offered.append(offered_cuts(latency, calibration, settings.channels.limits, progress=progress, store=store))
    if "factorize" in rewrites:
        with clock.stage("offer ranks"):
            offered.append(_offered_ranks(teacher, calibration, goal, latency, settings, progress, store))
    return offered


def _offered_ranks(
    teacher: Program,
    calibration: CalibrationSet,
    goal: Latency,
    latency: StoredLatency,
    settings: JointSettings,
    progress: Progress,
    store: AnalysisStore,
) -> Offered:
    analysis = stored_rank_analysis(
        store, teacher, calibration, settings=settings.ranks, resolve=settings.resolve, progress=progress
    )
    if not analysis.candidates:
        return Offered(items=(), rejects=tuple(analysis.rejects))
    trials, alone = rank_trials(analysis, calibration, progress=progress, store=store)
    menu, network = latency_menu(analysis, latency, progress=progress)
    wanted = replace(menu, budget=menu.budget - (1 - goal.share) * network)
    return offered_ranks(analysis, menu, search_plan(wanted, trials, alone).weights, network)


def _reasons(rejects: Sequence[Reject]) -> str:
    return "; ".join(dict.fromkeys(reject.reason for reject in rejects)) or "no rewrite saves latency on this backend"


__all__ = ["Applied", "JointSettings", "apply_mix", "cut_jointly", "mix_shape"]
