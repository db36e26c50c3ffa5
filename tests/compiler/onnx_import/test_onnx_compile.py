"""From a user's ONNX file to a faster one: the whole way, in Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import foldcut
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from foldcut.compiler.cli import main as cli
from foldcut.compiler.export.exporter import to_onnx_model
from foldcut.compiler.onnx.compare_files import Comparison, compare_onnx, random_samples
from foldcut.compiler.onnx.signature import OnnxSignature
from onnx import TensorProto, helper
from torch import nn
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("quick_measurement")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Block(), Block(), Block(), nn.Linear(8, 3)).eval()


def file(folder: Path, *, opset: int = 14, batch: int | None = None, seed: int | None = None) -> Path:
    """Somebody's file: own names, an old opset, words of its own."""
    model = network()
    if seed is not None:
        torch.manual_seed(seed)
        model[4] = nn.Linear(8, 3)
    proto = to_onnx_model(foldcut.capture(model, torch.randn(2, 4)), opset=opset)
    for value, name in ((proto.graph.input[0], "features:0"), (proto.graph.output[0], "logits")):
        for node in proto.graph.node:
            node.input[:] = [name if n == value.name else n for n in node.input]
            node.output[:] = [name if n == value.name else n for n in node.output]
        value.name = name
        dim = value.type.tensor_type.shape.dim[0]
        dim.Clear()
        if batch is None:
            dim.dim_param = "N"
        else:
            dim.dim_value = batch
    proto.doc_string, proto.graph.doc_string = "a model", "a graph"
    proto.metadata_props.add(key="owner", value="somebody")
    path = folder / f"model{'' if seed is None else seed}.onnx"
    onnx.save(proto, path)
    return path


def samples(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(1))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.mark.parametrize("batch", [None, 1])
def test_the_result_has_the_interface_and_the_words_of_the_file(tmp_path: Path, batch: int | None) -> None:
    path = file(tmp_path, batch=batch)
    result = foldcut.compile(path, samples(), goal=foldcut.Blocks(1), mimic=None, progress=False)
    before, after = OnnxSignature.of(onnx.load(path)), OnnxSignature.of(onnx.load_from_string(result.onnx))
    assert before == after
    assert before.inputs[0].name == "features:0" and before.opset == 14
    session = onnxruntime.InferenceSession(result.onnx)
    x = samples(1).numpy()
    got = session.run(["logits"], {"features:0": x})[0]
    assert np.abs(got - result.module(torch.from_numpy(x)).detach().numpy()).max() < 1e-5


def test_the_file_and_the_module_give_the_same_plan_and_network(tmp_path: Path) -> None:
    from_file = foldcut.compile(file(tmp_path), samples(), goal=foldcut.Blocks(1), mimic=None, progress=False)
    from_module = foldcut.compile(network(), samples(), goal=foldcut.Blocks(1), mimic=None, progress=False)
    assert [str(d) for d in from_file.plan.decisions] != []
    positions = []
    for result in (from_file, from_module):
        order = result.outcome.ctx.teacher.order
        linears = [n for n in order if n.startswith("linear")]
        drop = result.plan.decisions[0]
        assert isinstance(drop, foldcut.DropBlock)
        positions.append([i for i, n in enumerate(linears) if order[drop.entry] < order[n] < order[drop.exit]])
    assert positions[0] == positions[1]
    x = samples(5)
    assert torch.allclose(from_file.module(x), from_module.module(x), atol=1e-4)


def test_channels_are_pruned_from_a_file(tmp_path: Path) -> None:
    path = file(tmp_path)
    settings = foldcut.PipelineSettings(
        channels=foldcut.ChannelSettings(limits=foldcut.ChannelLimits(multiple_of=4)),
    )
    result = foldcut.compile(
        path,
        samples(),
        goal=foldcut.Channels(keep=0.5),
        rewrites=("prune_channels",),
        mimic=None,
        progress=False,
        settings=settings,
    )
    weights = {t.name: list(t.dims) for t in onnx.load_from_string(result.onnx).graph.initializer}
    assert [16, 4] in weights.values() or [4, 16] in weights.values()
    assert result.report.macs["after"] < result.report.macs["before"]


