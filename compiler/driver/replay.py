"""A plan put into effect again on the network that it was made for, with the first weights or with data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...passes.mimic.settings import MimicSettings
from ..data.calibration_set import CalibrationData, CalibrationSet, View
from ..data.sampled_error import sampled_error
from ..frontend.capture import Model, capture, opened
from ..frontend.model_inputs import needed_inputs
from ..ir.edit import set_tensors
from ..ir.edit_folds import fold_parameters
from ..ir.program import Batch, Program
from ..plan.decision import Decision
from ..plan.plan import Plan
from ..rewrite.context import Context
from ..rewrite.rewrite import Rewrite
from ..store.analysis_store import AnalysisStore
from ..store.cache_folder import kept_in
from ..support.errors import PlanError
from ..support.one_at_a_time import alone
from ..support.progress import Progress, StageClock, silent
from ..support.setting_checks import refuse
from .apply_decisions import applied_plain, by_phase, each_applied, made, require_rewrites, solved_at_the_end
from .builtin import built_in
from .pipeline import mimicking
from .pipeline_settings import PipelineSettings, check_options, check_seed
from .result import Compiled, exported
from .sealed import PT2, check_file, check_plan, digest


def apply(
    model: Model,
    plan: Plan | str | Path,
    *,
    weights: Model | None = None,
    calibration: CalibrationData | None = None,
    example: Batch | None = None,
    rewrites: Sequence[Rewrite] = (),
    mimic: MimicSettings | bool | None = True,
    views: Sequence[View] = (),
    seed: int = 0,
    settings: PipelineSettings | None = None,
    progress: Progress = silent,
    cache: bool | str | Path = True,
) -> Compiled:
    """Put the decisions of a plan into effect on the network that it was made for.

    `plan` is a `Plan` or the path of a plan.json. With `weights` (the model.pt2 that was saved with the plan, or any
    network of that shape; without `calibration` the model.pt2 beside the plan) the result is the network of the first
    time, and no data is needed. With `calibration` alone the layers are solved again, and mimicked unless `mimic` is
    False, as `compile` does; the units that the plan keeps, the blocks and the ranks stay its own, and `settings` say
    how they are solved. With both the weights are taken as they are, and the calibration set only says what the inputs
    look like, as `example`, a batch of inputs, does for a module without one. `rewrites` are those of the plan's
    decisions that foldcut does not bring. `cache` as in `compile`: what an interrupted call had solved is kept.

    Raises PlanError when the plan was made for another network or other weights, when the weights do not fit, or when
    there are neither weights nor data; OutputError when the model.pt2 beside the plan is not the one that was saved
    with it; CaptureError and CalibrationError; CompilerError when settings of two rewrites contradict each other.
    """
    check_options(mimic, views, progress, cache, settings)
    check_seed(seed)
    if isinstance(progress, bool):
        refuse("progress", progress, "a function of (stage, done, total)")
    read = plan if isinstance(plan, Plan) else Plan.load(plan)
    if weights is None and calibration is None and not isinstance(plan, Plan):
        weights = _beside(Path(plan), read)
    elif isinstance(weights, (str, Path)):
        _warn_of_others(Path(weights), read)
    if weights is None and calibration is None:
        raise PlanError(
            "a plan says what to cut, not the weights that are left",
            hint=f"give a calibration set, or the {PT2} that was saved with the plan",
        )
    with alone():
        network = opened(model)
        samples = None if calibration is None else CalibrationSet.of(calibration, inputs=needed_inputs(network))
        inputs = example if samples is None else samples.batch(slice(0, 2))
        teacher = fold_parameters(capture(network, inputs))
        read.check(teacher.fingerprint)
        opset = settings.opset if settings is not None else None
        if weights is not None:
            program = with_weights(apply_plan(teacher, read, rewrites), capture(weights, inputs))
            return _result(program, read, opset)
        assert samples is not None
        options = replace(settings or PipelineSettings(), seed=seed, views=tuple(views)).with_mimic(mimic)
        using = plan_rewrites(read, rewrites, options)
        _check_decisions(teacher, read.decisions, using)
        with kept_in(cache) as folder:
            ctx = options.context(teacher, samples, read.goal, AnalysisStore(folder), StageClock(), progress)
            return _solved(ctx, read, using, options)


def plan_rewrites(plan: Plan, rewrites: Sequence[Rewrite], settings: PipelineSettings | None = None) -> list[Rewrite]:
    """The rewrites that a plan's decisions are of. Raises PlanError when one is not there."""
    known = {rewrite.name: rewrite for rewrite in (*built_in(settings or PipelineSettings()), *rewrites)}
    require_rewrites(list(known.values()), plan.decisions)
    kinds = {decision.kind for decision in plan.decisions}
    return [rewrite for name, rewrite in known.items() if name in kinds]


