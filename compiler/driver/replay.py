"""A plan put into effect again on the network that it was made for, with the first weights or with data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import fx

from ...passes.drop.drop_blocks import drop_blocks
from ...passes.factorize.factorize import factorize_for_timing, factorize_plain
from ...passes.mimic.settings import MimicSettings
from ...passes.prune.prune_channels import prune_channels
from ..analysis.provenance import find_units
from ..data.calibration_set import CalibrationData, CalibrationSet, View
from ..data.output_error import output_error
from ..data.sampled_error import SampledError, sampled_error
from ..export.exporter import to_exported, to_onnx, to_pt2
from ..frontend.capture import Model, capture, opened
from ..frontend.model_inputs import needed_inputs
from ..ir.edit import set_tensors
from ..ir.edit_folds import fold_parameters
from ..ir.program import Batch, Program
from ..plan.plan import Decision, DropBlock, FactorizeLayer, Plan, PruneChannels
from ..store.analysis_store import AnalysisStore
from ..store.cache_folder import kept_in
from ..support.atomic_files import write_folder
from ..support.errors import PlanError
from ..support.one_at_a_time import alone
from ..support.progress import Progress, silent
from ..support.setting_checks import refuse
from .channel_pipeline import removed_units
from .joint_rewrite import judged, replay, solved_at_the_end
from .pipeline_settings import PipelineSettings, check_options, check_seed, joint_settings
from .saved import ONNX, PAGE, PT2, REPORT, check_file, check_plan, digest, with_plan
from .stored_passes import mimicked


@dataclass(frozen=True, kw_only=True, eq=False)
class Replayed:
    """A network that a plan was applied to: `.program`, `.module`, `.onnx` (bytes), `.plan`, `.save(folder)`.

    Where there was data, `output_errors` are the relative output errors after each stage on the samples that judge, and
    `tested` that of the result on samples that were not looked at before.
    """

    program: Program
    plan: Plan
    output_errors: Mapping[str, float]
    tested: SampledError | None = None
    opset: int | None = None

    @property
    def module(self) -> fx.GraphModule:
        """The rewritten network as a torch module; arguments and outputs as the original's."""
        return self.program.module

    @property
    def onnx(self) -> bytes:
        """The rewritten network as an ONNX model."""
        return self.files[ONNX]

    @cached_property
    def files(self) -> dict[str, bytes]:
        """The content of the output folder by file name."""
        exported = to_exported(self.program)
        onnx = to_onnx(self.program, opset=self.opset, exported=exported)
        return with_plan(self.plan, {ONNX: onnx, PT2: to_pt2(exported)})

    def save(self, folder: str | Path) -> Path:
        """Write model.onnx, model.pt2 and plan.json; all or none appear. A report that was there of another network
        goes. Raises OutputError."""
        write_folder(Path(folder), self.files, without=(REPORT, PAGE))
        return Path(folder)


def apply(
    model: Model,
    plan: Plan | str | Path,
    *,
    weights: Model | None = None,
    calibration: CalibrationData | None = None,
    example: Batch | None = None,
    mimic: MimicSettings | bool | None = True,
    views: Sequence[View] = (),
    seed: int = 0,
    settings: PipelineSettings | None = None,
    progress: Progress = silent,
    cache: bool | str | Path = True,
) -> Replayed:
    """Put the decisions of a plan into effect on the network that it was made for.

    `plan` is a `Plan` or the path of a plan.json. With `weights` (the model.pt2 that was saved with the plan, or any
    network of that shape; without `calibration` the model.pt2 beside the plan) the result is the network of the first
    time, and no data is needed. With `calibration` alone the layers are solved again, and mimicked unless `mimic` is
    False, as `compile` does; the units that the plan keeps, the blocks and the ranks stay its own, and `settings` say
    how they are solved. With both the
    weights are taken as they are, and the calibration set only says what the inputs look like, as `example`, a batch of
    inputs, does for a module without one. `cache` as in `compile`: what an interrupted call had solved is kept.

    Raises PlanError when the plan was made for another network or other weights, when the weights do not fit, or when
    there are neither weights nor data; OutputError when the model.pt2 beside the plan is not the one that was saved
    with it; CaptureError and CalibrationError; CompilerError when settings of two rewrites contradict each other.
    """
    check_options(mimic, views, progress, cache, settings)
    check_seed(seed)
    if isinstance(progress, bool):
        refuse("progress", progress, "a function of (stage, done, total)")
    made = plan if isinstance(plan, Plan) else Plan.load(plan)
    if weights is None and calibration is None and not isinstance(plan, Plan):
        weights = _beside(Path(plan), made)
    elif isinstance(weights, (str, Path)):
        _warn_of_others(Path(weights), made)
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
        made.check(teacher.fingerprint)
        opset = settings.opset if settings is not None else None
        if weights is not None:
            program = with_weights(apply_plan(teacher, made), capture(weights, inputs))
            return Replayed(program=program, plan=made, output_errors={}, opset=opset)
        assert samples is not None
        _check_ranks(teacher, made.decisions)
        options = replace(settings or PipelineSettings(), seed=seed, views=tuple(views)).with_mimic(mimic)
        with kept_in(cache) as folder:
            return _solved(teacher, made, samples, options, progress, AnalysisStore(folder))


