"""Attacks by files: `.pt2`, `.pt`, `.npz`, `.npy` and ONNX files that would run code, read other files, or grow."""

from __future__ import annotations

import json
import pickle
import random
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import hostile_files as hostile
import numpy as np
import onnx
import test_archive_check
import test_onnx_functions as functions
import torch
from attack_registry import Succeeded, attack, needs
from foldcut.compiler.data.calibration_set import read_calibration
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.frontend.model_source import load_model
from foldcut.compiler.onnx.file import read_onnx
from foldcut.compiler.onnx_import.importer import import_onnx
from foldcut.compiler.support.errors import CompilerError


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _refused(act: Callable[[], object], otherwise: str, *, mark: Path | None = None) -> str:
    """Raise Succeeded unless `act` ends in an error of foldcut's, without a mark and within 600 MB."""
    before = _peak_bytes()
    try:
        act()
    except CompilerError as error:
        needs(mark is None or not mark.exists(), "the code ran")
        needs(_peak_bytes() - before < 600_000_000, f"{(_peak_bytes() - before) >> 20} MB were taken")
        return f"{type(error).__name__}: {error.message.splitlines()[0]}"
    raise Succeeded(otherwise)


def _running(name: str) -> None:
    @attack(".pt2", f"code {name.replace('_', ' ')}")
    def run(folder: Path, _seed: int) -> str:
        mark = folder / "mark"
        path = hostile.changed(hostile.exported(folder / "net.pt2"), test_archive_check.RUNNING[name](mark))
        return _refused(lambda: capture(path), "the file was read", mark=mark)


for _name in test_archive_check.RUNNING:
    _running(_name)


@attack(".pt2", "code in the older layout")
def old_layout(folder: Path, _seed: int) -> str:
    mark = folder / "mark"
    samples = hostile.pickled(((hostile.Marks(mark),), {}))
    path = hostile.to_old_layout(hostile.exported(folder / "net.pt2"), samples=samples)
    return _refused(lambda: capture(path), "the file was read", mark=mark)


@attack(".pt2", "two layouts in one file")
def two_layouts(folder: Path, _seed: int) -> str:
    mark, path = folder / "mark", hostile.exported(folder / "net.pt2")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("serialized_example_inputs.pt", pickle.dumps(hostile.Marks(mark)))
    return _refused(lambda: capture(path), "the file was read", mark=mark)


@attack(".pt2", "a shared library inside")
def library(folder: Path, _seed: int) -> str:
    path = hostile.exported(folder / "net.pt2")
    hostile.changed(path, lambda e: e.update({"data/aotinductor/model/model.so": b"\x7fELF" + bytes(100)}))
    return _refused(lambda: capture(path), "the file was read")


@attack(".pt2", "an operator that writes files")
def operator(folder: Path, _seed: int) -> str:
    path = hostile.exported(folder / "net.pt2")
    hostile.changed(path, hostile.replaced(hostile.GRAPH, "torch.ops.aten.relu.default", "torch.ops.aten.save.default"))
    return _refused(lambda: capture(path), "the file was read")


@attack(".pt2", "a size that takes for ever to work out")
def endless_size(folder: Path, _seed: int) -> str:
    path = hostile.exported(folder / "net.pt2")

    def change(data: dict) -> None:  # type: ignore[type-arg]
        data["graph_module"]["graph"]["tensor_values"]["input"]["sizes"][0]["as_expr"]["expr_str"] = "9**9**9**9"

    hostile.changed(path, hostile.in_json(hostile.GRAPH, change))
    return _refused(lambda: capture(path), "the file was read")


@attack(".pt2", "names of entries that lead elsewhere, twice, in capitals")
def entry_names(folder: Path, _seed: int) -> str:
    names = [
        "../../out",
        "/tmp/out",
        "net/../../out",
        "net\\out",
        "net/" + hostile.SAMPLES,
        "NET/" + hostile.GRAPH.upper(),
    ]
    for number, name in enumerate(names):
        path = hostile.exported(folder / f"net{number}.pt2")
        entries = hostile.read(path)
        with zipfile.ZipFile(hostile.write(path, entries), "a") as archive:
            archive.writestr(name, b"x")
        said = _refused(lambda path=path: capture(path), f"{name} was read")
    return f"{len(names)} of {len(names)}: {said}"


def _bomb(path: Path) -> Path:
    """A gigabyte in a megabyte."""
    return test_archive_check.bomb(path, "net/data/weights/weight_0", 64)


@attack(".pt2", "a gigabyte in a small file")
def bomb_pt2(folder: Path, _seed: int) -> str:
    path = _bomb(folder / "net.pt2")
    return _refused(lambda: capture(path), "the file was read")


@attack(".npz, .pt, .npy", "a gigabyte in a small file")
def bomb_samples(folder: Path, _seed: int) -> str:
    for name in ("x.npz", "x.pt", "x.npy"):
        path = _bomb(folder / name)
        said = _refused(lambda path=path: read_calibration(path), f"{name} was read")
    _refused(lambda: load_model("torch.nn:Identity", folder / "x.pt"), "the weights were read")
    return said


