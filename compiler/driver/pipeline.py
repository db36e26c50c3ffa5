"""The flow: capture -> analyse -> plan -> rewrite and re-solve -> mimic -> export -> measure. Each arrow can be
called alone."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ...passes.drop.choose_drops import require_regions
from ...passes.prune.submodular import Selection
from ...runtime.measure.backend import Backend
from ...runtime.measure.measurement import Measurement
from ..analysis.provenance import Provenance
from ..analysis.regions import RegionAnalysis, find_regions
from ..data.calibration_set import CalibrationSet
from ..data.output_error import errors_by_output
from ..data.sampled_error import SampledError, sampled_error
from ..export.exporter import to_exported, to_onnx, to_pt2
from ..ir.compare import compare
from ..ir.cost import program_cost
from ..ir.program import Batch, Program
from ..plan.plan import Channels, CountedGoal, Decision, DropBlock, DropGoal, Goal, Latency, MaxError, Plan, RankGoal
from ..store.analysis_store import NOTHING_KEPT, AnalysisStore
from ..support.errors import ExportError, Reject
from ..support.progress import Progress, StageClock, silent
from ..support.search_time import SearchTime
from .channel_pipeline import cut_channels, on_lattice
from .drop_pipeline import cut_blocks
from .joint_pipeline import cut_jointly
from .latency_probe import LatencyProbe, Profiles
from .pipeline_settings import PipelineSettings, default_rewrites, joint_settings
from .rank_pipeline import cut_ranks, ranks_on_lattice
from .recount import recounted
from .rewritten import Rewritten, TriedPlan
from .stored_latency import StoredLatency
from .stored_passes import mimicked
from .unchanged import require_change

#: ONNX Runtime and torch may differ by this much of the largest output before an export counts as wrong.
ONNX_TOLERANCE = 1e-3
#: How often a latency goal is planned for when the finished network misses it.
MOST_AIMS = 3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the pipeline made: the student, its plan, its files' bytes, and everything measured on the way. `settings`
    are those used, with what the backend said about them; `planned` whether the plan reaches the goal by what was
    measured for it; `aims` the latency ratios that plans were made for, each after a network that missed;
    `output_errors` what the judging samples said on the way, `tested` (and `errors_by_output`) what the test samples
    say of the network that stands; `sizes` how many samples there were of each; `regimes` the `measurement`, and that
    of the same loads in the other regime where the backend can."""

    teacher: Program
    program: Program
    plan: Plan
    met: bool
    planned: bool
    rejects: tuple[Reject, ...]
    provenance: Provenance | None
    selections: Mapping[str, Selection]
    measurement: Measurement
    output_errors: Mapping[str, float]
    onnx: bytes
    pt2: bytes
    onnx_difference: float
    settings: PipelineSettings
    clock: StageClock
    tried: tuple[TriedPlan, ...] = ()
    aims: tuple[float, ...] = ()
    errors_by_output: Mapping[str, float] = field(default_factory=dict)
    tested: SampledError | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    profiles: Profiles | None = None
    regimes: Mapping[str, Measurement] = field(default_factory=dict)


