"""The command line: `foldcut compile`, `inspect`, `measure`, `verify` and `demo`.

Exit codes: 0 done, 1 a foldcut error (bad input, nothing written), 2 wrong usage, 3 goal not met (the best result is
written) or files that differ, 130 interrupted.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from .api import Compiled
from .api import compile as compile_model
from .atomic import check_writable, write_folder
from .calibration_set import CalibrationSet, horizontal_flip, read_calibration
from .capture import Model, capture
from .cli_goals import read_goal, read_settings
from .cli_measure import MeasureWish, measure_files, read_sizes, show_measured
from .cli_tables import describe, show_comparison, show_groups, show_regions, show_report
from .edit_folds import fold_parameters
from .errors import CaptureError, CompilerError, GoalError
from .model_source import load_model
from .onnx_compare import compare_onnx, random_samples
from .plan import Latency
from .progress import rich_progress, silent
from .saved import PAGE

app = typer.Typer(
    name="foldcut",
    help="Make a trained network faster from the network, a few hundred unlabelled inputs and a latency goal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
out, err = Console(), Console(stderr=True)

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A .onnx or .pt2 file, or package.module:callable that returns an nn.Module."),
]
WeightsOption = Annotated[Path | None, typer.Option(help="A state_dict (.pt) to load into the module.")]
ShapeOption = Annotated[
    str | None,
    typer.Option(metavar="C,H,W", help="Shape of one input sample, when there is no calibration set."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]


@app.command("compile")
def compile_command(
    model: ModelArgument,
    calib: Annotated[Path, typer.Option(help="Unlabelled inputs: .npy, .npz, .pt or a folder of images.")],
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
    ranks: Annotated[
        float | None, typer.Option(metavar="S", help="Goal: factorise every layer to a share S of its full rank.")
    ] = None,
    rewrites: Annotated[
        str | None,
        typer.Option(help="Rewrites that may be used: some of drop_blocks, prune_channels, factorize."),
    ] = None,
    multiple_of: Annotated[
        str | None,
        typer.Option(metavar="N", help="Channel counts and ranks in multiples of this; `lattice` asks the backend."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Unit group or layer (a pattern) or output to leave alone; repeatable."),
    ] = None,
    backend: Annotated[str, typer.Option(help="Where the latency counts.")] = "onnxruntime",
    batch: Annotated[int, typer.Option(help="Batch size that the latency is measured at.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads that the latency is measured with.")] = 1,
    weights: WeightsOption = None,
    input_shape: ShapeOption = None,
    key: Annotated[str | None, typer.Option(help="Array to read from an .npz or entry of a .pt file.")] = None,
    mean: Annotated[str, typer.Option(help="Mean per channel, for image folders.")] = "0,0,0",
    std: Annotated[str, typer.Option(help="Standard deviation per channel, for image folders.")] = "1,1,1",
    size: Annotated[str | None, typer.Option(metavar="H,W", help="Resize images of a folder to this.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take the first so many samples.")] = None,
    flip: Annotated[
        bool, typer.Option("--flip", help="Add mirrored images, where left and right mean the same.")
    ] = False,
    mimic: Annotated[bool, typer.Option(help="Train on the original's features after the re-solve.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Compile MODEL to a goal and write the output folder."""

    def work() -> None:
        goal = read_goal(latency, blocks, keep, macs, ranks)
        check_writable(output)
        samples = read_calibration(calib, key=key, size=_pair(size), mean=_floats(mean), std=_floats(std), limit=limit)
        _check_shape(samples, input_shape)
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
            rewrites=_names(rewrites),
            settings=read_settings(multiple_of, ignore or [], low_rank=ranks is not None or rewrites == "factorize"),
            progress=not (as_json or quiet),
        )
        result.save(output)
        if as_json:
            print(json.dumps(result.report.to_dict()))
        elif not quiet:
            show_report(result.report, out)
            _say_written(output, result)
        if unmet is not None:
            err.print(f"[bold red]{unmet.stage}[/]: {escape(unmet.message)}", highlight=False)
            raise typer.Exit(3)

    _guarded(work, debug=debug)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _say_written(output: Path, result: Compiled) -> None:
    """What was written where, the page that people open last."""
    out.print(f"wrote {output}/ ({', '.join(result.files)})")
    out.print(f"open {output / PAGE} in a browser", highlight=False)