def _check_ranks(teacher: Program, decisions: Sequence[Decision]) -> None:
    """Raise RewriteError for a layer, a scheme or ranks that are not there, as without data: before anything is solved.
    A plan may have been edited."""
    ranks = [d for d in decisions if isinstance(d, FactorizeLayer)]
    if ranks:
        factorize_for_timing(_without_factors(teacher, decisions), ranks)


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


def apply_plan(program: Program, plan: Plan) -> Program:
    """`decided` with a plan's decisions, on the network that it was made for. Raises PlanError when the plan was made
    for another network or other weights."""
    with alone():
        if program.fingerprint != plan.fingerprint:
            program = fold_parameters(program)  # as compile does before it plans
        plan.check(program.fingerprint)
        return decided(program, plan.decisions)


def decided(program: Program, decisions: Sequence[Decision]) -> Program:
    """Bypass regions, remove channels, factorise layers. The weights stay those of `program`, and factors are the best
    approximation of these: re-solve them with a calibration set, or load trained ones.

    Raises PlanError and RewriteError when a decision is about what the program does not have.
    """
    program = _without_factors(program, decisions)
    return factorize_plain(program, [d for d in decisions if isinstance(d, FactorizeLayer)])


def _without_factors(program: Program, decisions: Sequence[Decision]) -> Program:
    """The program with its regions bypassed and its channels removed."""
    program = drop_blocks(program, [d for d in decisions if isinstance(d, DropBlock)])
    cuts = [d for d in decisions if isinstance(d, PruneChannels)]
    if cuts:
        provenance = find_units(program)
        program = prune_channels(provenance, removed_units(provenance, cuts)).program
    return program


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


def _solved(
    teacher: Program,
    plan: Plan,
    samples: CalibrationSet,
    options: PipelineSettings,
    progress: Progress,
    store: AnalysisStore,
) -> Replayed:
    kinds = {DropBlock: "drop_blocks", PruneChannels: "prune_channels", FactorizeLayer: "factorize"}
    solved_at_the_end(joint_settings(options), {kinds[type(d)] for d in plan.decisions})
    sets = options.split(samples, teacher)
    fit, held_out = sets.fit, sets.judge
    solve = fit.take(slice(0, options.solve_samples))
    done = replay(teacher, plan.decisions, solve, joint_settings(options), progress=progress, store=store)
    program, errors = judged(teacher, done, held_out)
    if options.mimic is not None:
        program = mimicked(
            store,
            teacher,
            program,
            fit,
            held_out,
            kept=done.kept,
            settings=options.mimic,
            seed=options.seed,
            progress=progress,
        )
        errors["mimicked"] = output_error(teacher, program, held_out)
    tested = sampled_error(teacher, program, sets.test, seed=options.seed)
    return Replayed(program=program, plan=plan, output_errors=errors, tested=tested, opset=options.opset)


__all__ = ["Replayed", "apply", "apply_plan", "decided", "with_weights"]
