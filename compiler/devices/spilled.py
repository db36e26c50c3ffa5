"""Values in a file of raw bytes, which is mapped into memory when they are read: as they are, without an archive around
them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..support.errors import CompilerError

#: Each tensor begins at a multiple of so many bytes, as kernels like it.
ALIGNMENT = 64
#: Weights of more bytes in all are kept in a file: what is in use is then in memory, and the rest where it is needed.
MAPPED_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a tensor lies: the first byte of its storage in the file, and what of the storage it is."""

    start: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Spilled:
    """Values by name, the storages of the tensors among them in a file; `read` maps them."""

    path: Path
    size: int
    values: Mapping[str, Any]

    @classmethod
    def written(cls, values: Mapping[str, Any], path: Path) -> Spilled:
        """Write values to a file. A storage that several of them share is written once, and shared again when it is
        read. Raises CompilerError when there is no room."""
        starts: dict[int, int] = {}
        kept = dict(values)
        size = 0
        try:
            with path.open("wb") as file:
                for name, value in values.items():
                    if not isinstance(value, torch.Tensor):
                        continue
                    storage = value.untyped_storage()
                    if storage.data_ptr() not in starts:
                        starts[storage.data_ptr()] = size
                        content = torch.empty(0, dtype=torch.uint8).set_(storage.cpu())
                        file.write(content.numpy().data)
                        file.write(bytes(-len(content) % ALIGNMENT))
                        size += len(content) + -len(content) % ALIGNMENT
                    kept[name] = _Place(
                        start=starts[storage.data_ptr()],
                        dtype=value.dtype,
                        offset=int(value.storage_offset()),
                        shape=tuple(value.shape),
                        stride=value.stride(),
                        device=value.device,
                    )
        except OSError as cause:
            raise CompilerError(
                f"what layers hand on does not fit into memory, and not into {path.parent} either: {cause.strerror}",
                hint="give fewer samples, or name a roomier folder in the environment variable TMPDIR",
            ) from cause
        return cls(path=path, size=size, values=kept)

    def read(self) -> dict[str, Any]:
        """The values, laid out as they were, on the devices that they were on. Writing to a tensor of these changes no
        file."""
        whole = torch.UntypedStorage(0)  # no file can be mapped that has nothing in it
        if self.size:
            whole = cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(self.path), False, self.size))
        return {
            name: _placed(whole, value) if isinstance(value, _Place) else value for name, value in self.values.items()
        }


def stays_in_a_file(size_bytes: int) -> bool:
    """Whether weights of so many bytes are mapped from a file."""
    return size_bytes > MAPPED_BYTES


def mapped_copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """Copies in a file that is mapped into memory, laid out as they are; what shares a storage shares it again. The
    system takes the pages that nobody uses out of memory, and reads them again: the file lasts as long as the tensors,
    and has no name. None when there is no room for it: then there may be some in memory.
    """
    descriptor, name = tempfile.mkstemp(prefix="foldcut-weights-")
    os.close(descriptor)
    try:
        named = {str(place): tensor.detach() for place, tensor in enumerate(tensors)}
        copies = Spilled.written(named, Path(name)).read()
    except CompilerError:
        return None
    finally:
        with suppress(OSError):  # where a file that is in use cannot go, the system takes it with the temporary files
            Path(name).unlink()
    return [cast(torch.Tensor, copies[str(place)]) for place in range(len(tensors))]


@dataclass(frozen=True, kw_only=True)
class Hosted:
    """Values by name whose tensors are in host memory, and the device that they came from."""

    values: Mapping[str, Any]
    device: torch.device

    @classmethod
    def moved(cls, values: Mapping[str, Any], device: torch.device) -> Hosted:
        """Values of a device in host memory. What stands under two names is there once."""
        return cls(values=_all_on(values, torch.device("cpu")), device=device)

    def read(self) -> dict[str, Any]:
        """The values on their device."""
        return _all_on(self.values, self.device)


def _all_on(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    tensors = {id(value): value for value in values.values() if isinstance(value, torch.Tensor)}
    there = {key: value.to(device) for key, value in tensors.items()}
    return {name: there.get(id(value), value) for name, value in values.items()}


def _placed(whole: torch.UntypedStorage, place: _Place) -> torch.Tensor:
    """The tensor at a place."""
    first = place.start // place.dtype.itemsize + place.offset
    return torch.empty(0, dtype=place.dtype).set_(whole, first, place.shape, place.stride).to(place.device)