def test_latency_is_compared_with_the_users_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foldcut.runtime.probe import latency_probe

    path = file(tmp_path)
    built: list[bytes] = []
    original = latency_probe.LatencyProbe._built

    def build(self: Any, model: bytes) -> Any:
        built.append(model)
        return original(self, model)

    monkeypatch.setattr(latency_probe.LatencyProbe, "_built", build)
    foldcut.compile(path, samples(), goal=foldcut.Blocks(1), mimic=None, progress=False)
    assert built[0] == path.read_bytes()


def test_a_fixed_batch_is_measured_at_that_batch_only(tmp_path: Path) -> None:
    with pytest.raises(foldcut.CompilerError, match="fixes its batch size at 1"):
        foldcut.compile(file(tmp_path, batch=1), samples(), goal=foldcut.Blocks(1), batch=4, progress=False)


def test_calibration_of_another_type_is_refused(tmp_path: Path) -> None:
    """Integers for a floating-point input; another floating-point precision is converted."""
    with pytest.raises(foldcut.CompilerError, match="wrong type"):
        foldcut.compile(file(tmp_path), samples().long(), goal=foldcut.Blocks(1), progress=False)


def test_regions_speak_the_files_node_names(tmp_path: Path) -> None:
    path = file(tmp_path)
    names = {n.name for n in onnx.load(path).graph.node}
    program = foldcut.capture(path)
    paths = {program.path(node) for node in program.nodes.values() if node.op == "call_function"}
    assert paths <= names and paths
    region = foldcut.find_regions(program).blocks[0]
    assert all(name in names for name in region.path.split(" ... "))


def test_compile_inspect_and_verify_on_the_command_line(tmp_path: Path) -> None:
    path, calib = file(tmp_path), tmp_path / "x.npy"
    np.save(calib, samples().numpy())
    out = tmp_path / "out"
    done = run("compile", path, "--calib", calib, "--blocks", 1, "--no-mimic", "-q", "-o", out)
    assert done.exit_code == 0, done.output
    shown = run("inspect", path, "--json")
    assert json.loads(shown.stdout)["inputs"] == ["features:0: float32[batch, 4]"]
    same = run("verify", path, path, "--inputs", calib, "--json")
    assert same.exit_code == 0 and json.loads(same.stdout)["outputs"]["logits"]["absolute"] == 0
    other = run("verify", path, out / "model.onnx", "--inputs", calib)
    assert other.exit_code == 3 and "different" in other.stdout
    made_up = run("verify", path, path)
    assert made_up.exit_code == 0 and "the same on 8 samples" in made_up.stdout


def test_verify_names_every_difference_of_the_interface(tmp_path: Path) -> None:
    first, second = file(tmp_path), file(tmp_path, opset=15, batch=1, seed=3)
    found = compare_onnx(first, second, random_samples(first, 4, 0), batch=1)
    text = "; ".join(found.interface)
    assert "input features:0: float32[N, 4] became float32[1, 4]" in text
    assert "opset: 14 became 15" in text
    assert not found.same(1.0) and found.relative > 1e-3
    assert found.samples == 4


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_below_one_is_refused(tmp_path: Path, batch: int) -> None:
    """A batch of -1 compared nothing and found everything the same."""
    path = file(tmp_path)
    with pytest.raises(foldcut.CaptureError, match="batch starts at 1"):
        compare_onnx(path, path, random_samples(path, 4, 0), batch=batch)
    assert run("verify", path, path, "--batch", batch).exit_code not in (0, 3)


def test_nothing_compared_is_not_the_same() -> None:
    assert not Comparison(interface=(), outputs={}, samples=0).same(1.0)


def test_samples_that_do_not_fill_a_fixed_batch_are_left_out(tmp_path: Path) -> None:
    """Whichever of the two files fixes it."""
    free, fixed = file(tmp_path), file(tmp_path, batch=3, seed=3)
    for first, second in ((free, fixed), (fixed, free)):
        assert compare_onnx(first, second, random_samples(free, 8, 0)).samples == 6


