"""The command line: `foldcut compile`, `sweep`, `apply`, `inspect`, `measure`, `verify` and `demo`.

Exit codes: see `cli_options.Exit`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from ..data.calibration_set import CalibrationSet, horizontal_flip
from ..driver.api import Compiled
from ..driver.api import compile as compile_model
from ..driver.saved import PAGE
from ..frontend.capture import Model, capture
from ..frontend.model_source import load_model
from ..goals.latency import Latency
from ..ir.edit_folds import fold_parameters
from ..onnx.compare_files import compare_onnx, random_samples
from ..starting import started
from ..support.atomic_files import check_writable
from ..support.errors import CaptureError, GoalError
from ..support.progress import rich_progress, silent
from ..support.strict_json import json_text
from .goals import read_goal, read_rewrites, read_settings
from .measure import MeasureWish, measure_files, read_sizes, show_measured
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
from .plans import apply_command, sweep_command
from .tables import describe, show_comparison, show_groups, show_line, show_regions, show_report

app = typer.Typer(
    name="foldcut",
    help="Make a trained network faster from the network, a few hundred unlabelled inputs and a latency goal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)


@app.command("compile")
def compile_command(
    model: ModelArgument,
    calib: CalibOption,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for model.onnx, model.pt2, plan.json, report.json, report.html."),
    ],
    latency: Annotated[
        str | None,
        typer.Option(metavar="R", help="Goal: measured latency at most R times the original's, or `2.5ms` in all."),
    ] = None,
    blocks: Annotated[int | None, typer.Option(metavar="K", help="Goal: drop K blocks.")] = None,
    keep: Annotated[
        float | None, typer.Option(metavar="S", help="Goal: keep a share S of the channels of every group.")
    ] = None,
    macs: Annotated[
        float | None, typer.Option(metavar="R", help="Goal: at most R times the original's multiply-accumulates.")
    ] = None,
    parameters: Annotated[
        float | None, typer.Option(metavar="R", help="Goal: at most R times the original's parameters.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(metavar="E", help="Goal: as fast as a relative output error of E allows.")
    ] = None,
    ranks: Annotated[
        float | None, typer.Option(metavar="S", help="Goal: factorise every layer to a share S of its full rank.")
    ] = None,
    regime: RegimeOption = None,
    rewrites: RewritesOption = None,
    multiple_of: MultipleOption = None,
    ignore: IgnoreOption = None,
    search_seconds: SearchOption = None,
    backend: BackendOption = "onnxruntime",
    batch: BatchOption = 1,
    threads: ThreadsOption = 1,
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
    """Compile MODEL to a goal and write the output folder."""

    def work() -> None:
        goal = read_goal(latency, blocks, keep, macs, parameters, max_error, ranks, regime)
        allowed = read_rewrites(rewrites, [goal])
        check_writable(output)
        samples = read_samples(calib, key=key, size=size, mean=mean, std=std, limit=limit, input_shape=input_shape)
        result, unmet = _compile(
            load_model(model, weights),
            samples,
            goal=goal,
            backend=backend,
            batch=batch,
            threads=threads,
            mimic=mimic,
            views=(horizontal_flip,) if flip else (),
            seed=seed,
            rewrites=allowed,
            settings=read_settings(multiple_of, ignore or [], search_seconds),
            progress=not (as_json or quiet),
            cache=read_cache(cache, fresh),
        )
        result.save(output)
        if as_json:
            print(json_text(result.report.to_dict()))
        elif not quiet:
            show_report(result.report, out)
            _say_written(output, result)
        if unmet is not None:
            _end_unmet(unmet)

    guarded(work, debug=debug, interrupted=after_interrupt(fresh))


def _say_written(output: Path, result: Compiled) -> None:
    """What was written where, the page that people open last."""
    show_line(f"wrote {output}/ ({', '.join(result.files)})", out)
    show_line(f"open {output / PAGE} in a browser", out)


def _end_unmet(unmet: GoalError) -> NoReturn:
    """The end of a command whose best result is written and does not reach the goal."""
    say(unmet.message, head=unmet.stage)
    raise typer.Exit(Exit.NOT_MET)


def _compile(model: Model, samples: CalibrationSet, **options: Any) -> tuple[Compiled, GoalError | None]:
    try:
        return compile_model(model, samples, **options), None
    except GoalError as unmet:
        if isinstance(unmet.best, Compiled):
            return unmet.best, unmet
        raise


@app.command()
def inspect(
    model: ModelArgument,
    weights: WeightsOption = None,
    input_shape: ShapeOption = None,
    calib: Annotated[Path | None, typer.Option(help="A calibration set to take the input shape from.")] = None,
    key: KeyOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    size: SizeOption = None,
    graph: Annotated[bool, typer.Option(help="Print the graph as text.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the removable regions and the unit groups of MODEL, their cost, and what was left alone and why."""

    def work() -> None:
        read = sample_reader(calib, key=key, size=size, mean=mean, std=std, input_shape=input_shape)
        loaded = load_model(model, weights)
        program = fold_parameters(capture(loaded, _example(loaded, input_shape, read)))
        if graph:
            print(program.text(), end="")
            return
        found = describe(program)
        if as_json:
            print(json_text(found))
        else:
            show_regions(found, out)
            show_groups(found, out)

    guarded(work, debug=debug)


