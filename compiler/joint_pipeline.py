"""All rewrites under one latency goal: proposals of every kind, the search for a mix, and the mix put into effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..passes.drop_blocks import drop_blocks, entry_exit
from ..passes.factorize import factorize, factorize_for_timing
from ..passes.prune_channels import prune_channels
from ..passes.recoverability import QUICK_RESOLVE, RecoverabilitySettings
from ..passes.resolve_network import LayerError, ResolveSettings, resolve_network
from ..passes.select_channels import choose_channels
from ..passes.select_ranks import Option, RankAnalysis, RankSettings
from ..passes.submodular import Selection
from ..passes.targets import Kept
from .calibration_set import CalibrationSet
from .channel_pipeline import ChannelSettings, channel_decision
from .drop_pipeline import choose
from .errors import GoalError, Reject
from .joint_proposals import Offered, offered_cuts, offered_drops, offered_ranks
from .joint_search import MOST_MIXES, MixSearch
from .latency_probe import LatencyProbe
from .plan import Decision, DropBlock, FactorizeLayer, Latency, PruneChannels
from .program import Program
from .progress import Progress, StageClock, silent
from .proposals import Mix
from .provenance import Provenance, find_units
from .rank_choice import search_plan
from .rank_pipeline import latency_menu, rank_trials
from .regions import find_regions
from .rewritten import Rewritten
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
        groups = _groups(provenance, counts)
        if groups:
            program = prune_channels(provenance, surplus_units(groups, counts)).program
    return factorize_for_timing(program, ranks)


def apply_mix(
    teacher: Program,
    mix: Mix,
    calibration: CalibrationSet,
    settings: JointSettings,
    *,
    progress: Progress = silent,
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
        program = resolve_network(
            teacher, program, calibration, pairs, settings=QUICK_RESOLVE, progress=progress
        ).program
    if counts:
        program, kept, selections, cuts = _pruned(program, counts, calibration, settings, progress)
        decisions += cuts
    if ranks:
        program = _factorised(program, ranks, calibration, settings, progress)
        decisions += ranks
    resolved = resolve_network(
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
) -> tuple[Program, Mapping[str, Kept], Mapping[str, Selection], list[PruneChannels]]:
    provenance = find_units(program)
    groups = _groups(provenance, counts)
    if not groups:
        return program, {}, {}, []
    choice = choose_channels(
        provenance,
        calibration,
        counts,
        variant=settings.channels.variant,
        stream_target=settings.channels.stream_target,
        settings=settings.resolve,
        progress=progress,
    )
    pruned = prune_channels(provenance, choice.removed, choice.tensors)
    cuts = [channel_decision(g, choice.selections[g.name]) for g in groups]
    return pruned.program, pruned.kept, choice.selections, cuts


def _factorised(
    program: Program,
    ranks: Sequence[FactorizeLayer],
    calibration: CalibrationSet,
    settings: JointSettings,
    progress: Progress,
) -> Program:
    """Factors cut out of what the layers now see."""
    layers = {decision.layer: decision for decision in ranks}
    analysis = RankAnalysis(
        program, calibration, settings=replace(settings.ranks, ignore=()), resolve=settings.resolve, only=layers
    )
    options = {name: Option(scheme=d.scheme, ranks=d.ranks, macs=0, error=d.error or 0.0) for name, d in layers.items()}
    return factorize(program, analysis.factors(options, progress=progress))


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
) -> Rewritten:
    """Reach a latency goal by the best mix of `rewrites`: dropped regions, removed channels, factorised layers.

    Every kind offers what it can save and what that is predicted to cost; the mix is an integer programme's, corrected
    by what plans turned out to lose after a quick re-solve and to save on the backend (`MixSearch`). The errors
    are those of the outputs on `held_out`, relative: after the rewrites, each with its own closed form, and after the
    re-solve of the whole. Raises GoalError when nothing can be changed towards the goal.
    """
    offered = _offered(teacher, calibration, goal, probe, rewrites, settings, clock, progress)
    items = [item for offer in offered for item in offer.items]
    rejects = [reject for offer in offered for reject in offer.rejects]
    quick = replace(settings, resolve=QUICK_RESOLVE)
    few = calibration.take(slice(0, TRIAL_SAMPLES))
    done, most = 0, len(rewrites) + MOST_MIXES * (1 + len(rewrites))

    def measure(mix: Mix) -> float:
        with clock.stage("measure plan"):
            return probe.against(mix_shape(teacher, mix)).high

    def trial(mix: Mix) -> float:
        nonlocal done
        done += 1
        progress("try plans", done, max(done, most))
        with clock.stage("try plans"):
            return output_error(teacher, apply_mix(teacher, mix, few, quick).program, held_out)

    found = MixSearch(items, goal.share, measure=measure, trial=trial).run()
    if not found.best.mix:
        raise GoalError(f"nothing can be done towards {goal}", hint=_reasons(rejects))
    with clock.stage("re-solve"):
        applied = apply_mix(teacher, found.best.mix, calibration, settings, progress=progress)
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
        plans=tuple(found.to_list()),
    )


def _offered(
    teacher: Program,
    calibration: CalibrationSet,
    goal: Latency,
    probe: LatencyProbe,
    rewrites: Sequence[str],
    settings: JointSettings,
    clock: StageClock,
    progress: Progress,
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
            probe,
            settings=settings.recoverability,
            clock=clock,
            progress=progress,
        )
        offered.append(replace(offered_drops(choice), rejects=regions.rejects))
    if "prune_channels" in rewrites:
        with clock.stage("offer channels"):
            offered.append(offered_cuts(probe, calibration, settings.channels.limits, progress=progress))
    if "factorize" in rewrites:
        with clock.stage("offer ranks"):
            offered.append(_offered_ranks(teacher, calibration, goal, probe, settings, progress))
    return offered


def _offered_ranks(
    teacher: Program,
    calibration: CalibrationSet,
    goal: Latency,
    probe: LatencyProbe,
    settings: JointSettings,
    progress: Progress,
) -> Offered:
    analysis = RankAnalysis(teacher, calibration, settings=settings.ranks, resolve=settings.resolve, progress=progress)
    if not analysis.candidates:
        return Offered(items=(), rejects=tuple(analysis.rejects))
    trials, alone = rank_trials(analysis, calibration, progress=progress)
    menu, network = latency_menu(analysis, probe, progress=progress)
    wanted = replace(menu, budget=menu.budget - (1 - goal.share) * network)
    return offered_ranks(analysis, menu, search_plan(wanted, trials, alone).weights, network)


def _reasons(rejects: Sequence[Reject]) -> str:
    return "; ".join(dict.fromkeys(reject.reason for reject in rejects)) or "no rewrite saves latency on this backend"


__all__ = ["Applied", "JointSettings", "apply_mix", "cut_jointly", "mix_shape"]
