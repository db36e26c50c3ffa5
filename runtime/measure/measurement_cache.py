"""Measurements kept on disk from run to run: one SQLite file that any number of processes may use at once."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

#: Part of the file's name: what another version wrote is neither read nor touched.
FORMAT_VERSION = 2
_WAIT_SECONDS = 30.0
_TABLE = """CREATE TABLE IF NOT EXISTS measurements
    (key TEXT PRIMARY KEY, value TEXT NOT NULL, taken REAL NOT NULL, digest BLOB NOT NULL)"""
#: What a file that is in order may answer at times: it is busy, may not be written, or the disk is full.
_PASSING = frozenset(
    {"SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_FULL", "SQLITE_IOERR"}
)
_warned: list[Path] = []
_MOST_VARIABLES = 500  # SQLite limits how many one statement may have


class MeasurementCache:
    """JSON values by key in `folder`; None keeps them in memory only.

    Every write is a transaction, so a reader sees all of it or nothing, also when the writer is killed. What cannot be
    read or written costs a warning, once, and a new measurement; a damaged file is set aside, not deleted.
    Every value has a digest: a damaged one is measured again.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / f"measurements-{FORMAT_VERSION}.sqlite"
        self._memory: dict[str, Any] = {}

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that are known."""
        wanted = list(dict.fromkeys(keys))
        missing = [key for key in wanted if key not in self._memory]

        def read(connection: sqlite3.Connection) -> None:
            for start in range(0, len(missing), _MOST_VARIABLES):
                some = missing[start : start + _MOST_VARIABLES]
                marks = ",".join("?" * len(some))
                found = connection.execute(f"SELECT key, value, digest FROM measurements WHERE key IN ({marks})", some)
                rows = [(key, value, digest == _digest(key, value)) for key, value, digest in found]
                self._memory |= {key: json.loads(value) for key, value, sound in rows if sound}
                if not all(sound for *_, sound in rows):
                    _warn_once(self.path)

        if missing:
            self._in_file(read)
        return {key: self._memory[key] for key in wanted if key in self._memory}

    def put(self, values: Mapping[str, Any]) -> None:
        """Keep these values, in place of older ones of the same keys."""
        self._memory |= values
        texts = {key: json.dumps(value) for key, value in values.items()}
        rows = [(key, text, time.time(), _digest(key, text)) for key, text in texts.items()]
        self._in_file(lambda c: c.executemany("INSERT OR REPLACE INTO measurements VALUES (?, ?, ?, ?)", rows))

    def _in_file(self, work: Callable[[sqlite3.Connection], object]) -> None:
        """Do `work` in one transaction on the file, where there is one."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # a connection for each use: none is carried into a forked process or another thread
            with closing(sqlite3.connect(self.path, timeout=_WAIT_SECONDS)) as connection, connection:
                connection.execute(_TABLE)
                work(connection)
        except (OSError, sqlite3.Error, ValueError) as cause:
            self._give_up(self.path, cause)

    def _give_up(self, path: Path, cause: Exception) -> None:
        """Go on in memory; a file that holds something else than measurements is moved out of the way."""
        self.path, moved = None, ""
        if isinstance(cause, (ValueError, sqlite3.Error)) and not _passes(cause):
            try:
                path.replace(path.with_suffix(".damaged"))
                moved = f"; it was moved to {path.with_suffix('.damaged')}"
            except OSError:
                pass
        warnings.warn(f"measurements are not kept: {path}: {cause}{moved}", stacklevel=4)


def _digest(key: object, value: object) -> bytes:
    """What a value is known to be whole by, and to be the one of its key; a damaged file answers with any type."""
    return hashlib.blake2b(f"{key!r} {value!r}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _passes(cause: Exception) -> bool:
    """Whether the same file may be read another time."""
    name = str(getattr(cause, "sqlite_errorname", ""))
    return any(name.startswith(passing) for passing in _PASSING)


def _warn_once(path: Path | None) -> None:
    """At most once in a process: a bad disk damages many values."""
    if path is not None and not _warned:
        _warned.append(path)
        warnings.warn(f"kept measurements were damaged and are taken again: {path}", stacklevel=6)
