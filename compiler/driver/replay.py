"""Applying a plan again to the network that it was made for, with saved weights or with data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ...passes.mimic.settings import MimicSettings, expected_mimic_s
from ..data.calibration_set import CalibrationData, View
from ..data.sampled_error import sampled_error, warn_if_lost
from ..data.shards import read_parts
from ..devices.precision import exact_products
from ..export.edit_device import on_cpu
from ..export.edit_types import as_stored, widened
from ..frontend.capture import Model, capture, opened
from ..frontend.model_inputs import needed_inputs
from ..ir.cost import program_cost
from ..ir.edit import set_tensors
from ..ir.edit_folds import fold_parameters
from ..ir.program import Batch, Program
from ..plan.decision import Decision
from ..processes.joining import agree
from ..processes.working import working
from ..rewrite.context import Context
from ..rewrite.forecast import foresee_replay
from ..rewrite.own_source import own_sources
from ..rewrite.rewrite import Rewrite
from ..store.analysis_store import AnalysisStore, versions
from ..store.cache_folder import kept_in
from ..support.atomic_files import StoredFile, digest
from ..support.errors import PlanError
from ..support.one_at_a_time import alone
from ..support.progress import Progress, StageClock
from ..synthesis.settings import SynthesisSettings
from ..synthesis.synthesise import synthesise
from ..trial.apply_decisions import applied_plain, by_phase, each_applied, made, of_rewrites, solved_at_the_end
from .builtin import Plan, built_in, check_rewrites
from .pipeline import mimicking
from .pipeline_settings import PipelineSettings, check_options, with_reference_read
from .result import Compiled, exported
from .sealed import PT2, check_file, check_plan


def apply(
    model: Model,
    plan: Plan | str | Path,
    *,
    weights: Model | None = None,
    calibration: CalibrationData | None = None,
    example: Batch | None = None,
    rewrites: Sequence[str | Rewrite] = (),
    mimic: MimicSettings | bool | None = True,
    views: Sequence[View] | None = None,
    seed: int | None = None,
    device: str | torch.device | None = None,
    settings: PipelineSettings | None = None,
    progress: bool | Progress = True,
    cache: bool | str | Path = True,
) -> Compiled:
    """Apply a plan to the network that it was made for.

    With weights, the result has those weights, and no data is needed. The ``model.pt2`` beside a plan that is given
    by its path is used if neither `weights` nor `calibration` is given. With `calibration` alone, the layers are
    re-solved as in `compile`, and trained unless `mimic` is False; blocks, channels and ranks are those of the plan.
    With both, the weights are used as they are, and the samples only show what the inputs look like.

    Arguments:
        model: The original network, in any form that `compile` takes.
        plan: A `Plan`, or the path of a ``plan.json``.
        weights: A network with the shapes of the result, such as the ``model.pt2`` saved with the plan.
        calibration: Samples to re-solve with, in any form that `compile` takes but None; a `SynthesisSettings` makes
            them.
        example: One batch of inputs, to capture a module without calibration samples.
        rewrites: `Rewrite` instances for decisions that are not built in.
        mimic: As in `compile`. Only used without `weights`.
        views: As in `compile`. Only used without `weights`.
        seed: As in `compile`.
        device: As in `compile`. Only used without `weights`.
        settings: As in `compile`. Nothing is measured: its batch and threads are not used.
        progress: As in `compile`.
        cache: As in `compile`. A call that was interrupted continues from it.

    Returns:
        The `Compiled` network, without a report.

    Raises:
        PlanError: If the plan was made for another network or other weights, if the weights do not fit, or if neither
            weights nor samples are given.
        OutputError: If the ``model.pt2`` beside the plan is not the one saved with it.
        RewriteError: If a decision names what the network does not have.
        CaptureError: If the model or the weights cannot be captured.
        CalibrationError: If the samples do not fit the network.
        CompilerError: If an argument is out of range, or if settings of two rewrites contradict each other.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> samples = torch.randn(40, 8)
        >>> cut = foldcut.PruneChannels(group="0", kept=tuple(range(16)), total=32)
        >>> fingerprint = foldcut.capture(net, samples[:2]).fingerprint
        >>> plan = foldcut.Plan(decisions=(cut,), goal=foldcut.Channels(0.5), fingerprint=fingerprint, predicted={})
        >>> out = foldcut.apply(net, plan, calibration=samples, mimic=False, cache=False, progress=False)
        >>> out.program.parameter_count(), list(out.output_errors)
        (212, ['unsolved', 'rewritten', 're-solved'])
    """
    check_options(mimic, progress, cache, settings)
    options = (settings or PipelineSettings()).with_arguments(seed=seed, views=views, device=device).with_mimic(mimic)
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
    with working("apply", progress, options.memory_bytes, options.processes) as show:
        agree({**versions(), "plans": read.to_dict(), **options.told})
        clock = StageClock(show)
        with clock.stage("capture"):
            network = opened(model)
            if isinstance(calibration, SynthesisSettings):
                calibration = synthesise(network, calibration, seed=options.seed, progress=show, cache=cache)
            samples = None if calibration is None else read_parts(calibration, needed_inputs(network))
            inputs = example if samples is None else samples.batch(slice(0, 2))
            teacher = fold_parameters(capture(network, inputs))
            read.check(teacher.fingerprint)
        if weights is not None:
            program = with_weights(apply_plan(teacher, read, rewrites), capture(weights, inputs))
            return _result(program, read, options.opset)
        assert samples is not None
        teacher = widened(teacher)
        options = with_reference_read(network, options).at_home(network)
        using = plan_rewrites(read, rewrites, options)
        _check_decisions(teacher, read.decisions, using)
        with kept_in(cache) as folder:
            store = AnalysisStore(folder, basis=[*own_sources(using, read.goal), *options.where])
            ctx = options.context(teacher, samples, read.goal, store, clock, show)
            foresee_replay(ctx, using, partial(expected_mimic_s, options.mimic, program_cost(ctx.teacher).macs))
            options.settle_memory(ctx, measured=False)
            with exact_products(options.computes_on):
                return _solved(ctx, read, using, options)


def plan_rewrites(
    plan: Plan, rewrites: Sequence[str | Rewrite], settings: PipelineSettings | None = None
) -> list[Rewrite]:
    """The rewrites of the decisions of a plan. Raises PlanError when one is not available."""
    known = {rewrite.name: rewrite for rewrite in (*built_in(settings or PipelineSettings()), *_own(rewrites))}
    of_rewrites(list(known.values()), plan.decisions)
    kinds = {decision.kind for decision in plan.decisions}
    return [rewrite for name, rewrite in known.items() if name in kinds]


def _own(rewrites: Sequence[str | Rewrite]) -> list[Rewrite]:
    """Those that are not there by their name. Raises CompilerError for what is no rewrite."""
    if rewrites:
        check_rewrites(rewrites)
    return [rewrite for rewrite in rewrites if isinstance(rewrite, Rewrite)]


def _check_decisions(teacher: Program, decisions: Sequence[Decision], rewrites: Sequence[Rewrite]) -> None:
    """Raise RewriteError or PlanError for what is not there, as without data: before anything is solved. A plan may
    have been edited."""

    def checked(rewrite: Rewrite, program: Program, mine: list[Decision]) -> Program:
        rewrite.requires(program, mine)
        return rewrite.plain(program, mine) if rewrite is not last else program

    last = by_phase(rewrites)[-1] if rewrites else None
    each_applied(rewrites, teacher, decisions, checked)


def _beside(path: Path, plan: Plan) -> Path | None:
    """The network saved beside a plan, if it is there. Raises OutputError when it is that of another run."""
    found = path.with_name(PT2)
    if not found.is_file():
        return None
    check_plan(plan)
    check_file(plan, PT2, StoredFile(found))
    return found


def _warn_of_others(weights: Path, plan: Plan) -> None:
    """Weights trained further since are fine; those of another network of these shapes are probably a mistake."""
    if weights.is_file() and plan.files.get(PT2) not in (None, digest(StoredFile(weights))):
        warnings.warn(f"{weights} is not the {PT2} that was saved with the plan: its weights are taken", stacklevel=3)


def apply_plan(program: Program, plan: Plan, rewrites: Sequence[str | Rewrite] = ()) -> Program:
    """Apply the decisions of a plan to a program, without data.

    Regions are bypassed, channels removed and layers factorised. The weights that are left stay as they are; factors
    are the best approximation of the weight alone. Re-solve the result with `apply`.

    Arguments:
        program: The network that the plan was made for.
        plan: The plan.
        rewrites: `Rewrite` instances for decisions that are not built in.

    Returns:
        The rewritten `Program`.

    Raises:
        PlanError: If the plan was made for another network or other weights, or if the rewrite of a decision is not
            available.
        RewriteError: If a decision names what the program does not have.

    Example:
        >>> program = foldcut.capture(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval(), torch.randn(2, 8))
        >>> drop = foldcut.DropBlock(entry="input_1", exit="linear")
        >>> goal, fingerprint = foldcut.Blocks(1), program.fingerprint
        >>> plan = foldcut.Plan(decisions=(drop,), goal=goal, fingerprint=fingerprint, predicted={})
        >>> program.parameter_count(), foldcut.apply_plan(program, plan).parameter_count()
        (108, 36)
    """
    with alone():
        if program.fingerprint != plan.fingerprint:
            program = fold_parameters(program)  # as compile does before it plans
        plan.check(program.fingerprint)
        return decided(program, plan.decisions, rewrites)


def decided(program: Program, decisions: Sequence[Decision], rewrites: Sequence[str | Rewrite] = ()) -> Program:
    """Apply decisions without data: `apply_plan` without the check that the plan was made for this network. Raises
    PlanError and RewriteError when a decision is about what the program does not have.
    """
    known = {rewrite.name: rewrite for rewrite in (*built_in(PipelineSettings()), *_own(rewrites))}
    return applied_plain(list(known.values()), program, decisions)


def with_weights(program: Program, trained: Program) -> Program:
    """The program with the tensors of another network of the same names and shapes. Raises PlanError."""
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
    with ctx.clock.stage("re-solve"):
        done = made(ctx, rewrites, plan.decisions, exactly=True)
    done = mimicking(ctx, rewrites, done, options)
    with ctx.clock.stage("test"):
        program = as_stored(done.program)
        tested = sampled_error(ctx.teacher, program, ctx.sets.test, seed=ctx.seed)
    warn_if_lost(tested)
    return replace(_result(program, plan, options.opset), output_errors=done.errors, tested=tested)


def _result(program: Program, plan: Plan, opset: int | None) -> Compiled:
    return Compiled(
        plan=plan,
        make_program=lambda: on_cpu(program),
        make_networks=lambda: exported(program, opset),
    )


__all__ = ["apply", "apply_plan", "decided", "with_weights"]