def _check_decisions(teacher: Program, decisions: Sequence[Decision], rewrites: Sequence[Rewrite]) -> None:
    """Raise RewriteError or PlanError for what is not there, as without data: before anything is solved. A plan may
    have been edited."""

    def checked(rewrite: Rewrite, program: Program, mine: list[Decision]) -> Program:
        rewrite.requires(program, mine)
        return rewrite.plain(program, mine) if rewrite is not last else program

    last = by_phase(rewrites)[-1] if rewrites else None
    each_applied(rewrites, teacher, decisions, checked)


def _beside(path: Path, plan: Plan) -> Path | None:
    """The network that was saved with a plan, where it still lies beside it. Raises OutputError when what lies there
    is that of another run."""
    found = path.with_name(PT2)
    if not found.is_file():
        return None
    check_plan(plan)
    check_file(plan, PT2, found.read_bytes())
    return found


def _warn_of_others(weights: Path, plan: Plan) -> None:
    """Weights trained further since are welcome; those of another network of these shapes were hardly meant."""
    if weights.is_file() and plan.files.get(PT2) not in (None, digest(weights.read_bytes())):
        warnings.warn(f"{weights} is not the {PT2} that was saved with the plan: its weights are taken", stacklevel=3)


def apply_plan(program: Program, plan: Plan, rewrites: Sequence[Rewrite] = ()) -> Program:
    """`decided` with a plan's decisions, on the network that it was made for. Raises PlanError when the plan was made
    for another network or other weights."""
    with alone():
        if program.fingerprint != plan.fingerprint:
            program = fold_parameters(program)  # as compile does before it plans
        plan.check(program.fingerprint)
        return decided(program, plan.decisions, rewrites)


def decided(program: Program, decisions: Sequence[Decision], rewrites: Sequence[Rewrite] = ()) -> Program:
    """The decisions in effect: regions bypassed, channels removed, layers factorised. The weights stay those of
    `program`, and factors are the best approximation of these: re-solve them with a calibration set, or load trained
    ones. `rewrites` are those beside the built-in ones.

    Raises PlanError and RewriteError when a decision is about what the program does not have.
    """
    known = {rewrite.name: rewrite for rewrite in (*built_in(PipelineSettings()), *rewrites)}
    return applied_plain(list(known.values()), program, decisions)


def with_weights(program: Program, trained: Program) -> Program:
    """The program with the parameters and buffers of another network of the same names and shapes. Raises PlanError."""
    ours, theirs = program.module.state_dict(), trained.module.state_dict()
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [list(state[name].shape) if name in state else None for state in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise PlanError(
                f"the weights are not those of this plan: {name}",
                expected=shapes[0] or "no such tensor",
                actual=shapes[1] or "no such tensor",
                hint=f"give the {PT2} that was saved with the plan",
            )
    changed: dict[str, torch.Tensor] = {name: value for name, value in theirs.items() if value.numel()}
    return set_tensors(program, changed, note="weights of the plan")


def _solved(ctx: Context, plan: Plan, rewrites: Sequence[Rewrite], options: PipelineSettings) -> Compiled:
    solved_at_the_end(rewrites)
    done = made(ctx, rewrites, plan.decisions, exactly=True)
    program, errors = mimicking(ctx, done, options)
    tested = sampled_error(ctx.teacher, program, ctx.sets.test, seed=ctx.seed)
    return replace(_result(program, plan, options.opset), output_errors=errors, tested=tested)


def _result(program: Program, plan: Plan, opset: int | None) -> Compiled:
    return Compiled(plan=plan, make_program=lambda: program, make_networks=lambda: exported(program, opset))


__all__ = ["apply", "apply_plan", "decided", "with_weights"]
