"""The command line: what it prints, what it writes, how it fails."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foldcut.compiler.cli import apply as cli_apply
from foldcut.compiler.cli import compile as cli_compile
from foldcut.compiler.cli import demo
from foldcut.compiler.cli import inspect as cli_inspect
from foldcut.compiler.cli import main as cli
from foldcut.compiler.cli import sweep as cli_sweep
from foldcut.compiler.cli.console import out
from foldcut.compiler.export.exporter import to_exported, to_onnx, to_pt2
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.frontend.model_source import load_model
from foldcut.compiler.goals.latency import Latency
from foldcut.compiler.support import progress
from foldcut.compiler.support.errors import GoalError
from foldcut.passes.drop.decision import Blocks
from foldcut.passes.mimic.settings import MimicSettings
from PIL import Image
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("quick_measurement")

SOURCE = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), Block(), Block(), nn.Linear(6, 3))


model = build()
needs_arguments = Block.forward
number = 3


def broken():
    raise RuntimeError("no such checkpoint")
"""


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def failed(result: Any, *texts: str, code: int = 1) -> None:
    """It ended with this code and a message, not with a traceback."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    flat = " ".join(result.stderr.split())
    for text in texts:
        assert text in flat
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a module that builds a network, samples, weights, a .pt2 and an ONNX file."""
    path = tmp_path_factory.mktemp("work")
    (path / "foldcut_cli_net.py").write_text(SOURCE)
    (path / "foldcut_cli_typo.py").write_text("def build(:\n")
    (path / "foldcut_cli_raises.py").write_text("import os\nPATH = os.environ['CHECKPOINT']\n")
    (path / "foldcut_cli_script.py").write_text("import sys\nsys.exit('give a file')\n")
    np.save(path / "samples.npy", np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(path)
        net = load_model("foldcut_cli_net:build", None)
        torch.save(net.state_dict(), path / "weights.pt")
        program = capture(net, torch.zeros(2, 4))
        (path / "net.pt2").write_bytes(to_pt2(to_exported(program)))
        (path / "net.onnx").write_bytes(to_onnx(program))
        yield path


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """One compile with ONNX Runtime, its report printed as JSON."""
    out = tmp_path_factory.mktemp("result") / "out"
    result = run(
        "compile", "foldcut_cli_net:build", "--calib", "samples.npy", "--blocks", 1, "-o", out, "--json", "--no-mimic"
    )
    return result, out


def test_compile_writes_the_folder_and_prints_json_only(done: tuple[Any, Path]) -> None:
    result, out = done
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert sorted(p.name for p in out.iterdir()) == [
        "model.onnx",
        "model.pt2",
        "plan.json",
        "report.html",
        "report.json",
    ]
    assert json.loads((out / "report.json").read_text()) == report
    assert report["goal"] == {"kind": "blocks", "count": 1}
    assert report["backend"] == "onnxruntime"
    assert report["latency"]["clock"] == "thread_cpu"
    assert report["latency"]["ratio"] > 0
    assert len(report["decisions"]) == 1
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]


def test_an_unmet_goal_writes_the_best_and_ends_with_3(folder: Path, tmp_path: Path) -> None:
    result = run(
        "compile", "net.pt2", "--calib", "samples.npy", "--blocks", 9, "-o", tmp_path / "out", "--no-mimic", "--quiet"
    )
    failed(result, "goal", "only 2 of 9 blocks", "warning", code=3)
    assert result.stdout == ""
    assert len(list((tmp_path / "out").iterdir())) == 5
    assert json.loads((tmp_path / "out" / "report.json").read_text())["met"] is False


