"""The loop: what each rewrite offers, the plan that reaches the goal, the network made of it, mimicked, exported,
measured and recounted."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ...passes.mimic.stored import mimicked
from ...runtime.measure.measurement import Measurement
from ...runtime.probe.latency_probe import LatencyProbe, Profiles, example_inputs
from ...runtime.probe.stored_latency import StoredLatency
from ..data.calibration_set import CalibrationSet
from ..data.output_error import errors_by_output
from ..data.sampled_error import SampledError, sampled_error, warn_if_lost
from ..export.edit_types import as_measured, as_stored, warn_of_types
from ..export.exporter import to_exported, to_onnx, to_pt2
from ..ir.compare import ROUNDED_TOLERANCE, compare, relative_error
from ..ir.cost import program_cost
from ..ir.program import HALVES, Program
from ..ir.segments import is_dequantized
from ..metric.metric import Metric
from ..onnx.model_file import OnnxModel
from ..plan.decision import Decision
from ..plan.goal import Delivered, Goal
from ..plan.plan import Plan
from ..processes.sharing import by_first
from ..rewrite.checked_offer import check_decisions
from ..rewrite.context import Context
from ..rewrite.rewrite import Applied, Rewrite
from ..support.atomic_files import Content, size_of
from ..support.errors import BackendError, ExportError, GoalError
from ..support.setting_checks import Allowed, check_whole
from ..trial.apply_decisions import finished, made, shaped
from .builtin import built_in
from .ignore_patterns import sorted_ignores
from .pipeline_settings import PipelineSettings
from .plan_search import Search
from .unchanged import require_change

#: ONNX Runtime and torch may differ by this much of the largest output before an export counts as wrong.
ONNX_TOLERANCE = 1e-3
#: What a backend rounds otherwise may have so many times the energy of what rounding changes: two roundings of one
#: network that have nothing to do with each other differ by twice what one does.
MOST_OF_ROUNDING = 2.0
#: Batches that an export is compared on.
CHECKED_BATCHES = 4
OVERFLOW = (
    "this machine's kernels may overflow with weights of 8 bits: plan it anew from foldcut.dequantize(model), or with "
    "--dequantize"
)
#: How often a goal is planned for when the finished network misses it.
MOST_AIMS = 3
#: ... and once more when it is faster than this share of what is asked for and of what its plan was measured at: on a
#: machine that is busy plans look slower than they are, and more is cut than has to be.
FAR_BELOW = 0.92


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the pipeline made of a context: the student, its plan, its files' bytes, and everything measured on the way.

    `settings` and `rewrites` are those used, with what the backend said about them; `planned` whether the plan was
    found to reach the goal, by what was measured for it; `applied` the network and how it came about;
    `aims` the latency ratios that plans were made for, each after a network that missed; `output_errors` what the
    judging samples said on the way, `tested` (and `errors_by_output`) what the test samples say of the network that
    stands; `file_bytes` the sizes of the ONNX file that is replaced and of the new one; `sizes` how many samples there
    were of each; `goal_share` the latency ratio to reach, where there is one;
    `regimes` the `measurement`, and that of the same loads in the other regime where the backend can.
    """

    ctx: Context
    program: Program
    plan: Plan
    met: bool
    planned: bool
    applied: Applied
    rewrites: tuple[Rewrite, ...]
    measurement: Measurement
    output_errors: Mapping[str, float]
    onnx: OnnxModel
    pt2: Content
    onnx_difference: float
    file_bytes: Mapping[str, int]
    settings: PipelineSettings
    aims: tuple[float, ...] = ()
    errors_by_output: Mapping[str, float] = field(default_factory=dict)
    tested: SampledError | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    profiles: Profiles | None = None
    regimes: Mapping[str, Measurement] = field(default_factory=dict)
    goal_share: float | None = None


