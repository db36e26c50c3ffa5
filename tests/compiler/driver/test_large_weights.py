"""Weights above what one message, and memory, is made for: the bounds are set low, so that small networks are large."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foldcut
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from foldcut.compiler.cli.measure_files import MeasureWish, measure_files
from foldcut.compiler.devices import spilled
from foldcut.compiler.export.edit_device import kept_in_a_file
from foldcut.compiler.export.exporter import save_onnx
from foldcut.compiler.onnx import file as onnx_file
from foldcut.compiler.onnx import model_file
from foldcut.compiler.support.errors import CaptureError, CompilerError, OutputError
from foldcut.passes.solve.least_memory import least_bytes
from foldcut.runtime.measure.backend import Array, Backend, resolve_backend
from foldcut.runtime.probe import latency_probe
from torch import nn

WIDTH = 24
Compile = Callable[..., foldcut.Compiled]


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(torch.relu(self.wide(x)))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A network whose weights count as many gigabytes."""
    monkeypatch.setattr(model_file, "MAX_PROTOBUF_BYTES", 4000)
    monkeypatch.setattr(spilled, "MAPPED_BYTES", 4000)
    monkeypatch.setattr(onnx_file, "_LEAST_MAPPED_BYTES", 1024)
    return nn.Sequential(*map(Block, range(3)), nn.Linear(WIDTH, 5)).eval()


def samples(count: int = 60) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def compiled(counting_backend: Any) -> Compile:
    """Compiles with a backend that needs no time."""
    options = {"goal": foldcut.Blocks(1), "backend": counting_backend, "mimic": None, "cache": False, "progress": False}
    return lambda net, **more: foldcut.compile(net, samples(), **options | more)


def mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split(maxsplit=1)[0].partition("-")
        if int(first, 16) <= tensor.data_ptr() < int(last, 16):
            return "foldcut-weights-" in line
    return False


def ran(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("goal", [foldcut.Blocks(1), foldcut.Macs(0.8), foldcut.Latency(0.9)], ids=str)
def test_each_goal(large: nn.Module, tmp_path: Path, goal: foldcut.Goal, compiled: Compile) -> None:
    out = compiled(large, goal=goal)
    assert isinstance(out.onnx, model_file.OnnxFile)
    weights = sum(p.numel() * p.element_size() for p in out.module.parameters())
    assert out.report.file_bytes["after"] == out.onnx.size_bytes > weights
    folder = out.save(tmp_path / "out")
    assert {"model.onnx", "model.onnx.data", "model.pt2", "plan.json"} < {path.name for path in folder.iterdir()}
    torch.testing.assert_close(ran(folder / "model.onnx", samples()), out.module(samples()))
    again = foldcut.load(folder)
    assert torch.equal(again.module(samples()), out.module(samples()))
    assert (
        again.save(tmp_path / "again").joinpath("model.onnx.data").read_bytes()
        == (folder / "model.onnx.data").read_bytes()
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "torch", "openvino"])
def test_each_backend(large: nn.Module, backend: str, compiled: Compile) -> None:
    found = resolve_backend(backend)
    if not found.available().can_run:
        pytest.skip(found.available().reason)
    out = compiled(nn.Sequential(large[0], large[3]).eval(), goal=foldcut.Channels(0.5), backend=backend)
    assert isinstance(out.onnx, model_file.OnnxFile)
    assert out.report.onnx_difference < 1e-4
    assert out.report.latency["ratio"] > 0


def test_a_file_with_its_weights_beside_it_is_compiled_as_it_lies(
    large: nn.Module, tmp_path: Path, compiled: Compile
) -> None:
    """From a file to a folder: the same as from the module, and the user's folder is left alone."""
    source = save_onnx(foldcut.capture(large, samples(2)), tmp_path / "net" / "net.onnx", inline_bytes=1000)
    before = {path.name: path.read_bytes() for path in source[0].parent.iterdir()}
    program = foldcut.capture(source[0], samples(2))
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(source[1]) in maps.read_text()  # read where they are used
    torch.testing.assert_close(program(samples()), large(samples()))
    out, ours = (compiled(net, goal=foldcut.Latency(0.8)) for net in (source[0], large))
    assert [d.subject for d in out.plan.decisions] and len(out.plan.decisions) == len(ours.plan.decisions)
    torch.testing.assert_close(out.module(samples()), ours.module(samples()), rtol=1e-4, atol=1e-5)
    assert out.report.file_bytes["before"] == sum(map(len, before.values()))
    assert {path.name: path.read_bytes() for path in source[0].parent.iterdir()} == before


