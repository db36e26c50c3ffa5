"""Engines built by the TensorRT that is installed, on a machine that needs no GPU for it; and what it refuses."""

import os
import signal
import threading
import time
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from foldcut.compiler.support.errors import BackendError
from foldcut.runtime.measure.backend import Array, Backend, resolve_backend
from foldcut.runtime.tensorrt import build as tensorrt_build
from foldcut.runtime.tensorrt.backend import Profile, TensorRTBackend, TensorRTEngine
from foldcut.runtime.tensorrt.build import target_names
from foldcut.runtime.tensorrt.library import RTX, find_library
from onnx import TensorProto, helper, numpy_helper


def builds_here() -> bool:
    return TensorRTBackend().available().can_build


def is_rtx() -> bool:
    return builds_here() and find_library().flavour == RTX


pytestmark = pytest.mark.skipif(not builds_here(), reason=TensorRTBackend().available().reason)
rtx_only = pytest.mark.skipif(not is_rtx(), reason="full TensorRT builds for its own GPU only")


def serialise(
    nodes: Sequence[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], *, opset: int = 18, **weights: Array
) -> bytes:
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(list(nodes), "net", inputs, [output], initializers)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)])
    return model.SerializeToString()


def conv_net(shape: Sequence[int | str], *, width: int = 8) -> bytes:
    generator = np.random.default_rng(0)
    return serialise(
        [
            helper.make_node("Conv", ["x", "w1"], ["c1"], name="first", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c1"], ["r1"], name="relu"),
            helper.make_node("Conv", ["r1", "w2"], ["out"], name="last"),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        w1=generator.standard_normal((width, 3, 3, 3)).astype(np.float32),
        w2=generator.standard_normal((4, width, 1, 1)).astype(np.float32),
    )


def one_node(operator: str, shape: list[int | str] | None, element: int = TensorProto.FLOAT) -> bytes:
    node = helper.make_node(operator, ["x"], ["out"], name="the_node")
    return serialise([node], [helper.make_tensor_value_info("x", element, shape)])


def image(*shape: int) -> dict[str, Array]:
    return {"x": np.zeros(shape, np.float32)}


def test_it_is_a_backend_that_is_found_by_name() -> None:
    assert isinstance(TensorRTBackend(), Backend)
    assert isinstance(resolve_backend("tensorrt", to_run=False), TensorRTBackend)


def test_fixed_shapes_need_no_inputs() -> None:
    engine = TensorRTBackend().build(conv_net((2, 3, 16, 16)))
    assert isinstance(engine, TensorRTEngine)
    assert len(engine.plan) > 1000
    assert engine.info.profiles == {}
    assert [(t.name, t.dtype, t.shape) for t in engine.info.inputs] == [("x", "float32", (2, 3, 16, 16))]
    assert [(t.name, t.shape) for t in engine.info.outputs] == [("out", (2, 4, 16, 16))]
    assert (engine.info.version, engine.info.precision) == (find_library().version, "fp32")
    assert engine.info.network_layers >= 3


def test_a_dynamic_input_is_built_for_the_sizes_of_the_inputs() -> None:
    engine = TensorRTBackend().build(conv_net(("n", 3, "h", 16)), image(5, 3, 32, 16))
    assert engine.info.profiles == {"x": Profile.fixed((5, 3, 32, 16))}
    assert engine.info.inputs[0].shape == (-1, 3, -1, 16)


def test_a_profile_goes_before_the_inputs() -> None:
    profile = Profile(min=(1, 3, 16, 16), opt=(4, 3, 16, 16), max=(8, 3, 16, 16))
    engine = TensorRTBackend(profiles={"x": profile}).build(conv_net(("n", 3, 16, 16)), image(2, 3, 16, 16))
    assert engine.info.profiles == {"x": profile}


def test_a_dynamic_input_without_sizes_is_named() -> None:
    with pytest.raises(BackendError, match=r"input 'x' has dynamic dimensions \(0, 2\) and no profile") as caught:
        TensorRTBackend().build(conv_net(("n", 3, "h", 16)))
    assert "profiles={'x'" in str(caught.value)


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ({"y": Profile.fixed((1, 3, 16, 16))}, "'y', which is no input"),
        ({"x": Profile.fixed((1, 4, 16, 16))}, "contradicts"),
        ({"x": Profile.fixed((1, 3, 16))}, "contradicts"),
    ],
)
def test_profiles_that_do_not_fit_the_model(profiles: dict[str, Profile], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        TensorRTBackend(profiles=profiles).build(conv_net(("n", 3, 16, 16)))


def test_inputs_of_another_rank() -> None:
    with pytest.raises(BackendError, match="rank"):
        TensorRTBackend().build(conv_net(("n", 3, 16, 16)), image(3, 16, 16))
    with pytest.raises(BackendError, match="rank"):
        TensorRTBackend().build(one_node("Relu", None), image(2, 2))


def test_an_unknown_operator_is_reported_with_its_node(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match="cannot parse") as caught:
        TensorRTBackend().build(one_node("NoSuchOperator", [1, 4]))
    assert caught.value.node == "the_node (NoSuchOperator)"
    assert capfd.readouterr() == ("", "")


def test_bytes_that_are_no_model(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match="Failed to parse the ONNX model"):
        TensorRTBackend().build(b"not a model")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("model", ["net.onnx", None, 3])
def test_something_else_than_bytes(model: object) -> None:
    with pytest.raises(BackendError, match="bytes of an ONNX file"):
        TensorRTBackend().build(model)  # type: ignore[arg-type]


def test_an_input_that_is_a_shape_is_refused() -> None:
    with pytest.raises(BackendError, match="is a shape that the model computes with"):
        TensorRTBackend().build(one_node("ConstantOfShape", [2], TensorProto.INT64))


def test_a_model_above_2_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_build, "_MAX_PROTOBUF", 1000)
    with pytest.raises(BackendError, match="GB"):
        TensorRTBackend().build(conv_net((1, 3, 16, 16)))