def run_pipeline(ctx: Context, rewrites: Sequence[Rewrite], probe: LatencyProbe, settings: PipelineSettings) -> Outcome:
    """Everything after capture. Raises GoalError when nothing can be done; an unmet goal comes back as `met` False."""
    ctx.instruments.after("capture", ctx.teacher)
    warn_of_types(ctx.teacher, ctx.judge.batch(slice(0, 2)))
    latency = StoredLatency(ctx.store, probe)
    ctx = replace(ctx, latency=latency)
    if ctx.metric is not None:
        ctx.metric.read(ctx.teacher)  # what is wrong with it is told before anything is done
    with ctx.clock.stage("measure original"):
        goal = ctx.goal.settled(ctx)
    # rewrites of a mix leave alone what the settings of those that take no part name, too
    rewrites = sorted_ignores(ctx.teacher, rewrites, built_in(settings) if len(rewrites) > 1 else ())
    with ctx.clock.stage("probe lattice"):
        rewrites = [rewrite.prepared(ctx) for rewrite in rewrites]
    ctx = replace(ctx, multiples=functools.cache(functools.partial(_multiples, ctx, rewrites)))

    def made(aim: Goal) -> Outcome:
        train = functools.partial(mimicking, ctx, rewrites, settings=settings)
        done, planned = planned_network(replace(ctx, goal=aim), rewrites, train)
        require_change(ctx.teacher, done, ctx.goal)
        outcome = _finished(ctx, rewrites, done, planned, probe, settings)
        counted = goal.recounted(
            Delivered(
                teacher=ctx.teacher,
                program=outcome.program,
                decisions=len(done.decisions),
                planned=planned,
                in_effect=lambda: in_effect(ctx.teacher, outcome.program, done.decisions, rewrites),
            )
        )
        if planned and not counted and not in_effect(ctx.teacher, outcome.program, done.decisions, rewrites):
            warnings.warn(
                "the network does not cost what its plan was counted to: what `apply` of a rewrite makes is not what "
                f"its `shape` promised ({', '.join(dict.fromkeys(d.kind for d in done.decisions))})",
                stacklevel=3,
            )
        return replace(outcome, met=goal.reached(outcome.measurement, counted), goal_share=goal.share)

    found = _aimed(goal, made, latency, ctx.metric)
    if ctx.time.ran_out:
        warnings.warn(f"the search for a better plan ended after {ctx.time.seconds:g} s, as asked for", stacklevel=3)
    if ctx.metric is not None:
        ctx.metric.loss(found.program)
    with ctx.clock.stage("test"):
        return tested(replace(found, sizes=ctx.sets.sizes), goal, ctx.sets.test)


def planned_network(
    ctx: Context, rewrites: Sequence[Rewrite], train: Callable[[Applied], Applied] = lambda made: made
) -> tuple[Applied, bool]:
    """The network of the best plan for the goal, and whether the plan was found to reach it.

    Plans are searched for where the goal mixes rewrites; else the plan is that of the rewrite whose units it is in.
    `train` finishes the networks that a goal has to see as they will go out."""
    if ctx.goal.mixes:
        return ctx.goal.sought(Search(ctx=ctx, rewrites=rewrites, train=train))
    if len(rewrites) != 1:
        names = ", ".join(rewrite.name for rewrite in rewrites)
        raise GoalError(f"{ctx.goal} is reached by one rewrite alone, not by {names}", hint="name one: rewrites=[...]")
    rewrite = rewrites[0]
    own = rewrite.own_plan(ctx)
    check_decisions(rewrite, own.decisions)
    with ctx.clock.stage("re-solve"):
        done = made(ctx, rewrites, own.decisions)
    if own.decisions and not done.decisions:
        reasons = "; ".join(str(reject) for reject in done.rejects[:3])
        raise GoalError(f"nothing can be done towards {ctx.goal}: each change was refused", hint=reasons or None)
    # what is refused is left alone, as what is locked is, and says why
    settled = {*(decision.subject for decision in done.decisions), *(reject.node for reject in done.rejects)}
    met = own.met and all(decision.subject in settled for decision in own.decisions)
    return replace(done, rejects=(*own.rejects, *done.rejects)), met


def in_effect(teacher: Program, program: Program, decisions: Sequence[Decision], rewrites: Sequence[Rewrite]) -> bool:
    """Whether a network costs what the decisions leave of the original."""
    wanted = shaped(rewrites, teacher, decisions)
    same_macs = program_cost(program).macs == program_cost(wanted).macs
    return same_macs and program.parameter_count() == wanted.parameter_count()


def tested(outcome: Outcome, goal: Goal, test: CalibrationSet) -> Outcome:
    """The outcome with the error on samples that have chosen nothing, which a bound on the error goes by."""
    found = sampled_error(outcome.ctx.teacher, outcome.program, test, seed=outcome.settings.seed)
    warn_if_lost(found)
    by_output = errors_by_output(outcome.ctx.teacher, outcome.program, test)
    met = goal.reached(outcome.measurement, outcome.met, found.error) if goal.bounds_error else outcome.met
    return replace(outcome, tested=found, errors_by_output=by_output, met=met)


