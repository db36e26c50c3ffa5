"""Results kept by content: found again, never for other inputs, whole or not there."""

import hashlib
import os
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foldcut.compiler.store.analysis_store as analysis_store
import foldcut.compiler.store.checkpoint as checkpoint
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.ir.edit import set_tensors
from foldcut.compiler.ir.program import Program
from foldcut.compiler.store.analysis_store import NOTHING_KEPT, AnalysisStore
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save


@dataclass(frozen=True)
class Settings:
    ridge: float | None = 0.1
    names: tuple[str, ...] = ("a",)


class Counter:
    """Gives back what it was made with, and counts how often it was asked."""

    def __init__(self, value: Any) -> None:
        self.value, self.calls = value, 0

    def __call__(self) -> Any:
        self.calls += 1
        return self.value


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(value=plain)
def test_plain_data_comes_back_bit_for_bit(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("store")
    compute = Counter(value)
    assert AnalysisStore(folder).value("x", [1], compute) == value
    assert AnalysisStore(folder).value("x", [1], compute) == value
    assert compute.calls == 1


def test_tensors_come_back_bit_for_bit_and_contiguous(tmp_path: Path) -> None:
    tensors = {
        "turned": torch.randn(3, 5).double().t(),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
        "number": torch.tensor(3),
        "half": torch.randn(4).bfloat16(),
    }
    compute = Counter(({"k": [1, 2]}, tensors))
    for _ in range(2):
        data, found = AnalysisStore(tmp_path).result("x", [], compute)
        assert data == {"k": [1, 2]} and found.keys() == tensors.keys()
        for name, value in tensors.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value)
            assert (found[name].is_contiguous() and found[name].data_ptr() != value.data_ptr()) or not value.numel()
    assert compute.calls == 1


def test_other_inputs_are_other_results(tmp_path: Path, residual: Program) -> None:
    weight = next(name for name, _ in residual.module.named_parameters())
    other = set_tensors(residual, {weight: residual.tensor(weight) + 1}, note="other")
    images = torch.zeros(4, 3, 8, 8)
    keys: list[tuple[str, list[Any]]] = [
        ("x", []),
        ("y", []),
        ("x", [1]),
        ("x", [1.0]),
        ("x", ["1"]),
        ("x", [True]),
        ("x", [None]),
        ("x", [[1]]),
        ("x", [{"a": 1}]),
        ("x", [{"b": 1}]),
        ("x", [{1}]),
        ("x", [Settings()]),
        ("x", [Settings(ridge=None)]),
        ("x", [Settings(names=("a", "b"))]),
        ("x", [residual]),
        ("x", [other]),
        ("x", [CalibrationSet.of(images)]),
        ("x", [CalibrationSet.of(images[:3])]),
        ("x", [torch.zeros(2)]),
        ("x", [torch.zeros(2, 1)]),
        ("x", [torch.zeros(2).double()]),
        ("x", [-torch.zeros(2)]),
    ]
    store = AnalysisStore(tmp_path)
    for number, (name, inputs) in enumerate(keys):
        assert store.value(name, inputs, Counter(number)) == number
    for number, (name, inputs) in enumerate(keys):
        assert store.value(name, inputs, Counter("computed again")) == number
    assert (store.computed, store.reused) == (len(keys), len(keys))


