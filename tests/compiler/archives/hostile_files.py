"""`.pt2` files of which one part was changed, and objects that leave a mark when they are unpickled."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

Entries = dict[str, bytes]
Change = Callable[[Entries], object]

GRAPH, CONFIG, WEIGHT = "models/model.json", "data/weights/model_weights_config.json", "data/weights/weight_0"
SAMPLES, CONSTANTS = "data/sample_inputs/model.pt", "data/constants/model_constants_config.json"


class Marks:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def code(path: Path) -> str:
    """An expression that leaves the same mark, without a quote in it."""
    name = "+".join(f"chr({ord(letter)})" for letter in str(path))
    return f"__import__(chr(111)+chr(115)).mkdir({name})"


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def exported(path: Path) -> Path:
    """A small network as torch.export.save writes it."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    dims = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(net, (torch.ones(2, 3),), dynamic_shapes=dims), path)
    return path


def read(path: Path) -> Entries:
    """The entries without the name of the folder that they all lie in."""
    with zipfile.ZipFile(path) as archive:
        return {entry.filename.split("/", 1)[1]: archive.read(entry) for entry in archive.infolist()}


def write(path: Path, entries: Entries, *, root: str = "net/", method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(root + name, content)
    return path


def changed(path: Path, change: Change) -> Path:
    """The file with its entries changed in place."""
    entries = read(path)
    change(entries)
    return write(path, entries)


def in_json(name: str, change: Callable[[Any], object]) -> Change:
    """A change of one JSON entry."""

    def apply(entries: Entries) -> None:
        data = json.loads(entries[name])
        change(data)
        entries[name] = json.dumps(data).encode()

    return apply


def replaced(name: str, old: str, new: str) -> Change:
    """One text for another wherever it stands in an entry."""

    def apply(entries: Entries) -> None:
        text = entries[name].decode()
        assert old in text
        entries[name] = text.replace(old, new).encode()

    return apply


def signature(data: Any) -> Any:
    return data["graph_module"]["module_call_graph"][0]["signature"]


def to_old_layout(path: Path, *, samples: bytes | None = None) -> Path:
    """The layout of torch 2.7 and before."""
    entries = read(path)
    state = {}
    for name, payload in json.loads(entries[CONFIG])["config"].items():
        sizes = [size["as_int"] for size in payload["tensor_meta"]["sizes"]]
        held = torch.frombuffer(bytearray(entries["data/weights/" + payload["path_name"]]), dtype=torch.float32)
        state[name] = nn.Parameter(held.reshape(sizes))
    old = {
        "version": str(json.loads(entries[GRAPH])["schema_version"]["major"]).encode() + b".1",
        "serialized_exported_program.json": entries[GRAPH],
        "serialized_state_dict.pt": pickled(state),
        "serialized_constants.pt": pickled({}),
        "serialized_example_inputs.pt": samples if samples is not None else entries[SAMPLES],
    }
    return write(path, old, root="")