def _aimed(
    goal: Goal, made: Callable[[Goal], Outcome], latency: StoredLatency, metric: Metric | None = None
) -> Outcome:
    """The network for a goal. Where the finished network misses a latency that its plan was measured to reach, plan
    again for as much less, `MOST_AIMS` times in all; where it is far faster than its plan, once for as much more. Of
    those that reach the goal the one of least error on the judging samples stands, or a better one by the user's
    metric, else the fastest.

    The plan that is taken is one of several that were measured, so chance has flattered it. The first measurement of
    each network is kept and is the verdict on it, for as long as measurements are kept: a compile that goes on after an
    interruption, or is made again, plans as often and ends with the same answer. Where a later measurement says
    otherwise, a warning does too.
    """
    outcomes: list[tuple[float, Outcome]] = []
    share = goal.share
    if share is None:
        return made(goal)
    aims = [share]
    while True:
        last = made(goal.at(aims[-1]))
        seen = [last.measurement.ratio, last.met]
        ratio, met = latency.kept(
            "finished", [goal.to_dict(), aims, last.plan.decisions], functools.partial(list, seen)
        )
        if met != last.met:
            warnings.warn(_disagreement(goal, met, ratio, last.measurement), stacklevel=3)
        last = replace(last, met=met)
        outcomes.append((ratio, last))
        again = _next_aim(share, aims, ratio, last)
        if again is None or any(before.met for _, before in outcomes[:-1]):
            break
        aims.append(again)
    reached = [outcome for _, outcome in outcomes if outcome.met]
    if reached:
        reached.sort(key=lambda outcome: list(outcome.output_errors.values())[-1])
        best = reached[metric.best([outcome.program for outcome in reached]) if metric is not None else 0]
    else:
        _, best = min(outcomes, key=lambda outcome: outcome[0])
    return replace(best, aims=tuple(aims))


def _next_aim(share: float, aims: Sequence[float], ratio: float, last: Outcome) -> float | None:
    """What to plan for after a network of such a latency ratio; None where it stands."""
    if not last.met:
        return aims[-1] * share / ratio if last.planned and len(aims) < MOST_AIMS else None
    planned = next((plan.ratio for plan in last.applied.tried if plan.chosen), ratio)
    more = aims[-1] * planned / ratio
    return more if ratio < FAR_BELOW * min(share, planned) and more < 1 else None


def _disagreement(goal: Goal, met: bool, ratio: float, now: Measurement) -> str:
    """What the first measurement of a network says and what this one does."""
    verdict = "reached" if met else "missed"
    return f"{goal} was {verdict} when this network was first measured (x{ratio:.3f}); now it is x{now.ratio:.3f}"


def _multiples(ctx: Context, rewrites: Sequence[Rewrite]) -> dict[str, int]:
    """What channel counts are best multiples of, by layer. A rewrite that cannot ask the backend goes without, with a
    warning. Raises CompilerError for what is no multiple."""
    found: dict[str, int] = {}
    for rewrite in rewrites:
        try:
            with ctx.clock.stage("probe lattice"):
                asked = rewrite.multiples(ctx)
        except BackendError as cause:
            warnings.warn(f"channels are cut without regard to {rewrite.name}: {cause.message}", stacklevel=2)
            continue
        for layer, multiple in asked.items():
            check_whole(f"{rewrite.name}: multiples of {layer}", multiple, Allowed(least=1))
            found[layer] = math.lcm(found.get(layer, 1), multiple)
    return found


def _finished(
    ctx: Context,
    rewrites: Sequence[Rewrite],
    done: Applied,
    planned: bool,
    probe: LatencyProbe,
    settings: PipelineSettings,
) -> Outcome:
    """Mimicking, export and the final measurement."""
    done = mimicking(ctx, rewrites, done, settings)
    student, measurable = as_stored(done.program), as_measured(done.program)
    with ctx.clock.stage("export"):
        onnx, measured, pt2 = by_first(lambda: _exported(student, measurable, settings))
    with ctx.clock.stage("measure"):
        difference = by_first(lambda: onnx_difference(done, measured, probe, ctx.judge))
        regimes = probe.final_regimes(measured)
    with ctx.clock.stage("profile"):
        profiles = probe.profiles(measured)
    return Outcome(
        ctx=ctx,
        program=student,
        plan=make_plan(ctx, done),
        met=planned,
        planned=planned,
        applied=done,
        rewrites=tuple(rewrites),
        measurement=regimes[probe.regime],
        output_errors=done.errors,
        onnx=onnx,
        pt2=pt2,
        onnx_difference=difference,
        file_bytes={"before": size_of(probe.before), "after": size_of(measured)},
        settings=settings,
        profiles=profiles,
        regimes={str(regime): found for regime, found in regimes.items()},
    )


def _exported(
    student: Program, measurable: Program, settings: PipelineSettings
) -> tuple[OnnxModel, OnnxModel, Content]:
    """The network as ONNX, as it is measured, and as ``.pt2``."""
    exported = to_exported(student)
    onnx = to_onnx(student, opset=settings.opset, exported=exported)
    measured = onnx if measurable is student else to_onnx(measurable, opset=settings.opset)
    return onnx, measured, to_pt2(exported)


