"""The options of every command, declared once: a command's options are a dataclass, which typer reads."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ... import passes


def rewrite_names() -> list[str]:
    """The names of the rewrites that foldcut brings, read off their source: help does not wait for torch."""
    sources = [
        path for place in passes.__path__ for path in (*Path(place).glob("*.py"), *Path(place).glob("*/rewrite.py"))
    ]
    found = [re.search(r'^    name = "(\w+)"$', path.read_text(encoding="utf-8"), re.MULTILINE) for path in sources]
    return sorted(name[1] for name in found if name)


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
DequantizeOption = Annotated[
    bool,
    typer.Option("--dequantize", help="Take a model with QuantizeLinear and DequantizeLinear back to floats first."),
]
ShapeOption = Annotated[
    str | None,
    typer.Option(metavar="C,H,W", help="Shape of one input sample, when there is no calibration set."),
]
RewritesOption = Annotated[
    str | None,
    typer.Option(help=f"Rewrites that may be used: some of {', '.join(rewrite_names())}, or `all`."),
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
MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What the process may have in memory at once: 512M, 4G, 4GiB or bytes.",
        show_default="what there is",
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

OutputOption = Annotated[
    Path,
    typer.Option("--output", "-o", help="Folder for model.onnx, model.pt2, plan.json, report.json, report.html."),
]
InputsOption = Annotated[
    Path | None, typer.Option(help="Real inputs: .npy, .npz (one array for each input), .pt or a folder of images.")
]
BeforeArgument = Annotated[Path, typer.Argument(help="ONNX file of the original.")]
AfterArgument = Annotated[Path, typer.Argument(help="ONNX file to compare with it.")]


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How samples of a file or a folder are read."""

    key: KeyOption = None
    mean: MeanOption = None
    std: StdOption = None
    size: SizeOption = None


@dataclass(frozen=True, kw_only=True)
class SampleOptions(ImageOptions):
    """... and how many."""

    limit: LimitOption = None


@dataclass(frozen=True, kw_only=True)
class SolveOptions(SampleOptions):
    """What solving and training take, and where results are kept."""

    flip: FlipOption = False
    mimic: MimicOption = True
    seed: SeedOption = 0
    cache: CacheOption = None
    fresh: FreshOption = False
    memory: MemoryOption = None
    as_json: JsonOption = False
    quiet: QuietOption = False
    debug: DebugOption = False


@dataclass(frozen=True, kw_only=True)
class RunOptions(SolveOptions):
    """What `compile` and `sweep` share."""

    model: ModelArgument
    calib: CalibOption
    output: OutputOption
    regime: RegimeOption = None
    rewrites: RewritesOption = None
    multiple_of: MultipleOption = None
    ignore: IgnoreOption = None
    search_seconds: SearchOption = None
    backend: BackendOption = "onnxruntime"
    batch: BatchOption = 1
    threads: ThreadsOption = 1
    weights: WeightsOption = None
    dequantize: DequantizeOption = False
    save_temps: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Save the program there after every pass.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class CompileOptions(RunOptions):
    """Compile MODEL to a goal and write the output folder."""

    latency: Annotated[
        str | None,
        typer.Option(metavar="R", help="Goal: measured latency at most R times the original's, or `2.5ms` in all."),
    ] = None
    blocks: Annotated[int | None, typer.Option(metavar="K", help="Goal: drop K blocks.")] = None
    keep: Annotated[
        float | None, typer.Option(metavar="S", help="Goal: keep a share S of the channels of every group.")
    ] = None
    macs: Annotated[
        float | None, typer.Option(metavar="R", help="Goal: at most R times the original's multiply-accumulates.")
    ] = None
    parameters: Annotated[
        float | None, typer.Option(metavar="R", help="Goal: at most R times the original's parameters.")
    ] = None
    max_error: Annotated[
        float | None, typer.Option(metavar="E", help="Goal: as fast as a relative output error of E allows.")
    ] = None
    ranks: Annotated[
        float | None, typer.Option(metavar="S", help="Goal: factorise every layer to a share S of its full rank.")
    ] = None
    input_shape: ShapeOption = None