def test_other_code_and_threads_are_other_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AnalysisStore(tmp_path)
    store.value("x", [], Counter(1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert store.value("x", [], Counter(2)) == 2
    monkeypatch.setattr(analysis_store, "code_version", lambda: "another version")
    assert store.value("x", [], Counter(3)) == 3


def test_what_has_no_content_is_computed(tmp_path: Path) -> None:
    compute = Counter(1)
    store = AnalysisStore(tmp_path)
    assert [store.value("x", [lambda: 0], compute) for _ in range(2)] == [1, 1]
    assert compute.calls == 2 and not entries(tmp_path)


def test_nothing_is_kept_without_a_folder() -> None:
    compute = Counter(1)
    assert [NOTHING_KEPT.value("x", [], compute) for _ in range(2)] == [1, 1]
    assert compute.calls == 2


def test_measurements_get_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AnalysisStore(tmp_path)
    now = 1e9
    monkeypatch.setattr("time.time", lambda: now)
    store.value("x", [], Counter(1), most_age_s=60)
    now += 59
    assert store.value("x", [], Counter(2), most_age_s=60) == 1
    now += 2
    assert store.value("x", [], Counter(2), most_age_s=60) == 2
    assert store.value("x", [], Counter(3), most_age_s=60) == 2


@pytest.mark.parametrize("damage", [b"", b"no tensors at all", None])
def test_a_damaged_entry_is_computed_again(damage: bytes | None, tmp_path: Path) -> None:
    AnalysisStore(tmp_path).result("x", [], Counter(({}, {"t": torch.ones(100)})))
    (path,) = entries(tmp_path)
    path.write_bytes(path.read_bytes()[:-9] if damage is None else damage)
    compute = Counter(({}, {"t": torch.ones(100)}))
    _, tensors = AnalysisStore(tmp_path).result("x", [], compute)
    assert compute.calls == 1 and torch.equal(tensors["t"], torch.ones(100))
    AnalysisStore(tmp_path).result("x", [], compute)
    assert compute.calls == 1


def results(folder: Path) -> tuple[list[Any], int]:
    """Twelve results of several kinds, and how many of them were computed."""
    calls = 0

    def compute(number: int) -> Any:
        nonlocal calls
        calls += 1
        return {"number": number}, {"weight": torch.full((number + 1, 5), float(number))} if number % 3 else {}

    store = AnalysisStore(folder)
    found = [store.result(f"kind {n % 2}", [n], lambda n=n: compute(n)) for n in range(12)]
    return [(data, {name: tensor.tolist() for name, tensor in tensors.items()}) for data, tensors in found], calls


def flip(draw: random.Random, paths: list[Path]) -> None:
    for path in paths:
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def cut(draw: random.Random, paths: list[Path]) -> None:
    for path in paths:
        path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def swap(draw: random.Random, paths: list[Path]) -> None:
    """Each entry lies where another belongs: whole, and of another kind."""
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)


def forge(draw: random.Random, paths: list[Path]) -> None:
    """Readable tensors, as an earlier version or another program would have written."""
    for path in paths:
        path.write_bytes(
            save({"*json*": torch.frombuffer(bytearray(b'{"taken": 9e9, "data": {}}'), dtype=torch.uint8)})
        )


@pytest.mark.parametrize("damage", [flip, cut, swap, forge])
@pytest.mark.parametrize("seed", range(12))
def test_no_damage_changes_a_result(damage: Any, seed: int, tmp_path: Path) -> None:
    expected, _ = results(tmp_path)
    paths = sorted(entries(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        damage(random.Random(seed), paths)
        assert results(tmp_path) == (expected, 12)
        assert results(tmp_path) == (expected, 0)


def test_damage_is_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis_store, "_warned", [])
    results(tmp_path)
    flip(random.Random(0), entries(tmp_path))
    with pytest.warns(UserWarning, match="was damaged") as warned:
        results(tmp_path)
    assert len(warned) == 1


def test_a_damaged_state_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 0.0)
    monkeypatch.setattr(analysis_store, "_warned", [tmp_path])
    for seed in range(20):
        kept = AnalysisStore(tmp_path).checkpoint("training", [1])
        kept.keep(lambda: ({"done": 7}, {"weight": torch.ones(9)}))
        assert kept.read() is not None
        flip(random.Random(seed), entries(tmp_path))
        assert kept.read() is None


def test_a_state_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two lie side by side under one key."""
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    monkeypatch.setattr(analysis_store, "_warned", [tmp_path])
    AnalysisStore(tmp_path).checkpoint("training", [1]).keep(lambda: ({"done": 7}, {}))
    (path,) = entries(tmp_path)
    path.rename(path.with_suffix(".safetensors"))
    assert AnalysisStore(tmp_path).value("training", [1], Counter(3)) == 3


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = AnalysisStore(tmp_path / "file")
    with pytest.warns(UserWarning, match="analyses are not kept"):
        assert store.value("x", [], Counter(1)) == 1
    assert store.value("y", [], Counter(2)) == 2


def test_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    size = 2 << 20
    store = AnalysisStore(tmp_path, most_bytes=4 * size)

    def put(name: str) -> int:
        compute = Counter((None, {"t": torch.zeros(size, dtype=torch.uint8)}))
        store.result(name, [], compute)
        for path in entries(tmp_path):  # the clock of a file system may be coarse
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10))
        return compute.calls

    assert [put(name) for name in "abc"] == [1, 1, 1]
    assert put("a") == 0  # used again
    part = entries(tmp_path)[0].with_name(".part-left")
    part.write_bytes(bytes(size))
    fresh = part.with_name(".part-of-another-process")
    fresh.touch()
    os.utime(part, (0, 0))
    assert put("d") == 1
    assert fresh.exists()
    fresh.unlink()
    assert not part.exists() and sum(path.stat().st_size for path in entries(tmp_path)) <= 4 * size
    assert put("e") == 1
    assert [put("a"), put("e"), put("b")] == [0, 0, 1]


def test_small_entries_are_bounded_as_well(tmp_path: Path) -> None:
    most = 2_000_000
    for number in range(60):
        if number % 20 == 0:
            store = AnalysisStore(tmp_path, most_bytes=most)
        store.result("small", [number], lambda: (None, {"x": torch.zeros(25_000)}))
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= most + (1 << 20) + 200_000


def test_what_is_larger_than_all_that_may_be_kept_is_not(tmp_path: Path) -> None:
    store = AnalysisStore(tmp_path, most_bytes=1000)
    store.result("x", [], Counter((None, {"t": torch.zeros(1000)})))
    assert not entries(tmp_path)


def test_a_state_is_kept_until_the_result_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 0.0)
    before = torch.randn(3, 5)

    def state() -> Any:
        found = AnalysisStore(tmp_path).checkpoint("training", [1]).read()
        return found and (found[0], found[1]["weight"])

    assert state() is None
    AnalysisStore(tmp_path).checkpoint("training", [1]).keep(lambda: ({"done": 7}, {"weight": before}))
    data, weight = state()
    assert data == {"done": 7} and torch.equal(weight, before)
    assert AnalysisStore(tmp_path).checkpoint("training", [2]).read() is None
    AnalysisStore(tmp_path).value("training", [1], lambda: 3)
    assert state() is None and len(entries(tmp_path)) == 1


def test_a_state_is_not_taken_before_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    kept = AnalysisStore(tmp_path).checkpoint("training", [1])
    taken = []
    for now in (1.0, checkpoint.EVERY_S + 1, checkpoint.EVERY_S + 2, 2 * checkpoint.EVERY_S + 3):
        kept.keep(lambda at=now: (taken.append(at), {}))
    assert taken == [checkpoint.EVERY_S + 1, 2 * checkpoint.EVERY_S + 3]


def test_without_a_folder_no_state_is_kept() -> None:
    kept = NOTHING_KEPT.checkpoint("training", [1])
    kept.keep(lambda: pytest.fail("a state was taken"))
    assert kept.read() is None


def test_results_are_those_of_this_source() -> None:
    """The hash goes over all of foldcut's files, not over none."""
    assert analysis_store.code_version() != hashlib.blake2b(digest_size=16).hexdigest()


def test_results_follow_from_the_basis(tmp_path: Path) -> None:
    """What a store is told beside the inputs: the source of a user's rewrite."""
    first, second = (AnalysisStore(tmp_path, basis=[basis]) for basis in ("one", "two"))
    assert first.value("x", [1], Counter(3)) == 3
    assert second.value("x", [1], Counter(4)) == 4
    assert AnalysisStore(tmp_path, basis=["one"]).value("x", [1], Counter(5)) == 3
