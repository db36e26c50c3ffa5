"""Weights from safetensors files and into them, one file or shards with an index, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..ir.cost import tensor_bytes
from ..support.atomic_files import Content, StoredFile, temporary_folder, write_folder
from ..support.errors import CaptureError, first_line
from ..support.strict_json import json_file, read_json

M = TypeVar("M", bound=nn.Module)
#: How Hugging Face names the index of shards.
INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
#: So many names are told of.
_MOST_NAMES = 4


def load_shards(module: M, folder: str | Path) -> M:
    """Read the weights of a module from safetensors files, one tensor at a time.

    The files are mapped into memory one after the other, and each tensor is copied to where the module has it: what a
    file's pages take beside the weights, the system can have back. A module on the ``meta`` device, which has no
    weights yet, gets the file's own, in the file's type: they are read when they are first used, writing to them
    changes no file, and the file has to stay as it is for as long.

    Every weight has to be there and every tensor has to be wanted. A weight that is tied to another one may be left
    out, as Hugging Face does. Nothing is changed unless all names and shapes fit. Files are not executed: safetensors
    holds numbers only.

    Arguments:
        module: The network. Its weights are changed in place.
        folder: A folder with ``model.safetensors.index.json`` and the shards that it names, or with one or several
            ``.safetensors`` files; or the path of one such file.

    Returns:
        The module.

    Raises:
        CaptureError: If there is no such file, one is damaged or outside the folder, or names or shapes do not fit.

    Example:
        >>> import pathlib, tempfile
        >>> from safetensors.torch import save_file
        >>> net = nn.Linear(8, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(net.state_dict(), pathlib.Path(folder) / "model.safetensors")
        ...     with torch.device("meta"):
        ...         empty = nn.Linear(8, 4)
        ...     filled = foldcut.load_shards(empty, folder)
        >>> torch.equal(filled.weight, net.weight)
        True
    """
    files = _files(Path(folder))
    wanted = module.state_dict(keep_vars=True)
    _check_names(wanted, files)
    for path, names in _by_file(files):
        with ExitStack() as stack:
            opened = _opened(path, stack)
            for name in names:
                shape, have = _shape(opened, path, name), list(wanted[name].shape)
                if shape != have:
                    raise CaptureError(
                        f"{path}: {name} has another shape", expected=have, actual=shape, hint="build the network alike"
                    )
    for path, names in _by_file(files):
        with ExitStack() as stack, torch.no_grad():
            opened = _opened(path, stack)
            for name in names:
                _put(module, wanted[name], _read(opened, path, name))
    return module


def save_shards(module: nn.Module, folder: str | Path, *, shard_bytes: int = 5_000_000_000) -> list[Path]:
    """Write the weights of a module to safetensors files, as Hugging Face names and splits them.

    What fits into `shard_bytes` goes to ``model.safetensors``; more to ``model-00001-of-00003.safetensors`` and so on,
    with ``model.safetensors.index.json``. One shard at a time is written. A weight under two names is written under the
    first, as `load_shards` reads it. All files appear, or none; shards and an index of an earlier save go.

    Arguments:
        module: The network, as `Compiled.module` is one.
        folder: The folder. It is made if it does not exist.
        shard_bytes: Bytes of weights in one file. A larger tensor has a file of its own.

    Returns:
        The paths: the shards in order, then the index where there is one.

    Raises:
        CaptureError: If there is nothing to write, or `shard_bytes` is below 1.
        OutputError: If the files cannot be written.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = [path.name for path in foldcut.save_shards(net, folder, shard_bytes=160)]
        ...     again = foldcut.load_shards(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), folder)
        >>> files[:2], torch.equal(again[1].weight, net[1].weight)
        (['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'], True)
    """
    if shard_bytes < 1:
        raise CaptureError(f"shard_bytes={shard_bytes} is no size", hint="give bytes, at least 1")
    state, first = module.state_dict(keep_vars=True), dict[int, str]()
    for name, value in state.items():
        first.setdefault(_identity(value), name)
    shards = _split({name: state[name].detach() for name in first.values()}, shard_bytes)
    if not shards:
        raise CaptureError("the module has no weights", hint="give the network, as Compiled.module is one")
    names = [f"model-{place:05}-of-{len(shards):05}{_SUFFIX}" for place in range(1, len(shards) + 1)]
    files: dict[str, Content] = {}
    target = Path(folder)
    with temporary_folder() as staging:
        for name, shard in zip(names if len(shards) > 1 else [f"model{_SUFFIX}"], shards, strict=True):
            path = Path(staging) / name
            save_file({key: value.cpu().contiguous() for key, value in shard.items()}, path, {"format": "pt"})
            files[name] = StoredFile(path)
        if len(shards) > 1:
            held = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            total = sum(tensor_bytes(shard.values()) for shard in shards)
            files[INDEX] = json_file({"metadata": {"total_size": total}, "weight_map": held})
        old = [path.name for path in (*target.glob(f"model*{_SUFFIX}"), target / INDEX) if path.name not in files]
        write_folder(target, files, without=old)
    return [target / name for name in files]


def _split(named: Mapping[str, torch.Tensor], shard_bytes: int) -> list[dict[str, torch.Tensor]]:
    """The tensors in their order, so many bytes together."""
    shards: list[dict[str, torch.Tensor]] = []
    left = 0
    for name, value in named.items():
        size = tensor_bytes([value])
        if not shards or size > left:
            shards.append({})
            left = shard_bytes
        shards[-1][name] = value
        left -= size
    return shards


def _files(source: Path) -> dict[str, Path]:
    """Each tensor's name and the file that holds it. Raises CaptureError."""
    index = source / INDEX
    if index.is_file():
        return _indexed(source, index)
    paths = [source] if source.is_file() else sorted(source.glob(f"*{_SUFFIX}"))
    if not paths:
        raise CaptureError(
            f"{source} holds no {_SUFFIX} file", hint=f"give the folder of {INDEX} and its shards, or one file"
        )
    found: dict[str, Path] = {}
    for path in paths:
        with ExitStack() as stack:
            for name in _opened(path, stack).keys():  # noqa: SIM118 - it is no mapping
                if name in found:
                    raise CaptureError(f"{name} is in {found[name].name} and in {path.name}", hint="remove one of them")
                found[name] = path
    return found


