"""`foldcut sweep` and `foldcut apply`: many goals at once, and a plan put into effect again."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from torch import nn

from ..data.calibration_set import horizontal_flip
from ..driver.replay import Replayed, apply
from ..driver.sweep import Sweep, SweepPoint, sweep
from ..frontend.model_source import load_model
from ..support.atomic_files import check_writable
from ..support.errors import CaptureError
from ..support.progress import rich_progress, silent
from ..support.strict_json import json_text
from .goals import for_every_goal, read_goals, read_rewrites, read_settings
from .options import (
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
    RegimeOption,
    RewritesOption,
    SearchOption,
    SeedOption,
    ShapeOption,
    SizeOption,
    StdOption,
    ThreadsOption,
    WeightsOption,
    after_interrupt,
    guarded,
    out,
    read_cache,
    read_samples,
    read_shape,
    sample_reader,
    say,
)
from .tables import plain_table, show_line


def sweep_command(
    model: ModelArgument,
    calib: CalibOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for a folder of each goal, and sweep.json.")],
    latency: Annotated[
        str | None, typer.Option(metavar="R,R", help="Latency goals: ratios, or milliseconds such as 2.5ms.")
    ] = None,
    macs: Annotated[str | None, typer.Option(metavar="R,R", help="Goals in multiply-accumulates.")] = None,
    regime: RegimeOption = None,
    rewrites: RewritesOption = None,
    multiple_of: MultipleOption = None,
    ignore: IgnoreOption = None,
    search_seconds: SearchOption = None,
    backend: BackendOption = "onnxruntime",
    batch: BatchOption = 1,
    threads: ThreadsOption = 1,
    weights: WeightsOption = None,
    key: KeyOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
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
        goals = read_goals(latency, macs, regime)
        allowed = read_rewrites(rewrites, goals)
        check_writable(output)
        samples = read_samples(calib, key=key, size=size, mean=mean, std=std, limit=limit)
        loaded = load_model(model, weights)
        settings = read_settings(multiple_of, ignore or [], search_seconds)
        found = sweep(
            loaded,
            samples,
            goals=goals,
            backend=backend,
            batch=batch,
            threads=threads,
            mimic=mimic,
            views=(horizontal_flip,) if flip else (),
            seed=seed,
            rewrites=allowed,
            settings=for_every_goal(settings, goals, loaded, samples),
            progress=not (as_json or quiet),
            cache=read_cache(cache, fresh),
            each=_Written(output),
        )
        if as_json:
            print(json_text(found.to_dict()))
        elif not quiet:
            _show(found)
            show_line(f"wrote {output}/", out)
        if not all(point.met for point in found.points):
            raise typer.Exit(Exit.NOT_MET)

    guarded(work, debug=debug, interrupted=after_interrupt(fresh, "finished goals are in the folder"))


class _Written:
    """Puts every point of a sweep into its folder as it comes, with the index of those that are there, and says which
    goals were not met. As long as there is nothing to keep it waits: then an error says all, and nothing is written."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._points: list[SweepPoint] = []
        self._waiting: list[SweepPoint] = []

    def __call__(self, point: SweepPoint) -> None:
        self._points.append(point)
        self._waiting.append(point)
        if point.compiled is not None:
            point.compiled.save(self._output / point.name)
        if all(p.compiled is None for p in self._points):
            return
        Sweep(points=tuple(self._points)).save_index(self._output)
        for told in self._waiting:
            if not told.met:
                say(told.reason if str(told.goal) in told.reason else f"{told.goal}: {told.reason}", head="goal")
        self._waiting.clear()


def apply_command(
    plan: Annotated[Path, typer.Argument(help="A plan.json that foldcut wrote.")],
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for model.onnx, model.pt2 and plan.json.")],
    calib: Annotated[
        Path | None,
        typer.Option(
            help="Unlabelled inputs (.npy, .npz, .pt or a folder) to solve the layers again with; with --solved an "
            "example of the inputs only."
        ),
    ] = None,
    solved: Annotated[
        Path | None,
        typer.Option(
            help="The model.pt2 of the first time: its weights are taken, nothing is solved.",
            show_default="the one beside PLAN, unless there is --calib",
        ),
    ] = None,
    weights: WeightsOption = None,
    input_shape: ShapeOption = None,
    key: KeyOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
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
    beside the plan; with --calib, solved again.

    A module whose inputs are not one array of floats takes both --solved and --calib: weights, and inputs' form.
    """

    def work() -> None:
        check_writable(output)
        read = sample_reader(calib, key=key, size=size, mean=mean, std=std, input_shape=input_shape)
        samples = None if read is None else read(limit)
        with nullcontext(silent) if as_json or quiet else rich_progress() as progress:
            loaded = load_model(model, weights)
            if calib is None and input_shape is None and isinstance(loaded, nn.Module):
                raise CaptureError(
                    "the input shape is not known",
                    hint="give --input-shape C,H,W, or --solved model.pt2 and --calib DATA; --calib alone solves again",
                )
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
            print(json_text(_described(made)))
        elif not quiet:
            for decision in made.plan.decisions:
                show_line(str(decision), out)
            for stage, error in made.output_errors.items():
                show_line(f"output error (judged), {stage}: {error:.4f}", out)
            if made.tested is not None:
                show_line(f"output error: {made.tested}", out)
            show_line(f"wrote {output}/ ({', '.join(made.files)})", out)

    guarded(work, debug=debug, interrupted=after_interrupt(fresh))


def _zeros(shape: str) -> Any:
    import torch

    return torch.zeros(2, *read_shape(shape))


def _described(made: Replayed) -> dict[str, Any]:
    tested = None if made.tested is None else made.tested.to_dict()
    return {"plan": made.plan.to_dict(), "output_errors": dict(made.output_errors), "test": tested}


def _show(found: Sweep) -> None:
    table = plain_table("goal", "latency ratio", "95 %", "output error", "decisions", "")
    front = {point.name for point in found.front}
    for point in found.points:
        if point.compiled is None:
            table.add_row(str(point.goal), "not reached", "", "", "", escape(point.reason))
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
