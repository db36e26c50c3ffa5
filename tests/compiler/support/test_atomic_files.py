"""Writing a folder: all of it or nothing, and nothing else left behind."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from foldcut.compiler.support import atomic_files as atomic
from foldcut.compiler.support.atomic_files import check_writable, write_folder
from foldcut.compiler.support.errors import OutputError

FILES = {"a.txt": b"first", "b.bin": b"\x00\x01", "c.json": b"{}"}


def everything(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def fail_at(count: int, real: Callable[..., object], error: BaseException) -> Callable[..., object]:
    calls = iter(range(1, 1000))

    def failing(*args: object, **kwargs: object) -> object:
        if next(calls) >= count:
            raise error
        return real(*args, **kwargs)

    return failing


def test_a_new_folder_has_all_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", FILES)
    assert everything(tmp_path) == {"out": None, **{f"out/{name}": content for name, content in FILES.items()}}


def test_parents_are_made(tmp_path: Path) -> None:
    write_folder(tmp_path / "a" / "b" / "out", FILES)
    assert everything(tmp_path / "a" / "b" / "out") == FILES
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["out"]


def test_a_new_folder_can_be_read_by_others(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", FILES)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_files_of_an_existing_folder_are_replaced_and_others_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"old")
    (tmp_path / "mine.txt").write_bytes(b"keep")
    write_folder(tmp_path, FILES)
    assert everything(tmp_path) == {**FILES, "mine.txt": b"keep"}


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "a.txt").write_bytes(b"old")
    before = everything(tmp_path)
    monkeypatch.setattr(os, "fsync", fail_at(2, os.fsync, OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left") as caught:
        write_folder(out, FILES)
    assert caught.value.hint
    assert everything(tmp_path) == before


def test_parents_made_are_removed_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(os, "fsync", fail_at(2, os.fsync, OSError(28, "No space left on device")))
    with pytest.raises(OutputError):
        write_folder(tmp_path / "a" / "b" / "c" / "out", FILES)
    assert everything(tmp_path) == {"a": None}


def test_parents_made_are_removed_when_the_staging_folder_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", fail_at(1, tempfile.mkdtemp, OSError(28, "No space left on device")))
    with pytest.raises(OutputError):
        write_folder(tmp_path / "a" / "out", FILES)
    assert everything(tmp_path) == {}


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fail_at(2, os.fsync, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "a" / "out", FILES)
    assert everything(tmp_path) == {}


@pytest.mark.parametrize("without", [(), ("old.json",)])
def test_an_existing_folder_keeps_its_old_files_when_one_cannot_be_replaced(
    without: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "b.bin").mkdir(parents=True)
    for name in ("a.txt", "old.json"):
        (out / name).write_bytes(b"old")
    before = everything(tmp_path)
    with pytest.raises(OutputError):
        write_folder(out, FILES, without=without)
    assert everything(tmp_path) == before


def test_files_that_have_had_their_day_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("old.json", "other.txt"):
        (out / name).write_bytes(b"old")
    write_folder(out, FILES, without=("old.json", "never.json"))
    assert sorted(p.name for p in out.iterdir()) == sorted([*FILES, "other.txt"])


@pytest.mark.parametrize("below", ["", "out", "deep/er/out"])
def test_a_file_in_the_way_is_refused(tmp_path: Path, below: str) -> None:
    blocker = tmp_path / "file"
    blocker.write_bytes(b"mine")
    for call in (check_writable, lambda folder: write_folder(folder, FILES)):
        with pytest.raises(OutputError, match="is a file") as caught:
            call(blocker / below)
        assert caught.value.hint
    assert everything(tmp_path) == {"file": b"mine"}


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_args: object, **_kwargs: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic.tempfile, "TemporaryFile", denied)
    with pytest.raises(OutputError, match="Permission denied") as caught:
        write_folder(tmp_path / "out", FILES)
    assert caught.value.hint
    assert everything(tmp_path) == {}


def test_checking_writes_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b")
    assert everything(tmp_path) == {}


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("out"), FILES)
    write_folder(Path(), {"d.txt": b"here"})
    assert (tmp_path / "d.txt").read_bytes() == b"here"
    assert everything(tmp_path / "out") == FILES
