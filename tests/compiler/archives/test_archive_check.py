"""A `.pt2` file is looked through before torch loads it: nothing in it runs, and nothing in it fills the memory."""

import json
import pickle
import sys
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from foldcut.compiler.data.calibration_set import read_calibration
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.frontend.model_source import load_model
from foldcut.compiler.support.errors import CalibrationError, CaptureError
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
import hostile_files as hostile
from hostile_files import CONFIG, CONSTANTS, GRAPH, SAMPLES, WEIGHT, Change, Entries, Marks, in_json


def in_sizes(mark: Path) -> Change:
    def change(data: dict) -> None:  # type: ignore[type-arg]
        size = data["graph_module"]["graph"]["tensor_values"]["input"]["sizes"][0]
        size["as_expr"]["expr_str"] = hostile.code(mark)

    return in_json(GRAPH, change)


def in_a_size_of_a_tensor_with_a_fields_name(mark: Path) -> Change:
    def change(data: dict) -> None:  # type: ignore[type-arg]
        values = data["graph_module"]["graph"]["tensor_values"]
        values["input"]["sizes"][0]["as_expr"]["expr_str"] = hostile.code(mark)
        text = (
            json.dumps(data)
            .replace('"name": "input"', '"name": "metadata"')
            .replace('"input": {"dt', '"metadata": {"dt')
        )
        data.clear()
        data.update(json.loads(text))

    return in_json(GRAPH, change)


def in_guards(mark: Path) -> Change:
    return in_json(GRAPH, lambda data: data.update(guards_code=[hostile.code(mark)]))


def in_a_guards_text(mark: Path) -> Change:
    guard = f"L['x\" + str({hostile.code(mark)}) + \"'] == 1"
    return in_json(GRAPH, lambda data: data.update(guards_code=[guard]))


def in_a_parameter_of_forward(mark: Path) -> Change:
    return in_json(GRAPH, lambda d: hostile.signature(d).update(forward_arg_names=[f"input, x={hostile.code(mark)}"]))


def in_a_keyword_of_forward(mark: Path) -> Change:
    leaf = {"type": None, "context": None, "children_spec": []}
    keys = json.dumps([f"input, x={hostile.code(mark)}"])
    empty = {"type": "builtins.tuple", "context": "null", "children_spec": []}
    kwargs = {"type": "builtins.dict", "context": keys, "children_spec": [leaf]}
    tree = [1, {"type": "builtins.tuple", "context": "null", "children_spec": [empty, kwargs]}]
    return in_json(GRAPH, lambda d: hostile.signature(d).update(forward_arg_names=[], in_spec=json.dumps(tree)))


def in_a_nodes_name(mark: Path) -> Change:
    return hostile.replaced(GRAPH, '"linear"', json.dumps(f"linear = {hostile.code(mark)}; y"))


def in_a_class_to_import(mark: Path) -> Change:
    folder = mark.parent
    (folder / "imported_by_a_file.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass A: pass\n")
    keys = [{"__enum__": True, "fqn": "imported_by_a_file:A", "name": "x"}]
    leaf = {"type": None, "context": None, "children_spec": []}
    tree = [1, {"type": "builtins.dict", "context": json.dumps(keys), "children_spec": [leaf]}]
    return in_json(GRAPH, lambda data: hostile.signature(data).update(out_spec=json.dumps(tree)))


def in_sample_inputs(mark: Path) -> Change:
    return lambda entries: entries.update({SAMPLES: hostile.pickled(((Marks(mark),), {}))})


def in_plain_sample_inputs(mark: Path) -> Change:
    return lambda entries: entries.update({SAMPLES: pickle.dumps(Marks(mark), 2)})


def in_a_weight(mark: Path) -> Change:
    def change(entries: Entries) -> None:
        entries[WEIGHT] = hostile.pickled(Marks(mark))
        in_json(CONFIG, lambda data: data["config"]["0.weight"].update(use_pickle=True))(entries)

    return change


def in_a_constant(mark: Path) -> Change:
    def change(entries: Entries) -> None:
        payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        entries["data/constants/opaque_obj_0"] = pickle.dumps(Marks(mark))
        entries[CONSTANTS] = json.dumps({"config": {"x": payload}}).encode()

    return change


def in_weights_of_an_earlier_version(mark: Path) -> Change:
    return lambda entries: entries.update({"data/weights/model.pt": hostile.pickled({"x": Marks(mark)})})


