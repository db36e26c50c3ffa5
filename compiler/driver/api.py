"""The public entry points: `compile`, `load_model` and the `Compiled` result."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import fx

from ...passes.mimic.settings import MimicSettings
from ...passes.prune.channel_budget import ChannelLimits
from ...runtime.measure.backend import Backend, resolve_backend
from ..data.calibration_set import CalibrationData, CalibrationSet, View
from ..frontend.capture import Model, capture, is_onnx, opened
from ..frontend.model_inputs import needed_inputs
from ..ir.edit_folds import fold_parameters
from ..ir.program import Program
from ..onnx.file import in_one_piece
from ..plan.plan import Blocks, CountedGoal, DropBlock, FactorizeLayer, Goal, MaxError, Parameters, Plan, PruneChannels
from ..report.page import page_or_reason
from ..report.report import Report, unit_groups
from ..store.analysis_store import AnalysisStore
from ..store.cache_folder import kept_in
from ..support.atomic_files import write_folder
from ..support.errors import CompilerError, GoalError
from ..support.one_at_a_time import alone
from ..support.progress import Progress, StageClock, rich_progress, silent
from ..support.setting_checks import check_texts
from ..support.strict_json import json_file
from .pipeline import Outcome, cost_report, run_pipeline
from .pipeline_settings import PipelineSettings, check_options, check_run, default_rewrites, rewrites_for
from .report_parts import report_origin, report_parts
from .saved import ONNX, PAGE, PT2, REPORT, with_plan

REWRITES = ("drop_blocks", "prune_channels", "factorize")


@dataclass(frozen=True, kw_only=True, eq=False)
class Compiled:
    """A compiled network: `.module` (runs any batch size), `.program`, `.plan`, `.report`, `.onnx` (bytes) and
    `.save(folder)`."""

    outcome: Outcome
    report: Report

    @property
    def module(self) -> fx.GraphModule:
        """The rewritten network as a torch module; arguments and outputs as the original's."""
        return self.outcome.program.module

    @property
    def program(self) -> Program:
        return self.outcome.program

    @property
    def plan(self) -> Plan:
        return self.outcome.plan

    @property
    def onnx(self) -> bytes:
        """The rewritten network as an ONNX model."""
        return self.outcome.onnx

    @cached_property
    def files(self) -> dict[str, bytes]:
        """The content of the output folder by file name."""
        return {
            **with_plan(self.plan, {ONNX: self.outcome.onnx, PT2: self.outcome.pt2}),
            REPORT: json_file(self.report.to_dict()),
            PAGE: page_or_reason(self.report.to_dict()).encode(errors="backslashreplace"),
        }

    def save(self, folder: str | Path) -> Path:
        """Write model.onnx, model.pt2, plan.json, report.json and report.html; all or none appear. Raises OutputError
        when they cannot be written."""
        write_folder(Path(folder), self.files)
        return Path(folder)


