"""`compile`: from a trained network and calibration samples to a `Compiled`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...passes.mimic.settings import MimicSettings, expected_mimic_s
from ...runtime.measure.backend import Backend, resolve_backend
from ...runtime.measure.conditions import Conditions
from ...runtime.probe.latency_probe import LatencyProbe
from ..data.calibration_set import CalibrationData, CalibrationSet, View
from ..data.shards import read_parts
from ..data.synthetic import said_of
from ..devices.precision import exact_products
from ..export.edit_device import on_cpu
from ..export.edit_types import as_measured, widened
from ..export.exporter import to_onnx
from ..frontend.capture import Model, capture, is_onnx, opened
from ..frontend.model_inputs import needed_inputs
from ..ir.cost import program_cost
from ..ir.edit_folds import fold_parameters
from ..ir.program import Program
from ..metric.given import check_labelled, check_labels, check_metric, check_output, metric_of
from ..metric.metric import Evaluate
from ..metric.top1 import TESTED, Top1
from ..onnx.model_file import OnnxModel, as_model
from ..plan.goal import Goal
from ..processes.joining import agree
from ..processes.sharing import by_first
from ..processes.team import team
from ..processes.working import working
from ..report.contact_sheet import with_picture
from ..report.report import Report
from ..rewrite.context import Context
from ..rewrite.forecast import foresee
from ..rewrite.own_source import own_sources
from ..rewrite.rewrite import Rewrite
from ..store.analysis_store import AnalysisStore, versions
from ..store.cache_folder import kept_in
from ..support.errors import CompilerError, GoalError
from ..support.memory import peak_bytes, warn_if_above
from ..support.progress import Progress, StageClock
from ..support.tally import Tally, counted_into
from ..synthesis.synthesise import Watched, captured, is_asked_for, made_samples
from ..trial.quick_trial import Executor
from .builtin import chosen_rewrites
from .pipeline import Outcome, cost_report, run_pipeline
from .pipeline_settings import PipelineSettings, check_options, with_reference_read
from .report_parts import report_origin, report_parts, work_by_process, work_by_stage
from .result import Compiled as Compiled
from .sealed import networks_of

#: What to do where a goal is not met.
UNMET = "the best result is in the error's .best; ask for less, or allow other rewrites"


def compile(  # noqa: A001 - the public name, used as foldcut.compile
    model: Model,
    calibration: CalibrationData,
    *,
    goal: Goal,
    backend: str | Backend | type[Backend] = "onnxruntime",
    batch: int | None = None,
    rewrites: Sequence[str | Rewrite] | None = None,
    mimic: MimicSettings | bool | None = True,
    views: Sequence[View] | None = None,
    seed: int | None = None,
    progress: bool | Progress = True,
    threads: int | None = None,
    device: str | torch.device | None = None,
    executor: Executor | None = None,
    settings: PipelineSettings | None = None,
    cache: bool | str | Path = True,
    evaluate: Evaluate | Top1 | None = None,
) -> Compiled:
    """Make a trained network faster from unlabelled samples.

    The network is captured as a graph. Blocks are dropped, channels pruned or layers factorised until the goal is
    met, where that costs the least error. The layers affected are then re-solved in closed form on the calibration
    set,

        W' = W + argmin_D ||A D^T - R||_F^2 + ridge * d * ||D||_F^2,     R = T - A W^T,

    with A the rows of inputs that a layer now gets, T the output of the original network and d the mean diagonal of
    the Gram matrix ``A^T A``. Products are in float32, sums and solves in float64. `mimic` trains the result on the
    features of the original. After each of these steps the weights are kept only if they are no worse on the judging
    samples.

    The samples are divided: a tenth judges plans, a tenth tests, the rest fits. The output error that is reported,
    ``sum ||S(x) - T(x)||^2 / sum ||T(x)||^2`` over all outputs, is that of the test samples, which no choice has
    seen. Original and result are measured in turns on the backend, until the 95 % interval of their latency ratio is
    narrow.

    The same seed gives the same network bit for bit on one machine, except where a choice depends on measured times
    (`Latency`, `MaxError`, `MaxLoss`, `search_seconds`, `on_lattice`, `MimicSettings.seconds`). Calls from several
    threads run one after the other. A call that was interrupted continues from its cache. Dropping blocks follows
    PRACTISE (arXiv 2202.07861), pruning channels El Halabi et al. (arXiv 2203.04940).

    Arguments:
        model: An `nn.Module`, a `torch.export.ExportedProgram`, the path of a ``.pt2`` or ``.onnx`` file, or an
            `onnx.ModelProto`. An ONNX model is measured as the file it is, and the result keeps its interface, opset
            and metadata.
        calibration: A few hundred unlabelled inputs: a tensor or array with all samples along dimension 0, a tuple or
            dict of them for several inputs, or an iterable of batches, such as a DataLoader. None or a
            `SynthesisSettings`, which a module needs for the shape of an input, makes them from the network alone.
        goal: `Latency`, `MaxError` or `MaxLoss`, which mix all rewrites; `Macs` or `Parameters`, which prune channels
            by default; `Blocks`, `Channels` or `Ranks`, which use the rewrite of their units.
        backend: Where latency is measured: ``onnxruntime``, ``openvino``, ``torch``, ``tensorrt``, or a backend of
            your own.
        batch: Batch size of the measurement. If None, that of the settings: 1.
        rewrites: Which rewrites to use: ``drop_blocks``, ``prune_channels``, ``factorize``, ``quantize`` or `Rewrite`
            instances. If None, the goal decides: `Latency`, `MaxError` and `MaxLoss` take all, int8 where the backend
            is faster with it.
        mimic: Whether to train on the features of the original: True, False or None, or a `MimicSettings`.
        views: Functions of a batch that the task is invariant to, such as `horizontal_flip`. Each adds a changed copy
            of the samples to fit with. If None, those of the settings: none.
        seed: Seed of all random choices. If None, that of the settings: 0.
        progress: True shows on stderr what is to be done, about how long it takes, and bars. A callable gets (stage,
            done, total).
        threads: Number of CPU threads of the measurement. If None, that of the settings: 1.
        device: Where networks run and layers are solved, such as ``"cuda"``; ``"auto"`` is the accelerator of the
            machine, where there is one. If None, that of the settings: where the network is. Latencies are the
            backend's, and the result is on the CPU.
        executor: Tries plans that do not depend on each other, in a search among several rewrites: a
            `concurrent.futures.Executor`, or what has its ``submit``. If None, that of the settings: this process, or
            those of ``torch.distributed``'s group, which work together wherever there are several.
        settings: How each stage works. Arguments of the call with the name of a setting come before it.
        cache: True keeps the results of analyses in ``$FOLDCUT_CACHE`` or ``~/.cache/foldcut``, a path elsewhere,
            False nowhere.
        evaluate: Your own metric: a function of the network, an `nn.Module` called as the original is, that gives a
            number, larger is better, or one for each sample; or `Top1`. It is read for the original and for few
            networks, shown in the report, picks among plans that are alike, and `MaxLoss` goes by it.

    Returns:
        The `Compiled` network, with its plan and report.

    Raises:
        GoalError: If the goal is not valid, if the rewrites cannot serve it, or if it cannot be met. In the last case
            the best result is in `best`.
        CaptureError: If the model cannot be captured.
        CalibrationError: If the samples cannot be used for this network.
        BackendError: If the backend is not available or refuses the network.
        ExportError: If the result cannot be exported, or the export computes something else.
        CompilerError: If another argument is out of range.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> samples = torch.randn(40, 8)
        >>> options = {"progress": False, "cache": False, "mimic": False}
        >>> out = foldcut.compile(net, samples, goal=foldcut.Channels(0.5), **options)
        >>> print(out.plan.decisions[0])
        keep 16 of 32 units of 0
        >>> out.module(samples[:3]).shape, out.report.macs
        (torch.Size([3, 4]), {'before': 384, 'after': 192})
    """
    check_goal(goal, evaluate)
    check_labelled(evaluate, is_asked_for(calibration))
    check_options(mimic, progress, cache, settings)
    options = (settings or PipelineSettings()).with_executor(executor).with_mimic(mimic)
    options = options.with_arguments(batch=batch, threads=threads, seed=seed, views=views, device=device)
    options = _with_labels(options, evaluate)
    used = chosen_rewrites(goal, rewrites, options)
    resolved_backend = resolve_backend(backend)
    with working("compile", progress, options.memory_bytes, options.processes) as show:
        agree({**versions(), "goals": goal, "backends": resolved_backend.name, **options.told, "rewrites": used})
        clock, began_s = StageClock(show), time.process_time()
        with kept_in(cache) as folder, _collected() as messages, counted_into(Tally()) as done:
            watched = Watched(clock=clock, show=show, seed=options.seed, folder=folder)
            samples, teacher = _read(model, calibration, evaluate, watched)
            agree({"networks": teacher.fingerprint, "samples": samples.fingerprint})
            options = with_reference_read(model, options).at_home(model)
            _check_fixed_batch(teacher, options.batch)
            store = AnalysisStore(folder, basis=[*own_sources(used, goal), *options.where])
            ctx = options.context(teacher, samples, goal, store, clock, show)
            ctx = replace(ctx, metric=metric_of(evaluate, teacher, samples, ctx.sets.test, clock))
            foresee(ctx, used, partial(expected_mimic_s, options.mimic, program_cost(ctx.teacher).macs))
            deployed = as_model(model) if is_onnx(model) else None  # type: ignore[arg-type]
            original = _probe(ctx, options, resolved_backend, deployed)
            with closing(original) as probe, exact_products(options.computes_on):
                options.settle_memory(ctx, measured=True)
                outcome = run_pipeline(ctx, used, probe, options)
            warn_if_above()
        origin = {**report_origin(outcome, model), "processes": work_by_process(done, time.process_time() - began_s)}
        result = Compiled(
            plan=outcome.plan,
            make_program=lambda: on_cpu(outcome.program),
            make_networks=lambda: networks_of(outcome.onnx, outcome.pt2),
            compiled_report=_report(outcome, samples, goal, resolved_backend, messages, origin),
            outcome=outcome,
            output_errors=outcome.output_errors,
            tested=outcome.tested,
        )
    if not outcome.met:
        raise GoalError(goal.unmet(result), best=result, hint=UNMET)
    return result


def _read(
    model: Model, calibration: CalibrationData, evaluate: Evaluate | Top1 | None, watched: Watched
) -> tuple[CalibrationSet, Program]:
    """The samples, made where there are none, and the network. Raises CalibrationError for labels that do not fit."""
    with watched.clock.stage("capture"):
        network = opened(model)
        if not is_asked_for(calibration):
            samples = read_parts(calibration, needed_inputs(network))
            check_labels(evaluate, samples)
            teacher = widened(fold_parameters(capture(network, samples.batch(slice(0, 2)))))
            check_output(evaluate, teacher)
            return samples, teacher
        teacher = captured(network, calibration)
    return by_first(lambda: made_samples(teacher, calibration, watched)), teacher


def _probe(ctx: Context, options: PipelineSettings, backend: Backend, deployed: OnnxModel | None) -> LatencyProbe:
    """The original on the backend."""
    with ctx.clock.stage("export"):
        measured = as_measured(ctx.teacher)
        original = by_first(lambda: to_onnx(measured, opset=options.opset))
    return LatencyProbe(
        measured,
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
def _collected() -> Iterator[list[str]]:
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
        for message in messages if team().first else ():
            warnings.warn(message, stacklevel=4)


def _with_labels(options: PipelineSettings, evaluate: Evaluate | Top1 | None) -> PipelineSettings:
    """The settings with as many samples to test as a labelled set is read on."""
    labelled = isinstance(evaluate, Top1) and options.tested is None
    return replace(options, tested=TESTED) if labelled else options


def check_goal(goal: object, evaluate: Evaluate | Top1 | None) -> None:
    """Raise GoalError for anything but a goal, and for one that is about a metric where there is none; CompilerError
    for a metric that cannot be called."""
    if not isinstance(goal, Goal):
        raise GoalError(
            f"{goal!r} is not a goal",
            hint="pass foldcut.Latency(ratio), Blocks(count), Channels(keep), Macs(ratio), Parameters(ratio), "
            "MaxError(error), MaxLoss(loss) or Ranks(keep=...)",
        )
    check_metric(evaluate, goal)


def _check_fixed_batch(program: Program, batch: int) -> None:
    """A file with a fixed batch size is measured at that size, since it does not run at another."""
    fixed = program.origin.fixed_batch if program.origin is not None else None
    if fixed is not None and fixed != batch:
        raise CompilerError(
            f"the ONNX file fixes its batch size at {fixed}",
            actual=f"batch={batch}",
            hint=f"measure with batch={fixed}, or export the file with a dynamic batch",
        )


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
        goal_share=outcome.goal_share,
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
        file_bytes=outcome.file_bytes,
        calibration={
            "samples": len(samples),
            **outcome.sizes,
            "held_out": options.held_out,
            "ignored": list(samples.ignored),
            "fingerprint": samples.fingerprint,
            "distance": None if outcome.ctx.distance is None else outcome.ctx.distance.to_dict(),
            **with_picture(said_of(samples), samples),
        },
        seconds=outcome.ctx.clock.to_dict(),
        profile=work_by_stage(outcome),
        memory={"peak_bytes": peak_bytes(), "limit_bytes": options.memory_bytes},
        environment=dict(environment) if isinstance(environment, dict) else {},
        seed=options.seed,
        warnings=tuple(messages),
        errors_by_output=outcome.errors_by_output,
        metric=outcome.ctx.metric.to_dict(outcome.program) if outcome.ctx.metric is not None else {},
        **origin,
        **parts,
    )
