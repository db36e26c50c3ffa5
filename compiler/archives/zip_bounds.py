"""Zip archives that nobody vouches for (`.npz`, `.pt`, `.pt2`): looked through before anything is read from them."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import BinaryIO

from ..support.errors import CompilerError, named_first_line

#: So many bytes an archive may unpack to whatever its size; beyond them, so many times its own size. Weights are
#: stored as they are, pictures hardly shrink; deflate reaches 1,030 times on zeros.
FREE_BYTES = 256 << 20
MOST_RATIO = 200
_MOST_ENTRIES = 100_000
_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def is_zip(path: Path) -> bool:
    """Whether the readers of numpy and torch would take the file for an archive, whatever it is called."""
    try:
        with path.open("rb") as file:
            return file.read(4) in _MAGIC
    except OSError:
        return False


def check_zip(source: Path | bytes, error: type[CompilerError], *, name: str | None = None) -> list[zipfile.ZipInfo]:
    """The entries of an archive whose names are plain and different, and which unpacks to bounded memory.

    Readers unpack no more than an entry declares, so declared sizes bound what is really unpacked. Raises `error`.
    """
    label = name or str(source if isinstance(source, Path) else "the archive")
    kind = source.suffix if isinstance(source, Path) else "zip"
    file: Path | BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else source
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except Exception as cause:  # BadZipFile, and whatever else a broken header raises
        raise error(
            f"{label} is not a readable {kind} file: {named_first_line(cause)}", hint="the file is truncated or damaged"
        ) from cause
    _check_names(label, entries, error)
    _check_sizes(label, entries, size, error)
    return entries


def _check_names(label: str, entries: list[zipfile.ZipInfo], error: type[CompilerError]) -> None:
    seen: set[str] = set()
    for entry in entries:
        name = entry.orig_filename
        parts = name.split("/")
        if not name or parts[0] == "" or {"..", "."} & set(parts) or "\\" in name or not name.isprintable():
            raise error(
                f"{label} names an entry {name[:80]!r}", hint="do not trust this file: the name leads elsewhere"
            )
        # torch's reader does not tell upper case from lower case
        if name.casefold() in seen:
            raise error(f"{label} holds two entries {name[:80]!r}", hint="do not trust this file: readers would differ")
        seen.add(name.casefold())
        if entry.flag_bits & 1 or entry.compress_type not in _METHODS:
            raise error(
                f"{label}: the entry {name[:80]!r} is encrypted or packed in an unusual way",
                hint="save it again without encryption; a file that was saved so is damaged",
            )


def _check_sizes(label: str, entries: list[zipfile.ZipInfo], size: int, error: type[CompilerError]) -> None:
    if len(entries) > _MOST_ENTRIES or sum(e.compress_size for e in entries) > size:
        raise error(f"{label} holds more entries than fit in it", hint="do not trust this file: entries overlap")
    for entry in entries:
        if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
            raise error(f"{label}: the entry {entry.filename[:80]!r} has two sizes", hint="the file is damaged")
    unpacked, most = sum(entry.file_size for entry in entries), max(FREE_BYTES, MOST_RATIO * size)
    if unpacked > most:
        raise error(
            f"{label} unpacks to far more than its size",
            expected=f"at most {most} bytes: {MOST_RATIO} times the file's {size}, or {FREE_BYTES}",
            actual=f"{unpacked} bytes",
            hint="store the arrays without compression (numpy.savez, torch.save)",
        )


def check_contents(path: Path, error: type[CompilerError]) -> None:
    """Raise `error` when an entry does not have its checksum. torch's reader does not look: a flipped bit of a weight
    would be another network. To be called behind `check_zip`."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as cause:  # BadZipFile, zlib.error, and whatever else a broken entry raises
        raise error(
            f"{path} is not a readable {path.suffix} file: {named_first_line(cause)}",
            hint="the file is truncated or damaged",
        ) from cause
    if bad is not None:
        raise error(
            f"{path} is damaged: {bad[:80]!r} does not have its checksum",
            hint="copy the file again, or save it again, with torch.serialization.set_crc32_options(True)",
        )
