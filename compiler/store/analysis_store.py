"""Results of analyses kept on disk under the hash of everything that they follow from.

A key is made of what goes in: programs and calibration sets by their fingerprints, settings field by field, tensors by
their bytes; and of what computes: foldcut's own source, torch, the CPU's instruction set and the number of threads.
So a result is found again only where computing it again would give the same bits, and nothing has to be invalidated.
Every entry is a file of its own, written under a temporary name and renamed: after a kill it is whole or not there.
It begins with a digest of its content and of the place that it was written for: what a disk, a copy or another program
has changed is computed again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save

from ..data.calibration_set import CalibrationSet
from ..ir.program import Program
from ..processes.sharing import by_first
from ..processes.team import team
from ..support.memory import told_bytes
from .checkpoint import UNKEPT, Checkpoint, Timed

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]

#: Part of the folder's name: what another version wrote is neither read nor touched.
FORMAT_VERSION = 2
#: What every entry begins with, before its digest.
_MAGIC = b"foldcut analysis\n"
_DIGEST_BYTES = 32
#: The name under which an entry holds its plain data, beside its tensors.
_JSON = "*json*"
#: Entries beyond this many bytes in all go, those not used for longest first.
MOST_BYTES = 4 << 30
#: So many bytes are written before the folder is looked through again.
_LOOK_BYTES = 1 << 20
#: How the state of a result that is not finished is named.
UNFINISHED = ".unfinished"
#: A temporary file this old is not being written any more.
LEFT_S = 3600.0


#: The damaged entry that a warning was given for.
_warned: list[Path] = []


class NotAddressableError(TypeError):
    """Something goes into a result that has no content to be known again by (a function, say)."""


class AnalysisStore:
    """Computes results, or reads those that were computed before; `folder` None keeps none.

    `basis` are texts that all results depend on besides their inputs and foldcut's own source, such as the source of
    a user's rewrite. `reused` and `computed` count results. What cannot be written costs a warning, once; what cannot
    be read is computed again.
    """

    def __init__(self, folder: Path | None = None, *, basis: Sequence[str] = (), most_bytes: int = MOST_BYTES) -> None:
        #: Where measurements are kept as well, in files of their own.
        self.root = folder
        self.folder = None if folder is None else folder / f"analyses-{FORMAT_VERSION}"
        self.reused = self.computed = 0
        self._basis = list(basis)
        self._most_bytes = most_bytes
        self._unlooked = _LOOK_BYTES  # what others have written is not known

    def value(self, name: str, inputs: Sequence[Any], compute: Callable[[], T], *, most_age_s: float = math.inf) -> T:
        """Plain data (what JSON holds) that follows from `inputs`, kept for `most_age_s` seconds (a measurement does
        not only follow from its inputs). Floats come back bit for bit, tuples as lists."""
        found, _ = self.result(name, inputs, lambda: (compute(), {}), most_age_s=most_age_s)
        return found

    def result(
        self,
        name: str,
        inputs: Sequence[Any],
        compute: Callable[[], tuple[T, Mapping[str, torch.Tensor]]],
        *,
        most_age_s: float = math.inf,
    ) -> tuple[T, Tensors]:
        """Plain data and tensors that follow from `inputs`. The tensors are contiguous copies, whether they were
        computed or read: what is computed from them does not depend on which."""
        path = self._path(name, inputs)
        found = by_first(lambda: None if path is None else self._read(path, most_age_s))
        if found is None:
            data, tensors = compute()
            self.computed += 1
            found = json.loads(json.dumps(data)), {key: _copy(value) for key, value in tensors.items()}
            if path is not None and team().first:
                self._write(path, *found)
                with suppress(OSError):
                    path.with_suffix(UNFINISHED).unlink()
        else:
            self.reused += 1
        return found

    def checkpoint(self, name: str, inputs: Sequence[Any]) -> Checkpoint:
        """Where the computation of a result keeps how far it has got; the result takes the place of what is there."""
        path = self._path(name, inputs)
        if path is None:  # of several processes the first one keeps the state of all, and hands it round
            return UNKEPT
        part = path.with_suffix(UNFINISHED)
        return Timed(
            lambda: by_first(lambda: self._read(part, math.inf)), lambda standing: self._write(part, *standing)
        )

    def _path(self, name: str, inputs: Sequence[Any]) -> Path | None:
        if self.folder is None or not team().first:
            return None
        try:
            text = json.dumps([name, _basis() + self._basis, [_described(value) for value in inputs]])
        except NotAddressableError:
            return None
        key = hashlib.blake2b(text.encode(), digest_size=20).hexdigest()
        return self.folder / key[:2] / f"{key[2:]}.safetensors"

    def _read(self, path: Path, most_age_s: float) -> tuple[Any, Tensors] | None:
        try:
            tensors = {name: _copy(value) for name, value in load(_opened(path)).items()}
            kept = json.loads(bytes(tensors.pop(_JSON).numpy()))
            if time.time() - kept["taken"] > most_age_s:
                return None
            with suppress(OSError):  # a folder that may only be read
                os.utime(path)  # what was used last goes last
        except (OSError, MemoryError):
            return None
        except Exception:  # a damaged entry, whatever the reader makes of it, is one that is not there
            _warn_once(path)
            with suppress(OSError):
                path.unlink()
            return None
        return kept["data"], tensors

    def _write(self, path: Path, data: Any, tensors: Tensors) -> None:
        text = json.dumps({"taken": time.time(), "data": data}).encode()
        content = save({**tensors, _JSON: torch.frombuffer(bytearray(text), dtype=torch.uint8)})
        content = _MAGIC + _sealed(path, content) + content
        if self.folder is None or len(content) > self._most_bytes:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(prefix=".part-", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                Path(part).replace(path)
            except BaseException:
                Path(part).unlink(missing_ok=True)
                raise
            self._unlooked += len(content)
            if self._unlooked >= _LOOK_BYTES:  # looking is not free
                self._unlooked = 0
                self._shrink(self.folder)
        except FileNotFoundError:
            return  # another process has made room just now: this entry is lost, the next need not be
        except OSError as cause:
            warnings.warn(f"analyses are not kept: {self.folder}: {cause.strerror}", stacklevel=4)
            self.folder = None

    def _shrink(self, folder: Path) -> None:
        """Remove the entries not used for longest until the rest is within bounds; leftovers of a kill go first."""
        found = []
        for path in folder.glob("*/*"):
            with suppress(OSError):
                status = path.stat()
                left = path.name.startswith(".part-") and time.time() - status.st_mtime > LEFT_S
                found.append((not left, status.st_mtime, status.st_size, path))
        excess = sum(size for _, _, size, _ in found) - self._most_bytes
        for _, _, size, path in sorted(found, key=lambda entry: entry[:2]):
            if excess <= 0:
                return
            with suppress(OSError):
                path.unlink()
                excess -= size


#: Keeps nothing: every result is computed.
NOTHING_KEPT = AnalysisStore()


def _sealed(path: Path, content: bytes) -> bytes:
    """The digest of an entry: one put in the place of another does not have it."""
    digest = hashlib.blake2b(f"{path.parent.name}/{path.name}\n".encode(), digest_size=_DIGEST_BYTES)
    digest.update(content)
    return digest.digest()


def _opened(path: Path) -> bytes:
    """The content of an entry behind its digest. Raises ValueError when it is not what was written there."""
    whole = path.read_bytes()
    start = len(_MAGIC) + _DIGEST_BYTES
    content = whole[start:]
    if whole[:start] != _MAGIC + _sealed(path, content):
        raise ValueError("the entry is damaged")
    return content


def _warn_once(path: Path) -> None:
    """At most once in a process: a bad disk damages many entries."""
    if not _warned:
        _warned.append(path)
        warnings.warn(f"a kept analysis was damaged and is made again: {path}", stacklevel=5)


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().contiguous().clone()


def _described(value: Any) -> Any:
    """A value as JSON that says all of its content; long content by its hash."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Program, CalibrationSet)):
        return f"{type(value).__name__} {value.fingerprint}"
    if isinstance(value, torch.Tensor):
        return f"tensor {value.dtype} {list(value.shape)} {_hashed(value)}"
    if isinstance(value, Mapping):
        return {"map": [[_described(key), _described(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_described(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return {"set": sorted(json.dumps(_described(item)) for item in value)}
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value).__qualname__: [[f.name, _described(getattr(value, f.name))] for f in fields(value)]}
    raise NotAddressableError(f"{type(value).__name__} has no content to be known again by")


def _hashed(value: torch.Tensor) -> str:
    plain = value.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(plain.data, digest_size=16).hexdigest()


def _basis() -> list[str | int]:
    """What computes: other code, another torch, another number of threads or other batches, as a
    memory limit asks for, may round in another way."""
    cpu = (platform.machine(), torch.backends.cpu.get_cpu_capability())
    return [code_version(), torch.__version__, *cpu, torch.get_num_threads(), *told_bytes()]


def versions() -> dict[str, str]:
    """What computes, by its name."""
    return {"versions of foldcut": code_version(), "versions of torch": str(torch.__version__)}


@functools.cache
def code_version() -> str:
    """Hash of foldcut's own source: a version number would not tell an edited copy from the release."""
    digest = hashlib.blake2b(digest_size=16)
    package = Path(__file__).parents[2]
    for folder in ("compiler", "passes", "runtime"):
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