@dataclass(frozen=True, kw_only=True)
class SweepOptions(RunOptions):
    """Compile MODEL to several goals from one set of analyses, and show which results no other beats.

    Every result is written as soon as it is there. Exit code 3 when a goal was not met.
    """

    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for a folder of each goal, and sweep.json.")]
    latency: Annotated[
        str | None, typer.Option(metavar="R,R", help="Latency goals: ratios, or milliseconds such as 2.5ms.")
    ] = None
    macs: Annotated[str | None, typer.Option(metavar="R,R", help="Goals in multiply-accumulates.")] = None


@dataclass(frozen=True, kw_only=True)
class ApplyOptions(SolveOptions):
    """Put PLAN into effect on MODEL, the network that it was made for: without data, with the weights that were saved
    beside the plan; with --calib, solved again.

    A module whose inputs are not one array of floats takes both --solved and --calib: weights, and inputs' form.
    """

    plan: Annotated[Path, typer.Argument(help="A plan.json that foldcut wrote.")]
    model: ModelArgument
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for model.onnx, model.pt2 and plan.json.")]
    calib: Annotated[
        Path | None,
        typer.Option(
            help="Unlabelled inputs (.npy, .npz, .pt or a folder) to solve the layers again with; with --solved an "
            "example of the inputs only."
        ),
    ] = None
    solved: Annotated[
        Path | None,
        typer.Option(
            help="The model.pt2 of the first time: its weights are taken, nothing is solved.",
            show_default="the one beside PLAN, unless there is --calib",
        ),
    ] = None
    weights: WeightsOption = None
    dequantize: DequantizeOption = False
    input_shape: ShapeOption = None


@dataclass(frozen=True, kw_only=True)
class InspectOptions(ImageOptions):
    """Show the removable regions and the unit groups of MODEL, their cost, and what was left alone and why."""

    model: ModelArgument
    weights: WeightsOption = None
    dequantize: DequantizeOption = False
    input_shape: ShapeOption = None
    calib: Annotated[Path | None, typer.Option(help="A calibration set to take the input shape from.")] = None
    graph: Annotated[bool, typer.Option(help="Print the graph as text.")] = False
    as_json: JsonOption = False
    debug: DebugOption = False


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(ImageOptions):
    """Measure AFTER against BEFORE over fresh loads of both, in turns; ratio = after / before."""

    before: BeforeArgument
    after: AfterArgument
    backend: Annotated[str, typer.Option(help="Where to run.")] = "onnxruntime"
    batch: Annotated[
        int | None, typer.Option(help="Batch size; without it 1, or the batch that a file fixes.", show_default=False)
    ] = None
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1
    inputs: InputsOption = None
    dim: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="Size of a dynamic dimension; may be repeated.")
    ] = None
    regime: RegimeOption = None
    self_check: Annotated[bool, typer.Option("--self-check", help="First measure BEFORE against itself.")] = False
    seed: Annotated[int, typer.Option(min=0, help="Seed of made-up inputs and of the order.")] = 0
    samples: Annotated[bool, typer.Option("--samples", help="With --json: every pair as well.")] = False
    as_json: JsonOption = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False
    debug: DebugOption = False


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(SampleOptions):
    """Compare what two ONNX files compute, and their inputs and outputs. Exit code 3 when they differ."""

    before: BeforeArgument
    after: AfterArgument
    inputs: Annotated[
        Path | None, typer.Option(help="Samples: .npy, .npz (one array for each input), .pt or a folder of images.")
    ] = None
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest difference, relative to an output's largest entry.")
    ] = 1e-4
    batch: Annotated[int | None, typer.Option(min=1, help="Samples at once.")] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of made-up inputs, where none are given.")] = 0
    as_json: JsonOption = False
    debug: DebugOption = False


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Train a small residual network on handwritten digits, compile it to a latency goal, show before and after. Exit
    code 3 when the goal was not met.
    """

    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the result.")] = field(
        default=Path("demo-output")
    )
    goal: Annotated[float, typer.Option("--latency", help="Latency goal.")] = 0.6
    rewrites: Annotated[str | None, typer.Option(help="Rewrites that may be used, as for compile.")] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of training and compile.")] = 0
    quiet: QuietOption = False
    debug: DebugOption = False