def test_weights_are_not_the_users_own(large: nn.Module) -> None:
    """Copied into a file: ties stay, training the module further changes nothing, and neither does the file's name."""
    large[1].wide.weight = large[0].wide.weight
    program = foldcut.capture(large, samples(2))
    expected = program(samples())
    torch.testing.assert_close(expected, large(samples()))
    tensors = dict(program.module.named_parameters())
    assert (
        program.parameter_count()
        == sum(p.numel() for p in large.parameters())
        == sum(t.numel() for t in {t.data_ptr(): t for t in tensors.values()}.values())
    )
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.zero_()
    assert torch.equal(program(samples()), expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what memory is")
def test_new_weights_are_in_files_too(large: nn.Module, compiled: Compile) -> None:
    """Those that a compile made: the same network as where they are in memory, bit for bit."""
    out = compiled(large, goal=foldcut.Channels(0.5))
    there = [parameter for parameter in out.module.parameters() if mapped(parameter)]
    assert sum(t.numel() for t in there) > 0.9 * sum(t.numel() for t in out.module.parameters())
    assert kept_in_a_file(out.program, out.program) is out.program


def test_no_room_on_disk_is_no_fault(large: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Any:
        raise CompilerError("no space left on the device")

    monkeypatch.setattr(spilled.Spilled, "written", full)
    torch.testing.assert_close(foldcut.capture(large, samples(2))(samples()), large(samples()))


def test_networks_of_which_memory_holds_one(
    large: nn.Module, counting_backend: Any, compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are loaded one at a time, and measured all the same."""
    together: list[int] = []
    open_runners: list[Any] = []

    class Watched(type(counting_backend)):  # type: ignore[misc]
        def load(self, engine: object, inputs: Any, *, threads: int = 1) -> Any:
            runner = super().load(engine, inputs, threads=threads)
            if isinstance(engine, model_file.OnnxFile):  # single segments are small
                open_runners.append(runner)
                together.append(len(open_runners))
                runner.close = lambda: open_runners.remove(runner)
            return runner

    monkeypatch.setattr(latency_probe, "available_bytes", lambda: 1000)
    out = compiled(large, goal=foldcut.Latency(0.8), backend=Watched())
    assert max(together) == 1 and len(together) > 3 and not open_runners
    # 1 ms and 10 for each of 7 layers: without a block 51 of 71
    assert out.report.latency["ratio"] == pytest.approx(51 / 71)
    together.clear()
    monkeypatch.setattr(latency_probe, "available_bytes", lambda: 1 << 40)
    same = compiled(large, goal=foldcut.Latency(0.8), backend=Watched())
    assert max(together) > 2 and not open_runners
    assert same.report.latency["ratio"] == pytest.approx(51 / 71)


def test_the_least_memory_counts_no_copies(large: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights in files one session's are in memory, or those that are being solved; in one message many copies."""
    program = foldcut.capture(large, samples(2))
    weights = sum(p.numel() * p.element_size() for p in large.parameters())
    in_files = least_bytes(program)
    monkeypatch.setattr(model_file, "MAX_PROTOBUF_BYTES", 2_000_000_000)
    assert in_files < least_bytes(program) and in_files < least_bytes(program, trained=True)
    assert in_files >= weights


def test_a_folder_that_was_damaged(large: nn.Module, tmp_path: Path, compiled: Compile) -> None:
    folder = compiled(large).save(tmp_path / "out")
    weights = bytearray((folder / "model.onnx.data").read_bytes())
    weights[100] ^= 1
    (folder / "model.onnx.data").write_bytes(weights)
    with pytest.raises(OutputError, match=r"model\.onnx is not the one"):
        foldcut.load(folder)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(OutputError):
        foldcut.load(folder)


def test_a_smaller_network_in_its_place(
    large: nn.Module, tmp_path: Path, compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(large).save(tmp_path / "out")
    monkeypatch.setattr(model_file, "MAX_PROTOBUF_BYTES", 2_000_000_000)
    out = compiled(large)
    folder = out.save(tmp_path / "out")
    assert isinstance(out.onnx, bytes) and not (folder / "model.onnx.data").exists()
    assert foldcut.load(folder).onnx == out.onnx


def test_files_that_are_measured_lie_where_they_are(large: nn.Module, tmp_path: Path) -> None:
    program = foldcut.capture(large, samples(2))
    paths = [save_onnx(program, tmp_path / name / "net.onnx", inline_bytes=1000)[0] for name in ("a", "b")]
    wish = MeasureWish(batch=1, threads=1, backend="onnxruntime", self_check=False, seed=0)
    assert 0.3 < measure_files(*paths, wish).measurement.ratio < 3


def test_an_executor_is_told(large: nn.Module, compiled: Compile) -> None:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1) as executor, pytest.raises(CompilerError, match="an executor is not handed"):
        compiled(large, goal=foldcut.Macs(0.7), executor=executor)


def test_a_proto_above_the_limit_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.ModelProto()

    def refused(_: object) -> bytes:
        raise ValueError("Message exceeds 2 GiB")

    monkeypatch.setattr(onnx.ModelProto, "SerializeToString", refused, raising=False)
    with pytest.raises(CaptureError, match="too large for one message") as caught:
        model_file.as_model(model)
    assert "external data" in str(caught.value.hint)


def test_a_model_in_another_process_reads_and_leaves_the_files(large: nn.Module, compiled: Compile) -> None:
    out = compiled(large)
    assert isinstance(out.onnx, model_file.OnnxFile)
    copy = pickle.loads(pickle.dumps(out.onnx))
    folder = out.onnx.path.parent
    assert copy.structure() == out.onnx.structure()
    del copy
    assert sorted(path.name for path in folder.iterdir())[:1] == ["model.onnx"]
    feeds: dict[str, Array] = {"input_1": samples(2).numpy().astype(np.float32)}
    backend: Backend = resolve_backend("onnxruntime")
    assert backend.load(backend.build(out.onnx, feeds), feeds).outputs()[0].shape == (2, 5)
