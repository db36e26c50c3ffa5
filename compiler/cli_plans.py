"""`foldcut sweep` and `foldcut apply`: many goals at once, and a plan put into effect again."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from torch import nn

from .atomic import check_writable
from .calibration_set import horizontal_flip
from .cli_goals import read_goals, read_rewrites, read_settings, used_rewrites
from .cli_options import (
    BackendOption,
    BatchOption,
    CacheOption,
    CalibOption,
    DebugOption,
    Exit,
    FlipOption,
    FreshOption,
    IgnoreOption,
    JsonOption,
    KeyOption,
    LimitOption,
    MeanOption,
    MimicOption,
    ModelArgument,
    MultipleOption,
    QuietOption,
    RewritesOption,
    SearchOption,
    SeedOption,
    ShapeOption,
    SizeOption,
    StdOption,
    ThreadsOption,
    WeightsOption,
    guarded,
    out,
    read_cache,
    read_samples,
    read_shape,
)
from .errors import CaptureError
from .model_source import load_model
from .progress import rich_progress, silent
from .replay import Replayed, apply
from .sweep import Sweep, SweepPoint, sweep


def sweep_command(
    model: ModelArgument,
    calib: CalibOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for a folder of each goal, and sweep.json.")],
    latency: Annotated[
        str | None, typer.Option(metavar="R,R", help="Latency goals: ratios, or milliseconds such as 2.5ms.")
    ] = None,
    macs: Annotated[str | None, typer.Option(metavar="R,R", help="Goals in multiply-accumulates.")] = None,
    rewrites: RewritesOption = None,
    multiple_of: MultipleOption = None,
    ignore: IgnoreOption = None,
    search_seconds: SearchOption = None,
    backend: BackendOption = "onnxruntime",
    batch: BatchOption = 1,
    threads: ThreadsOption = 1,
    weights: WeightsOption = None,
    key: KeyOption = None,
    mean: MeanOption = "0,0,0",
    std: StdOption = "1,1,1",
    size: SizeOption = None,
    limit: LimitOption = None,
    flip: FlipOption = False,
    mimic: MimicOption = True,
    seed: SeedOption = 0,
    cache: CacheOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile MODEL to several goals from one set of analyses, and show which results no other beats.

    Every result is written as soon as it is there. Exit code 3 when a goal was not met.
    """

    def work() -> None:
        goals, allowed = read_goals(latency, macs), read_rewrites(rewrites)
        check_writable(output)
        samples = read_samples(calib, key=key, size=size, mean=mean, std=std, limit=limit)

        def written(point: SweepPoint) -> None:
            if point.compiled is not None:
                point.compiled.save(output / point.name)

        found = sweep(
            load_model(model, weights),
            samples,
            goals=goals,
            backend=backend,
            batch=batch,
            threads=threads,
            mimic=mimic,
            views=(horizontal_flip,) if flip else (),
            seed=seed,
            rewrites=allowed,
            settings=read_settings(multiple_of, ignore or [], used_rewrites(goals[0], allowed), search_seconds),
            progress=not (as_json or quiet),
            cache=read_cache(cache, fresh),
            each=written,
        )
        found.save_index(output)
        if as_json:
            print(json.dumps(found.to_dict()))
        elif not quiet:
            _show(found)
            out.print(f"wrote {output}/", highlight=False)
        if not all(point.met for point in found.points):
            raise typer.Exit(Exit.NOT_MET)

    guarded(work, debug=debug, interrupted="finished goals are in the folder, and the same command goes on from there")


def apply_command(
    plan: Annotated[Path, typer.Argument(help="A plan.json that foldcut wrote.")],
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for model.onnx, model.pt2 and plan.json.")],
    calib: Annotated[
        Path | None, typer.Option(help="Unlabelled inputs to solve the layers again with: .npy, .npz, .pt or a folder.")
    ] = None,
    solved: Annotated[
        Path | None,
        typer.Option(help="The model.pt2 of the first time, with its weights.", show_default="the one beside PLAN"),
    ] = None,
    weights: WeightsOption = None,
    input_shape: ShapeOption = None,
    key: KeyOption = None,
    mean: MeanOption = "0,0,0",
    std: StdOption = "1,1,1",
    size: SizeOption = None,
    limit: LimitOption = None,
    flip: FlipOption = False,
    mimic: MimicOption = True,
    seed: SeedOption = 0,
    cache: CacheOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Put PLAN into effect on MODEL, the network that it was made for: without data, with the weights that were saved
    beside the plan; with --calib, solved again."""

    def work() -> None:
        check_writable(output)
        samples: Any = None
        if calib is not None:
            samples = read_samples(calib, key=key, size=size, mean=mean, std=std, limit=limit, input_shape=input_shape)
        with nullcontext(silent) if as_json or quiet else rich_progress() as progress:
            loaded = load_model(model, weights)
            if calib is None and input_shape is None and isinstance(loaded, nn.Module):
                raise CaptureError("the input shape is not known", hint="give --input-shape C,H,W or --calib DATA")
            made = apply(
                loaded,
                plan,
                weights=solved,
                calibration=samples,
                example=None if input_shape is None else _zeros(input_shape),
                mimic=mimic,
                views=(horizontal_flip,) if flip else (),
                seed=seed,
                progress=progress,
                cache=read_cache(cache, fresh),
            )
            made.save(output)
        if as_json:
            print(json.dumps(_described(made)))
        elif not quiet:
            for decision in made.plan.decisions:
                out.print(str(decision), markup=False, highlight=False)
            for stage, error in made.output_errors.items():
                out.print(f"output error (held out), {stage}: {error:.4f}", highlight=False)
            out.print(f"wrote {output}/ ({', '.join(made.files)})", highlight=False)

    guarded(work, debug=debug)


def _zeros(shape: str) -> Any:
    import torch

    return torch.zeros(2, *read_shape(shape))


def _described(made: Replayed) -> dict[str, Any]:
    return {"plan": made.plan.to_dict(), "output_errors": dict(made.output_errors)}


def _show(found: Sweep) -> None:
    table = Table("goal", "latency ratio", "95 %", "output error", "decisions", "", box=None, header_style="bold")
    front = {point.name for point in found.front}
    for point in found.points:
        if point.compiled is None:
            table.add_row(str(point.goal), "not reached", "", "", "", point.reason)
            continue
        report = point.compiled.report
        latency = report.latency
        notes = [] if point.met else ["not met"]
        notes += [] if point.name in front else ["another is as fast and nearer"]
        table.add_row(
            str(point.goal),
            f"{latency['ratio']:.3f}",
            f"{latency['low']:.3f} to {latency['high']:.3f}",
            f"{report.output_error:.4f}",
            str(len(report.decisions)),
            ", ".join(notes),
        )
    out.print(table)