def _by_file(files: Mapping[str, Path]) -> list[tuple[Path, list[str]]]:
    """The names that each file holds: one file is open at a time."""
    return [(path, [name for name in files if files[name] == path]) for path in dict.fromkeys(files.values())]


def _indexed(folder: Path, index: Path) -> dict[str, Path]:
    """What an index says, after each file was found to lie in its folder."""
    try:
        named = read_json(index.read_bytes())["weight_map"]
        names = {str(tensor): str(file) for tensor, file in named.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise CaptureError(f"{index} is no index of shards: {first_line(cause)}", hint="copy it again") from cause
    for file in dict.fromkeys(names.values()):
        if Path(file).name != file or not file.endswith(_SUFFIX):
            raise CaptureError(
                f"{index} names a file outside its folder", actual=repr(file), hint="do not trust these files"
            )
        if not (folder / file).is_file():
            raise CaptureError(f"a shard is missing: {folder / file}", hint="copy all files of the network")
    return {tensor: folder / file for tensor, file in names.items()}


def _opened(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as cause:
        raise CaptureError(f"cannot read {path}: {first_line(cause)}", hint="the file is damaged") from cause


def _shape(opened: Any, path: Path, name: str) -> list[int]:
    try:
        return list(opened.get_slice(name).get_shape())
    except SafetensorError as cause:  # the index says that it is there
        raise CaptureError(
            f"{path} has no {name}: {first_line(cause)}", hint="copy all files of one network"
        ) from cause


def _read(opened: Any, path: Path, name: str) -> torch.Tensor:
    try:
        found: torch.Tensor = opened.get_tensor(name)
    except (SafetensorError, OSError) as cause:
        raise CaptureError(f"cannot read {name} of {path}: {first_line(cause)}", hint="the file is damaged") from cause
    return found


def _check_names(wanted: Mapping[str, torch.Tensor], files: Mapping[str, Path]) -> None:
    """Raise CaptureError for weights that are nowhere, and for tensors that nothing wants."""
    there = [_identity(wanted[name]) for name in files if name in wanted]
    missing = [name for name, value in wanted.items() if name not in files and _identity(value) not in there]
    unknown = [name for name in files if name not in wanted]
    if missing or unknown:
        raise CaptureError(
            "the files are not those of this network",
            expected=_some(missing) if missing else None,
            actual=_some(unknown) if unknown else "nothing of these names",
            hint="build the network as it was when its weights were saved",
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _identity(value: torch.Tensor) -> int:
    """Equal for a tensor under two names: there is no memory to go by on the meta device."""
    return id(value) if value.device.type == "meta" else value.data_ptr() or id(value)


def _put(module: nn.Module, old: torch.Tensor, new: torch.Tensor) -> None:
    """The values of a tensor where the module has it; the tensor itself, under each of its names, where it has none."""
    if old.device.type != "meta":
        old.copy_(new)
        return
    fresh = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    for tensors, name in _owners(module, old):
        tensors[name] = fresh


def _owners(module: nn.Module, old: torch.Tensor) -> Iterator[tuple[dict[str, Any], str]]:
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            yield from [(tensors, name) for name, value in tensors.items() if value is old]