def test_weights_beside_the_file_cannot_be_found_from_bytes() -> None:
    model = onnx.load_from_string(conv_net((1, 3, 16, 16)))
    for weight in model.graph.initializer:
        onnx.external_data_helper.set_external_data(weight, "net.data")
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
    with pytest.raises(BackendError, match="cannot parse"):
        TensorRTBackend().build(model.SerializeToString())


@rtx_only
def test_devices_to_build_for() -> None:
    model = conv_net((1, 3, 16, 16))
    assert TensorRTBackend().build(model).info.targets == ("sm80+",)
    assert TensorRTBackend(device="SM89").build(model).info.targets == ("sm89",)
    assert TensorRTBackend(device=["sm86", "sm89", "sm86"]).build(model).info.targets == ("sm86", "sm89")


@rtx_only
def test_a_device_that_the_library_does_not_know() -> None:
    with pytest.raises(BackendError, match="cannot build for 'sm12345'") as caught:
        TensorRTBackend(device="sm12345").build(conv_net((1, 3, 16, 16)))
    assert "sm89" in str(caught.value.expected)
    assert "sm89" in target_names(find_library())


@rtx_only
def test_what_the_builder_refuses_is_one_error_with_its_reason(capfd: pytest.CaptureFixture[str]) -> None:
    """TensorRT-RTX has no float32 matrix products for Turing."""
    node = helper.make_node("MatMul", ["x", "w"], ["out"], name="product")
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 64])
    model = serialise([node], [shape], w=np.ones((64, 64), np.float32))
    with pytest.raises(BackendError, match=r"cannot build the model: .*SM75") as caught:
        TensorRTBackend(device="sm75").build(model)
    assert caught.value.node == "product"
    assert capfd.readouterr() == ("", "")


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(BackendError, match="precision"):
        TensorRTBackend(precision="int8")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="optimization level"):
        TensorRTBackend(optimization_level=6)


def test_workspace_and_optimization_level_are_taken() -> None:
    backend = TensorRTBackend(workspace_bytes=1 << 26, optimization_level=1)
    assert backend.build(conv_net((1, 3, 16, 16))).plan


def test_half_precision_stores_smaller_weights() -> None:
    model, images = conv_net(("n", 3, 16, 16), width=4096), {"x": np.ones((1, 3, 16, 16), np.float32)}
    weight_bytes = 4 * 4096 * (27 + 4)
    single = TensorRTBackend().build(model, images)
    half = TensorRTBackend(precision="fp16").build(model, images)
    assert len(single.plan) - len(half.plan) > 0.25 * weight_bytes  # half of them, less what casts cost
    assert half.info.model_sha256 == single.info.model_sha256
    assert (half.info.precision, half.info.inputs) == ("fp16", single.info.inputs)
    assert 0 < half.info.half_error < 0.01


def test_half_precision_needs_samples() -> None:
    with pytest.raises(BackendError, match="needs sample inputs"):
        TensorRTBackend(precision="fp16").build(conv_net((1, 3, 16, 16)))


def test_samples_guide_half_precision_where_the_inputs_would_not() -> None:
    model = conv_net(("n", 3, 16, 16))
    loud = {"x": np.full((1, 3, 16, 16), 1e5, np.float32)}
    backend = TensorRTBackend(precision="fp16", samples=loud)
    assert backend.build(model, image(1, 3, 16, 16)).info.float32_operators == 3


@pytest.mark.skipif(os.name != "posix", reason="signals are sent to the process itself")
def test_ctrl_c_ends_a_build_and_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    """TensorRT swallows what its callbacks raise, so the interrupt must wait for the end."""
    nodes = [helper.make_node("MatMul", [f"v{i}", "w"], [f"v{i + 1}"], name=f"n{i}") for i in range(300)]
    nodes += [helper.make_node("Relu", ["v300"], ["out"])]
    shape = helper.make_tensor_value_info("v0", TensorProto.FLOAT, [8, 64])
    model = serialise(nodes, [shape], w=np.eye(64, dtype=np.float32))
    building = threading.Event()
    given = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal

    def press() -> None:
        building.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    with pytest.MonkeyPatch.context() as patch:
        original = tensorrt_build._monitor
        patch.setattr(tensorrt_build, "_monitor", lambda *a: (building.set(), original(*a))[1])
        thread.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                TensorRTBackend().build(model)
                time.sleep(5)  # in case that the signal comes late
            thread.join()
            assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, given)
    assert capfd.readouterr().err == ""


def test_builds_in_several_threads_do_not_mix_their_errors() -> None:
    models = {"good": conv_net((1, 3, 16, 16)), "bad": one_node("NoSuchOperator", [1])}
    results: dict[str, object] = {}

    def build(name: str) -> None:
        try:
            results[name] = TensorRTBackend().build(models[name])
        except BackendError as error:
            results[name] = error

    threads = [threading.Thread(target=build, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(results["good"], TensorRTEngine)
    assert isinstance(results["bad"], BackendError)
