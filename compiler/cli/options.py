"""The options of every command, declared once: a command's options are a dataclass, which typer reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from ..data.sample_paths import check_optional, check_readable, says_none
from ..frontend.model_path import check_metric_named, check_named
from ..support.atomic_files import check_writable
from ..support.errors import GoalError, OutputError, PlanError, plural
from .declared import Options, check_kept
from .option_types import (
    AfterArgument,
    BackendOption,
    BatchOption,
    BeforeArgument,
    CacheOption,
    Caches,
    CalibOption,
    DebugOption,
    DequantizeOption,
    DeviceMemoryOption,
    DeviceOption,
    EvaluateOption,
    FlipOption,
    FreshOption,
    IgnoreOption,
    InputsOption,
    JsonOption,
    KeyOption,
    LabelsOption,
    LimitOption,
    MeanOption,
    MemoryOption,
    MimicOption,
    MimicSecondsOption,
    ModelArgument,
    MultipleOption,
    OutputOption,
    QuietOption,
    ReferenceOption,
    RegimeOption,
    RewritesOption,
    SearchOption,
    SeedOption,
    ShapeOption,
    SizeOption,
    StdOption,
    ThreadsOption,
    WeightsOption,
)

#: Every goal of the command line.
EXAMPLES = (
    "--latency 0.7, --blocks 4, --keep 0.5, --macs 0.6, --parameters 0.5, --max-error 0.02, --max-loss 0.5 or "
    "--ranks 0.25"
)


def latency_number(text: str) -> tuple[float, str]:
    """The number in "0.7" or "2.5ms", and whether it is a ``ratio`` or ``ms``. Raises GoalError."""
    number, unit = (text[:-2].strip(), "ms") if text.endswith("ms") else (text, "ratio")
    try:
        return float(number), unit
    except ValueError:
        raise GoalError(f"--latency {text!r} is not a goal", hint="give a ratio, 0.7, or milliseconds, 2.5ms") from None


def latency_words(text: str, regime: str | None) -> str:
    """A latency as its goal says it. Raises GoalError."""
    value, unit = latency_number(text.strip())
    wanted = f"latency ratio {value:g}" if unit == "ratio" else f"latency {value:g} ms"
    return f"{regime} {wanted}" if regime == Caches.COLD else wanted


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
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
    mimic_seconds: MimicSecondsOption = None
    seed: SeedOption = 0
    cache: CacheOption = None
    fresh: FreshOption = False
    memory: MemoryOption = None
    device_memory: DeviceMemoryOption = None
    device: DeviceOption = None
    as_json: JsonOption = False
    quiet: QuietOption = False
    debug: DebugOption = False

    def check(self) -> None:
        check_kept(self.cache, self.fresh)


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
    input_shape: ShapeOption = None
    reference: ReferenceOption = None
    evaluate: EvaluateOption = None
    labels: LabelsOption = None
    save_temps: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Save the program there after every pass.")
    ] = None

    def check(self) -> None:
        super().check()
        check_writable(self.output)
        check_named(self.model, self.weights)
        check_optional(None if says_none(self.calib) else self.calib, vars(self))
        if self.reference is not None:
            check_readable(self.reference)
        check_metric_named(self.evaluate, self.labels, self.limit)

    def _begun(self, goal: str) -> str:
        """The first words, with the goal as it is said there."""
        data = "inputs made from the network alone" if says_none(self.calib) else self.calib
        return f"compiling {self.model} to {goal} with {data}, on {self.backend}; output in {self.output}/"


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
    max_loss: Annotated[
        float | None,
        typer.Option(metavar="L", help="Goal: as fast as a loss of L in the metric (--evaluate, --labels) allows."),
    ] = None
    ranks: Annotated[
        float | None, typer.Option(metavar="S", help="Goal: factorise every layer to a share S of its full rank.")
    ] = None
    profile: Annotated[
        bool, typer.Option("--profile", help="Show what each stage took, what it did, and what it cannot do without.")
    ] = False

    def check(self) -> None:
        self.check_goal()
        super().check()

    def check_goal(self) -> None:
        """Raise GoalError unless there is one goal, and what is said beside it is about it."""
        if self.latency is None and self.regime is not None:
            raise GoalError(
                "--regime says how a latency is measured, and none is asked for", hint="give --latency as well"
            )
        if len(self._goals()) != 1:
            raise GoalError("give one goal", hint=EXAMPLES)
        if self.max_loss is not None and self.evaluate is None and self.labels is None:
            raise GoalError(
                "--max-loss is about a metric, and there is none",
                hint="give --evaluate package.module:callable, or --labels labels.npy",
            )

    def first_words(self) -> str:
        return self._begun(self._goals()[0])

    def _goals(self) -> list[str]:
        """The goals that are given, as they say themselves."""
        words = {
            "blocks": lambda count: f"{plural(count, 'block')} dropped",
            "keep": "{:g} of the channels kept".format,
            "macs": "MACs ratio {:g}".format,
            "parameters": "parameters ratio {:g}".format,
            "max_error": "output error at most {:g}".format,
            "max_loss": "metric loss at most {:g}".format,
            "ranks": "{:g} of full rank".format,
            "latency": lambda text: latency_words(text, self.regime),
        }
        return [say(getattr(self, name)) for name, say in words.items() if getattr(self, name) is not None]


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

    def first_words(self) -> str:
        goals = [latency_words(text, self.regime) for text in (self.latency or "").split(",") if text.strip()]
        goals += [f"MACs ratio {text.strip()}" for text in (self.macs or "").split(",") if text.strip()]
        return self._begun(f"each of {', '.join(goals)}" if goals else "several latency ratios")


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

    def check(self) -> None:
        super().check()
        check_writable(self.output)
        check_optional(self.calib, vars(self))
        if not self.plan.is_file():
            raise PlanError(f"no such file: {self.plan}", hint="name a plan.json that foldcut wrote")
        check_named(self.model, self.weights)

    def first_words(self) -> str:
        if self.solved is not None:
            weights = f" with the weights of {self.solved}"
        else:
            weights = "" if self.calib is None else f", solved again with {self.calib}"
        return f"applying {self.plan} to {self.model}{weights}; output in {self.output}/"


@dataclass(frozen=True, kw_only=True)
class SynthesiseOptions(Options):
    """Make calibration inputs from MODEL alone, as `--calib none` does, and a picture of them where they are images."""

    model: ModelArgument
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="So many samples.")] = 500
    output: Annotated[
        Path, typer.Option("--output", "-o", help="An .npz file; the picture, a .png, lies beside it.")
    ] = field(default=Path("synthetic.npz"))
    iterations: Annotated[
        int | None, typer.Option(min=0, help="Steps of gradient descent.", show_default="as many as pay")
    ] = None
    weights: WeightsOption = None
    dequantize: DequantizeOption = False
    input_shape: ShapeOption = None
    seed: SeedOption = 0
    cache: CacheOption = None
    fresh: FreshOption = False
    as_json: JsonOption = False
    quiet: QuietOption = False
    debug: DebugOption = False

    def check(self) -> None:
        if self.output.suffix != ".npz":
            raise OutputError(f"{self.output} is not the name of an .npz file", hint="give -o NAME.npz")
        check_writable(self.output.parent)
        check_named(self.model, self.weights)
        check_kept(self.cache, self.fresh)

    def first_words(self) -> str:
        return f"making {plural(self.count, 'input')} from {self.model} alone; output in {self.output}"


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
class DemoOptions(Options):
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

    def check(self) -> None:
        check_writable(self.output)

    def first_words(self) -> str:
        made = "training a small network on handwritten digits, then compiling it"
        return f"{made} to latency ratio {self.goal:g}; output in {self.output}/"