def run_pipeline(
    teacher: Program,
    calibration: CalibrationSet,
    goal: Goal,
    backend: Backend,
    *,
    settings: PipelineSettings | None = None,
    rewrites: Sequence[str] | None = None,
    deployed: bytes | None = None,
    clock: StageClock | None = None,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> Outcome:
    """Everything after capture. What is in the `store` is not computed again.

    `rewrites` are those to use, of the ones that reach the goal (`rewrites_for`); `default_rewrites` where none are
    named. A latency goal and a bound on the error take several, and mix them. `deployed` is the model that runs today,
    where it came as a file: latency is compared with it, else with the exported original. Raises GoalError when nothing
    can be removed; an unmet goal comes back as `met` False.
    """
    settings, clock = settings or PipelineSettings(), clock or StageClock()
    sets = settings.split(calibration, teacher)
    fit, held_out = sets.fit, sets.judge
    used = tuple(rewrites) if rewrites else default_rewrites(goal)
    analysis = None
    if used == ("drop_blocks",) and isinstance(goal, DropGoal):
        with clock.stage("analyse"):
            analysis = find_regions(teacher)
        require_regions(analysis, goal)
    with clock.stage("export"):
        original = to_onnx(teacher, opset=settings.opset)
    asked, time = goal, SearchTime(settings.search_seconds)
    probe = LatencyProbe(
        teacher,
        original,
        backend,
        held_out,
        batch=settings.batch,
        threads=settings.threads,
        seed=settings.seed,
        deployed=deployed,
        folder=store.root,
        opset=settings.opset,
        regime=goal.regime if isinstance(goal, Latency) else "hot",
    )
    try:
        if isinstance(goal, Latency) and goal.ms is not None:
            with clock.stage("measure original"):
                goal = goal.relative(StoredLatency(store, probe).original_ms())
        with clock.stage("probe lattice"):
            if "factorize" in used:
                settings = replace(settings, ranks=ranks_on_lattice(settings.ranks, probe, progress))
            if "prune_channels" in used:
                settings = replace(settings, channels=on_lattice(settings.channels, probe, progress))

        def made(aim: Goal) -> Outcome:
            rewritten = _rewritten(
                teacher, analysis, fit, held_out, aim, probe, used, settings, clock, progress, store, time
            )
            require_change(teacher, rewritten, asked)
            outcome = _finish(teacher, rewritten, fit, held_out, asked, probe, settings, clock, progress, store)
            planned = recounted(goal, teacher, outcome.program, rewritten.decisions, rewritten.met)
            return replace(outcome, met=reached(goal, outcome.measurement, planned))

        found = _aimed(goal, made, StoredLatency(store, probe)) if isinstance(goal, Latency) else made(goal)
        if time.ran_out:
            warnings.warn(f"the search for a better plan ended after {time.seconds:g} s, as asked for", stacklevel=3)
        with clock.stage("test"):
            return tested(replace(found, sizes=sets.sizes), goal, sets.test)
    finally:
        probe.close()


def tested(outcome: Outcome, goal: Goal, test: CalibrationSet) -> Outcome:
    """The outcome with the error on samples that have chosen nothing, which a bound on the error goes by."""
    found = sampled_error(outcome.teacher, outcome.program, test, seed=outcome.settings.seed)
    by_output = errors_by_output(outcome.teacher, outcome.program, test)
    bounded = isinstance(goal, MaxError)
    met = reached(goal, outcome.measurement, outcome.met, found.error) if bounded else outcome.met
    return replace(outcome, tested=found, errors_by_output=by_output, met=met)


def _aimed(goal: Latency, made: Callable[[Latency], Outcome], latency: StoredLatency) -> Outcome:
    """The network for a latency goal. Where the finished network misses what its plan was measured to reach, plan again
    for as much less, `MOST_AIMS` times in all; the first that reaches the goal stands, else the fastest.

    The plan that is taken is one of several that were measured, so chance has flattered it. The first measurement of
    each network is kept and is the verdict on it, for as long as measurements are kept: a compile that goes on after an
    interruption, or is made again, plans as often and ends with the same answer. Where a later measurement says
    otherwise, a warning does too.
    """
    outcomes: list[tuple[bool, float, Outcome]] = []
    aims = [goal.share]
    while True:
        last = made(goal.aimed(aims[-1]))
        seen = [last.measurement.ratio, last.met]
        ratio, met = latency.kept("finished", [aims, last.plan.decisions], functools.partial(list, seen))
        if met != last.met:
            warnings.warn(_disagreement(goal, met, ratio, last.measurement), stacklevel=3)
        last = replace(last, met=met)
        outcomes.append((not met, ratio, last))
        if met or not last.planned or len(aims) == MOST_AIMS:
            break
        aims.append(aims[-1] * goal.share / ratio)
    _, _, best = min(outcomes, key=lambda outcome: outcome[:2])
    return replace(best, aims=tuple(aims))


def _disagreement(goal: Latency, met: bool, ratio: float, now: Measurement) -> str:
    """What the first measurement of a network says and what this one does."""
    verdict = "reached" if met else "missed"
    return f"{goal} was {verdict} when this network was first measured (x{ratio:.3f}); now it is x{now.ratio:.3f}"


def _rewritten(
    teacher: Program,
    analysis: RegionAnalysis | None,
    fit: CalibrationSet,
    held_out: CalibrationSet,
    goal: Goal,
    probe: LatencyProbe,
    used: tuple[str, ...],
    settings: PipelineSettings,
    clock: StageClock,
    progress: Progress,
    store: AnalysisStore,
    time: SearchTime,
) -> Rewritten:
    """The rewrite, or the mix of several."""
    if analysis is not None and isinstance(goal, DropGoal):
        return cut_blocks(
            teacher,
            analysis,
            fit,
            held_out,
            goal,
            probe,
            recoverability=settings.recoverability,
            resolve=settings.resolve,
            solve_samples=settings.solve_samples,
            clock=clock,
            progress=progress,
            store=store,
        )
    solve = fit.take(slice(0, settings.solve_samples))
    if used == ("factorize",) and isinstance(goal, RankGoal):
        return cut_ranks(
            teacher,
            solve,
            held_out,
            goal,
            probe,
            settings=settings.ranks,
            resolve=settings.resolve,
            clock=clock,
            progress=progress,
            store=store,
        )
    if isinstance(goal, (Latency, MaxError, CountedGoal)):
        joint = joint_settings(settings)
        return cut_jointly(
            teacher,
            solve,
            held_out,
            goal,
            probe,
            used,
            settings=joint,
            clock=clock,
            progress=progress,
            store=store,
            time=time,
        )
    assert isinstance(goal, Channels)
    return cut_channels(
        teacher,
        solve,
        held_out,
        goal,
        settings=settings.channels,
        resolve=settings.resolve,
        clock=clock,
        progress=progress,
        store=store,
    )


def _finish(
    teacher: Program,
    rewritten: Rewritten,
    fit: CalibrationSet,
    held_out: CalibrationSet,
    goal: Goal,
    probe: LatencyProbe,
    settings: PipelineSettings,
    clock: StageClock,
    progress: Progress,
    store: AnalysisStore,
) -> Outcome:
    """Mimicking, export and the final measurement."""
    student, errors = rewritten.program, dict(rewritten.errors)
    if settings.mimic is not None:
        with clock.stage("mimic"):
            trained = mimicked(
                store,
                teacher,
                student,
                fit,
                held_out,
                kept=rewritten.kept,
                settings=settings.mimic,
                seed=settings.seed,
                progress=progress,
            )
            error = sampled_error(teacher, trained, held_out, seed=settings.seed)
        # mimicking looks at every output relative to its size; a bound on the whole is not given up for that
        if not isinstance(goal, MaxError) or error.most <= goal.error or error.error <= list(errors.values())[-1]:
            student, errors["mimicked"] = trained, error.error
    with clock.stage("export"):
        exported = to_exported(student)
        onnx, pt2 = to_onnx(student, opset=settings.opset, exported=exported), to_pt2(exported)
    with clock.stage("measure"):
        difference = onnx_difference(student, onnx, probe, held_out)
        regimes = probe.final_regimes(onnx)
    with clock.stage("profile"):
        profiles = probe.profiles(onnx)
    return Outcome(
        teacher=teacher,
        program=student,
        plan=make_plan(teacher, goal, rewritten.decisions, errors),
        met=rewritten.met,
        planned=rewritten.met,
        rejects=rewritten.rejects,
        provenance=rewritten.provenance,
        selections=rewritten.selections,
        measurement=regimes[probe.regime],
        output_errors=errors,
        onnx=onnx,
        pt2=pt2,
        onnx_difference=difference,
        settings=settings,
        clock=clock,
        tried=rewritten.tried,
        profiles=profiles,
        regimes={str(regime): found for regime, found in regimes.items()},
    )


def reached(goal: Goal, measurement: Measurement, planned: bool = True, error: float | None = None) -> bool:
    """Whether the finished network reaches the goal. A plan that was `planned` to has been measured with its whole
    interval below a latency goal, so of the second measurement the ratio has to be; of any other network the whole
    interval. A bound on the error goes by the `error` on the test samples."""
    if isinstance(goal, Latency):
        return (measurement.ratio if planned else measurement.high) <= goal.share
    if isinstance(goal, MaxError) and error is not None:
        return error <= goal.error
    return planned


def make_plan(teacher: Program, goal: Goal, decisions: Sequence[Decision], errors: Mapping[str, float]) -> Plan:
    """The plan with what it was predicted to cost and to save."""
    drops = [d for d in decisions if isinstance(d, DropBlock)]
    predicted: dict[str, float] = {}
    if drops and len(drops) == len(decisions):  # what other decisions lose and save is not known one by one
        predicted["feature_error"] = drops[-1].error or 0.0
        known = [d.saving for d in drops if d.saving is not None]
        if known:
            predicted["latency_ratio"] = 1 - sum(known)
    return Plan(
        decisions=tuple(decisions),
        goal=goal,
        fingerprint=teacher.fingerprint,
        predicted={**predicted, **dict(errors)},
    )


def onnx_difference(program: Program, onnx: bytes, probe: LatencyProbe, samples: CalibrationSet) -> float:
    """Largest difference between the backend's outputs and torch's, relative to the largest output. Raises
    ExportError above 1e-3."""
    runner = probe.load(onnx)
    try:
        runner.run()
        ours = runner.outputs()
    finally:
        runner.close()
    batch: Batch = samples.batch(np.arange(len(next(iter(probe.inputs.values())))) % len(samples))  # type: ignore[arg-type]
    found = compare(program(batch), [torch.from_numpy(np.asarray(value)) for value in ours])
    if not found.same_structure or not found.relative <= ONNX_TOLERANCE:
        raise ExportError(
            "the exported model computes something else than torch",
            expected=f"within {ONNX_TOLERANCE:g} relative",
            actual=found,
        )
    return found.relative


def cost_report(outcome: Outcome) -> tuple[dict[str, int], dict[str, int]]:
    """(MACs, parameters) before and after."""
    before, after = program_cost(outcome.teacher), program_cost(outcome.program)
    return (
        {"before": before.macs, "after": after.macs},
        {
            "before": outcome.teacher.parameter_count() - outcome.teacher.copied_parameters,
            "after": outcome.program.parameter_count(),
        },
    )
