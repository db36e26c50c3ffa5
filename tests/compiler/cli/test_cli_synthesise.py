"""`foldcut synthesise`, and `--calib none`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foldcut.compiler.cli import main as cli
from foldcut.compiler.cli.options import CompileOptions, SynthesiseOptions
from foldcut.compiler.support.errors import CompilerError
from PIL import Image
from typer.testing import CliRunner

pytestmark = [pytest.mark.usefixtures("quick_measurement"), pytest.mark.filterwarnings("ignore::UserWarning")]

SOURCE = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 16, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


def ids():
    return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 3))
"""
NET = ("foldcut_cli_blind:build", "--input-shape", "3,8,8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("blind")
    (path / "foldcut_cli_blind.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(path)
        yield path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def failed(result: Any, *texts: str) -> None:
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    flat = " ".join(result.stderr.split())
    assert [text for text in texts if text not in flat] == []


def test_samples_and_a_picture_are_written_and_a_compile_takes_them(folder: Path) -> None:
    made = run("synthesise", *NET, "-n", 12, "-o", "made.npz", "--iterations", 3, "--fresh", "--json")
    said = json.loads(made.stdout)
    assert (said["count"], said["norms"], said["files"]) == (12, 1, ["made.npz", "made.png"])
    with np.load("made.npz") as archive:
        assert [archive[name].shape for name in archive.files] == [(12, 3, 8, 8)]
    assert Image.open("made.png").format == "PNG"
    options = ("--keep", 0.5, "--no-mimic", "--fresh", "--json", "-o", "out")
    report = json.loads(run("compile", NET[0], "--calib", "made.npz", *options).stdout)
    assert report["calibration"]["synthetic"]["count"] == 12
    told = run("synthesise", *NET, "-n", 12, "-o", "made.npz", "--iterations", 3, "--fresh")
    assert "12 samples: dead leaves of 3 x 8 x 8" in told.stdout and "wrote made.npz and made.png" in told.stdout
    assert "samples to make without data" in told.stderr


def test_calib_none_makes_as_many_as_the_limit_says(folder: Path) -> None:
    done = run("compile", *NET, "--calib", "none", "--limit", 20, "--keep", 0.5, "--no-mimic", "--json", "-o", "blind")
    report = json.loads(done.stdout)
    assert report["calibration"]["samples"] == report["calibration"]["synthetic"]["count"] == 20
    assert "warning: no data were given: 20 calibration samples" in done.stderr
    assert 'id="synthetic"' in Path("blind/report.html").read_text()


def test_indices_have_no_picture(folder: Path) -> None:
    made = run("synthesise", "foldcut_cli_blind:ids", "--input-shape", 3, "-n", 9, "-o", "ids.npz", "--json", "--fresh")
    assert json.loads(made.stdout)["files"] == ["ids.npz"]


def test_a_folder_called_none_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("none").mkdir()
    options = CompileOptions(model="a:b", calib=Path("none"), output=Path("out"), keep=0.5)
    assert "with none, on" in options.first_words()


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("compile", NET[0], "--calib", "none", "--keep", 0.5, "-o", "x"), ("shape of one input must be known",)),
        (
            ("compile", *NET, "--calib", "none", "--key", "a", "--keep", 0.5, "-o", "x"),
            ("--key: there are no samples to read",),
        ),
        (("compile", *NET, "--calib", "nothing", "--keep", 0.5, "-o", "x"), ("no such file or folder: nothing",)),
        (("synthesise", *NET, "-o", "made.png"), ("made.png is not the name of an .npz file",)),
        (("synthesise", NET[0], "--input-shape", "3,x", "-o", "x.npz"), ("--input-shape '3,x' is not a shape",)),
        (("synthesise", "gone.onnx", "-o", "x.npz"), ("no such file: gone.onnx",)),
        (("synthesise", *NET, "--fresh", "--cache", "kept", "-o", "x.npz"), ("--fresh keeps no analyses",)),
    ],
    ids=lambda value: str(value[0]) if value and value[0] in ("compile", "synthesise") else "",
)
def test_bad_input(folder: Path, arguments: tuple[object, ...], texts: tuple[str, ...]) -> None:
    failed(run(*arguments), *texts)
    assert not Path("x").exists() and not Path("x.npz").exists()


def test_what_will_be_done_is_said_first() -> None:
    options = SynthesiseOptions(model="a:b", count=7, output=Path("z.npz"))
    assert options.first_words() == "making 7 inputs from a:b alone; output in z.npz"
    compiling = CompileOptions(model="a:b", calib=Path("None"), output=Path("out"), keep=0.5)
    assert "with inputs made from the network alone" in compiling.first_words()
    with pytest.raises(CompilerError, match=r"\.npz"):
        SynthesiseOptions(model="a:b", output=Path("z.npy")).check()
