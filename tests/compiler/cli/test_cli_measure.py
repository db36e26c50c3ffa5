"""`foldcut measure`: inputs of both files, verdicts and refusals, on a backend whose clock counts layers."""

import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from foldcut.compiler.cli import main as cli
from foldcut.compiler.cli import measure_files as cli_measure
from foldcut.compiler.data.calibration_set import read_calibration
from foldcut.compiler.support.errors import BackendError
from foldcut.runtime.measure.measure import Rounds
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from typer.testing import CliRunner

value = helper.make_tensor_value_info


def layers(
    count: int,
    shape: Sequence[int | str | None] | None = ("batch", 4),
    element: int = TensorProto.FLOAT,
    name: str = "x",
) -> onnx.ModelProto:
    """So many 4 x 4 matrix products in a row; the counting clock shows 1 ms and 10 ms more for each."""
    names = ["cast", *(f"v{i}" for i in range(1, count)), "out"] if count else ["out"]
    nodes = [helper.make_node("Cast", [name], [names[0]], to=TensorProto.FLOAT)]
    nodes += [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(names)]
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")]
    graph = helper.make_graph(
        nodes, "net", [value(name, element, shape)], [value("out", TensorProto.FLOAT, None)], weights
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["measure", *map(str, arguments)])


def found(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def failed(result: Any, *texts: str, code: int = 1) -> None:
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    flat = " ".join(result.stderr.split())
    for text in texts:
        assert text in flat


class WatchedBackend:
    """The counting backend with a log of what it built, loaded and closed."""

    def __init__(self, inner: Any, fail_at: int = 0) -> None:
        self.inner, self.fail_at = inner, fail_at
        self.inputs: list[dict[str, Any]] = []
        self.open = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def load(self, engine: Any, inputs: Any, *, threads: int = 1) -> Any:
        self.inputs.append(dict(inputs))
        if len(self.inputs) == self.fail_at:
            raise BackendError("no memory left", hint="take a smaller one")
        runner = self.inner.load(engine, inputs, threads=threads)
        self.open += 1
        runner.close = self.closed
        return runner

    def closed(self) -> None:
        self.open -= 1


@pytest.fixture
def backend(counting_backend: Any, monkeypatch: pytest.MonkeyPatch) -> WatchedBackend:
    watched = WatchedBackend(counting_backend)
    monkeypatch.setattr(cli_measure, "resolve_backend", lambda name: watched)
    return watched


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a slow and a fast network: 41 ms and 21 ms."""
    onnx.save(layers(4), tmp_path / "slow.onnx")
    onnx.save(layers(2), tmp_path / "fast.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("files")
def test_json_holds_ratio_interval_clock_and_environment(backend: WatchedBackend) -> None:
    data = found("slow.onnx", "fast.onnx", "--batch", 3, "--threads", 2)
    assert data["ratio"] == pytest.approx(21 / 41)
    assert data["low"] <= data["ratio"] <= data["high"]
    assert (data["clock"], data["pairs"], data["verdict"], data["contended"]) == ("cuda", 40, "faster", False)
    assert data["environment"] == {"backend": "counting", "threads": 2, "batch": 3}
    assert data["self_check"] is None
    assert (data["regime"], data["loads"], data["control"]) == ("hot", [pytest.approx(21 / 41)] * 5, 1)
    assert data["other_regime"] is None  # its clock is a device's, whose caches nobody empties
    assert "samples" not in data
    assert backend.inputs[0]["x"].shape == (3, 4)
    assert backend.open == 0


@pytest.mark.usefixtures("files", "backend")
def test_samples_and_self_check_on_request() -> None:
    data = found("fast.onnx", "slow.onnx", "--samples", "--self-check")
    assert data["samples"] == [[21.0, 41.0]] * 40
    assert data["verdict"] == "slower"
    assert data["self_check"]["ratio"] == 1
    assert data["self_check"]["environment"]["batch"] == 1


@pytest.mark.usefixtures("files", "backend")
def test_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run("slow.onnx", "fast.onnx", "--self-check", "-q").stdout.splitlines()
    assert lines == [
        "before 41.000 ms  after 21.000 ms  (cuda, 5 fresh loads, 40 pairs)",
        "ratio x0.512   95 %: 0.512 to 0.512   faster   (hot caches)",
        "self-check: before against itself x1.000   95 %: 1.000 to 1.000",
        "backend counting, threads 1, batch 1",
    ]
    assert "no difference that can be claimed" in run("slow.onnx", "slow.onnx").stdout
    monkeypatch.setattr("foldcut.runtime.measure.measure._CONTENDED_SPREAD", -1.0)
    assert "contended: something else used the machine" in run("slow.onnx", "fast.onnx").stdout


@pytest.mark.usefixtures("files", "backend")
def test_progress_is_on_stderr_and_can_be_left_out() -> None:
    shown = run("slow.onnx", "fast.onnx", "--self-check").stderr
    for stage in ("build", "measure before itself", "measure fresh loads"):
        assert stage in shown
    assert run("slow.onnx", "fast.onnx", "--quiet").stderr == ""
    assert run("slow.onnx", "fast.onnx", "--json").stderr == ""


@pytest.mark.parametrize(("arguments", "fail_at"), [((), 2), ((), 5), (("--self-check",), 2), (("--self-check",), 4)])
def test_what_was_loaded_is_freed_when_the_rest_fails(
    files: Path, backend: WatchedBackend, arguments: tuple[str, ...], fail_at: int
) -> None:
    backend.fail_at = fail_at
    failed(run("slow.onnx", "fast.onnx", *arguments), "backend: no memory left", "hint: take a smaller one")
    assert len(backend.inputs) == fail_at
    assert backend.open == 0


def test_an_interrupt_frees_everything(files: Path, backend: WatchedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_rounds: Any) -> None:
        assert backend.open == 3
        raise KeyboardInterrupt

    monkeypatch.setattr(Rounds, "time_round", interrupt)
    failed(run("slow.onnx", "fast.onnx"), "interrupted", code=130)
    assert backend.open == 0


def test_failed_self_check_ends_with_1(files: Path, backend: WatchedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    slower = iter([1.0, 1.5])
    load = backend.load

    def unequal(*arguments: Any, **options: Any) -> Any:
        runner = load(*arguments, **options)
        runner.time_ms *= next(slower)
        return runner

    monkeypatch.setattr(backend, "load", unequal)
    failed(run("slow.onnx", "fast.onnx", "--self-check"), "against itself does not come out equal")
    assert backend.open == 0


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        ({"name": "y"}, "actual: y: float[batch, 4]"),
        ({"element": TensorProto.DOUBLE}, "actual: x: double[batch, 4]"),
        ({"shape": ["batch", 2, 4]}, "actual: x: float[batch, 2, 4]"),
        ({"shape": [None, 8]}, "actual: x: float[?, 8]"),
    ],
)
def test_files_that_take_other_inputs(files: Path, backend: WatchedBackend, other: Any, shown: str) -> None:
    onnx.save(layers(2, **other), "other.onnx")
    failed(
        run("slow.onnx", "other.onnx"),
        "do not take the same inputs",
        "expected: x: float[batch, 4]",
        shown,
        "foldcut verify",
    )
    assert backend.inputs == []


@pytest.mark.parametrize(("shape", "batch"), [([2, 4], 2), (None, 1), (["n", 4], 1)])
def test_one_file_may_fix_what_the_other_leaves_open(
    files: Path, backend: WatchedBackend, shape: list[int | str | None] | None, batch: int
) -> None:
    onnx.save(layers(2, shape), "other.onnx")
    for pair in (("slow.onnx", "other.onnx"), ("other.onnx", "slow.onnx")):
        assert found(*pair)["environment"]["batch"] == batch
        assert backend.inputs[-1]["x"].shape == (batch, 4)


@pytest.mark.usefixtures("files", "backend")
def test_fixed_batch_cannot_be_changed() -> None:
    onnx.save(layers(2, [2, 4]), "two.onnx")
    assert found("two.onnx", "two.onnx", "--batch", 2)["environment"]["batch"] == 2
    for pair in (("two.onnx", "two.onnx"), ("slow.onnx", "two.onnx")):
        failed(
            run(*pair, "--batch", 3), "a model fixes its batch at 2", "expected: 2", "actual: 3", "leave --batch out"
        )
    failed(run("slow.onnx", "two.onnx", "--batch", 0), "the batch starts at 1")
    failed(run("slow.onnx", "two.onnx", "--threads", 0), "whole number from 1 up")


@pytest.mark.usefixtures("files")
def test_other_dynamic_dimensions_need_a_size(backend: WatchedBackend) -> None:
    onnx.save(layers(2, ["batch", "length", None, 4]), "wide.onnx")
    failed(
        run("wide.onnx", "wide.onnx"),
        "dimensions are dynamic and have no size: length, x.2",
        "give --dim length=N --dim x.2=N, or real inputs",
    )
    found("wide.onnx", "wide.onnx", "--dim", "length=5", "--dim", "x.2=3")
    assert backend.inputs[-1]["x"].shape == (1, 5, 3, 4)
    for text in ("length", "length=", "=3", "length=0", "length=a"):
        failed(run("wide.onnx", "wide.onnx", "--dim", text), f"--dim '{text}' is not a size", "NAME=N")


def drawn(path: str, **options: Any) -> Any:
    """The one sample that is taken where one is asked for."""
    return read_calibration(path, limit=1, **options).leaves[0].numpy()


@pytest.mark.usefixtures("files")
def test_real_inputs_repeat_up_to_the_batch(backend: WatchedBackend) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.save("rows.npy", rows)
    np.savez("rows.npz", x=rows)
    for data in ("rows.npy", "rows.npz"):
        found("slow.onnx", "fast.onnx", "--inputs", data, "--batch", 5)
        np.testing.assert_array_equal(backend.inputs[-1]["x"], rows[[0, 1, 2, 0, 1]])
    found("slow.onnx", "fast.onnx", "--inputs", "rows.npy")
    np.testing.assert_array_equal(backend.inputs[-1]["x"], drawn("rows.npy"))


@pytest.mark.usefixtures("files")
def test_real_inputs_are_read_as_told(backend: WatchedBackend) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.savez("two.npz", x=rows, y=rows)
    found("slow.onnx", "fast.onnx", "--inputs", "two.npz", "--key", "x")
    np.testing.assert_array_equal(backend.inputs[-1]["x"], drawn("two.npz", key="x"))
    failed(run("slow.onnx", "fast.onnx", "--inputs", "two.npz", "--key", "z"), "no entry 'z'", "expected: one of x, y")
    Path("images").mkdir()
    Image.new("RGB", (9, 5), (255, 0, 0)).save("images/red.png")
    Image.new("RGB", (3, 3), (0, 0, 255)).save("images/small.png")
    onnx.save(layers(2, ["batch", 3, 2, 4]), "image.onnx")
    options = ("--inputs", "images", "--size", "2,4", "--mean", "0.5,0,0", "--std", "0.5,1,1", "--batch", 2)
    found("image.onnx", "image.onnx", *options)
    assert backend.inputs[-1]["x"][:, :, 0, 0].tolist() == [[1, 0, 0], [-1, 0, 1]]
    failed(run("image.onnx", "image.onnx", "--inputs", "images", "--batch", 2), "differ in size", "give --size H,W")
    for option, value in (("--size", "2,4"), ("--mean", "0,0,0"), ("--key", "x")):
        failed(run("slow.onnx", "fast.onnx", option, value), f"{option}: there are no samples to read")


@pytest.mark.usefixtures("files", "quick_measurement")
def test_real_inputs_that_do_not_fit() -> None:
    np.save("wide.npy", np.zeros((3, 5), np.float32))
    np.save("double.npy", np.zeros((3, 4)))
    np.savez("two.npz", x=np.zeros((3, 4), np.float32), y=np.zeros((3, 4), np.float32))
    failed(run("slow.onnx", "fast.onnx", "--inputs", "wide.npy"), "wrong shape", "expected: ('batch', 4)")
    failed(run("slow.onnx", "fast.onnx", "--inputs", "double.npy"), "wrong dtype", "expected: float32")
    failed(run("slow.onnx", "fast.onnx", "--inputs", "two.npz"), "do not have the models' inputs", "actual: x, y")
    failed(run("slow.onnx", "fast.onnx", "--inputs", "none.npy"), "no such file or folder: none.npy")


@pytest.mark.usefixtures("files", "backend")
def test_files_that_cannot_be_read() -> None:
    Path("garbage.onnx").write_bytes(b"garbage")
    failed(run("none.onnx", "fast.onnx"), "cannot read none.onnx: No such file", "give the path of an ONNX file")
    failed(run("slow.onnx", "."), "cannot read .: Is a directory")
    failed(run("slow.onnx", "garbage.onnx"), "garbage.onnx: not an ONNX model")
    failed(run("garbage.onnx", "slow.onnx"), "garbage.onnx: not an ONNX model")
    onnx.save(layers(2), "apart.onnx", save_as_external_data=True, location="apart.data", size_threshold=0)
    Path("apart.data").unlink()
    failed(run("slow.onnx", "apart.onnx"), "apart.onnx: the weights of 'w' are missing", "put the file there")


@pytest.mark.usefixtures("files", "backend")
def test_weights_beside_the_file_are_read() -> None:
    onnx.save(layers(2), "apart.onnx", save_as_external_data=True, location="apart.data", size_threshold=0)
    assert Path("apart.data").exists()
    assert found("slow.onnx", "apart.onnx")["ratio"] == pytest.approx(21 / 41)
    Path("apart.data").unlink()
    failed(run("slow.onnx", "apart.onnx"), "missing")


@pytest.mark.usefixtures("files", "quick_measurement")
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_every_backend_here_measures(name: str) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    data = found("slow.onnx", "fast.onnx", "--backend", name, "--batch", 2)
    assert (data["regime"], data["other_regime"]["regime"]) == ("hot", "cold")
    cold = found("slow.onnx", "fast.onnx", "--backend", name, "--batch", 2, "--regime", "cold")
    assert (cold["regime"], cold["other_regime"]["regime"]) == ("cold", "hot")
    assert data["clock"] == "thread_cpu"
    assert data["environment"]["backend"] == name
    assert {"cpu", "load_1min", "threads", "batch"} <= set(data["environment"])


@pytest.mark.usefixtures("files", "backend")
def test_a_regime_that_the_backend_does_not_have() -> None:
    failed(run("slow.onnx", "fast.onnx", "--regime", "cold"), "'cold' is not there on this backend", "measure hot")
    assert run("slow.onnx", "fast.onnx", "--regime", "warm").exit_code == 2


@pytest.mark.usefixtures("files")
def test_backend_that_is_not_there_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    failed(run("slow.onnx", "fast.onnx", "--backend", "openvino"), "cannot build engines here", "pip install")
    failed(run("slow.onnx", "fast.onnx", "--backend", "abacus"), "no backend named 'abacus'", "openvino")
