"""The command line: what it prints, what it writes, how it fails."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foldcut.compiler import cli
from foldcut.compiler.capture import capture
from foldcut.compiler.export import to_exported, to_onnx, to_pt2
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
    np.save(path / "samples.npy", np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(path)
        net = cli.load_model("foldcut_cli_net:build", None)
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
    )
    result = run("compile", "net.pt2", "--calib", "samples.npy", *arguments)
    assert result.exit_code == 0, result.output
    assert "kept 6 of 12 units of 1.up" in " ".join(result.output.split())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["goal"] == {"kind": "channels", "keep": 0.5}
    assert {g["group"]: (g["kept"], g["total"]) for g in report["groups"]}["1.up"] == (6, 12)


@pytest.mark.parametrize("goal", [("--ranks", 0.4), ("--macs", 0.8, "--rewrites", "factorize")], ids=str)
def test_low_rank_on_the_command_line(folder: Path, tmp_path: Path, goal: tuple[Any, ...]) -> None:
    options = (*goal, "--multiple-of", 1, "--ignore", "3", "-o", tmp_path / "out", "--no-mimic")
    result = run("compile", "net.pt2", "--calib", "samples.npy", *options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["decisions"]
    assert {d["kind"] for d in report["decisions"]} == {"factorize_layer"}
    assert "3" not in {d["path"] for d in report["decisions"]}
    first = report["decisions"][0]
    assert f"factorised {first['path']} (channel) to rank {first['ranks'][0]} of {first['full'][0]}" in " ".join(
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
    from foldcut.compiler.report import Report

    data = json.loads((done[1] / "report.json").read_text())
    del data["version"]
    cli.show_report(Report(**data), cli.out)
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
        ((*COMPILE,), ("give one goal", "--latency 0.7, --blocks 4", "--max-error 0.02 or --ranks 0.25")),
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
        ((*COMPILE, "--keep", "0.5", "--multiple-of", "0"), ("multiple_of starts at 1",)),
        ((*COMPILE, "--keep", "0.5", "--multiple-of", "some"), ("'some' is no number", "lattice")),
        ((*COMPILE, "--keep", "0.5", "--ignore", "x.*"), ("no unit group matches 'x.*'", "hint")),
        ((*COMPILE, "--blocks", "1", "--backend", "abacus"), ("no backend named 'abacus'", "onnxruntime", "hint")),
        ((*COMPILE, "--blocks", "1", "--batch", "0"), ("batch and threads start at 1",)),
        ((*COMPILE, "--blocks", "1", "--size", "large"), ("--size 'large' is not a size",)),
        ((*COMPILE, "--blocks", "1", "--mean", "0.5"), ("not one number per channel",)),
        ((*COMPILE, "--blocks", "1", "--weights", "net.pt2"), ("cannot load net.pt2", "state_dict")),
        ((*COMPILE[:3], "missing.npy", *COMPILE[4:], "--blocks", "1"), ("no such file or folder: missing.npy",)),
        ((*COMPILE[:3], "net.onnx", *COMPILE[4:], "--blocks", "1"), ("cannot read calibration data from net.onnx",)),
        (("compile", "missing.pt2", *COMPILE[2:], "--blocks", "1"), ("no such file: missing.pt2", "hint")),
        (("compile", "nowhere:build", *COMPILE[2:], "--blocks", "1"), ("cannot import nowhere:build", "hint")),
        (("compile", "foldcut_cli_net:nothing", *COMPILE[2:], "--blocks", "1"), ("cannot import",)),
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

    monkeypatch.setattr(cli, "compile_model", never)
    (tmp_path / "out").write_text("mine")
    failed(run(*COMPILE[:-1], tmp_path / "out", "--blocks", 1), "is a file", "hint")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_interrupt_writes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "compile_model", interrupt)
    failed(run(*COMPILE[:-1], tmp_path / "out", "--blocks", 1), "interrupted", code=130)
    assert not list(tmp_path.iterdir())


def test_options_reach_the_compiler(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def note(model: Any, samples: Any, **options: Any) -> None:
        seen.update(options, model=model, count=len(samples))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "compile_model", note)
    options = ("--latency", 0.6, "--batch", 4, "--threads", 2, "--seed", 7, "--limit", 5, "--no-mimic", "--quiet")
    run(*COMPILE[:-1], tmp_path / "out", *options)
    assert seen["goal"] == cli.Latency(0.6)
    wanted = {"backend": "onnxruntime", "batch": 4, "threads": 2, "seed": 7, "mimic": False, "progress": False}
    assert {key: seen[key] for key in wanted} == wanted
    assert seen["count"] == 5
    assert isinstance(seen["model"], torch.nn.Module)


def test_debug_shows_the_error_itself(folder: Path, tmp_path: Path) -> None:
    result = run(*COMPILE[:-1], tmp_path / "out", "--debug")
    assert isinstance(result.exception, cli.GoalError)


def test_bad_input_to_inspect(folder: Path) -> None:
    failed(run("inspect", "foldcut_cli_net:build"), "the input shape is not known", "--input-shape")
    failed(run("inspect", "foldcut_cli_net:build", "--input-shape", "big"), "'big' is not a shape")
    failed(run("inspect", "foldcut_cli_net:build", "--input-shape", "5"), "does not run on the example batch")
    failed(run("inspect", "samples.npy"), "cannot read samples.npy as a network")


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


def test_help(folder: Path) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("compile", "inspect", "measure", "demo"))
