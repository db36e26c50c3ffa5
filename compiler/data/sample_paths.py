"""Where samples are: what can be said about a path without torch, which takes seconds to load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..support.errors import CalibrationError

ARRAY_SUFFIXES = (".npy", ".npz", ".pt")
#: In the place of a path: there are no data.
NONE = "none"


def says_none(path: Path) -> bool:
    """Whether a path says that there are no data. A file or folder of that name is what it is."""
    return str(path).lower() == NONE and not path.exists()


def shard_files(folder: Path) -> list[Path]:
    """The files of samples that lie in a folder, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix in ARRAY_SUFFIXES) if folder.is_dir() else []


def check_readable(path: Path) -> None:
    """Raise CalibrationError for what is neither a folder nor a file of a kind that can be read."""
    if path.is_dir():
        return
    if not path.is_file():
        hint = "pass a .npy, .npz or .pt file, or a folder of such files or of images"
        if says_none(path):
            hint += "; `none` is for --calib of `compile` and `sweep`, and `foldcut synthesise` writes such samples"
        raise CalibrationError(f"no such file or folder: {path}", hint=hint)
    if path.suffix not in ARRAY_SUFFIXES:
        raise CalibrationError(
            f"cannot read calibration data from {path.name}",
            expected=".npy, .npz, .pt, or a folder of such files or of images",
        )


def check_optional(path: Path | None, options: Mapping[str, Any]) -> None:
    """`check_readable` where samples need not be given. Raises CalibrationError too where none are, and yet `options`
    say something about how they are read."""
    if path is not None:
        check_readable(path)
        return
    named = " and ".join(f"--{name}" for name in ("key", "size", "mean", "std") if options[name] is not None)
    if named:
        raise CalibrationError(
            f"{named}: there are no samples to read", hint=f"name a file or folder of samples, or leave {named} out"
        )
