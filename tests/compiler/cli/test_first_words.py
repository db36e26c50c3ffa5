"""What a command says before torch is loaded: what it will do, and what is wrong with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foldcut.compiler.cli.goals import read_goal, read_goals
from foldcut.compiler.cli.option_types import Caches
from foldcut.compiler.cli.options import ApplyOptions, CompileOptions, DemoOptions, SweepOptions

#: Ends where the first of the libraries that take long is asked for, and says so.
SCRIPT = """
import sys

class End:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "onnx", "onnxruntime", "numpy", "scipy"):
            sys.exit("loading")

sys.meta_path.insert(0, End())
from foldcut.compiler.cli.main import app
sys.exit(app({arguments!r}, standalone_mode=False))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "x.npy", np.zeros((4, 2), np.float32))
    for name in ("net.onnx", "net.pt2", "plan.json", "weights.pt"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def begun(*arguments: str) -> tuple[int, list[str]]:
    """The exit code and the lines on stderr, till anything large is loaded."""
    script = SCRIPT.format(arguments=list(arguments))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


COMPILE = ("compile", "net.onnx", "--calib", "x.npy", "-o", "out")


def test_what_will_be_done_is_said_before_anything_is_loaded(folder: Path) -> None:
    assert begun(*COMPILE, "--latency", "0.7") == (
        1,
        ["compiling net.onnx to latency ratio 0.7 with x.npy, on onnxruntime; output in out/", "loading"],
    )
    assert begun("sweep", *COMPILE[1:], "--latency", "0.8, 2.5ms", "--macs", "0.5", "--backend", "torch")[1] == [
        "compiling net.onnx to each of latency ratio 0.8, latency 2.5 ms, MACs ratio 0.5 with x.npy, on torch; "
        "output in out/",
        "loading",
    ]
    assert begun("apply", "plan.json", "net.pt2", "--calib", "x.npy", "-o", "out")[1] == [
        "applying plan.json to net.pt2, solved again with x.npy; output in out/",
        "loading",
    ]
    assert begun("compile", "net.onnx", "--calib", "none", "-o", "out", "--macs", "0.5")[1] == [
        "compiling net.onnx to MACs ratio 0.5 with inputs made from the network alone, on onnxruntime; output in out/",
        "loading",
    ]
    assert begun("synthesise", "net.onnx", "-n", "9")[1] == [
        "making 9 inputs from net.onnx alone; output in synthetic.npz",
        "loading",
    ]
    assert begun("demo", "-o", "out")[1][0].startswith("training a small network on handwritten digits, then")


@pytest.mark.parametrize("quiet", ["--quiet", "--json"])
def test_nothing_is_said_where_nothing_is_to_be_said(folder: Path, quiet: str) -> None:
    assert begun(*COMPILE, "--latency", "0.7", quiet) == (1, ["loading"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((*COMPILE,), "goal: give one goal"),
        ((*COMPILE, "--blocks", "2", "--macs", "0.5"), "goal: give one goal"),
        ((*COMPILE, "--latency", "fast"), "goal: --latency 'fast' is not a goal"),
        ((*COMPILE, "--blocks", "2", "--regime", "cold"), "goal: --regime says how a latency is measured, and none is"),
        (("compile", "none.onnx", *COMPILE[2:], "--blocks", "2"), "capture: no such file: none.onnx"),
        (
            (*COMPILE, "--blocks", "2", "--weights", "weights.pt"),
            "capture: --weights goes with package.module:callable",
        ),
        (("compile", "a:b", *COMPILE[2:], "--blocks", "2", "--weights", "no.pt"), "capture: no such file: no.pt"),
        (("compile", "net.onnx", "--calib", "gone", "-o", "out", "--blocks", "2"), "calibrate: no such file or folder"),
        ((*COMPILE[:-1], "x.npy", "--blocks", "2"), "output: x.npy is a file"),
        ((*COMPILE[:-1], "x.npy/out", "--blocks", "2"), "output: x.npy is a file, so x.npy/out cannot be made"),
        ((*COMPILE, "--blocks", "2", "--fresh", "--cache", "c"), "compile: --fresh keeps no analyses"),
        (("sweep", "none.pt2", *COMPILE[2:]), "capture: no such file: none.pt2"),
        (("apply", "none.json", "net.pt2", "-o", "out"), "plan: no such file: none.json"),
        (
            ("apply", "plan.json", "net.pt2", "-o", "out", "--key", "x"),
            "calibrate: --key: there are no samples to read",
        ),
        (("demo", "-o", "x.npy"), "output: x.npy is a file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(folder: Path, arguments: tuple[str, ...], error: str) -> None:
    code, said = begun(*arguments)
    assert code == 1 and said[0].startswith(error)
    assert said[1].startswith("  hint: ") and "loading" not in said
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"latency": "0.7"},
        {"latency": "2.5ms"},
        {"latency": "0.70", "regime": Caches.COLD},
        {"latency": "0.7", "regime": Caches.HOT},
        {"blocks": 1},
        {"blocks": 4},
        {"keep": 0.5},
        {"macs": 0.6},
        {"parameters": 0.25},
        {"max_error": 0.02},
        {"max_loss": 0.5, "evaluate": "package.module:metric"},
        {"ranks": 0.25},
    ],
)
def test_goals_are_called_what_they_call_themselves(given: dict[str, Any]) -> None:
    options = CompileOptions(model="net.onnx", calib=Path("x.npy"), output=Path("out"), **given)
    assert f" to {read_goal(options)} with " in options.first_words()


def test_goals_of_a_sweep_are_called_what_they_call_themselves() -> None:
    options = SweepOptions(model="m", calib=Path("x"), output=Path("out"), latency="0.8,2ms,", macs="0.5")
    goals = ", ".join(map(str, read_goals(options.latency, options.macs)))
    assert f" to each of {goals} with " in options.first_words()
    assert (
        " to several latency ratios with " in SweepOptions(model="m", calib=Path("x"), output=Path("o")).first_words()
    )


def test_words_of_an_application_and_of_the_demo() -> None:
    options = {"plan": Path("plan.json"), "model": "net.pt2", "output": Path("out")}
    assert ApplyOptions(**options).first_words() == "applying plan.json to net.pt2; output in out/"
    solved = ApplyOptions(**options, solved=Path("m.pt2"), calib=Path("x.npy")).first_words()
    assert solved == "applying plan.json to net.pt2 with the weights of m.pt2; output in out/"
    assert "latency ratio 0.6; output in demo-output/" in DemoOptions().first_words()
