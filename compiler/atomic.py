"""Writing files so that a reader sees the old or the new content, never a part."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .errors import OutputError


def check_writable(folder: Path) -> None:
    """Raise OutputError unless files can be made in `folder` (or, when it does not exist yet, in its nearest existing
    parent)."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file", hint="name a folder for the output")
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"{existing} is a file, so {folder} cannot be made", hint="name another output folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as cause:
        raise OutputError(
            f"cannot write to {existing}: {cause.strerror}", hint="name a folder that you may write to"
        ) from cause


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files under temporary names in a folder beside `folder`, then rename them into place.

    A folder that does not exist yet appears at once with all its files. Nothing is left behind on failure.
    """
    check_writable(folder)
    created = _missing_parents(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as cause:
        raise OutputError(
            f"cannot write {folder}: {cause.strerror}", hint="name a folder that you may write to"
        ) from cause
    try:
        staging.chmod(0o755)
        for name, content in files.items():
            with (staging / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            for name in files:
                (staging / name).replace(folder / name)
        else:
            staging.rename(folder)
    except OSError as cause:
        _remove_empty(created)
        raise OutputError(
            f"cannot write {folder}: {cause.strerror}", hint="check free space and permissions"
        ) from cause
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _missing_parents(folder: Path) -> list[Path]:
    missing, parent = [], folder.parent
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
