"""A network named on the command line: what can be said about its name without torch, which takes seconds to load."""

from __future__ import annotations

from pathlib import Path

from ..support.errors import CaptureError


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
