"""What the commands share: options, how samples are read, how errors are shown, exit codes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from .calibration_set import CalibrationSet, read_calibration
from .errors import CaptureError, CompilerError

out, err = Console(), Console(stderr=True)


class Exit(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    #: A foldcut error: bad input, nothing written.
    ERROR = 1
    #: Wrong usage of the command line (typer's own).
    USAGE = 2
    #: A goal was not met (the best result is written), or files differ.
    NOT_MET = 3
    #: Ctrl-C; no file is half-written.
    INTERRUPTED = 130


ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A .onnx or .pt2 file, or package.module:callable that returns an nn.Module."),
]
CalibOption = Annotated[Path, typer.Option(help="Unlabelled inputs: .npy, .npz, .pt or a folder of images.")]
WeightsOption = Annotated[Path | None, typer.Option(help="A state_dict (.pt) to load into the module.")]
ShapeOption = Annotated[
    str | None,
    typer.Option(metavar="C,H,W", help="Shape of one input sample, when there is no calibration set."),
]
RewritesOption = Annotated[
    str | None,
    typer.Option(help="Rewrites that may be used: some of drop_blocks, prune_channels, factorize, or `all`."),
]
MultipleOption = Annotated[
    str | None,
    typer.Option(metavar="N", help="Channel counts and ranks in multiples of this; `lattice` asks the backend."),
]
IgnoreOption = Annotated[
    list[str] | None,
    typer.Option(help="Unit group or layer (a pattern) or output to leave alone; repeatable."),
]
SearchOption = Annotated[
    float | None,
    typer.Option(
        metavar="S",
        min=0,
        help="Seconds for the search of a better mix, beside the analyses.",
        show_default="while it finds better ones",
    ),
]
BackendOption = Annotated[str, typer.Option(help="Where the latency counts.")]
BatchOption = Annotated[int, typer.Option(help="Batch size that the latency is measured at.")]
ThreadsOption = Annotated[int, typer.Option(help="CPU threads that the latency is measured with.")]
KeyOption = Annotated[str | None, typer.Option(help="Array to read from an .npz or entry of a .pt file.")]
MeanOption = Annotated[str, typer.Option(help="Mean per channel, for image folders.")]
StdOption = Annotated[str, typer.Option(help="Standard deviation per channel, for image folders.")]
SizeOption = Annotated[str | None, typer.Option(metavar="H,W", help="Resize images of a folder to this.")]
LimitOption = Annotated[int | None, typer.Option(help="Take the first so many samples.")]
FlipOption = Annotated[bool, typer.Option("--flip", help="Add mirrored images, where left and right mean the same.")]
MimicOption = Annotated[bool, typer.Option(help="Train on the original's features after the re-solve.")]
SeedOption = Annotated[int, typer.Option(help="Seed of every random choice.")]
CacheOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where analyses are kept.", show_default="$FOLDCUT_CACHE or ~/.cache/foldcut"),
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Neither read nor keep analyses: compute and measure all.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def read_samples(
    calib: Path,
    *,
    key: str | None,
    size: str | None,
    mean: str,
    std: str,
    limit: int | None,
    input_shape: str | None = None,
) -> CalibrationSet:
    """The calibration set of the command line. Raises CalibrationError and CompilerError."""
    samples = read_calibration(calib, key=key, size=_pair(size), mean=_floats(mean), std=_floats(std), limit=limit)
    if input_shape is not None and list(samples.leaves[0].shape[1:]) != read_shape(input_shape):
        raise CompilerError(
            "--input-shape is not the shape of the calibration samples",
            expected=input_shape,
            actual=list(samples.leaves[0].shape[1:]),
            hint="leave it out, or resize the samples",
        )
    return samples


def read_cache(cache: Path | None, fresh: bool) -> bool | Path:
    """The `cache` argument of `compile`. Raises CompilerError."""
    if fresh and cache is not None:
        raise CompilerError("--fresh keeps no analyses", hint="leave out --cache or --fresh")
    return False if fresh else cache or True


def read_shape(shape: str) -> list[int]:
    """The sizes in "3,224,224". Raises CaptureError."""
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


def guarded(work: Callable[[], None], *, debug: bool, interrupted: str = "nothing was written") -> None:
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
            raise typer.Exit(Exit.ERROR) from None
        except KeyboardInterrupt:
            err.print(f"interrupted; {interrupted}")
            raise typer.Exit(Exit.INTERRUPTED) from None


def _fail(error: CompilerError) -> NoReturn:
    err.print(f"[bold red]{error.stage}[/]: {escape(error.message)}", highlight=False)
    for label, value in (("at", error.node), ("expected", error.expected), ("actual", error.actual)):
        if value is not None:
            err.print(f"  {label}: {value}", markup=False, highlight=False)
    if error.hint:
        err.print(f"  hint: {error.hint}", markup=False, highlight=False)
    raise typer.Exit(Exit.ERROR)
