"""The eager reference beside ONNX Runtime's runner, and its refusals."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.program import Program
from foldcut.compiler.support.errors import BackendError
from foldcut.runtime.measure.backend import Array, Runner, resolve_backend
from foldcut.runtime.onnxruntime.backend import OnnxRuntimeBackend, random_inputs
from foldcut.runtime.torch_eager.backend import TorchBackend, torch_threads
from onnx import TensorProto, helper, numpy_helper

BACKEND, REFERENCE = TorchBackend(), OnnxRuntimeBackend()
node, value = helper.make_node, helper.make_tensor_value_info


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str] = ("out",),
    element: int = TensorProto.FLOAT,
    **weights: Array,
) -> bytes:
    results = [value(name, element, None) for name in outputs]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(list(nodes), "net", list(inputs), results, tensors)
    made = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    return made.SerializeToString()


def same_as_onnxruntime(content: bytes, inputs: dict[str, Array], *, threads: int = 1) -> None:
    runner = BACKEND.load(BACKEND.build(content, inputs), inputs, threads=threads)
    reference = REFERENCE.load(content, inputs)
    runner.run()
    found, wanted = runner.outputs(), reference.outputs()
    assert [(a.shape, a.dtype) for a in found] == [(a.shape, a.dtype) for a in wanted]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def conv_net() -> bytes:
    generator = np.random.default_rng(0)
    return model(
        [
            node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
            node("Relu", ["c"], ["r"]),
            node("GlobalAveragePool", ["r"], ["out"]),
        ],
        [value("x", TensorProto.FLOAT, ["batch", 3, "height", 16])],
        w=generator.standard_normal((8, 3, 3, 3)).astype(np.float32),
        b=generator.standard_normal(8).astype(np.float32),
    )


@pytest.fixture(scope="module")
def fixed_net() -> bytes:
    """The file fixes the batch at 2."""
    weights = {"w": np.ones((4, 3), np.float32)}
    return model([node("MatMul", ["x", "w"], ["out"])], [value("x", TensorProto.FLOAT, [2, 4])], **weights)


@pytest.mark.parametrize(("threads", "clock"), [(1, "thread_cpu"), (2, "wall")])
def test_outputs_and_clock(conv_net: bytes, threads: int, clock: str) -> None:
    inputs = random_inputs(conv_net, batch=3, sizes={"height": 16})
    same_as_onnxruntime(conv_net, inputs, threads=threads)
    runner = BACKEND.load(BACKEND.build(conv_net, inputs), inputs, threads=threads)
    assert isinstance(runner, Runner)
    assert runner.clock == clock


def test_networks_of_the_compiler(residual: Program, transformer: Program) -> None:
    for program in (residual, transformer):
        content = to_onnx(program)
        same_as_onnxruntime(content, random_inputs(content, batch=2))


def test_one_engine_serves_every_dynamic_size(conv_net: bytes) -> None:
    engine = BACKEND.build(conv_net, random_inputs(conv_net, sizes={"height": 16}))
    for batch, height in ((1, 8), (3, 16)):
        inputs = random_inputs(conv_net, batch=batch, sizes={"height": height})
        wanted = REFERENCE.load(conv_net, inputs).outputs()[0]
        np.testing.assert_allclose(BACKEND.load(engine, inputs).outputs()[0], wanted, rtol=1e-4, atol=1e-5)


def test_runner_keeps_its_own_inputs_and_gives_copies_of_outputs(conv_net: bytes) -> None:
    inputs = random_inputs(conv_net, sizes={"height": 16})
    runner = BACKEND.load(BACKEND.build(conv_net, inputs), inputs)
    (expected,) = runner.outputs()
    inputs["x"][:] = 0
    runner.outputs()[0][:] = 7
    np.testing.assert_array_equal(runner.outputs()[0], expected)
    runner.run()
    np.testing.assert_array_equal(runner.outputs()[0], expected)
    assert expected.any()


def test_several_inputs_and_outputs_in_the_files_order() -> None:
    content = model(
        [
            node("Add", ["a", "b"], ["sum"]),
            node("ReduceSum", ["sum"], ["total"], keepdims=0),
            node("Neg", ["a"], ["minus"]),
        ],
        [value("b", TensorProto.FLOAT, ["n", 3]), value("a", TensorProto.FLOAT, ["n", 3])],
        outputs=("minus", "total", "sum"),
    )
    generator = np.random.default_rng(0)
    same_as_onnxruntime(content, {n: generator.standard_normal((2, 3)).astype(np.float32) for n in "ab"})


def test_input_that_nothing_reads_is_still_one() -> None:
    inputs = [value("idle", TensorProto.INT64, ["n", 2]), value("x", TensorProto.FLOAT, ["n"])]
    content = model([node("Neg", ["x"], ["out"])], inputs)
    x = np.ones(3, np.float32)
    same_as_onnxruntime(content, {"x": x, "idle": np.zeros((3, 2), np.int64)})
    with pytest.raises(BackendError, match="names"):
        BACKEND.build(content, {"x": x})


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int64, np.uint8, np.bool_])
def test_dtypes(dtype: Any) -> None:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    content = model([node("Transpose", ["x"], ["out"])], [value("x", element, ["n", 2])], element=element)
    same_as_onnxruntime(content, {"x": np.array([[0, 1], [1, 1]], dtype)})


def test_operator_outside_the_table_runs_too() -> None:
    content = model(
        [node("TopK", ["x", "k"], ["out", "index"])],
        [value("x", TensorProto.FLOAT, ["n", 5])],
        k=np.array([2], np.int64),
    )
    same_as_onnxruntime(content, random_inputs(content, batch=3))


def test_batch_that_the_file_fixes_stays_fixed(fixed_net: bytes) -> None:
    same_as_onnxruntime(fixed_net, random_inputs(fixed_net))
    engine = BACKEND.build(fixed_net)
    with pytest.raises(BackendError, match="wrong shape"):
        BACKEND.load(engine, {"x": np.zeros((4, 4), np.float32)})


def test_size_that_importing_fixes_is_fixed_in_the_engine() -> None:
    """The file says "n"; its weights take 6 only."""
    inputs = [value("x", TensorProto.FLOAT, ["batch", "n"])]
    content = model([node("MatMul", ["x", "w"], ["out"])], inputs, w=np.ones((6, 3), np.float32))
    engine = BACKEND.build(content, {"x": np.zeros((2, 6), np.float32)})
    assert engine.specs[0].shape[1] == 6
    with pytest.raises(BackendError, match="wrong shape"):
        BACKEND.load(engine, {"x": np.zeros((2, 12), np.float32)})


def test_threads_are_given_back(conv_net: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    inputs = random_inputs(conv_net, sizes={"height": 16})
    runner: Any = BACKEND.load(BACKEND.build(conv_net, inputs), inputs, threads=before + 2)

    def module(*arguments: torch.Tensor) -> None:
        seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner, "_module", module)
    with pytest.raises(BackendError, match="torch could not run the model: out of memory"):
        runner.run()
    assert seen == [(before + 2, True)]
    assert torch.get_num_threads() == before
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_closed_runner(conv_net: bytes) -> None:
    inputs = random_inputs(conv_net, sizes={"height": 16})
    runner = BACKEND.load(BACKEND.build(conv_net, inputs), inputs)
    runner.close()
    runner.close()
    for call in (runner.run, runner.outputs):
        with pytest.raises(BackendError, match="closed"):
            call()


def test_import_says_nothing_of_compiling(fixed_net: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BACKEND.build(fixed_net)
    assert capfd.readouterr() == ("", "")


def test_model_that_cannot_be_imported() -> None:
    content = model([node("RandomNormalLike", ["x"], ["out"])], [value("x", TensorProto.FLOAT, ["n"])])
    with pytest.raises(BackendError, match=r"torch cannot run the model: .*RandomNormalLike") as caught:
        BACKEND.build(content)
    assert caught.value.hint


def test_dimension_without_a_size_needs_inputs(conv_net: bytes) -> None:
    with pytest.raises(BackendError, match="'x' is dynamic and no size is known"):
        BACKEND.build(conv_net)


@pytest.mark.parametrize("content", [b"not a model", b""])
def test_bytes_that_are_no_model(content: bytes) -> None:
    with pytest.raises(BackendError, match="not an ONNX model"):
        BACKEND.build(content)


def test_model_that_is_not_bytes() -> None:
    with pytest.raises(BackendError, match="torch backend builds from the bytes of an ONNX file"):
        BACKEND.build("net.onnx")  # type: ignore[arg-type]


def test_engine_of_another_backend(conv_net: bytes) -> None:
    with pytest.raises(BackendError, match=r"what TorchBackend\.build returned"):
        BACKEND.load(conv_net, {})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "names"),
        ({"y": np.zeros((2, 4), np.float32)}, "names"),
        ({"x": np.zeros((2, 4), np.float64)}, "dtype"),
        ({"x": np.zeros((2, 5), np.float32)}, "shape"),
        ({"x": np.zeros(4, np.float32)}, "shape"),
        ({"x": [[1.0]]}, "numpy array"),
    ],
)
def test_inputs_that_do_not_fit(fixed_net: bytes, inputs: dict[str, Array], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        BACKEND.load(BACKEND.build(fixed_net), inputs)
    with pytest.raises(BackendError, match=message):
        BACKEND.build(fixed_net, inputs)


def test_output_of_a_type_that_numpy_does_not_have(fixed_net: bytes) -> None:
    runner: Any = BACKEND.load(BACKEND.build(fixed_net), random_inputs(fixed_net))
    runner._values = (torch.zeros(2, dtype=torch.bfloat16),)
    with pytest.raises(BackendError, match="type that numpy does not have"):
        runner.outputs()


def test_number_of_threads_is_checked(fixed_net: bytes) -> None:
    with pytest.raises(BackendError, match="whole number"):
        BACKEND.load(BACKEND.build(fixed_net), random_inputs(fixed_net), threads=0)


@pytest.mark.parametrize("package", ["onnx_graphsurgeon", "onnxruntime"])
def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match="cannot build engines here") as caught:
        resolve_backend("torch")
    assert "pip install torch onnx onnx-graphsurgeon onnxruntime" in str(caught.value.hint)


def test_available_here_and_environment() -> None:
    assert resolve_backend("torch").name == "torch"
    environment = BACKEND.environment()
    assert environment["torch"] == torch.__version__
    assert {"backend", "cpu", "cpus_available", "load_1min"} <= set(environment)
    assert all(type(entry) in (str, int) for entry in environment.values())