def test_channels_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    arguments = (
        "--keep",
        0.5,
        "--multiple-of",
        2,
        "--rewrites",
        "prune_channels",
        "-o",
        tmp_path / "out",
        "--no-mimic",
        "--profile",
    )
    result = run("compile", "net.pt2", "--calib", "samples.npy", *arguments)
    assert result.exit_code == 0, result.output
    assert "1.up: 6 of 12 units kept" in " ".join(result.output.split())
    assert "multiply-accumulates by stage" in result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"stage", "wall_s", "cpu_s", "macs", "least_macs"} == set(report["profile"][0])
    assert report["goal"] == {"kind": "channels", "keep": 0.5}
    assert {g["group"]: (g["kept"], g["total"]) for g in report["groups"]}["1.up"] == (6, 12)


@pytest.mark.parametrize("goal", [("--ranks", 0.4), ("--macs", 0.8, "--rewrites", "factorize")], ids=str)
def test_low_rank_on_the_command_line(folder: Path, tmp_path: Path, goal: tuple[Any, ...]) -> None:
    options = (*goal, "--multiple-of", 1, "--ignore", "3", "-o", tmp_path / "out", "--no-mimic")
    result = run("compile", "net.pt2", "--calib", "samples.npy", *options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["decisions"]
    assert {d["kind"] for d in report["decisions"]} == {"factorize"}
    assert "3" not in {d["path"] for d in report["decisions"]}
    first = report["decisions"][0]
    assert f"{first['path']}: channel, rank {first['ranks'][0]} of {first['full'][0]}" in " ".join(
        result.output.split()
    )


def test_inspect_lists_the_unit_groups(folder: Path) -> None:
    found = json.loads(run("inspect", "net.pt2", "--json").stdout)
    groups = {g["group"]: g for g in found["groups"]}
    assert groups["1.up"]["total"] == 12
    assert groups["1.up"]["locked"] is None
    assert 0 < groups["1.up"]["macs_share"] < 1
    assert "network output" in groups["3"]["locked"]
    text = " ".join(run("inspect", "net.pt2").output.split())
    assert "unit groups" in text and "1.up" in text


def test_the_table(done: tuple[Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    from foldcut.compiler.report.report import Report

    data = json.loads((done[1] / "report.json").read_text())
    del data["version"]
    cli_compile.show_report(Report(**data), out)
    text = capsys.readouterr().out
    assert "before and after" in text
    assert "latency" in text
    assert "dropped" in text


def test_inspect_as_json(folder: Path) -> None:
    result = run("inspect", "foldcut_cli_net:build", "--input-shape", "4", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["inputs"] == ["input_1: float32[batch, 4]"]
    assert found["macs"] == 4 * 6 + 2 * 2 * 6 * 12 + 6 * 3
    blocks = [r for r in found["regions"] if r["block"]]
    assert [(b["path"], b["kind"], b["macs"]) for b in blocks] == [("1", "residual", 144), ("2", "residual", 144)]
    assert found["rejects"] == []


def test_inspect_is_the_same_from_every_source(folder: Path) -> None:
    found = [
        json.loads(run("inspect", *source, "--json").stdout)["fingerprint"]
        for source in (
            ["net.pt2"],
            ["foldcut_cli_net:build", "--calib", "samples.npy"],
            ["foldcut_cli_net:model", "--input-shape", "4"],
            ["foldcut_cli_net:build", "--input-shape", "4", "--weights", "weights.pt"],
        )
    ]
    assert len(set(found)) == 1


def test_inspect_as_table_and_as_graph(folder: Path) -> None:
    table = run("inspect", "net.pt2")
    assert table.exit_code == 0
    assert "removable regions" in table.stdout
    graph = run("inspect", "net.pt2", "--graph")
    assert graph.stdout.startswith("input  input_1: float32[batch, 4]\n%linear = linear(")


def test_measure_prints_the_ratio(folder: Path, done: tuple[Any, Path]) -> None:
    result = run("measure", "net.onnx", done[1] / "model.onnx", "--batch", 2, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["low"] <= data["high"]
    assert data["ratio"] > 0
    plain = run("measure", "net.onnx", "net.onnx")
    assert plain.exit_code == 0, plain.output
    assert "ratio x" in plain.stdout


COMPILE = ("compile", "foldcut_cli_net:build", "--calib", "samples.npy", "-o", "OUT")


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (
            (*COMPILE,),
            ("give one goal", "--latency 0.7, --blocks 4", "--max-error 0.02, --max-loss 0.5 or --ranks 0.25"),
        ),
        ((*COMPILE, "--latency", "0.5", "--blocks", "1"), ("give one goal",)),
        ((*COMPILE, "--latency", "1.5"), ("Latency(1.5) is not a goal", "hint")),
        ((*COMPILE, "--latency", "0ms"), ("Latency(ms=0.0) is not a goal", "hint")),
        ((*COMPILE, "--latency", "fast"), ("--latency 'fast' is not a goal", "2.5ms")),
        ((*COMPILE, "--latency", "99999ms"), ("the original takes", "within latency 99999 ms")),
        ((*COMPILE, "--blocks", "0"), ("Blocks(0) is not a goal",)),
        ((*COMPILE, "--keep", "0"), ("Channels(0.0) is not a goal", "hint")),
        ((*COMPILE, "--macs", "1.5"), ("Macs(1.5) is not a goal", "hint")),
        ((*COMPILE, "--ranks", "0"), ("Ranks(keep=0.0) is not a goal", "hint")),
        ((*COMPILE, "--ranks", "0.5", "--ignore", "x.*"), ("no layer matches 'x.*'", "hint")),
        ((*COMPILE, "--ranks", "0.5", "--rewrites", "drop_blocks"), ("reached by factorize", "hint")),
        ((*COMPILE, "--keep", "0.5", "--rewrites", "drop_blocks"), ("reached by prune_channels", "hint")),
        ((*COMPILE, "--keep", "0.5", "--rewrites", "magic"), ("unknown rewrites",)),
        ((*COMPILE, "--keep", "0.5", "--multiple-of", "0"), ("--multiple-of starts at 1", "or lattice, not 0")),
        ((*COMPILE, "--macs", "0.5", "--multiple-of", "-8"), ("--multiple-of starts at 1", "or lattice, not -8")),
        ((*COMPILE, "--keep", "0.5", "--multiple-of", "some"), ("'some' is no number", "lattice")),
        ((*COMPILE, "--keep", "0.5", "--ignore", "x.*"), ("no unit group or output matches 'x.*'", "hint")),
        ((*COMPILE, "--blocks", "1", "--backend", "abacus"), ("no backend named 'abacus'", "onnxruntime", "hint")),
        ((*COMPILE, "--blocks", "1", "--batch", "0"), ("batch and threads start at 1",)),
        ((*COMPILE, "--blocks", "1", "--size", "large"), ("--size 'large' is not a size",)),
        ((*COMPILE, "--blocks", "1", "--size", "0,0"), ("--size '0,0' is not a size", "from 1 on such as 224,224")),
        ((*COMPILE, "--blocks", "1", "--size=-4,4"), ("--size '-4,4' is not a size",)),
        ((*COMPILE, "--blocks", "1", "--size", "2,2"), ("size: for folders of images only, and samples.npy is none",)),
        ((*COMPILE, "--blocks", "1", "--mean", "0,0,0"), ("mean: for folders of images only", "leave mean out")),
        ((*COMPILE, "--blocks", "1", "--std", "1,1,1"), ("std: for folders of images only", "leave std out")),
        ((*COMPILE, "--blocks", "1", "--key", "x"), ("key names an array", "samples.npy has none", "(--key)")),
        (
            (*COMPILE[:3], "weights.pt", *COMPILE[4:], "--blocks", "1", "--key", "x"),
            ("no entry 'x'", "one of 0.weight,"),
        ),
        ((*COMPILE, "--blocks", "1", "--mean", "0.5"), ("not one number per channel",)),
        ((*COMPILE, "--blocks", "1", "--weights", "net.pt2"), ("cannot load net.pt2", "state_dict")),
        ((*COMPILE[:3], "missing.npy", *COMPILE[4:], "--blocks", "1"), ("no such file or folder: missing.npy",)),
        ((*COMPILE[:3], "net.onnx", *COMPILE[4:], "--blocks", "1"), ("cannot read calibration data from net.onnx",)),
        (("compile", "missing.pt2", *COMPILE[2:], "--blocks", "1"), ("no such file: missing.pt2", "hint")),
        (("compile", "nowhere:build", *COMPILE[2:], "--blocks", "1"), ("cannot import nowhere:build", "hint")),
        (("compile", "foldcut_cli_net:nothing", *COMPILE[2:], "--blocks", "1"), ("cannot import",)),
        (
            ("compile", "foldcut_cli_typo:build", *COMPILE[2:], "--blocks", "1"),
            ("SyntaxError: ", "foldcut_cli_typo.py"),
        ),
        (("compile", "foldcut_cli_raises:build", *COMPILE[2:], "--blocks", "1"), ("KeyError: 'CHECKPOINT'", "hint")),
        (("compile", "foldcut_cli_script:build", *COMPILE[2:], "--blocks", "1"), ("SystemExit: give a file", "hint")),
        (("compile", "foldcut_cli_net:broken", *COMPILE[2:], "--blocks", "1"), ("no such checkpoint",)),
        (("compile", "foldcut_cli_net:needs_arguments", *COMPILE[2:], "--blocks", "1"), ("needs_arguments",)),
        (("compile", "foldcut_cli_net:number", *COMPILE[2:], "--blocks", "1"), ("foldcut_cli_net:number",)),
        (("compile", "net.pt2", *COMPILE[2:], "--blocks", "1", "--weights", "weights.pt"), ("--weights goes with",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and value[0] != "compile" else "",
)
def test_bad_input_to_compile(folder: Path, tmp_path: Path, arguments: tuple[str, ...], texts: tuple[str, ...]) -> None:
    out = tmp_path / "new" / "out"
    before = sorted(folder.rglob("*"))
    failed(run(*[str(out) if a == "OUT" else a for a in arguments]), *texts)
    assert not list(tmp_path.iterdir())
    assert sorted(p for p in folder.rglob("*") if "__pycache__" not in p.parts) == [
        p for p in before if "__pycache__" not in p.parts
    ]


def test_samples_of_the_wrong_shape(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((8, 5), np.float32))
    result = run("compile", "net.pt2", "--calib", tmp_path / "wide.npy", "--blocks", 1, "-o", tmp_path / "out")
    failed(result, "wrong shape for input 'input_1'", "expected: input_1: float32[batch, 4]", "actual: float32[8, 5]")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_noticed_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args: Any, **_options: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(cli_compile, "compile_model", never)
    (tmp_path / "out").write_text("mine")
    failed(run(*COMPILE[:-1], tmp_path / "out", "--blocks", 1), "is a file", "hint")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_interrupt_writes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_compile, "compile_model", interrupt)
    ended = run(*COMPILE[:-1], tmp_path / "out", "--blocks", 1)
    failed(ended, "interrupted; nothing was written; what is done is kept, and the same command goes on", code=130)
    assert not list(tmp_path.iterdir())
    fresh = run(*COMPILE[:-1], tmp_path / "out", "--blocks", 1, "--fresh")
    begun = "compiling foldcut_cli_net:build to 1 block dropped with samples.npy, on onnxruntime"
    ended = f"{begun}; output in {tmp_path / 'out'}/\ninterrupted; nothing was written\n"
    assert fresh.exit_code == 130 and fresh.stderr == ended


def test_options_reach_the_compiler(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def note(model: Any, samples: Any, **options: Any) -> None:
        seen.update(options, model=model, count=len(samples))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_compile, "compile_model", note)
    options = ("--latency", 0.6, "--batch", 4, "--threads", 2, "--seed", 7, "--limit", 5, "--no-mimic", "--quiet")
    run(*COMPILE[:-1], tmp_path / "out", *options)
    assert seen["goal"] == Latency(0.6)
    wanted = {"backend": "onnxruntime", "batch": 4, "threads": 2, "seed": 7, "mimic": False, "progress": False}
    assert {key: seen[key] for key in wanted} == wanted
    assert seen["count"] == 5
    assert isinstance(seen["model"], torch.nn.Module)


def test_the_time_of_the_training_reaches_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def note(*_model: Any, **options: Any) -> None:
        seen.append(options["mimic"])
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_compile, "compile_model", note)
    monkeypatch.setattr(cli_sweep, "sweep", note)
    monkeypatch.setattr(cli_apply, "apply", note)
    compiled = (*COMPILE[:-1], tmp_path / "out", "--blocks", 1)
    run(*compiled, "--mimic-seconds", 2.5)
    run(*compiled)
    run("sweep", *COMPILE[1:-1], tmp_path / "out", "--mimic-seconds", 0)
    (tmp_path / "plan.json").write_text("{}")
    applied = ("apply", tmp_path / "plan.json", *COMPILE[1:-1], tmp_path / "out")
    run(*applied, "--mimic-seconds", 7)
    assert seen == [MimicSettings(seconds=2.5), True, MimicSettings(seconds=0), MimicSettings(seconds=7)]
    failed(run(*compiled, "--no-mimic", "--mimic-seconds", 3), "--no-mimic leaves out", "give one of them")
    failed(run(*applied, "--mimic-seconds", 3, "--solved", "net.pt2"), "are not trained", "give --calib alone")
    assert run(*compiled, "--mimic-seconds", -1).exit_code == 2 and len(seen) == 4


def test_debug_shows_the_error_itself(folder: Path, tmp_path: Path) -> None:
    result = run(*COMPILE[:-1], tmp_path / "out", "--debug")
    assert isinstance(result.exception, GoalError)


def test_bad_input_to_inspect(folder: Path) -> None:
    failed(run("inspect", "foldcut_cli_net:build"), "the input shape is not known", "--input-shape")
    failed(run("inspect", "foldcut_cli_net:build", "--input-shape", "big"), "'big' is not a shape")
    failed(run("inspect", "foldcut_cli_net:build", "--input-shape", "5"), "does not run on the example batch")
    failed(run("inspect", "samples.npy"), "cannot read samples.npy as a network")
    for shape in ("0,4", "-4", "4,", ""):
        failed(run("inspect", "foldcut_cli_net:build", f"--input-shape={shape}"), f"'{shape}' is not a shape")
    both = ("--input-shape", "5", "--calib", "samples.npy")
    failed(run("inspect", "foldcut_cli_net:build", *both), "--input-shape is not the shape of the calibration samples")
    for option, value in (("--size", "2,2"), ("--mean", "0,0,0"), ("--std", "1,1,1"), ("--key", "x")):
        failed(
            run("inspect", "net.pt2", option, value), f"{option}: there are no samples to read", f"leave {option} out"
        )


def test_bad_input_to_measure(folder: Path, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage")
    failed(run("measure", "net.onnx", "missing.onnx"), "cannot read missing.onnx", "hint")
    failed(run("measure", "net.onnx", "net.onnx", "--backend", "abacus"), "no backend named 'abacus'")
    failed(run("measure", garbage, "net.onnx"))
    failed(run("measure", "net.onnx", garbage))
    failed(run("measure", "net.onnx", folder))


def test_wrong_usage_ends_with_2(folder: Path) -> None:
    assert run("compile", "net.pt2").exit_code == 2
    assert run("paint").exit_code == 2
    assert run("compile", "net.pt2", "--blocks", "many").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        *((*COMPILE, "--blocks", "1", *wrong) for wrong in (("--seed", "-1"), ("--limit", "-5"), ("--limit", "0"))),
        *(("sweep", *COMPILE[1:], "--macs", "0.5", *wrong) for wrong in (("--seed", "-1"), ("--limit", "0"))),
        *(("apply", "plan.json", "net.pt2", "-o", "OUT", *wrong) for wrong in (("--seed", "-1"), ("--limit", "0"))),
        *(
            ("verify", "net.onnx", "net.onnx", option, value)
            for option in ("--batch", "--limit")
            for value in ("0", "-1")
        ),
        ("verify", "net.onnx", "net.onnx", "--seed", "-1"),
        ("verify", "net.onnx", "net.onnx", "--tolerance", "-1"),
        ("measure", "net.onnx", "net.onnx", "--seed", "-1"),
        ("demo", "-o", "OUT", "--seed", "-1"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_wrong_usage(folder: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ended = run(*[str(tmp_path / "out") if a == "OUT" else a for a in arguments])
    failed(ended, f"Invalid value for '{arguments[-2]}'", code=2)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def pictures(folder: Path) -> Path:
    """Images of two sizes, and a network for images as a file."""
    path = folder / "pictures"
    path.mkdir()
    for index in range(6):
        Image.new("RGB", (4 + index, 6), (index * 40, 0, 255)).save(path / f"{index}.png")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    (folder / "conv.onnx").write_bytes(to_onnx(capture(net.eval(), torch.zeros(2, 3, 5, 5))))
    return path


def test_inspect_and_verify_read_samples_as_compile_does(folder: Path, pictures: Path) -> None:
    np.savez("many.npz", x=np.zeros((8, 4), np.float32), y=np.zeros((8, 5), np.float32))
    found = json.loads(run("inspect", "foldcut_cli_net:build", "--calib", "many.npz", "--key", "x", "--json").stdout)
    assert found["fingerprint"] == json.loads(run("inspect", "net.pt2", "--json").stdout)["fingerprint"]
    failed(run("inspect", "foldcut_cli_net:build", "--calib", "many.npz", "--key", "z"), "one of x, y")
    failed(run("inspect", "foldcut_cli_net:build", "--calib", pictures), "differ in size", "give --size H,W")
    unfit = run("inspect", "foldcut_cli_net:build", "--calib", pictures, "--size", "4,5")
    failed(unfit, "does not run on the example batch")
    options = ("--inputs", pictures, "--size", "5,5", "--mean", "0.5,0,0", "--std", "0.5,1,1", "--limit", 3)
    same = run("verify", "conv.onnx", "conv.onnx", *options, "--batch", 2)
    assert same.exit_code == 0 and "the same on 3 samples" in same.output
    failed(run("verify", "conv.onnx", "conv.onnx", "--inputs", pictures), "differ in size", "give --size H,W")
    failed(run("verify", "net.onnx", "net.onnx", "--key", "x"), "--key: there are no samples to read")


def test_errors_say_which_file(folder: Path, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage")
    for command in ("verify", "measure"):
        for pair in (("net.onnx", garbage), (garbage, "net.onnx")):
            failed(run(command, *pair), f"{garbage}: not an ONNX model")
    failed(run(*COMPILE[:1], garbage, *COMPILE[2:-1], tmp_path / "out", "--blocks", 1), f"{garbage}: not an ONNX model")


def test_lines_are_neither_wrapped_nor_read_as_markup(folder: Path, tmp_path: Path) -> None:
    """So that a log can be searched, and a path copied, whatever it is called."""
    odd = tmp_path / ("a-long-way-down" * 6) / "out[/x] [red] :smile:"
    arguments = ("--blocks", 1, "--no-mimic", "-o", odd)
    made = run("compile", "net.pt2", "--calib", "samples.npy", *arguments)
    assert made.exit_code == 0, made.output
    assert f"wrote {odd}/ (model.onnx, model.pt2, plan.json, report.json, report.html)" in made.stdout.splitlines()
    assert f"open {odd / 'report.html'} in a browser" in made.stdout.splitlines()
    again = run("apply", odd / "plan.json", "net.pt2", "-o", odd / "again")
    assert f"wrote {odd / 'again'}/ (model.onnx, model.pt2, plan.json)" in again.stdout.splitlines()
    missing = odd / "none.npy"
    lost = run("compile", "net.pt2", "--calib", missing, *arguments)
    failed(lost)
    assert f"calibrate: no such file or folder: {missing}" in lost.stderr.splitlines()
    few = run("compile", "net.pt2", "--calib", "samples.npy", "--blocks", 9, "--no-mimic", "-q", "-o", tmp_path / "few")
    assert few.stderr.splitlines()[-1] == "goal: only 2 of 9 blocks can be dropped"
    assert "warning: the network has 2 removable regions, fewer than 9" in few.stderr.splitlines()


def test_names_are_not_shortened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "stage_" + "deep_" * 30 + "[/end]"
    region = {
        "name": name,
        "path": name,
        "kind": "residual",
        "block": True,
        "macs": 1,
        "macs_share": 1.0,
        "parameters": 1,
    }
    group = {"group": name, "total": 4, "widths": [1], "consumers": [], "macs_share": 1.0, "locked": "[/locked]"}
    found = {"macs": 1, "parameters": 1, "regions": [region], "groups": [group]}
    found |= {"rejects": [{"node": name, "reason": "[/why]"}], "unknown": {"[/op]": [name]}}
    monkeypatch.setattr(cli_inspect, "describe", lambda _program: found)
    shown = run("inspect", "net.pt2")
    assert shown.exit_code == 0, repr(shown.exception)
    assert "…" not in shown.stdout and "[/locked]" in shown.stdout
    assert f"left alone: {name}: [/why]" in shown.stdout.splitlines()
    assert f"not understood: [/op] (1 times, first at {name})" in shown.stdout.splitlines()


def test_a_log_hears_of_every_stage(folder: Path, tmp_path: Path) -> None:
    made = run("compile", "net.pt2", "--calib", "samples.npy", "--blocks", 1, "--fresh", "-o", tmp_path / "out")
    stages = [line.split(" s  ")[1] for line in made.stderr.splitlines() if " s  " in line]
    assert {"choose blocks", "re-solve", "mimic"} <= set(stages)
    assert len(stages) == len(set(stages))
    assert run(*COMPILE[:-1], tmp_path / "quiet", "--blocks", 1, "--no-mimic", "-q").stderr == ""


def test_a_long_stage_is_heard_of_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1, 2, 3, 40, 41, 80, 81])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    lines: list[str] = []
    plain = progress.PlainProgress(lines.append)
    for done in range(1, 6):
        plain("mimic", done, 9)
    plain("re-solve", 1, 2)
    plain("mimic", 9, 9)
    assert [line.split() for line in lines] == [
        ["1", "s", "mimic"],
        ["40", "s", "mimic", "4/9"],
        ["80", "s", "re-solve"],
    ]


@pytest.fixture
def quick_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with a small network that is not trained, and a goal in blocks that it does not have."""
    pytest.importorskip("sklearn")
    compiled = demo.compile_model

    def unmet(net: Any, samples: Any, **options: Any) -> Any:
        return compiled(
            net, samples[:16], goal=Blocks(9), mimic=False, progress=options["progress"], seed=options["seed"]
        )

    monkeypatch.setattr(demo, "train_digits", lambda *_data, **_options: demo.DigitNet(1, 4).eval())
    monkeypatch.setattr(demo, "compile_model", unmet)


@pytest.mark.usefixtures("quick_demo")
def test_a_demo_that_misses_its_goal_ends_with_3(folder: Path, tmp_path: Path) -> None:
    reported = run("demo", "-o", tmp_path / "reported")
    failed(reported, "goal: only 2 of 9 blocks can be dropped", code=3)
    assert "foldcut demo" in reported.stdout and f"wrote {tmp_path / 'reported'}/" in reported.stdout
    quiet = run("demo", "-o", tmp_path / "quiet", "--quiet")
    failed(quiet, code=3)
    assert quiet.stdout == ""
    assert quiet.stderr.splitlines()[-1] == "goal: only 2 of 9 blocks can be dropped"
    assert (tmp_path / "quiet" / "model.onnx").is_file() and (tmp_path / "reported" / "model.onnx").is_file()


def test_help(folder: Path) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("compile", "inspect", "measure", "demo"))
