"""All rewrites under one latency goal: proposals of every kind, and the search for a mix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..passes.recoverability import QUICK_RESOLVE
from .analysis_store import NOTHING_KEPT, AnalysisStore
from .calibration_set import CalibrationSet
from .drop_pipeline import choose
from .errors import GoalError, Reject
from .joint_proposals import Offered, offered_cuts, offered_drops, offered_ranks
from .joint_rewrite import JointSettings, apply_mix, mix_shape
from .joint_search import MOST_MIXES, Found, MixSearch
from .latency_probe import LatencyProbe
from .plan import Latency
from .program import Program
from .progress import Progress, StageClock, silent
from .proposals import Mix
from .rank_choice import search_plan
from .rank_pipeline import latency_menu, rank_trials
from .regions import find_regions
from .rewritten import Rewritten, TriedPlan
from .stored_latency import StoredLatency
from .stored_passes import stored_rank_analysis
from .verify import output_error

#: Samples that a plan is put into effect with while plans are compared.
TRIAL_SAMPLES = 128


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
            rounds=plan.rounds,
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


__all__ = ["JointSettings", "apply_mix", "cut_jointly", "mix_shape"]