def own_export(folder: Path) -> Path:
    """The network of `file` with the names that foldcut's export gives it."""
    proto = to_onnx_model(foldcut.capture(network(), torch.randn(2, 4)), opset=14)
    onnx.save(proto, folder / "own.onnx")
    return folder / "own.onnx"


def test_inputs_of_other_names_are_compared_by_position(tmp_path: Path) -> None:
    """Somebody's own export against foldcut's, either way round, with samples made up or named as in one of them."""
    theirs, ours = file(tmp_path), own_export(tmp_path)
    said = "inputs: features:0 became input_1"
    shown = run("verify", theirs, ours)
    assert shown.exit_code == 3 and said in " ".join(shown.output.split())
    given = foldcut.CalibrationSet.of({"features:0": samples(6)})
    for first, second in ((theirs, ours), (ours, theirs)):
        found = compare_onnx(first, second, given)
        assert found.relative < 1e-5 and found.samples == 6
        assert any(line.startswith("inputs: ") for line in found.interface)
        assert not found.same(1.0)
    with pytest.raises(foldcut.CaptureError, match="do not have the file's inputs"):
        compare_onnx(theirs, ours, foldcut.CalibrationSet.of({"pixels": samples(6)}))


def difference(folder: Path, names: tuple[str, str], first: str, *, types: tuple[int, int] = (1, 1)) -> Path:
    """`first` less the other input."""
    other = next(name for name in names if name != first)
    ranks = ([None, 2], [None, 2] if types[1] == 1 else [None, 2, 1])
    inputs = [helper.make_tensor_value_info(n, t, r) for n, t, r in zip(names, types, ranks, strict=True)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 2])]
    nodes = [helper.make_node("Cast", [n], [f"{n}_"], to=1) for n in names]
    nodes.append(helper.make_node("Sub", [f"{first}_", f"{other}_"], ["y"]))
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    path = folder / f"{'-'.join(names)}-{types[1]}.onnx"
    onnx.save(model, path)
    return path


def test_names_that_both_files_have_go_before_the_position(tmp_path: Path) -> None:
    before = difference(tmp_path, ("a", "b"), "a")
    for names, first in ((("x", "y0"), "x"), (("b", "a"), "a"), (("b", "c"), "c"), (("a", "c"), "a")):
        found = compare_onnx(before, difference(tmp_path, names, first), random_samples(before, 4, 0))
        assert found.relative == 0, names


def test_inputs_of_another_type_or_number_do_not_stand_for_each_other(tmp_path: Path) -> None:
    before = difference(tmp_path, ("a", "b"), "a")
    for after in (difference(tmp_path, ("x", "y0"), "x", types=(1, 7)), own_export(tmp_path)):
        with pytest.raises(foldcut.CaptureError, match="do not have the file's inputs") as refused:
            compare_onnx(before, after, random_samples(before, 4, 0))
        assert "float32[" in str(refused.value.expected)


def test_a_difference_that_is_not_finite_is_null(tmp_path: Path) -> None:
    """JSON has no Infinity: other readers than Python's refuse it."""
    path = file(tmp_path)
    broken = onnx.load(path)
    bias = next(t for t in broken.graph.initializer if list(t.dims) == [3])
    bias.CopyFrom(helper.make_tensor(bias.name, TensorProto.FLOAT, [3], [float("nan"), 0.0, 0.0]))
    onnx.save(broken, tmp_path / "broken.onnx")
    shown = run("verify", path, tmp_path / "broken.onnx", "--json")
    assert shown.exit_code == 3
    found = json.loads(shown.stdout, parse_constant=pytest.fail)
    assert found["outputs"]["logits"]["absolute"] is None and found["outputs"]["logits"]["relative"] is None
    assert found["same"] is False


@pytest.mark.parametrize("name", ["missing.onnx", "text.onnx"])
def test_what_is_no_model_ends_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    result = run("inspect", tmp_path / name)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "hint" in result.stderr
