"""What the commands share: options, how samples are read, how errors are shown, exit codes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from ..data.calibration_set import CalibrationSet, read_calibration
from ..support.errors import CalibrationError, CaptureError, CompilerError
from .tables import show_line

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


class Caches(StrEnum):
    """The regimes of a latency, for --regime."""

    HOT = "hot"
    COLD = "cold"


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
MeanOption = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Mean per channel, for image folders.", show_default="0,0,0")
]
StdOption = Annotated[
    str | None,
    typer.Option(metavar="R,G,B", help="Standard deviation per channel, for image folders.", show_default="1,1,1"),
]
SizeOption = Annotated[str | None, typer.Option(metavar="H,W", help="Resize images of a folder to this.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Take so many samples, a random choice of all.")]
FlipOption = Annotated[bool, typer.Option("--flip", help="Add mirrored images, where left and right mean the same.")]
MimicOption = Annotated[bool, typer.Option(help="Train on the original's features after the re-solve.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]
RegimeOption = Annotated[
    Caches | None,
    typer.Option(
        help="What the caches hold when latency is measured: the network itself (a loop without pauses), or nothing of "
        "it (a server with pauses).",
        show_default="hot",
    ),
]
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
    mean: str | None,
    std: str | None,
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


def sample_reader(
    path: Path | None,
    *,
    key: str | None,
    size: str | None,
    mean: str | None,
    std: str | None,
    input_shape: str | None = None,
) -> Callable[[int | None], CalibrationSet] | None:
    """What reads so many samples (None: all) where a command need not be given any, None where it is not.
    Raises CalibrationError when nothing is to be read, and yet something is said about how."""
    if path is not None:
        return lambda limit: read_samples(
            path, key=key, size=size, mean=mean, std=std, limit=limit, input_shape=input_shape
        )
    options = {"--key": key, "--size": size, "--mean": mean, "--std": std}
    told = " and ".join(name for name, value in options.items() if value is not None)
    if told:
        raise CalibrationError(
            f"{told}: there are no samples to read", hint=f"name a file or folder of samples, or leave {told} out"
        )
    return None


def read_cache(cache: Path | None, fresh: bool) -> bool | Path:
    """The `cache` argument of `compile`. Raises CompilerError."""
    if fresh and cache is not None:
        raise CompilerError("--fresh keeps no analyses", hint="leave out --cache or --fresh")
    return False if fresh else cache or True


def after_interrupt(fresh: bool, written: str = "nothing was written") -> str:
    """What is true of a command that was interrupted: analyses are kept unless it was told to keep none."""
    return written if fresh else f"{written}; what is done is kept, and the same command goes on from there"


def read_shape(shape: str) -> list[int]:
    """The sizes in "3,224,224". Raises CaptureError."""
    sizes = _sizes(shape)
    if not sizes:
        raise CaptureError(f"--input-shape {shape!r} is not a shape", expected="numbers from 1 on such as 3,224,224")
    return sizes


def _sizes(text: str) -> list[int]:
    """Whole numbers from 1 on between commas; none for anything else."""
    parts = text.split(",")
    return [int(part) for part in parts] if all(p.strip().isdecimal() and int(p) > 0 for p in parts) else []


def _floats(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
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
    sizes = _sizes(text)
    if len(sizes) != 2:
        raise CompilerError(f"--size {text!r} is not a size", expected="two numbers from 1 on such as 224,224")
    return sizes[0], sizes[1]


def say(text: str, *, head: str = "", style: str = "bold red") -> None:
    """A line on stderr, `head` in front of it in colour."""
    show_line(Text.assemble((head, style), ": " if head else "", text), err)


def guarded(work: Callable[[], None], *, debug: bool, interrupted: str = "nothing was written") -> None:
    """Errors as one line and a hint; warnings as one line each."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_args, **_kwargs: say(str(message), head="warning", style="yellow")
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
            say(f"{type(error).__name__}: {error}", head="internal error")
            say("  hint: run again with --debug for the trace and report it with the model")
            raise typer.Exit(Exit.ERROR) from None
        except KeyboardInterrupt:
            say(f"interrupted; {interrupted}")
            raise typer.Exit(Exit.INTERRUPTED) from None


def _fail(error: CompilerError) -> NoReturn:
    say(error.message, head=error.stage)
    for label, value in (("at", error.node), ("expected", error.expected), ("actual", error.actual)):
        if value is not None:
            say(f"  {label}: {value}")
    if error.hint:
        say(f"  hint: {error.hint}")
    raise typer.Exit(Exit.ERROR)