def in_a_second_network(mark: Path) -> Change:
    def change(entries: Entries) -> None:
        entries["models/other.json"], entries["data/sample_inputs/other.pt"] = entries[GRAPH], entries[SAMPLES]
        for kind in ("weights", "constants"):
            entries[f"data/{kind}/other_{kind}_config.json"] = entries[f"data/{kind}/model_{kind}_config.json"]
        in_sizes(mark)(entries)
        entries["models/other.json"], entries[GRAPH] = entries[GRAPH], entries["models/other.json"]

    return change


#: How a file makes torch run code.
RUNNING = {
    f.__name__: f
    for f in (
        in_sizes,
        in_a_size_of_a_tensor_with_a_fields_name,
        in_guards,
        in_a_guards_text,
        in_a_parameter_of_forward,
        in_a_keyword_of_forward,
        in_a_nodes_name,
        in_a_class_to_import,
        in_sample_inputs,
        in_plain_sample_inputs,
        in_a_weight,
        in_a_constant,
        in_weights_of_an_earlier_version,
        in_a_second_network,
    )
}
#: Those of them that leave their mark when torch itself reads and runs the file: the attacks are real ones.
REAL = {"in_sizes", "in_guards", "in_a_class_to_import", "in_sample_inputs", "in_a_weight", "in_a_constant"}


@pytest.mark.parametrize("name", RUNNING)
def test_code_in_a_file_does_not_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    monkeypatch.syspath_prepend(tmp_path)
    path = hostile.changed(hostile.exported(tmp_path / "net.pt2"), RUNNING[name](mark))
    with pytest.raises(CaptureError, match=r"could run code|is an object|has the size"):
        capture(path)
    assert not mark.exists()
    if name in REAL:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(Exception):  # after the mark
                torch.export.load(path).module()(torch.ones(2, 3))
        assert mark.exists(), "torch no longer runs this: is there another way?"
    sys.modules.pop("imported_by_a_file", None)


def test_code_in_a_file_of_the_older_layout_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    fine = hostile.to_old_layout(hostile.exported(tmp_path / "fine.pt2"))
    assert capture(fine)(torch.ones(5, 3)).shape == (5, 4)
    bad = hostile.to_old_layout(hostile.exported(tmp_path / "bad.pt2"), samples=hostile.pickled(((Marks(mark),), {})))
    with pytest.raises(CaptureError, match="could run code"):
        capture(bad)
    assert not mark.exists()


