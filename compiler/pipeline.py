"""The flow: capture -> analyse -> plan -> rewrite and re-solve -> mimic -> export -> measure. Each arrow can be
called alone."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ..passes.mimic import MimicSettings
from ..passes.recoverability import RecoverabilitySettings
from ..passes.resolve_network import ResolveSettings
from ..passes.select_ranks import RankSettings
from ..passes.submodular import Selection
from ..runtime.backend import Backend
from ..runtime.measurement import Measurement
from .analysis_store import NOTHING_KEPT, AnalysisStore
from .calibration_set import CalibrationSet, View
from .channel_pipeline import ChannelSettings, cut_channels, on_lattice
from .cost import program_cost
from .drop_pipeline import cut_blocks
from .errors import ExportError, Reject, first_line
from .export import to_exported, to_onnx, to_pt2
from .joint_pipeline import cut_jointly
from .joint_rewrite import JointSettings
from .latency_probe import LatencyProbe, Profiles
from .plan import (
    Blocks,
    ChannelGoal,
    CountedGoal,
    Decision,
    DropBlock,
    DropGoal,
    Goal,
    Latency,
    MaxError,
    Plan,
    RankGoal,
    Ranks,
)
from .planner import require_regions
from .program import Batch, Program
from .progress import Progress, StageClock, silent
from .provenance import Provenance
from .rank_pipeline import cut_ranks, ranks_on_lattice
from .regions import RegionAnalysis, find_regions
from .rewritten import Rewritten, TriedPlan
from .stored_latency import StoredLatency
from .stored_passes import stored_mimic
from .verify import compare, errors_by_output, output_error

#: ONNX Runtime and torch may differ by this much of the largest output before an export counts as wrong.
ONNX_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """How each stage works. `mimic` None leaves gradient mimicking out; `held_out` is the share of samples kept from
    fitting; `views` add changed copies of the fitting samples that the task does not care about (a mirrored image);
    `solve_samples` caps what the re-solve reads, originals first."""

    resolve: ResolveSettings = field(default_factory=ResolveSettings)
    channels: ChannelSettings = field(default_factory=ChannelSettings)
    ranks: RankSettings = field(default_factory=RankSettings)
    recoverability: RecoverabilitySettings = field(default_factory=RecoverabilitySettings)
    mimic: MimicSettings | None = field(default_factory=MimicSettings)
    held_out: float = 0.1
    views: tuple[View, ...] = ()
    solve_samples: int = 512
    batch: int = 1
    threads: int = 1
    seed: int = 0
    opset: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the pipeline made: the student, its plan, its files' bytes, and everything measured on the way. `settings`
    are those used, with what the backend said about them."""

    teacher: Program
    program: Program
    plan: Plan
    met: bool
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
    errors_by_output: Mapping[str, float] = field(default_factory=dict)
    profiles: Profiles | None = None


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
    calibration = calibration.aligned(teacher)
    calibration.check(teacher)
    fit, held_out = calibration.split(settings.seed, settings.held_out)
    fit = fit.with_views(settings.views)
    used = tuple(rewrites) if rewrites else default_rewrites(goal)
    analysis = None
    if used == ("drop_blocks",) and isinstance(goal, DropGoal):
        with clock.stage("analyse"):
            analysis = find_regions(teacher)
        require_regions(analysis, goal)
    with clock.stage("export"):
        original = to_onnx(teacher, opset=settings.opset)
    probe = LatencyProbe(
        teacher,
        original,
        backend,
        held_out,
        batch=settings.batch,
        threads=settings.threads,
        seed=settings.seed,
        deployed=deployed,
    )
    asked = goal
    try:
        if isinstance(goal, Latency) and goal.ms is not None:
            with clock.stage("measure original"):
                goal = goal.relative(StoredLatency(store, probe).original_ms())
        with clock.stage("probe lattice"):
            if "factorize" in used:
                settings = replace(settings, ranks=ranks_on_lattice(settings.ranks, probe, progress))
            if "prune_channels" in used:
                settings = replace(settings, channels=on_lattice(settings.channels, probe, progress))
        rewritten = _rewritten(teacher, analysis, fit, held_out, goal, probe, used, settings, clock, progress, store)
        met = functools.partial(reached, goal)
        return _finish(teacher, rewritten, fit, held_out, asked, met, probe, settings, clock, progress, store)
    finally:
        probe.close()


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
) -> Rewritten:
    """The rewrite, or the mix of several."""
    if analysis is not None:
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
    if isinstance(goal, (Latency, MaxError)):
        joint = joint_settings(settings)
        return cut_jointly(
            teacher, solve, held_out, goal, probe, used, settings=joint, clock=clock, progress=progress, store=store
        )
    assert isinstance(goal, ChannelGoal)
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


