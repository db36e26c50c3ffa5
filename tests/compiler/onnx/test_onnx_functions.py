"""Functions of a model's own: counted before they are inlined, and their tensors checked as all others."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from foldcut.compiler.onnx import functions as onnx_functions
from foldcut.compiler.onnx.file import read_onnx
from foldcut.compiler.onnx.model_file import OnnxFile, as_model
from foldcut.compiler.onnx_import.importer import import_onnx
from foldcut.compiler.support.errors import BackendError, CaptureError
from foldcut.runtime.measure.inputs import model_specs
from onnx import helper, numpy_helper

FLOAT = onnx.TensorProto.FLOAT


def function(name: str, nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    return helper.make_function("my", name, ["a"], ["b"], nodes, opsets)


def calling(functions: list[onnx.FunctionProto], called: str) -> onnx.ModelProto:
    value = [helper.make_tensor_value_info(name, FLOAT, ["n", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node(called, ["x"], ["y"], domain="my")], "net", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8)


def twice(called: str) -> list[onnx.NodeProto]:
    return [helper.make_node(called, ["a"], ["h"], domain="my"), helper.make_node(called, ["h"], ["b"], domain="my")]


def tower(height: int) -> onnx.ModelProto:
    """Each function calls the one below it twice."""
    floors = [function("f0", [helper.make_node("Relu", ["a"], ["b"])])]
    floors += [function(f"f{i}", twice(f"f{i - 1}")) for i in range(1, height)]
    return calling(floors[::-1], f"f{height - 1}")


def test_functions_that_double_at_every_level_are_refused() -> None:
    with pytest.raises(CaptureError, match="so often") as caught:
        read_onnx(tower(40).SerializeToString())
    assert str(2**39) in str(caught.value)


def test_functions_within_the_bound_are_inlined() -> None:
    model = tower(6)
    assert len(read_onnx(model.SerializeToString()).graph.node) == 32
    x = torch.randn(3, 4)
    assert torch.equal(import_onnx(model)(x), x.relu())


def test_calls_within_branches_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    value = onnx.ValueInfoProto(name="r")
    branch = helper.make_graph([helper.make_node("f4", ["a"], ["r"], domain="my")], "g", [], [value])
    choice = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["c"], ["b"], then_branch=branch, else_branch=branch),
    ]
    model = calling([*tower(5).functions, function("top", choice)], "top")
    monkeypatch.setattr(onnx_functions, "MOST_NODES", 2 * 16 + 2)
    onnx_functions.check_functions(model)
    monkeypatch.setattr(onnx_functions, "MOST_NODES", 2 * 16 + 1)
    with pytest.raises(CaptureError, match="34 nodes"):
        onnx_functions.check_functions(model)


def test_large_constants_are_counted_as_often_as_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(np.zeros(4000, np.float32)))
    floors = [function("f0", [weight, helper.make_node("Relu", ["a"], ["b"])])]
    floors += [function(f"f{i}", twice(f"f{i - 1}")) for i in range(1, 8)]
    monkeypatch.setattr(onnx_functions, "MOST_BYTES", 1_000_000)
    with pytest.raises(CaptureError, match="bytes"):
        read_onnx(calling(floors, "f7").SerializeToString())


@pytest.mark.parametrize("ring", [1, 2, 5])
def test_functions_that_call_each_other_in_a_circle_are_refused(ring: int) -> None:
    floors = [
        function(f"f{i}", [helper.make_node(f"f{(i + 1) % ring}", ["a"], ["b"], domain="my")]) for i in range(ring)
    ]
    with pytest.raises(CaptureError, match="circle"):
        read_onnx(calling(floors, "f0").SerializeToString())


def test_a_long_chain_of_functions_is_refused() -> None:
    floors = [function("f0", [helper.make_node("Relu", ["a"], ["b"])])]
    floors += [function(f"f{i}", [helper.make_node(f"f{i - 1}", ["a"], ["b"], domain="my")]) for i in range(1, 5000)]
    with pytest.raises(CaptureError, match="nest too deep"):
        read_onnx(calling(floors[::-1], "f4999").SerializeToString())


def test_two_functions_of_one_name_are_refused() -> None:
    model = calling([function("f", [helper.make_node("Relu", ["a"], ["b"])])] * 2, "f")
    with pytest.raises(CaptureError, match=r"one name|checker"):
        read_onnx(model.SerializeToString())


def constant(array: np.ndarray, location: str | None = None) -> onnx.TensorProto:  # type: ignore[type-arg]
    tensor = numpy_helper.from_array(array, "w")
    if location is not None:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    return tensor


def in_a_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["a", "w"], ["b"])]
    return calling([function("f", nodes)], "f")


def in_a_branch_of_a_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["a", "w"], ["r"])]
    branch = helper.make_graph(nodes, "g", [], [onnx.ValueInfoProto(name="r")])
    choice = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["c"], ["b"], then_branch=branch, else_branch=branch),
    ]
    return calling([function("f", choice)], "f")


def in_a_default_of_a_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["w"])
    node.attribute.append(onnx.AttributeProto(name="value", ref_attr_name="k", type=onnx.AttributeProto.TENSOR))
    made = function("f", [node, helper.make_node("Add", ["a", "w"], ["b"])])
    made.attribute_proto.append(helper.make_attribute("k", tensor))
    model = calling([made], "f")
    model.ir_version = 9
    return model


PLACES = [in_a_function, in_a_branch_of_a_function, in_a_default_of_a_function]


@pytest.mark.parametrize("place", PLACES)
def test_tensors_of_functions_are_read_beside_the_file_only(
    place: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = np.arange(4, dtype=np.float32)
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    for number, where in enumerate((folder, elsewhere)):
        where.mkdir()
        (where / "w.bin").write_bytes((weight + 100 * number).tobytes())
    (tmp_path / "secret.bin").write_bytes(weight.tobytes())
    monkeypatch.chdir(elsewhere)  # what lies here is not meant
    path = folder / "net.onnx"
    path.write_bytes(place(constant(weight, "w.bin")).SerializeToString())  # type: ignore[operator]
    assert (weight + 100).tobytes() not in read_onnx(path).SerializeToString()
    if place is not in_a_default_of_a_function:  # inlining drops them
        x = torch.randn(3, 4)
        assert torch.equal(import_onnx(path)(x), x + torch.tensor(weight))
    assert isinstance(as_model(path), OnnxFile)
    with pytest.raises(CaptureError, match="outside the model"):
        read_onnx(path.read_bytes())
    with pytest.raises(BackendError, match="outside the model"):
        model_specs(path.read_bytes())
    path.write_bytes(place(constant(weight, "../secret.bin")).SerializeToString())  # type: ignore[operator]
    for reader in (read_onnx, as_model):
        with pytest.raises(CaptureError, match="outside the model's folder"):
            reader(path)


@pytest.mark.parametrize("place", PLACES)
def test_tensors_of_functions_hold_what_their_shape_says(place: object) -> None:
    tensor = constant(np.zeros(4, np.float32))
    tensor.dims[0] = 1 << 40
    with pytest.raises(CaptureError, match="does not fit its shape"):
        read_onnx(place(tensor).SerializeToString())  # type: ignore[operator]


def test_sparse_tensors_are_refused_wherever_they_are() -> None:
    values = helper.make_tensor("v", FLOAT, [1], [1.0])
    sparse = helper.make_sparse_tensor(values, helper.make_tensor("i", onnx.TensorProto.INT64, [1], [0]), [1 << 40])
    nodes = [helper.make_node("Constant", [], ["w"], sparse_value=sparse), helper.make_node("Add", ["a", "w"], ["b"])]
    with pytest.raises(CaptureError, match="sparse"):
        read_onnx(calling([function("f", nodes)], "f").SerializeToString())
    plain = calling([function("f", [helper.make_node("Relu", ["a"], ["b"])])], "f")
    plain.graph.node.append(helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    with pytest.raises(CaptureError, match="sparse"):
        read_onnx(plain.SerializeToString())
