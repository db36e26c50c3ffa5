"""A network named on the command line: what can be said about its name without torch, which takes seconds to load."""

from __future__ import annotations

from pathlib import Path

from ..support.errors import CalibrationError, CaptureError, CompilerError


def names_file(source: str) -> bool:
    """Whether a name is that of a file, and not `package.module:callable`."""
    return ":" not in source or Path(source).exists()


def check_named(source: str, weights: Path | None) -> None:
    """Raise CaptureError for a file that is not there, and for weights beside one or that are not there."""
    if names_file(source):
        if weights is not None:
            raise CaptureError("--weights goes with package.module:callable", hint="a .pt2 file holds its weights")
        if not Path(source).is_file():
            raise CaptureError(f"no such file: {source}", hint="name a .pt2 or .onnx file, or package.module:callable")
    elif weights is not None and not weights.is_file():
        raise CaptureError(f"no such file: {weights}", hint="name a state_dict that was saved with torch.save")


def check_metric_named(evaluate: str | None, labels: Path | None, limit: int | None) -> None:
    """Raise CompilerError for a metric that is no `package.module:callable`, and for labels that are not there, beside
    one, or of samples that not all are taken."""
    if evaluate is not None and labels is not None:
        raise CompilerError("--evaluate and --labels are two metrics", hint="give one of them")
    if evaluate is not None and not all(evaluate.partition(":")):
        raise CompilerError(f"--evaluate {evaluate!r} names no function", hint="give package.module:callable")
    if labels is None:
        return
    if not labels.is_file() or labels.suffix != ".npy":
        raise CalibrationError(f"no such file of labels: {labels}", hint="give an .npy file of whole numbers")
    if limit is not None:
        raise CalibrationError(
            "--limit takes a random choice of the samples, and --labels are those of all", hint="leave out --limit"
        )
