"""ONNX and .pt2: the same function, the same names, a dynamic batch."""

import gc
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.export import exporter as export
from foldcut.compiler.export import registry as onnx_registry
from foldcut.compiler.export.exporter import to_exported, to_onnx, to_pt2
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit import bypass
from foldcut.compiler.ir.graph_copy import copied
from foldcut.compiler.ir.program import Program
from foldcut.compiler.onnx import model_file
from foldcut.compiler.onnx.bypass import onnx_without
from foldcut.compiler.support.errors import ExportError
from torch import nn


def run(model: bytes, **inputs: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


class Named(nn.Module):
    """Two inputs of different dtypes, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(10, 4), nn.Linear(3, 4)

    def forward(self, ids: torch.Tensor, extra: torch.Tensor) -> dict[str, torch.Tensor]:
        joined = self.table(ids).mean(1) + self.linear(extra)
        return {"joined": joined, "score": joined.sum(1)}


@pytest.fixture(scope="module")
def residual_onnx(residual: Program) -> bytes:
    return to_onnx(residual)


@pytest.fixture(scope="module")
def transformer_onnx(transformer: Program) -> bytes:
    return to_onnx(transformer)


@pytest.fixture(scope="module")
def named() -> Program:
    batch = {"ids": torch.zeros(2, 5, dtype=torch.long), "extra": torch.zeros(2, 3)}
    return capture(Named().eval(), batch)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnx_computes_what_torch_computes(
    residual: Program, residual_onnx: bytes, nets: SimpleNamespace, count: int
) -> None:
    x = nets.images(count, seed=count)
    np.testing.assert_allclose(run(residual_onnx, x=x)[0], residual(x).numpy(), rtol=1e-4, atol=1e-5)


def test_onnx_keeps_names_and_dynamic_dims(residual_onnx: bytes) -> None:
    graph = onnx.load_model_from_string(residual_onnx).graph
    assert [(v.name, dims(v)) for v in graph.input] == [("x", ["batch", 3, 8, 8])]
    assert [(v.name, dims(v)) for v in graph.output] == [("output", ["batch", 4])]


def test_onnx_of_a_transformer_at_another_batch(
    transformer: Program, transformer_onnx: bytes, nets: SimpleNamespace
) -> None:
    x = nets.tokens(5)
    np.testing.assert_allclose(run(transformer_onnx, x=x)[0], transformer(x).numpy(), rtol=1e-4, atol=1e-5)


def test_several_inputs_and_outputs(named: Program) -> None:
    model = to_onnx(named)
    graph = onnx.load_model_from_string(model).graph
    assert [(v.name, dims(v)) for v in graph.input] == [("ids", ["batch", 5]), ("extra", ["batch", 3])]
    assert [(v.name, dims(v)) for v in graph.output] == [("joined", ["batch", 4]), ("score", ["batch"])]
    batch = {"ids": torch.randint(0, 10, (3, 5)), "extra": torch.randn(3, 3)}
    joined, score = run(model, **batch)
    wanted = named(batch)
    np.testing.assert_allclose(joined, wanted["joined"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(score, wanted["score"], rtol=1e-5, atol=1e-6)


def test_the_opset_can_be_chosen(named: Program) -> None:
    versions = {i.domain: i.version for i in onnx.load_model_from_string(to_onnx(named, opset=20)).opset_import}
    assert versions[""] == 20


def test_pt2_round_trip(residual: Program, nets: SimpleNamespace) -> None:
    loaded = torch.export.load(BytesIO(to_pt2(to_exported(residual))))
    x = nets.images(5)
    assert torch.equal(loaded.module()(x), residual(x))
    again = capture(loaded)
    assert again.text() == residual.text()
    assert again.fingerprint == residual.fingerprint
    assert again.inputs == residual.inputs


def test_pt2_of_a_dict_of_inputs(named: Program) -> None:
    loaded = torch.export.load(BytesIO(to_pt2(to_exported(named))))
    batch = {"ids": torch.randint(0, 10, (7, 5)), "extra": torch.randn(7, 3)}
    result, wanted = loaded.module()(**batch), named(batch)
    assert torch.equal(result["score"], wanted["score"])


def test_a_bypassed_program_exports(residual: Program, nets: SimpleNamespace) -> None:
    shorter = bypass(residual, "relu", "relu_2")
    x = nets.images(3)
    np.testing.assert_allclose(run(to_onnx(shorter), x=x)[0], shorter(x).numpy(), rtol=1e-4, atol=1e-5)


def test_models_above_protobufs_limit_have_their_weights_beside_them(
    residual: Program, nets: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = to_onnx(residual)
    monkeypatch.setattr(model_file, "MAX_PROTOBUF_BYTES", 1000)
    model = to_onnx(residual)
    assert isinstance(model, model_file.OnnxFile)
    folder, x = model.path.parent, nets.images(3)
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data"]
    session = onnxruntime.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], run(whole, x=x)[0])
    del session, model
    gc.collect()
    assert not folder.exists()


def test_what_onnx_cannot_express_is_refused_with_the_cause() -> None:
    class Exotic(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError, match=r"torch\.onnx cannot express") as caught:
        to_onnx(capture(Exotic().eval(), torch.randn(2, 3)))
    assert caught.value.__cause__ is not None


def test_cutting_a_region_out_of_the_file_equals_exporting_the_bypass(
    residual: Program, residual_onnx: bytes, nets: SimpleNamespace
) -> None:
    x = nets.images(3)
    cut = 0
    for region in find_regions(residual).regions:
        model = onnx_without(residual_onnx, [(region.entry, region.exit)])
        if model is None:
            continue
        cut += 1
        wanted = bypass(residual, region.entry, region.exit)(x).numpy()
        np.testing.assert_allclose(run(model, x=x)[0], wanted, rtol=1e-4, atol=1e-5, err_msg=region.name)
        graph = onnx.load_model_from_string(model).graph
        assert [v.name for v in graph.output] == ["output"]
    assert cut >= 3


def test_every_region_of_other_networks_is_cut_right_or_not_at_all(
    inverted: Program, transformer: Program, transformer_onnx: bytes, nets: SimpleNamespace
) -> None:
    for program, whole, x in (
        (inverted, to_onnx(inverted), nets.images(3)),
        (transformer, transformer_onnx, nets.tokens(3)),
    ):
        name = program.inputs[0].name
        for region in find_regions(program).regions:
            model = onnx_without(whole, [(region.entry, region.exit)])
            if model is None:
                continue
            wanted = bypass(program, region.entry, region.exit)(x).numpy()
            np.testing.assert_allclose(run(model, **{name: x})[0], wanted, rtol=1e-4, atol=1e-5, err_msg=region.name)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_cutting_out_a_chain_in_any_order(
    residual: Program, residual_onnx: bytes, nets: SimpleNamespace, order: tuple[int, int]
) -> None:
    pairs = [("relu", "relu_2"), ("relu_2", "relu_4")]
    model = onnx_without(residual_onnx, [pairs[i] for i in order])
    assert model is not None
    wanted = bypass(bypass(residual, "relu_2", "relu_4"), "relu", "relu_2")
    x = nets.images(3)
    np.testing.assert_allclose(run(model, x=x)[0], wanted(x).numpy(), rtol=1e-4, atol=1e-5)
    convolutions = [n for n in onnx.load_model_from_string(model).graph.node if n.op_type == "Conv"]
    assert len(convolutions) == 3


def test_a_region_whose_values_the_exporter_renamed_is_not_cut(residual_onnx: bytes) -> None:
    assert onnx_without(residual_onnx, [("relu", "no_such_value")]) is None


def test_cutting_out_nothing_changes_nothing(residual: Program, residual_onnx: bytes, nets: SimpleNamespace) -> None:
    x = nets.images(2)
    same = onnx_without(residual_onnx, [])
    assert same is not None
    assert np.array_equal(run(same, x=x)[0], run(residual_onnx, x=x)[0])


def test_the_exporters_table_is_filled_once(residual: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file as with a table of its own for each export, and what one export adds the next does not see."""
    with monkeypatch.context() as patch:
        patch.setattr(onnx_registry, "_registry", lambda: None)  # as with a torch that keeps its table elsewhere
        own = to_onnx(residual)
    torch_registry = onnx_registry._registry()
    filled, fill = [], vars(torch_registry)["from_torchlib"].__func__

    def counted(cls: Any, *args: Any, **options: Any) -> Any:
        filled.append(options)
        return fill(cls, *args, **options)

    monkeypatch.setattr(torch_registry, "from_torchlib", classmethod(counted))
    assert to_onnx(residual) == own == to_onnx(residual)
    assert len(filled) == 1
    with onnx_registry.filled_once():
        first, second = torch_registry.from_torchlib(), torch_registry.from_torchlib()
        first.register_op(torch.ops.aten.relu.default, torch.relu)
        assert len(first.get_decomps(torch.ops.aten.relu.default)) == 2
        assert len(second.get_decomps(torch.ops.aten.relu.default)) == 1
    assert vars(torch_registry)["from_torchlib"].__func__ is counted


def test_an_input_named_like_a_builtin_is_exported_without_tracing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """`input` is what nn.Sequential and many files call theirs; a copy of the graph that calls it `input_1` no longer
    fits its signature, and the slow way was taken."""
    program = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval(), torch.randn(2, 3))
    calls: list[str] = []
    translated = export._translated
    monkeypatch.setattr(export, "_translated", lambda *args: calls.append("translated") or translated(*args))
    onnx.checker.check_model(onnx.load_model_from_string(to_onnx(program)))
    assert calls == ["translated"]


def test_copies_of_graphs_keep_the_names_of_nodes() -> None:
    exported = to_exported(capture(nn.Sequential(nn.Linear(3, 4)).eval(), torch.randn(2, 3)))
    names = [node.name for node in exported.graph.nodes]
    assert "input" in names
    assert [node.name for node in copied(exported.graph).nodes] == names
    assert [node.name for node in copied(exported.graph_module).graph.nodes] == names
