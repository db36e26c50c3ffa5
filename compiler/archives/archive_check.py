"""What a `.pt` or `.pt2` file holds, looked at before torch loads it: pickles that would run code are refused."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..support.errors import CaptureError, CompilerError, named_first_line
from ..support.strict_json import read_json
from .exported_text import check_exported_text
from .zip_bounds import FREE_BYTES, MOST_RATIO, check_contents, check_zip, is_zip

#: Entries of the older layout that torch still reads, by what they hold.
_OLD_GRAPH = "serialized_exported_program.json"
_OLD_TENSORS = frozenset(f"serialized_{what}.{kind}" for what in ("state_dict", "constants") for kind in ("pt", "json"))
_OLD_PICKLES = _OLD_TENSORS | {"serialized_example_inputs.pt"}
#: Entries that hold no more than a few characters, or that torch does not look at.
_MARKS = re.compile(r"archive_format|archive_version|version|byteorder|\.data/\w+|extra/.*|extra_files/.*")
_FOLDERS = ("data/weights/", "data/constants/")
_PAYLOAD = re.compile(r"(weight|tensor)_\d+", re.ASCII)
_HINT = "do not trust this file; where you do, torch.export.load it yourself and pass the ExportedProgram"


def check_exported_file(path: Path) -> None:
    """Raise CaptureError for a `.pt2` file that could run code of its own or fill the memory when torch loads it.

    Pickled entries have to be of what `torch.load(weights_only=True)` takes. Compiled code, scripted objects and
    entries that torch.export does not write are refused, and so is text in the graph that Python would evaluate.
    """
    entries = check_zip(path, CaptureError)
    check_contents(path, CaptureError)
    names = [entry.filename for entry in entries if not entry.is_dir()]
    if any(name in {_OLD_GRAPH, *_OLD_PICKLES} for name in names):
        _check_old(path, names)
        return
    roots = {name.split("/")[0] for name in names}
    if len(roots) != 1 or any("/" not in name for name in names):
        raise CaptureError(f"{path} does not have the layout of a .pt2 file", hint="save it with torch.export.save")
    with path.open("rb") as file, _damage(path):  # by its content: torch cannot open every path
        reader = torch._C.PyTorchFileReader(file)
        root = f"{roots.pop()}/"
        sizes = {entry.filename.removeprefix(root): entry.file_size for entry in entries if not entry.is_dir()}
        if sizes != {name: reader.get_record_size(name) for name in reader.get_all_records()}:
            raise CaptureError(f"{path} lists its entries in two ways", hint=_HINT)
        for name in sizes:
            _check_entry(path, name, reader, sizes)


def check_pickled_file(path: Path, error: type[CompilerError]) -> None:
    """Raise `error` for a `.pt` or `.npz` file that is damaged or unpacks to far more than its size. That it holds no
    objects is left to `torch.load(weights_only=True)` and to numpy."""
    if is_zip(path):
        check_zip(path, error)
        check_contents(path, error)


def check_extents(value: Any, error: type[CompilerError]) -> None:
    """Raise `error` for a tensor that shows far more elements than it stores: copying it would fill the memory."""
    for leaf in torch.utils._pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.device.type != "meta":
            shown, stored = leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes()
            if shown > max(FREE_BYTES, MOST_RATIO * stored):
                raise error(
                    f"a tensor of shape {list(leaf.shape)} stores {stored} bytes and shows {shown}",
                    hint="save it contiguous, if it is meant",
                )


def _check_old(path: Path, names: list[str]) -> None:
    """The layout of torch 2.7 and before, which torch reads with zipfile when its own reader fails."""
    unknown = [n for n in names if n not in {_OLD_GRAPH, *_OLD_PICKLES} and not _MARKS.fullmatch(n)]
    if unknown or _readable(path):
        raise CaptureError(f"{path} mixes two layouts of .pt2 files", actual=", ".join(unknown[:3]) or None, hint=_HINT)
    with _damage(path), zipfile.ZipFile(path) as archive:
        for name in names:
            if name == _OLD_GRAPH:
                check_exported_text(archive.read(name))
            elif name in _OLD_PICKLES:
                _check_pickle(path, name, archive.read(name))


def _readable(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            torch._C.PyTorchFileReader(file)
        except RuntimeError:
            return False
    return True


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Whatever a reader makes of a broken archive."""
    try:
        yield
    except CompilerError:
        raise
    except Exception as cause:
        raise CaptureError(
            f"{path} is not a readable .pt2 file: {named_first_line(cause)}",
            hint="save it again with torch.export.save",
        ) from cause


def _check_entry(path: Path, name: str, reader: Any, sizes: dict[str, int]) -> None:
    folder = next((f for f in _FOLDERS if name.startswith(f)), None)
    inner = name.removeprefix(folder or "")
    if _MARKS.fullmatch(name) or (folder and _PAYLOAD.fullmatch(inner)):
        return  # marks, and the bytes of tensors: a pickle among them is named by a config
    content = reader.get_record(name)
    if name.startswith("models/"):
        check_exported_text(content)
    elif folder and inner.endswith("_config.json"):
        _check_config(path, folder, content, reader, sizes)
    elif inner.endswith(".pt") and (folder or name.startswith("data/sample_inputs/")):
        _check_pickle(path, name, content)
    else:
        raise CaptureError(
            f"{path} holds {name[:80]!r}, which is code, an object, or no part of an exported program",
            expected="graph, weights, constants and sample inputs",
            hint=_HINT,
        )


def _check_config(path: Path, folder: str, content: bytes, reader: Any, sizes: dict[str, int]) -> None:
    """Which tensor lies in which entry: pickled tensors are looked at, and none may be larger than what is stored."""
    shown = 0
    for tensor, payload in read_json(content)["config"].items():
        entry = folder + str(payload["path_name"])
        if not _PAYLOAD.fullmatch(str(payload["path_name"])) or entry not in sizes:
            raise CaptureError(f"{path}: {tensor!r} is an object, not a tensor", actual=entry[:120], hint=_HINT)
        if payload["use_pickle"]:
            _check_pickle(path, entry, reader.get_record(entry))
        else:
            shown = max(shown, _elements(payload["tensor_meta"]["sizes"]))
    if 8 * shown > max(8 * FREE_BYTES, MOST_RATIO * sum(sizes.values())):
        raise CaptureError(f"{path} declares a tensor of {shown} elements that it does not hold", hint=_HINT)


def _elements(sizes: list[dict[str, Any]]) -> int:
    count = 1
    for size in sizes:
        if not isinstance(size.get("as_int"), int) or len(size) != 1:
            raise CaptureError(f"a stored tensor has the size {size}", hint=_HINT)
        count *= size["as_int"]
    return count


def _check_pickle(path: Path, name: str, content: bytes) -> None:
    """The restricted unpickler is the judge: it builds tensors, numbers and containers, and calls nothing else."""
    if not content:
        return
    if content[:2] == b"PK":
        check_zip(content, CaptureError, name=f"{path}: {name}")
    try:
        value = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as cause:  # a foreign file raises whatever its reader raises
        called = re.search(r"GLOBAL (\S+)", str(cause))
        raise CaptureError(
            f"{path} holds objects that could run code: {name}",
            expected="what torch.load(weights_only=True) takes: tensors, numbers, lists, dicts",
            actual=called[1] if called else named_first_line(cause),
            hint=_HINT,
        ) from cause
    check_extents(value, CaptureError)
