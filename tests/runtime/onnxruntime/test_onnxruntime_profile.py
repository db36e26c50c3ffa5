"""Times of single nodes, from ONNX Runtime's profiler."""

import numpy as np
import onnx
import onnx.parser
import pytest
from foldcut.compiler.support.errors import BackendError
from foldcut.runtime.measure.backend import ProfilingBackend
from foldcut.runtime.onnxruntime.backend import OnnxRuntimeBackend, OnnxRuntimeCudaBackend
from foldcut.runtime.onnxruntime.profile import _node_times
from foldcut.runtime.openvino.backend import OpenVinoBackend

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[n, 4] x) => (float[n, 4] y)
<float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}>
{
  product = MatMul(x, w)
  kept = Tanh(product)
  y = Softmax(kept)
}
"""


@pytest.fixture(scope="module")
def model() -> bytes:
    made = onnx.parser.parse_model(MODEL)
    for node in made.graph.node:
        node.name = f"node_{node.output[0]}"
    return bytes(made.SerializeToString())


def test_every_node_that_runs_is_timed(model: bytes) -> None:
    nodes = OnnxRuntimeBackend().profile(model, {"x": np.ones((3, 4), np.float32)})
    assert {"product", "kept", "y"} <= {name for node in nodes for name in node.names}
    assert {node.kind for node in nodes} >= {"MatMul", "Tanh", "Softmax"}
    assert all(0 <= node.ms < 1000 for node in nodes)
    order = [next(n for n in node.names if n in {"product", "kept", "y"}) for node in nodes]
    assert order == ["product", "kept", "y"]


def test_the_median_and_the_names() -> None:
    def event(name: str, us: float, cat: str = "Node") -> dict[str, object]:
        return {"cat": cat, "name": name, "dur": us, "args": {"op_name": "Conv"}}

    events = [
        event("model_run", 900, cat="Session"),
        event("a_nchwc_kernel_time", 10),
        event("a_nchwc_kernel_time", 12),
        event("a_nchwc_kernel_time", 500),
        event("a_nchwc_fence_before", 7),
    ]
    (node,) = _node_times(events, {"a_nchwc": ["reordered"]})
    assert node.ms == pytest.approx(0.012)
    assert node.names == ("reordered", "a", "a_nchwc")


def test_who_can_profile() -> None:
    assert isinstance(OnnxRuntimeBackend(), ProfilingBackend)
    assert not isinstance(OpenVinoBackend(), ProfilingBackend)


def test_what_cannot_be_profiled(model: bytes) -> None:
    inputs = {"x": np.ones((3, 4), np.float32)}
    with pytest.raises(BackendError, match="does not time single nodes"):
        OnnxRuntimeCudaBackend().profile(model, inputs)
    with pytest.raises(BackendError, match="gave no profile"):
        OnnxRuntimeBackend().profile(model, {})
    with pytest.raises(BackendError, match="refused the model"):
        OnnxRuntimeBackend().profile(b"nothing", inputs)
