"""What the options of commands are called, take and say, each declared once."""

from __future__ import annotations

import re
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
CalibOption = Annotated[
    Path,
    typer.Option(
        help="Unlabelled inputs: .npy, .npz, .pt or a folder of images; `none` makes them from the network alone."
    ),
]
ReferenceOption = Annotated[
    Path | None,
    typer.Option(
        help="Inputs that the network meets in use, read like --calib: how far the calibration set is from them.",
        show_default="what its batch norms keep",
    ),
]
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
EvaluateOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:CALLABLE",
        help="Your own metric: package.module:callable that takes the network and gives a number, larger is better.",
    ),
]
LabelsOption = Annotated[
    Path | None,
    typer.Option(help="Classes of the calibration samples (.npy): the metric is top-1 of those that test."),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What the process may have in memory at once: 512M, 4G, 4GiB or bytes.",
        show_default="what there is",
    ),
]
DeviceMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What values may take on the device of --device, beside the weights: 20G.",
        show_default="what is free",
    ),
]
BackendOption = Annotated[str, typer.Option(help="Where the latency counts.")]
BatchOption = Annotated[int, typer.Option(help="Batch size that the latency is measured at.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where layers are solved: cuda, cuda:1, or auto for the accelerator there is.")
]
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
MimicSecondsOption = Annotated[
    float | None,
    typer.Option(
        metavar="S",
        min=0,
        help="Seconds for that training, 0 for none.",
        show_default="as its iterations take",
    ),
]
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