def _check_shape(samples: CalibrationSet, shape: str | None) -> None:
    """A shape given on the command line must be the calibration set's."""
    if shape is not None and list(samples.leaves[0].shape[1:]) != _sizes(shape):
        raise CompilerError(
            "--input-shape is not the shape of the calibration samples",
            expected=shape,
            actual=list(samples.leaves[0].shape[1:]),
            hint="leave it out, or resize the samples",
        )


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
    graph: Annotated[bool, typer.Option(help="Print the graph as text.")] = False,
    as_json: JsonOption = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Show the removable regions and the unit groups of MODEL, their cost, and what was left alone and why."""

    def work() -> None:
        loaded = load_model(model, weights)
        program = fold_parameters(capture(loaded, _example(loaded, input_shape, calib)))
        if graph:
            print(program.text(), end="")
            return
        found = describe(program)
        if as_json:
            print(json.dumps(found))
        else:
            show_regions(found, out)
            show_groups(found, out)

    _guarded(work, debug=debug)


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
    dim: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="Size of a dynamic dimension; may be repeated.")
    ] = None,
    self_check: Annotated[bool, typer.Option("--self-check", help="First measure BEFORE against itself.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of made-up inputs and of the order.")] = 0,
    samples: Annotated[bool, typer.Option("--samples", help="With --json: every pair as well.")] = False,
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Measure AFTER against BEFORE in interleaved pairs; ratio = after / before."""

    def work() -> None:
        wish = MeasureWish(
            backend=backend,
            batch=batch,
            threads=threads,
            seed=seed,
            inputs=inputs,
            sizes=read_sizes(dim or []),
            self_check=self_check,
        )
        with nullcontext(silent) if as_json or quiet else rich_progress() as progress:
            found = measure_files(before, after, wish, progress=progress)
        if as_json:
            print(json.dumps(found.to_dict(samples=samples)))
        else:
            show_measured(found, out)

    _guarded(work, debug=debug)


@app.command()
def verify(
    before: Annotated[Path, typer.Argument(help="ONNX file of the original.")],
    after: Annotated[Path, typer.Argument(help="ONNX file to compare with it.")],
    inputs: Annotated[
        Path | None, typer.Option(help="Samples: .npy, .npz (one array for each input), .pt or a folder of images.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference, relative to an output's largest entry.")] = 1e-4,
    batch: Annotated[int | None, typer.Option(help="Samples at once.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take the first so many samples.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of made-up inputs, where none are given.")] = 0,
    as_json: JsonOption = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Compare what two ONNX files compute, and their inputs and outputs. Exit code 3 when they differ."""

    def work() -> None:
        samples = read_calibration(inputs, limit=limit) if inputs else random_samples(before, limit or 8, seed)
        found = compare_onnx(before, after, samples, batch=batch)
        if as_json:
            print(json.dumps({**found.to_dict(), "same": found.same(tolerance)}))
        else:
            show_comparison(found, tolerance, out)
        if not found.same(tolerance):
            raise typer.Exit(3)

    _guarded(work, debug=debug)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the result.")] = Path("demo-output"),
    goal: Annotated[float, typer.Option("--latency", help="Latency goal.")] = 0.6,
    rewrites: Annotated[str | None, typer.Option(help="Rewrites that may be used, as for compile.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of training and compile.")] = 0,
    quiet: QuietOption = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Train a small residual network on handwritten digits, compile it to a latency goal, show before and after."""

    def work() -> None:
        from .demo import run_demo

        check_writable(output)
        result = run_demo(Latency(goal), rewrites=_names(rewrites), seed=seed, progress=not quiet, console=out)
        write_folder(output, result.files)
        _say_written(output, result)

    _guarded(work, debug=debug)


def _example(model: Model, shape: str | None, calib: Path | None) -> Any:
    import torch

    if calib is not None:
        return read_calibration(calib).batch(slice(0, 2))
    if shape is not None:
        return torch.randn(2, *_sizes(shape), generator=torch.Generator().manual_seed(0))
    if isinstance(model, torch.nn.Module):
        raise CaptureError("the input shape is not known", hint="give --input-shape C,H,W or --calib DATA")
    return None


def _sizes(shape: str) -> list[int]:
    try:
        return [int(s) for s in shape.split(",")]
    except ValueError:
        raise CaptureError(f"--input-shape {shape!r} is not a shape", expected="numbers such as 3,224,224") from None


def _floats(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise CompilerError(
            f"{text!r} is not one number per channel", expected="three numbers such as 0.485,0.456,0.406"
        )
    return values


def _pair(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        height, width = (int(v) for v in text.split(","))
    except ValueError:
        raise CompilerError(f"--size {text!r} is not a size", expected="two numbers such as 224,224") from None
    return height, width


def _guarded(work: Callable[[], None], *, debug: bool) -> None:
    """Errors as one line and a hint; warnings as one line each."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_args, **_kwargs: err.print(
            f"[yellow]warning[/]: {escape(str(message))}", highlight=False
        )
        try:
            work()
        except CompilerError as error:
            if debug:
                raise
            _fail(error)
        except typer.Exit:
            raise
        except Exception as error:  # what foldcut did not foresee still ends in one line
            if debug:
                raise
            err.print(f"[bold red]internal error[/]: {escape(f'{type(error).__name__}: {error}')}", highlight=False)
            err.print("  hint: run again with --debug for the trace and report it with the model")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            err.print("interrupted; nothing was written")
            raise typer.Exit(130) from None


def _fail(error: CompilerError) -> NoReturn:
    err.print(f"[bold red]{error.stage}[/]: {escape(error.message)}", highlight=False)
    for label, value in (("at", error.node), ("expected", error.expected), ("actual", error.actual)):
        if value is not None:
            err.print(f"  {label}: {value}", markup=False, highlight=False)
    if error.hint:
        err.print(f"  hint: {error.hint}", markup=False, highlight=False)
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the `foldcut` command."""
    app()