@app.command()
def measure(
    before: Annotated[Path, typer.Argument(help="ONNX file of the original.")],
    after: Annotated[Path, typer.Argument(help="ONNX file to compare with it.")],
    backend: Annotated[str, typer.Option(help="Where to run.")] = "onnxruntime",
    batch: Annotated[
        int | None, typer.Option(help="Batch size; without it 1, or the batch that a file fixes.", show_default=False)
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    inputs: Annotated[
        Path | None, typer.Option(help="Real inputs: .npy, .npz (one array for each input), .pt or a folder of images.")
    ] = None,
    key: KeyOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    size: SizeOption = None,
    dim: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="Size of a dynamic dimension; may be repeated.")
    ] = None,
    regime: RegimeOption = None,
    self_check: Annotated[bool, typer.Option("--self-check", help="First measure BEFORE against itself.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of made-up inputs and of the order.")] = 0,
    samples: Annotated[bool, typer.Option("--samples", help="With --json: every pair as well.")] = False,
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    debug: DebugOption = False,
) -> None:
    """Measure AFTER against BEFORE over fresh loads of both, in turns; ratio = after / before."""

    def work() -> None:
        wish = MeasureWish(
            backend=backend,
            batch=batch,
            threads=threads,
            seed=seed,
            inputs=sample_reader(inputs, key=key, size=size, mean=mean, std=std),
            sizes=read_sizes(dim or []),
            self_check=self_check,
            regime="cold" if regime == "cold" else "hot",
        )
        with nullcontext(silent) if as_json or quiet else rich_progress() as progress:
            found = measure_files(before, after, wish, progress=progress)
        if as_json:
            print(json_text(found.to_dict(samples=samples)))
        else:
            show_measured(found, out)

    guarded(work, debug=debug)


@app.command()
def verify(
    before: Annotated[Path, typer.Argument(help="ONNX file of the original.")],
    after: Annotated[Path, typer.Argument(help="ONNX file to compare with it.")],
    inputs: Annotated[
        Path | None, typer.Option(help="Samples: .npy, .npz (one array for each input), .pt or a folder of images.")
    ] = None,
    key: KeyOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    size: SizeOption = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest difference, relative to an output's largest entry.")
    ] = 1e-4,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples at once.")] = None,
    limit: LimitOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of made-up inputs, where none are given.")] = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare what two ONNX files compute, and their inputs and outputs. Exit code 3 when they differ."""

    def work() -> None:
        read = sample_reader(inputs, key=key, size=size, mean=mean, std=std)
        samples = random_samples(before, limit or 8, seed) if read is None else read(limit)
        found = compare_onnx(before, after, samples, batch=batch)
        if as_json:
            print(json_text({**found.to_dict(), "same": found.same(tolerance)}))
        else:
            show_comparison(found, tolerance, out)
        if not found.same(tolerance):
            raise typer.Exit(Exit.NOT_MET)

    guarded(work, debug=debug)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the result.")] = Path("demo-output"),
    goal: Annotated[float, typer.Option("--latency", help="Latency goal.")] = 0.6,
    rewrites: Annotated[str | None, typer.Option(help="Rewrites that may be used, as for compile.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of training and compile.")] = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a small residual network on handwritten digits, compile it to a latency goal, show before and after. Exit
    code 3 when the goal was not met."""

    def work() -> None:
        from .demo import run_demo

        check_writable(output)
        asked, console = Latency(goal), Console(quiet=True) if quiet else out
        allowed = read_rewrites(rewrites, [asked])
        result, unmet = run_demo(asked, rewrites=allowed, seed=seed, progress=not quiet, console=console)
        result.save(output)
        if not quiet:
            _say_written(output, result)
        if unmet is not None:
            _end_unmet(unmet)

    guarded(work, debug=debug)


def _example(model: Model, shape: str | None, read: Callable[[int | None], CalibrationSet] | None) -> Any:
    import torch

    if read is not None:
        return read(2).batch(slice(None))
    if shape is not None:
        return torch.randn(2, *read_shape(shape), generator=torch.Generator().manual_seed(0))
    if isinstance(model, torch.nn.Module):
        raise CaptureError("the input shape is not known", hint="give --input-shape C,H,W or --calib DATA")
    return None


app.command("sweep")(sweep_command)
app.command("apply")(apply_command)


def main() -> None:
    """Entry point of the `foldcut` command."""
    started()
    if isinstance(sys.stdout, TextIOWrapper):  # as stderr does: a file name need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    app()