def default_rewrites(goal: Goal) -> tuple[str, ...]:
    """The rewrites that are used for a goal when none are named."""
    return rewrites_for(goal) if isinstance(goal, MaxError) else rewrites_for(goal)[:1]


def joint_settings(settings: PipelineSettings) -> JointSettings:
    """The settings of the rewrites."""
    return JointSettings(
        resolve=settings.resolve,
        channels=settings.channels,
        ranks=settings.ranks,
        recoverability=settings.recoverability,
    )


def rewrites_for(goal: Goal) -> tuple[str, ...]:
    """The rewrites that reach a goal, the one used unless told otherwise first."""
    if isinstance(goal, CountedGoal):
        return ("prune_channels", "factorize")
    if isinstance(goal, (Latency, MaxError)):
        return ("drop_blocks", "prune_channels", "factorize")
    if isinstance(goal, Ranks):
        return ("factorize",)
    return ("drop_blocks",) if isinstance(goal, Blocks) else ("prune_channels",)


def _finish(
    teacher: Program,
    rewritten: Rewritten,
    fit: CalibrationSet,
    held_out: CalibrationSet,
    goal: Goal,
    met: Callable[[Measurement], bool],
    probe: LatencyProbe,
    settings: PipelineSettings,
    clock: StageClock,
    progress: Progress,
    store: AnalysisStore,
) -> Outcome:
    """Mimicking, export and the final measurement, which `met` is asked about."""
    student, errors = rewritten.program, dict(rewritten.errors)
    if settings.mimic is not None:
        with clock.stage("mimic"):
            student = _mimicked(teacher, rewritten, fit, held_out, settings.mimic, settings.seed, progress, store)
            errors["mimicked"] = output_error(teacher, student, held_out)
    with clock.stage("export"):
        exported = to_exported(student)
        onnx, pt2 = to_onnx(student, opset=settings.opset, exported=exported), to_pt2(exported)
    with clock.stage("measure"):
        difference = onnx_difference(student, onnx, probe, held_out)
        measurement = probe.final(onnx)
    with clock.stage("profile"):
        profiles = probe.profiles(onnx)
    return Outcome(
        teacher=teacher,
        program=student,
        plan=make_plan(teacher, goal, rewritten.decisions, errors),
        met=rewritten.met and met(measurement),
        rejects=rewritten.rejects,
        provenance=rewritten.provenance,
        selections=rewritten.selections,
        measurement=measurement,
        output_errors=errors,
        onnx=onnx,
        pt2=pt2,
        onnx_difference=difference,
        settings=settings,
        clock=clock,
        tried=rewritten.tried,
        errors_by_output=errors_by_output(teacher, student, held_out),
        profiles=profiles,
    )


def reached(goal: Goal, measurement: Measurement) -> bool:
    """Whether the final measurement lets the goal stand. The choice has measured it as reached with its whole interval
    below; a second measurement has to contradict that with its whole interval above."""
    return not isinstance(goal, Latency) or measurement.low <= goal.share


def _mimicked(
    teacher: Program,
    rewritten: Rewritten,
    fit: CalibrationSet,
    held_out: CalibrationSet,
    settings: MimicSettings,
    seed: int,
    progress: Progress,
    store: AnalysisStore,
) -> Program:
    """The student after mimicking; the re-solved one, with a warning, when the training fails (out of memory, an
    operator without a gradient): the work before it is not lost."""
    try:
        return stored_mimic(
            store,
            teacher,
            rewritten.program,
            fit,
            held_out,
            kept=rewritten.kept,
            settings=settings,
            seed=seed,
            progress=progress,
        )
    except (RuntimeError, NotImplementedError) as cause:
        warnings.warn(f"mimicking failed, the re-solved network is kept: {first_line(cause)}", stacklevel=2)
        return rewritten.program


def make_plan(teacher: Program, goal: Goal, decisions: Sequence[Decision], errors: Mapping[str, float]) -> Plan:
    """The plan with what it was predicted to cost and to save."""
    drops = [d for d in decisions if isinstance(d, DropBlock)]
    predicted = {"feature_error": drops[-1].error or 0.0} if drops else {}
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
        {"before": outcome.teacher.parameter_count(), "after": outcome.program.parameter_count()},
    )