class Everything(nn.Module):
    """Sizes, guards, infinities, texts and names as real networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("my-buffer", torch.ones(2))

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.attention(x, x, x)[0].masked_fill(mask.unsqueeze(-1), float("-inf"))
        z = F.interpolate(x.unsqueeze(1), size=(x.shape[1] // 2, 5), mode="bilinear")
        half = F.gelu(torch.div(x, 3, rounding_mode="floor"), approximate="tanh")
        return {
            "it.s": y.flatten(1) & True if y.dtype == torch.bool else y,
            "z": z + getattr(self, "my-buffer").sum(),
            "h": half,
        }


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    net = Everything().eval()
    args, kwargs = (torch.randn(3, 6, 8),), {"mask": torch.zeros(3, 6, dtype=torch.bool)}
    dims = {
        "x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},
        "mask": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},
    }
    program = torch.export.export(net, args, kwargs, dynamic_shapes=dims)
    assert any("//" in guard for guard in program._guards_code)
    for number, kept in enumerate((program, program.run_decompositions({}))):
        torch.export.save(kept, tmp_path / f"{number}.pt2")
        capture(tmp_path / f"{number}.pt2")


def test_compiled_code_in_a_file_is_refused(tmp_path: Path) -> None:
    path = hostile.exported(tmp_path / "net.pt2")
    hostile.changed(path, lambda entries: entries.update({"data/aotinductor/model/model.so": b"\x7fELF"}))
    with pytest.raises(CaptureError, match="which is code"):
        capture(path)


@pytest.mark.parametrize(
    "target", ["torch.ops.aten.from_file.default", "torch.ops.aten.save.default", "torch.os.system"]
)
def test_an_operator_that_reaches_files_is_refused(target: str, tmp_path: Path) -> None:
    path = hostile.exported(tmp_path / "net.pt2")
    hostile.changed(path, hostile.replaced(GRAPH, "torch.ops.aten.relu.default", target))
    with pytest.raises(CaptureError, match="an operator"):
        capture(path)


@pytest.mark.parametrize(
    "size", ["10**10**10", "Pow(Integer(9), Integer(999999))", "Pow(Pow(Pow(Pow(Pow(9, 16), 16), 16), 16), 16)"]
)
def test_a_size_that_takes_for_ever_is_refused(size: str, tmp_path: Path) -> None:
    path = hostile.exported(tmp_path / "net.pt2")
    hostile.changed(path, hostile.replaced(GRAPH, "Symbol('s31', positive=True, integer=True)", size))
    with pytest.raises(CaptureError, match="a size"):
        capture(path)


@pytest.mark.parametrize("name", ["../../escaped", "/absolute", "data/../../escaped", "back\\slash", "nul\x01"])
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    path = hostile.exported(tmp_path / "net.pt2")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(CaptureError, match=r"names an entry"):
        capture(path)


@pytest.mark.parametrize("again", [str, str.upper])
def test_two_entries_of_one_name_are_refused(again: type, tmp_path: Path) -> None:
    """One reader takes the first, another the last, and torch's does not tell upper case from lower case."""
    path = hostile.exported(tmp_path / "net.pt2")
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("net/" + again(SAMPLES), b"x")
    with pytest.raises(CaptureError, match="two entries"):
        capture(path)


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_of_a_weight_is_noticed(seed: int, tmp_path: Path) -> None:
    path = hostile.exported(tmp_path / "net.pt2")
    content, weight = bytearray(path.read_bytes()), hostile.read(path)[WEIGHT]
    content[content.index(weight) + 5 * seed] ^= 1 << seed
    path.write_bytes(content)
    with pytest.raises(CaptureError, match="does not have its checksum"):
        capture(path)
    state = tmp_path / "x.pt"
    torch.save(torch.arange(12.0), state)
    content, weight = bytearray(state.read_bytes()), torch.arange(12.0).numpy().tobytes()
    content[content.index(weight) + 5 * seed] ^= 1 << seed
    state.write_bytes(content)
    with pytest.raises(CalibrationError, match="does not have its checksum"):
        read_calibration(state)


def bomb(path: Path, name: str, count: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open(name, "w") as entry:
        for _ in range(count):
            entry.write(bytes(1 << 24))
    return path


def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path: Path) -> None:
    packed = bomb(tmp_path / "bomb.zip", "net/data/weights/weight_0", 20)
    assert packed.stat().st_size < 4_000_000
    for name in ("net.pt2", "x.npz", "x.pt", "x.npy"):
        path = tmp_path / name
        path.write_bytes(packed.read_bytes())
        error = CaptureError if name == "net.pt2" else CalibrationError
        with pytest.raises(error, match="unpacks to far more") as caught:
            capture(path) if name == "net.pt2" else read_calibration(path)
        assert "200 times" in str(caught.value)
    with pytest.raises(CaptureError, match="unpacks to far more"):
        load_model("torch.nn:Identity", tmp_path / "x.pt")


def test_compressed_arrays_of_usual_size_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((50, 3, 64, 64), np.float32))
    assert len(read_calibration(tmp_path / "x.npz")) == 50


def test_a_tensor_that_is_not_stored_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(1).expand(1 << 40), tmp_path / "x.pt")
    with pytest.raises(CalibrationError, match="stores 4 bytes"):
        read_calibration(tmp_path / "x.pt")
    path = hostile.exported(tmp_path / "net.pt2")

    def large(data: dict) -> None:  # type: ignore[type-arg]
        data["config"]["0.weight"]["tensor_meta"]["sizes"] = [{"as_int": 1 << 40}, {"as_int": 3}]

    hostile.changed(path, lambda entries: (in_json(CONFIG, large)(entries), entries.update({WEIGHT: b""})))
    with pytest.raises(CaptureError, match="does not hold"):
        capture(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_objects_in_calibration_files_are_not_loaded(suffix: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / f"x{suffix}"
    objects = np.array([Marks(mark)], dtype=object)
    with path.open("wb") as file:
        torch.save(Marks(mark), file) if suffix == ".pt" else (np.save if suffix == ".npy" else np.savez)(file, objects)
    with pytest.raises(CalibrationError):
        read_calibration(path)
    path.write_bytes(pickle.dumps(Marks(mark)))
    with pytest.raises(CalibrationError):
        read_calibration(path)
    with pytest.raises(CaptureError):
        load_model("torch.nn:Identity", path)
    assert not mark.exists()
