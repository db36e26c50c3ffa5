"""Measurements on disk: whole or not there, for any number of processes, and never in the way."""

import random
import sqlite3
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import foldcut.runtime.measure.measurement_cache as measurement_cache
import pytest
from foldcut.compiler.store.cache_folder import default_folder
from foldcut.runtime.measure.measurement_cache import FORMAT_VERSION, MeasurementCache
from hypothesis import given
from hypothesis import strategies as st

numbers = st.floats(allow_nan=False, allow_infinity=False)


def test_what_is_put_is_there_for_the_next(tmp_path: Path) -> None:
    MeasurementCache(tmp_path).put({"a": {"units": 0.25}, "b": [1, 2]})
    assert MeasurementCache(tmp_path).get(["b", "a", "c"]) == {"b": [1, 2], "a": {"units": 0.25}}
    assert (tmp_path / f"measurements-{FORMAT_VERSION}.sqlite").exists()


@given(st.dictionaries(st.text(), numbers, max_size=8))
def test_any_key_and_number_comes_back_as_it_was(values: dict[str, float]) -> None:
    cache = MeasurementCache(None)
    cache.put(values)
    assert cache.get(values) == values


def test_any_key_comes_back_from_disk(tmp_path: Path) -> None:
    values = {"'; DROP TABLE measurements; --": 1.5, "schlüssel \N{SNOWMAN}": 1e-300, "": 0.1 + 0.2}
    MeasurementCache(tmp_path).put(values)
    assert MeasurementCache(tmp_path).get(values) == values


def test_more_keys_than_a_statement_takes(tmp_path: Path) -> None:
    values = {f"key {i}": i for i in range(2_500)}
    MeasurementCache(tmp_path).put(values)
    assert MeasurementCache(tmp_path).get(values) == values


def test_a_newer_value_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for value in (1, 2):
        MeasurementCache(tmp_path).put({"a": value})
    assert MeasurementCache(tmp_path).get(["a"]) == {"a": 2}


def test_processes_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from foldcut.runtime.measure.measurement_cache import MeasurementCache\n"
        "cache = MeasurementCache(Path(sys.argv[1]))\n"
        "for i in range(40): cache.put({f'{sys.argv[2]} {i}': i, 'shared': sys.argv[2]})\n"
        "assert cache.path is not None\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    writers = [
        subprocess.Popen([sys.executable, "-W", "error::UserWarning", "-c", code, str(tmp_path), name], env=environment)
        for name in "abc"
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    keys = [f"{name} {i}" for name in "abc" for i in range(40)]
    assert len(MeasurementCache(tmp_path).get(keys)) == 120


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    cache = MeasurementCache(tmp_path)
    assert cache.path is not None
    cache.path.write_bytes(b"not a database at all, and longer than a header of one hundred bytes" * 4)
    with pytest.warns(UserWarning, match="not kept"):
        assert cache.get(["a"]) == {}
    assert (tmp_path / f"measurements-{FORMAT_VERSION}.damaged").read_bytes().startswith(b"not a database")
    cache.put({"a": 1})  # in memory, without another warning
    assert cache.get(["a"]) == {"a": 1}
    MeasurementCache(tmp_path).put({"b": 2})
    assert MeasurementCache(tmp_path).get(["b"]) == {"b": 2}


@pytest.mark.parametrize("change", ["value = '{'", "value = '2'", "key = 'b'", "digest = 'x'", "value = x'00'"])
def test_a_changed_value_is_measured_again(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement_cache, "_warned", [])
    cache = MeasurementCache(tmp_path)
    cache.put({"a": 1})
    with sqlite3.connect(str(cache.path)) as connection:
        connection.execute(f"UPDATE measurements SET {change}")
    connection.close()
    with pytest.warns(UserWarning, match="taken again"):
        assert MeasurementCache(tmp_path).get(["a", "b"]) == {}
    with warnings.catch_warnings():  # once in a process
        warnings.simplefilter("error")
        assert MeasurementCache(tmp_path).get(["a", "b"]) == {}
        MeasurementCache(tmp_path).put({"a": 3, "b": 4})
        assert MeasurementCache(tmp_path).get(["a", "b"]) == {"a": 3, "b": 4}


@pytest.mark.parametrize("seed", range(40))
def test_no_damage_changes_a_value(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    values = {f"key {i}": {"units": i / 7, "steps": [i] * 20} for i in range(60)}
    cache = MeasurementCache(tmp_path)
    cache.put(values)
    assert cache.path is not None
    content = bytearray(cache.path.read_bytes())
    for _ in range(draw.choice([1, 5, 100])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    cache.path.write_bytes(content[: len(content) if seed % 4 else draw.randrange(len(content))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = MeasurementCache(tmp_path).get(values)
        assert all(values[key] == value for key, value in found.items())
        again = MeasurementCache(tmp_path)
        again.put(values)
        assert again.get(values) == values
        assert all(values[key] == value for key, value in MeasurementCache(tmp_path).get(values).items())


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = MeasurementCache(tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match="not kept"):
        cache.put({"a": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get(["a"]) == {"a": 1}


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    MeasurementCache(None).put({"a": 1})
    assert not list(tmp_path.iterdir())


def test_where_measurements_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOLDCUT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == Path.home() / ".cache" / "foldcut"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/foldcut")
    monkeypatch.setenv("FOLDCUT_CACHE", "/else/where")
    assert default_folder() == Path("/else/where")
    monkeypatch.setenv("FOLDCUT_CACHE", "~/own")
    assert default_folder() == Path.home() / "own"


def test_without_a_home_a_temporary_folder_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FOLDCUT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert default_folder().parent == Path(tempfile.gettempdir())
