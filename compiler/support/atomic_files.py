"""Writing files so that a reader sees the old or the new content, never a part; and content that waits in a file until
it is written."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from .errors import OutputError

#: A file is read in pieces of so many bytes.
_PIECE_BYTES = 1 << 22


class StoredFile:
    """Content that is too large to be held in memory twice, in a file. One in a temporary `folder` goes when nobody
    refers to it any more; a copy in another process only reads it."""

    def __init__(self, path: Path, folder: tempfile.TemporaryDirectory[str] | None = None) -> None:
        self.path, self._folder = path, folder

    @property
    def size_bytes(self) -> int:
        """Bytes of the file, and of those that belong to it."""
        return self.path.stat().st_size

    def pieces(self) -> Iterator[bytes]:
        """What the file holds, from its beginning."""
        with self.path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece

    def __fspath__(self) -> str:
        return str(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_folder": None}


Content: TypeAlias = "bytes | StoredFile"


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder for stored files."""
    return tempfile.TemporaryDirectory(prefix="foldcut-")


def size_of(content: Content) -> int:
    """The number of bytes."""
    return content.size_bytes if isinstance(content, StoredFile) else len(content)


def digest(content: Content) -> str:
    """What content is known again by."""
    return hashed(content, hashlib.blake2b(digest_size=16))


def hashed(content: Content, found: Any) -> str:
    """The hex digest of content by a hash of `hashlib`."""
    for piece in content.pieces() if isinstance(content, StoredFile) else (content,):
        found.update(piece)
    return found.hexdigest()


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


def write_folder(folder: Path, files: Mapping[str, Content], *, without: Sequence[str] = ()) -> None:
    """Write all files under temporary names in or beside `folder`, then rename them into place; files named in
    `without` go.

    A folder that does not exist yet appears at once with all its files; in one that exists, the old files stay until
    all new ones
    are written, and come back when one cannot be put in place. Nothing is left behind on failure or Ctrl-C.
    """
    check_writable(folder)
    created = _missing_parents(folder)
    staging: Path | None = None
    done = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # inside a folder that exists: it may be a mount point, across which nothing can be renamed
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder if folder.exists() else folder.parent))
        _write_files(staging / "new", files)
        if folder.exists():
            _exchange(staging / "new", staging / "old", folder, files, without)
        else:
            (staging / "new").rename(folder)
        done = True
    except OSError as cause:
        raise OutputError(
            f"cannot write {folder}: {cause.strerror}", hint="check the path, free space and permissions"
        ) from cause
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if not done:
            _remove_empty(created)


def _write_files(target: Path, files: Mapping[str, Content]) -> None:
    target.mkdir()
    for name, content in files.items():
        with (target / name).open("wb") as file:
            if isinstance(content, StoredFile):
                with content.path.open("rb") as source:
                    shutil.copyfileobj(source, file, _PIECE_BYTES)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _exchange(new: Path, old: Path, folder: Path, files: Mapping[str, Content], without: Sequence[str]) -> None:
    """Put the new files in place one by one, and take away the others; on a failure put the old ones back."""
    old.mkdir()
    placed: list[str] = []
    try:
        for name in (*without, *files):
            if (folder / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{name} is a folder")
            if (folder / name).exists():
                (folder / name).rename(old / name)
            placed.append(name)
            if name in files:
                (new / name).rename(folder / name)
    except BaseException:
        for name in placed:
            if (old / name).exists():
                (old / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise


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
