"""The public entry points: `compile`, `load_model` and the `Compiled` result."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...passes.mimic.settings import MimicSettings
from ...runtime.measure.backend import Backend, resolve_backend
from ...runtime.measure.conditions import Conditions
from ...runtime.probe.latency_probe import LatencyProbe
from ..data.calibration_set import CalibrationData, CalibrationSet, View
from ..export.exporter import to_onnx
from ..frontend.capture import Model, capture, is_onnx, opened
from ..frontend.model_inputs import needed_inputs
from ..ir.edit_folds import fold_parameters
from ..ir.program import Program
from ..onnx.file import in_one_piece
from ..plan.goal import Goal
from ..report.report import Report
from ..rewrite.context import Context
from ..rewrite.rewrite import Rewrite
from ..store.analysis_store import AnalysisStore
from ..store.cache_folder import kept_in
from ..support.errors import CompilerError, GoalError
from ..support.one_at_a_time import alone
from ..support.progress import Progress, StageClock, rich_progress, silent
from .builtin import chosen_rewrites
from .pipeline import Outcome, cost_report, run_pipeline
from .pipeline_settings import PipelineSettings, check_options, check_run
from .report_parts import report_origin, report_parts
from .result import Compiled as Compiled
from .sealed import ONNX, PT2


def compile(  # noqa: A001 - the public name, used as foldcut.compile
    model: Model,
    calibration: CalibrationData,
    *,
    goal: Goal,
    backend: str | Backend | type[Backend] = "onnxruntime",
    batch: int = 1,
    rewrites: Sequence[str | Rewrite] | None = None,
    mimic: MimicSettings | bool | None = True,
    views: Sequence[View] = (),
    seed: int = 0,
    progress: bool | Progress = True,
    threads: int = 1,
    settings: PipelineSettings | None = None,
    cache: bool | str | Path = True,
) -> Compiled:
    """Make a trained network faster: drop blocks, prune channels or factorise layers, re-solve what is left, mimic the
    original's features, measure.

    `model` is an `nn.Module`, an `ExportedProgram`, the path of a `.pt2` or `.onnx` file, or an `onnx.ModelProto`;
    `calibration` a few hundred unlabelled inputs (a tensor or array with all samples, a tuple or dict for several
    inputs, a DataLoader or generator of batches). What comes in as ONNX is measured against that very file, and goes
    out with its names, dims, opset and metadata. `goal` is `Latency(ratio)` or `Latency(ms=...)`, measured on `backend`
    at `batch` with `threads` CPU threads, or `MaxError(e)`, the fastest within an output error: both mix dropped
    blocks, pruned channels and factorised layers (`cut_jointly`); or `Macs(ratio)` or `Parameters(ratio)`, which prune
    channels by default, until one unit more would miss the goal; or `Blocks(k)`, which drops blocks, or
    `Channels(keep)`, which prunes channels, or `Ranks(keep=...)`, which factorises layers. `rewrites` says which of
    ``drop_blocks``, ``prune_channels`` and ``factorize`` are used: several are mixed, one that the goal cannot use is
    refused; ``("prune_channels", "factorize")`` reaches `Macs` and `Parameters` by both. `mimic` False or None leaves
    out the gradient stage, a `MimicSettings` sets it. `views` such as `foldcut.horizontal_flip` add changed copies of
    the samples, where the task does not care about the change. `progress` True shows bars on stderr; a callable
    receives (stage, done, total).
    `settings` sets how each stage works; batch, threads, seed and views are taken from the arguments. `cache` True
    keeps the results of analyses in ``$FOLDCUT_CACHE`` (else ``~/.cache/foldcut``), a path elsewhere, False nowhere:
    the same call after an interruption goes on where it was and ends with the same network.

    The same seed gives the same network bit for bit on one machine, but for `Latency` and `MaxError`, where the choice
    also depends on measured times. Calls in several threads run one after the other.

    Raises CompilerError: CaptureError, CalibrationError, BackendError, ExportError, or GoalError. When a goal cannot
    be met, the GoalError carries the best result in `.best`.
    """
    check_goal(goal)
    check_run(batch, threads, seed)
    check_options(mimic, views, progress, cache, settings)
    options = replace(settings or PipelineSettings(), batch=batch, threads=threads, seed=seed, views=tuple(views))
    options = options.with_mimic(mimic)
    used = chosen_rewrites(goal, rewrites, options)
    resolved_backend = resolve_backend(backend)
    clock = StageClock()
    with alone(), kept_in(cache) as folder, _progress(progress) as show, _collected_warnings() as messages:
        with clock.stage("capture"):
            network = opened(model)
            samples = CalibrationSet.of(calibration, inputs=needed_inputs(network))
            teacher = fold_parameters(capture(network, samples.batch(slice(0, 2))))
            _check_fixed_batch(teacher, batch)
        ctx = options.context(teacher, samples, goal, AnalysisStore(folder), clock, show)
        deployed = in_one_piece(model) if is_onnx(model) else None  # type: ignore[arg-type]
        with closing(_probe(ctx, options, resolved_backend, deployed)) as probe:
            outcome = run_pipeline(ctx, used, probe, options)
    origin = report_origin(outcome, model)
    result = Compiled(
        plan=outcome.plan,
        make_program=lambda: outcome.program,
        make_networks=lambda: {ONNX: outcome.onnx, PT2: outcome.pt2},
        compiled_report=_report(outcome, samples, goal, resolved_backend, messages, origin),
        outcome=outcome,
        output_errors=outcome.output_errors,
        tested=outcome.tested,
    )
    if not outcome.met:
        raise GoalError(
            goal.unmet(result),
            best=result,
            hint="the best result is in the error's .best; ask for less, or allow other rewrites",
        )
    return result


def _probe(ctx: Context, options: PipelineSettings, backend: Backend, deployed: bytes | None) -> LatencyProbe:
    """The original on the backend."""
    with ctx.clock.stage("export"):
        original = to_onnx(ctx.teacher, opset=options.opset)
    return LatencyProbe(
        ctx.teacher,
        original,
        backend,
        ctx.judge,
        Conditions(
            batch=options.batch,
            threads=options.threads,
            regime=ctx.goal.regime,
            opset=options.opset,
            seed=options.seed,
            folder=ctx.store.root,
        ),
        deployed=deployed,
    )


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """The user warnings raised inside, for the report; they are issued again on leaving, also after an error."""
    messages: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                yield messages
            finally:
                messages += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    finally:
        for message in messages:
            warnings.warn(message, stacklevel=4)


def check_goal(goal: object) -> None:
    """Raise GoalError for what is no goal."""
    if not isinstance(goal, Goal):
        raise GoalError(
            f"{goal!r} is not a goal",
            hint="pass foldcut.Latency(ratio), Blocks(count), Channels(keep), Macs(ratio), Parameters(ratio), "
            "MaxError(error) or Ranks(keep=...)",
        )


def _check_fixed_batch(program: Program, batch: int) -> None:
    """A file with a fixed batch is measured at that batch: it does not run at another."""
    fixed = program.origin.fixed_batch if program.origin is not None else None
    if fixed is not None and fixed != batch:
        raise CompilerError(
            f"the ONNX file fixes its batch size at {fixed}",
            actual=f"batch={batch}",
            hint=f"measure with batch={fixed}, or export the file with a dynamic batch",
        )


def _progress(progress: bool | Progress) -> AbstractContextManager[Progress]:
    if progress is True:
        return rich_progress()
    return nullcontext(silent if progress is False else progress)


def _report(
    outcome: Outcome,
    samples: CalibrationSet,
    goal: Goal,
    backend: Backend,
    messages: Sequence[str],
    origin: Mapping[str, Any],
) -> Report:
    assert outcome.tested is not None
    options = outcome.settings
    macs, parameters = cost_report(outcome)
    latency = outcome.measurement.to_dict(samples=False)
    environment = latency.pop("environment", {})
    with outcome.ctx.clock.stage("report"):
        parts = report_parts(outcome)
    return Report(
        goal=goal.to_dict(),
        goal_words=goal.words(),
        met=outcome.met,
        backend=backend.name,
        batch=options.batch,
        latency=latency,
        macs=macs,
        parameters=parameters,
        output_error=outcome.tested.error,
        test=outcome.tested.to_dict(),
        output_errors=outcome.output_errors,
        decisions=[d.to_dict() for d in outcome.plan.decisions],
        rejects=[str(r) for r in outcome.applied.rejects],
        onnx_difference=outcome.onnx_difference,
        calibration={
            "samples": len(samples),
            **outcome.sizes,
            "held_out": options.held_out,
            "ignored": list(samples.ignored),
            "fingerprint": samples.fingerprint,
        },
        seconds=outcome.ctx.clock.to_dict(),
        environment=dict(environment) if isinstance(environment, dict) else {},
        seed=options.seed,
        warnings=tuple(messages),
        errors_by_output=outcome.errors_by_output,
        **origin,
        **parts,
    )