def compile(  # noqa: A001 - the public name, used as foldcut.compile
    model: Model,
    calibration: CalibrationData,
    *,
    goal: Goal,
    backend: str | Backend | type[Backend] = "onnxruntime",
    batch: int = 1,
    rewrites: Sequence[str] | None = None,
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
    channels unless told otherwise, until one unit more would miss the goal; or `Blocks(k)`, which drops blocks, or
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
    check_arguments(goal, rewrites, batch, threads, seed)
    check_options(mimic, views, progress, cache, settings)
    resolved_backend = resolve_backend(backend)
    clock = StageClock()
    with alone(), kept_in(cache) as folder, _progress(progress) as show, _collected_warnings() as messages:
        with clock.stage("capture"):
            network = opened(model)
            samples = CalibrationSet.of(calibration, inputs=needed_inputs(network))
            teacher = fold_parameters(capture(network, samples.batch(slice(0, 2))))
            _check_fixed_batch(teacher, batch)
        options = replace(settings or PipelineSettings(), batch=batch, threads=threads, seed=seed, views=tuple(views))
        options = options.with_mimic(mimic)
        allowed = default_rewrites(goal) if rewrites is None else _usable(goal, rewrites)
        outcome = run_pipeline(
            teacher,
            samples,
            goal,
            resolved_backend,
            settings=options,
            rewrites=allowed,
            deployed=in_one_piece(model) if is_onnx(model) else None,  # type: ignore[arg-type]
            clock=clock,
            progress=show,
            store=AnalysisStore(folder),
        )
    origin = report_origin(outcome, model, allowed)
    result = Compiled(outcome=outcome, report=_report(outcome, samples, goal, resolved_backend, messages, origin))
    if not outcome.met:
        raise GoalError(
            _unmet(goal, outcome),
            best=result,
            hint="the best result is in the error's .best; ask for less, or allow other rewrites",
        )
    return result


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


def check_arguments(goal: Goal, rewrites: Sequence[str] | None, batch: int, threads: int, seed: int = 0) -> None:
    """Raise GoalError for what is no goal or cannot be reached by the rewrites, CompilerError for the rest."""
    if not isinstance(goal, Goal):
        raise GoalError(
            f"{goal!r} is not a goal",
            hint="pass foldcut.Latency(ratio), Blocks(count), Channels(keep), Macs(ratio), Parameters(ratio), "
            "MaxError(error) or Ranks(keep=...)",
        )
    check_run(batch, threads, seed)
    if rewrites is None:
        return
    check_texts("rewrites", rewrites)
    unknown = [r for r in rewrites if r not in REWRITES]
    if unknown or not rewrites:
        raise CompilerError(f"unknown rewrites {list(rewrites)}", expected=f"some of {list(REWRITES)}")
    if not set(rewrites_for(goal)).intersection(rewrites):
        needed = " or ".join(rewrites_for(goal))
        raise GoalError(
            f"the goal {goal} is reached by {needed}, which rewrites={list(rewrites)} leaves out",
            hint=f"add {needed} to rewrites, or leave rewrites out",
        )
    ignored = [r for r in rewrites if r not in rewrites_for(goal)]
    if ignored:
        raise GoalError(
            f"{' and '.join(ignored)} cannot be used towards {goal}",
            hint=f"leave it out of rewrites: this goal is reached by {' or '.join(rewrites_for(goal))}",
        )


def _usable(goal: Goal, rewrites: Sequence[str]) -> tuple[str, ...]:
    """Those of the rewrites that reach the goal."""
    return tuple(r for r in rewrites_for(goal) if r in rewrites)


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


def _unmet(goal: Goal, outcome: Outcome) -> str:
    dropped = len(outcome.plan.decisions)
    if isinstance(goal, Blocks):
        return f"only {dropped} of {goal.count} blocks can be dropped"
    if isinstance(goal, CountedGoal):
        macs, parameters = cost_report(outcome)
        cost = parameters if isinstance(goal, Parameters) else macs
        ratio = cost["after"] / max(1, cost["before"])
        return f"{goal} cannot be met: with all that may be cut at its least, the ratio is {ratio:.3f}"
    if isinstance(goal, MaxError):
        return f"{goal} is not met: the least that was found is {outcome.tested}"
    m = outcome.measurement
    reached = f"{m.ratio:.3f} ({m.low:.3f} to {m.high:.3f})"
    kinds = ((DropBlock, "regions dropped"), (PruneChannels, "groups pruned"), (FactorizeLayer, "layers factorised"))
    counts = [(sum(isinstance(d, kind) for d in outcome.plan.decisions), text) for kind, text in kinds]
    done = " and ".join(f"{count} {text}" for count, text in counts if count) or "nothing done"
    return f"{goal} is not met: with {done}, the ratio is {reached}"


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
    with outcome.clock.stage("report"):
        parts = report_parts(outcome, samples)
    return Report(
        goal=goal.to_dict(),
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
        rejects=[str(r) for r in outcome.rejects],
        groups=_groups(outcome),
        multiple_of=None if outcome.provenance is None else _multiple(goal, options.channels.limits),
        onnx_difference=outcome.onnx_difference,
        calibration={
            "samples": len(samples),
            **outcome.sizes,
            "held_out": options.held_out,
            "ignored": list(samples.ignored),
            "fingerprint": samples.fingerprint,
        },
        seconds=outcome.clock.to_dict(),
        environment=dict(environment) if isinstance(environment, dict) else {},
        seed=options.seed,
        warnings=tuple(messages),
        errors_by_output=outcome.errors_by_output,
        **origin,
        **parts,
    )


def _multiple(goal: Goal, limits: ChannelLimits) -> int:
    """What channel counts went to multiples of: goals that are counted go unit by unit where no multiple is given."""
    return 1 if isinstance(goal, CountedGoal) and limits.multiple_of is None else limits.multiple


def _groups(outcome: Outcome) -> list[dict[str, Any]]:
    """The unit groups, with the error curve of each selection and what the greedy choice is sure to reach."""
    if outcome.provenance is None:
        return []
    groups = unit_groups(outcome.provenance, outcome.plan.decisions)
    for group in groups:
        selection = outcome.selections.get(group["group"])
        if selection is not None:
            group["errors"] = [round(float(e), 6) for e in selection.errors]
            group["submodularity_ratio"], group["guarantee"] = selection.ratio_bound, selection.guarantee
    return groups