def mimicking(ctx: Context, rewrites: Sequence[Rewrite], done: Applied, settings: PipelineSettings) -> Applied:
    """The network after gradient mimicking, where that is asked for: trained before the rewrites that come last."""
    if settings.mimic is None or done.trained:
        return done
    base = done.before_last or done
    with ctx.clock.stage("mimic"):
        trained = mimicked(ctx, base, settings.mimic)
        if trained.skipped is not None:
            return replace(done, unmimicked=trained.skipped)
        ctx.instruments.after("mimic", trained.program, base.program)
        error = sampled_error(ctx.teacher, trained.program, ctx.judge, seed=ctx.seed)
    # mimicking looks at every output relative to its size; a bound on the whole is not given up for that
    if not ctx.goal.within(error.most) and error.error > list(base.errors.values())[-1]:
        return done
    better = replace(base, program=trained.program, errors={**base.errors, "mimicked": error.error})
    if done.before_last is None:
        return better
    return replace(finished(ctx, rewrites, better, done.decisions), tried=done.tried)


def make_plan(ctx: Context, done: Applied) -> Plan:
    """The plan with what it was predicted to lose and, where that is known one by one, to save."""
    # what a decision is predicted to save is a share of what the goal bounds
    savings = [getattr(decision, "saving", None) for decision in done.decisions if ctx.goal.measured]
    known = [saving for saving in savings if saving is not None]
    saved = {"latency_ratio": 1 - sum(known)} if known and len(known) == len(savings) else {}
    return Plan(
        decisions=done.decisions,
        goal=ctx.goal,
        fingerprint=as_stored(ctx.teacher).fingerprint,
        predicted={**saved, **done.errors},
    )


def onnx_difference(done: Applied, onnx: OnnxModel, probe: LatencyProbe, samples: CalibrationSet) -> float:
    """Largest difference between the backend's outputs and torch's on a few batches, relative to the largest output.

    Raises ExportError above 1e-3, above 2e-2 where the outputs are in half precision. Where values are rounded, sums
    that lie between two integers may fall on either side, and what reads them follows: where rewrites that come last
    have rounded them, it is raised where what the backend computes otherwise has more than twice the energy of what
    those rewrites changed, and above 2e-2 where they came so.
    """
    program = as_measured(done.program)
    floating = as_measured(done.before_last.program) if done.before_last is not None else None
    came_rounded = floating is None and any(is_dequantized(node) for node in program.graph.nodes)
    half = any(spec.dtype in HALVES for spec in program.outputs)
    tolerance = ROUNDED_TOLERANCE if came_rounded or half else ONNX_TOLERANCE
    size = probe.conditions.batch
    count = min(CHECKED_BATCHES, math.ceil(len(samples) / size))
    taken = [samples.take((torch.arange(size) + i * size) % len(samples)) for i in range(count)]
    inputs = [example_inputs(program, part, size) for part in taken]
    worst, off, rounded, near = 0.0, 0.0, 0.0, True
    for part, values in zip(taken, probe.outputs(onnx, inputs), strict=True):
        batch = part.batch(slice(None))
        ours, theirs = program(batch), [torch.from_numpy(value) for value in values]
        found = compare(ours, theirs)
        worst, near = max(worst, found.relative), near and found.relative <= tolerance
        if found.same_structure and floating is not None:
            off += relative_error(ours, theirs)
            rounded += relative_error(ours, floating(batch))
        elif not found.same_structure or not found.relative <= tolerance:
            raise _computes_otherwise(f"within {tolerance:g} relative", found, OVERFLOW if came_rounded else None)
    if not near and not off <= MOST_OF_ROUNDING * rounded:
        raise _computes_otherwise(
            f"at most {MOST_OF_ROUNDING:g} times what rounding changes, {rounded / count:.3g} of the outputs' energy",
            f"{off / count:.3g} of it",
        )
    return worst


def _computes_otherwise(expected: str, actual: object, hint: str | None = None) -> ExportError:
    message = "the exported model computes something else than torch"
    return ExportError(message, expected=expected, actual=actual, hint=hint)


def cost_report(outcome: Outcome) -> tuple[dict[str, int], dict[str, int]]:
    """(MACs, parameters) before and after."""
    before, after = program_cost(outcome.ctx.teacher), program_cost(outcome.program)
    return (
        {"before": before.macs, "after": after.macs},
        {
            "before": outcome.ctx.teacher.parameter_count() - outcome.ctx.teacher.copied_parameters,
            "after": outcome.program.parameter_count(),
        },
    )