@attack(".npz, .pt, .npy", "pickled objects")
def pickled_samples(folder: Path, _seed: int) -> str:
    mark = folder / "mark"
    objects = np.array([hostile.Marks(mark)], dtype=object)
    np.save(folder / "x.npy", objects)
    np.savez(folder / "x.npz", objects)
    torch.save(hostile.Marks(mark), folder / "x.pt")
    for kind in ("npy", "npz", "pt"):
        for content in (None, pickle.dumps(hostile.Marks(mark))):
            path = folder / f"x.{kind}"
            if content is not None:
                path.write_bytes(content)
            said = _refused(lambda path=path: read_calibration(path), f"{kind} was read", mark=mark)
            _refused(lambda path=path: load_model("torch.nn:Identity", path), f"{kind} was read", mark=mark)
    return said


@attack(".pt", "a tensor of terabytes in a few bytes")
def expanded(folder: Path, _seed: int) -> str:
    torch.save(torch.zeros(1).expand(1 << 42), folder / "x.pt")
    return _refused(lambda: read_calibration(folder / "x.pt"), "the file was read")


@attack(".pt2", "40 files with random bits flipped")
def tampered(folder: Path, seed: int) -> str:
    draw, path = random.Random(seed), hostile.exported(folder / "net.pt2")
    content, x, refused = path.read_bytes(), torch.ones(3, 3), 0
    expected = capture(path)(x)
    for _ in range(40):
        changed = bytearray(content)
        for _ in range(draw.choice([1, 8, 64])):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            found = capture(path)(x)
        except CompilerError:
            refused += 1
        else:
            needs(torch.equal(found, expected), "another network was read")
    return f"{refused} refused, {40 - refused} without effect"


@attack(".pt2", "40 graphs with random values changed")
def mutated(folder: Path, seed: int) -> str:
    draw, path = random.Random(seed), hostile.exported(folder / "net.pt2")
    entries = hostile.read(path)
    refused = 0
    for _ in range(40):
        data = json.loads(entries[draw.choice([hostile.GRAPH, hostile.CONFIG])])
        name = hostile.GRAPH if "graph_module" in data else hostile.CONFIG
        where = data
        while isinstance(where, (dict, list)) and where:
            key = draw.choice(list(where)) if isinstance(where, dict) else draw.randrange(len(where))
            if not isinstance(where[key], (dict, list)) or draw.random() < 0.1:
                where[key] = draw.choice([None, -1, 2**63, "x", [], {}, 1.5, [[]], True])
                break
            where = where[key]
        hostile.write(path, {**entries, name: json.dumps(data).encode()})
        try:
            capture(path)
        except CompilerError:
            refused += 1
    return f"{refused} refused, {40 - refused} read, no other exception"


@attack("ONNX", "functions that double at each of 40 levels")
def doubling(_folder: Path, _seed: int) -> str:
    return _refused(lambda: read_onnx(functions.tower(40).SerializeToString()), "the file was read")


@attack("ONNX", "functions in a circle")
def circle(_folder: Path, _seed: int) -> str:
    floors = [functions.function(f"f{i}", functions.twice(f"f{(i + 1) % 3}")) for i in range(3)]
    return _refused(lambda: read_onnx(functions.calling(floors, "f0").SerializeToString()), "the file was read")


@attack("ONNX", "weights of a function outside the model's folder")
def outside(folder: Path, _seed: int) -> str:
    (folder / "secret.bin").write_bytes(bytes(16))
    (folder / "model").mkdir()
    for place in functions.PLACES:
        for location in ("../secret.bin", str(folder / "secret.bin"), "/etc/passwd", "secret.bin"):
            tensor = functions.constant(np.zeros(4, np.float32), location)
            (folder / "model" / "net.onnx").write_bytes(place(tensor).SerializeToString())
            said = _refused(lambda: import_onnx(folder / "model" / "net.onnx"), f"{location} was read")
    return said


@attack("ONNX", "a name that is code")
def hostile_names(folder: Path, _seed: int) -> str:
    mark = folder / "mark"
    weight = onnx.numpy_helper.from_array(np.zeros((4, 4), np.float32), f"w; {hostile.code(mark)} #")
    value = [onnx.helper.make_tensor_value_info(n, 1, ["n", 4]) for n in (f"x={hostile.code(mark)}", "y'\"\n")]
    node = onnx.helper.make_node("MatMul", [value[0].name, weight.name], [value[1].name], name="__class__")
    graph = onnx.helper.make_graph([node], "net", value[:1], value[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    try:
        import_onnx(model)(torch.ones(2, 4))
        said = "imported under other names"
    except CompilerError as error:
        said = error.message.splitlines()[0]
    needs(not mark.exists(), "the code ran")
    return said
