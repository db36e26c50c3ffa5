"""ONNX in and out: names, interface and words of the file survive, dimensions stay as free as they can be."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from foldcut.compiler.export.exporter import save_onnx, to_onnx
from foldcut.compiler.ir.compare import Difference
from foldcut.compiler.ir.program import Program, is_call
from foldcut.compiler.onnx.session import reference_session, run_reference
from foldcut.compiler.onnx_import.importer import _agrees, import_onnx
from foldcut.compiler.support.errors import CaptureError
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

Weights = dict[str, tuple[int, ...]]


def model(
    nodes: str, outputs: str, inputs: str = "float[n, 4] x", weights: Weights | None = None, opset: int = 17
) -> onnx.ModelProto:
    """A model from ONNX's text form, with seeded weights of the given names and shapes."""
    head = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    found = parser.parse_model(f"{head} net ({inputs}) => ({outputs}) {{ {nodes} }}")
    generator = np.random.default_rng(0)
    for name, shape in (weights or {}).items():
        array = generator.standard_normal(shape).astype(np.float32) * 0.3
        found.graph.initializer.append(numpy_helper.from_array(array, name))
    return found


def rows(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(source: onnx.ModelProto | bytes, *inputs: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    session = reference_session(source if isinstance(source, bytes) else source.SerializeToString())
    return run_reference(session, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})


def assert_equal(
    program: Program, source: onnx.ModelProto | bytes, *inputs: torch.Tensor, tolerance: float = 1e-4
) -> None:
    """The Program computes what ONNX Runtime makes of the source."""
    ours = program(inputs)
    ours = ours if isinstance(ours, tuple) else (ours,)
    for a, b in zip(ours, reference(source, *inputs), strict=True):
        assert (str(a.numpy().dtype), a.shape) == (str(b.dtype), b.shape)
        np.testing.assert_allclose(a.numpy().astype(np.float64), b.astype(np.float64), rtol=tolerance, atol=tolerance)


def declared(values: Any) -> list[tuple[str, int, list[int | str]]]:
    """Name, type and dimensions of inputs or outputs."""
    return [
        (v.name, v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in values
    ]


def assert_same_interface(content: bytes, source: onnx.ModelProto) -> None:
    written = onnx.load_model_from_string(content)
    onnx.checker.check_model(written, full_check=True)
    assert declared(written.graph.input) == declared(source.graph.input)
    assert declared(written.graph.output) == declared(source.graph.output)
    assert [o.version for o in written.opset_import] == [o.version for o in source.opset_import]


def renamed(source: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    """The model with other names for its initializers: the text form knows plain ones only."""
    for tensor in source.graph.initializer:
        tensor.name = names[tensor.name]
    for node in source.graph.node:
        node.input[:] = [names.get(i, i) for i in node.input]
    return source


NAMES = {
    "a": "encoder.layers.0.fc.weight",
    "b": "model/dense/kernel:0",
    "c": "onnx::MatMul_123",
    "d": "encoder.layers.0.fc.bias",
    "e": "features.0-conv",
}


def test_parameters_have_the_names_of_the_initializers() -> None:
    """Dots, slashes, colons and dashes are what PyTorch and TensorFlow write."""
    nodes = """h1 = MatMul (x, a) h2 = Add (h1, d) h3 = Relu (h2) h4 = MatMul (h3, b) h5 = MatMul (h4, c)
        y = Mul (h5, e)"""
    weights: Weights = {"a": (4, 5), "b": (5, 6), "c": (6, 4), "d": (5,), "e": (4,)}
    source = renamed(model(nodes, "float[n, 4] y", weights=weights), NAMES)
    paths = ["/fc/MatMul", "/fc/Add", "dense/Relu", "dense/MatMul:0", "last", "scale"]
    for node, path in zip(source.graph.node, paths, strict=True):
        node.name = path
    program = import_onnx(source)
    assert set(dict(program.module.named_parameters())) == set(NAMES.values())
    assert program.parameter_count() == sum(int(np.prod(shape)) for shape in weights.values())
    assert {program.path(n) for n in program.graph.nodes if n.op == "call_function"} >= set(paths) - {"/fc/Add"}
    assert_equal(program, source, rows(3, 4))


def test_names_that_would_collide_are_kept_apart() -> None:
    source = renamed(
        model(
            "h = MatMul (x, a) i = Mul (h, b) j = Add (i, c) y = Mul (j, d)",
            "float[n, 4] y",
            weights={"a": (4, 4), "b": (4,), "c": (4,), "d": (4,)},
        ),
        {"a": "layer", "b": "layer.weight", "c": "layer weight", "d": "layer?weight"},
    )
    program = import_onnx(source)
    assert len(dict(program.module.named_parameters())) == 4
    assert_equal(program, source, rows(3, 4))


def test_dynamic_dimensions_stay_dynamic() -> None:
    source = model(
        "c = Conv <pads = [1, 1, 1, 1]> (x, w) y = Relu (c)",
        "float[batch, 5, height, width] y",
        "float[batch, 3, height, width] x",
        {"w": (5, 3, 3, 3)},
    )
    program = import_onnx(source, sizes={"height": 8, "width": 6})
    assert_equal(program, source, rows(3, 3, 10, 12))
    content = to_onnx(program)
    assert_same_interface(content, source)
    assert_equal(program, content, rows(1, 3, 5, 7))


def test_a_dimension_without_a_size_asks_for_an_example() -> None:
    source = model("y = Relu (x)", "float[n, t] y", "float[n, t] x")
    with pytest.raises(CaptureError, match=r"dimension 1 \(t\) of 'x'"):
        import_onnx(source)
    assert_equal(import_onnx(source, rows(2, 6)), source, rows(3, 9))


#: A vision transformer as an exporter writes it for one image: every size is a number.
ATTENTION = """
    p = Conv <strides = [4, 4]> (x, patch) s1 = Constant <value_ints = [1, 8, 4]> () r = Reshape (p, s1)
    t = Transpose <perm = [0, 2, 1]> (r) k = Concat <axis = 1> (token, t) z = Add (k, place)
    qkv = MatMul (z, wqkv) s2 = Constant <value_ints = [1, 5, 3, 2, 4]> () u = Reshape (qkv, s2)
    v = Transpose <perm = [2, 0, 3, 1, 4]> (u)
    i0 = Constant <value_int = 0> () i1 = Constant <value_int = 1> () i2 = Constant <value_int = 2> ()
    q = Gather <axis = 0> (v, i0) ky = Gather <axis = 0> (v, i1) va = Gather <axis = 0> (v, i2)
    kt = Transpose <perm = [0, 1, 3, 2]> (ky) a = MatMul (q, kt) b = Softmax <axis = -1> (a) c = MatMul (b, va)
    d = Transpose <perm = [0, 2, 1, 3]> (c) s3 = Constant <value_ints = [1, 5, 8]> () e = Reshape (d, s3)
    o = MatMul (e, wo) g = Add (o, z) first = Gather <axis = 1> (g, i0) y = Gemm <transB = 1> (first, fc)
"""
TRANSFORMER: Weights = {
    "patch": (8, 3, 4, 4), "token": (1, 1, 8), "place": (1, 5, 8), "wqkv": (8, 24), "wo": (8, 8), "fc": (4, 8),
}  # fmt: skip


def one_image() -> onnx.ModelProto:
    return model(ATTENTION, "float[1, 4] y", "float[1, 3, 8, 8] x", TRANSFORMER)


def each(source: onnx.ModelProto, x: torch.Tensor) -> torch.Tensor:
    """The file's output for each sample by itself."""
    return torch.cat([torch.from_numpy(reference(source, x[i : i + 1])[0]) for i in range(len(x))])


def test_a_batch_of_one_becomes_any_batch_and_goes_out_as_one() -> None:
    """Class token, heads and reshapes are written out for one image."""
    source = one_image()
    program = import_onnx(source)
    assert str(program.inputs[0].shape[0]) == "batch"
    x = rows(5, 3, 8, 8)
    torch.testing.assert_close(program(x), each(source, x), rtol=1e-4, atol=1e-4)
    content = to_onnx(program)
    assert_same_interface(content, source)
    assert_equal(program, content, x[:1])


def test_a_flattening_reshape_of_a_batch_of_one_becomes_any_batch() -> None:
    source = model(
        "c = Conv (x, w) s = Constant <value_ints = [1, -1]> () r = Reshape (c, s) y = Gemm <transB = 1> (r, fc)",
        "float[1, 4] y",
        "float[1, 3, 4, 4] x",
        {"w": (2, 3, 3, 3), "fc": (4, 8)},
    )
    program = import_onnx(source)
    x = rows(3, 3, 4, 4)
    torch.testing.assert_close(program(x), each(source, x), rtol=1e-4, atol=1e-4)
    assert_same_interface(to_onnx(program), source)


def test_a_network_that_mixes_its_samples_keeps_its_batch() -> None:
    """The mean over the batch is no function of one sample: the file's batch of 2 stays."""
    source = model(
        """m = ReduceMean <axes = [0], keepdims = 1> (x) d = Sub (x, m) s = Constant <value_ints = [2, 2, 2]> ()
        y = Reshape (d, s)""",
        "float[2, 2, 2] y",
        "float[2, 4] x",
    )
    with pytest.warns(UserWarning, match="batch size stays fixed"):
        program = import_onnx(source)
    assert program.inputs[0].shape == (2, 4)
    assert_equal(program, source, rows(2, 4))


def test_outputs_keep_their_order_and_an_unused_input_stays() -> None:
    source = model(
        "b = MatMul (x, w) a = Relu (b) s = ReduceSum <keepdims = 0> (a)",
        "float[n, 3] a, float s, float[n, 3] b",
        "float[n, 4] x, float[n, 2] unused",
        {"w": (4, 3)},
    )
    program = import_onnx(source)
    assert [v.name for v in program.inputs] == ["x", "unused"]
    assert [v.name for v in program.outputs] == ["a", "s", "b"]
    inputs = rows(3, 4), rows(3, 2)
    assert_equal(program, source, *inputs)
    content = to_onnx(program)
    assert_same_interface(content, source)
    assert_equal(program, content, *inputs)


def test_an_input_may_be_an_output_too() -> None:
    source = model("y = Relu (x)", "float[n, 4] y, float[n, 4] x")
    program = import_onnx(source)
    assert_equal(program, source, rows(3, 4))
    assert_same_interface(to_onnx(program), source)


def test_tokens_and_a_mask() -> None:
    """Integers into an embedding, and a mask that leaves words out."""
    source = model(
        """e = Gather (table, ids) h = MatMul (e, w) k = Cast <to = 9> (mask) a = Constant <value_ints = [-1]> ()
        u = Unsqueeze (k, a) zero = Constant <value_float = 0.0> () g = Where (u, h, zero)
        one = Constant <value_ints = [1]> () y = ReduceSum <keepdims = 0> (g, one)""",
        "float[n, 4] y",
        "int64[n, t] ids, int64[n, t] mask",
        {"table": (9, 3), "w": (3, 4)},
    )
    ids, mask = torch.arange(12).reshape(2, 6) % 9, (torch.arange(12).reshape(2, 6) % 4 > 0).long()
    program = import_onnx(source, (ids, mask))
    assert_equal(program, source, ids[:1, :4], mask[:1, :4])
    content = to_onnx(program)
    assert_same_interface(content, source)
    assert_equal(program, content, ids, mask)


def test_half_precision() -> None:
    source = model("c = Conv (x, w) y = Relu (c)", "float[n, 4, 6, 6] y", "float[n, 3, 8, 8] x", {"w": (4, 3, 3, 3)})
    for value in (*source.graph.input, *source.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    weight = numpy_helper.to_array(source.graph.initializer[0])
    source.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight.astype(np.float16), "w"))
    program = import_onnx(source)
    assert program.tensor("w").dtype == torch.float16
    content = to_onnx(program)
    assert_same_interface(content, source)
    assert_equal(program, source, rows(3, 3, 8, 8).half(), tolerance=1e-2)
    assert_equal(program, content, rows(3, 3, 8, 8).half(), tolerance=1e-2)


#: What the older exporter of torch writes for x.view(x.size(0), -1) and for heads: sizes computed in the graph.
SHAPES = """
    s = Shape (x) i0 = Constant <value = int64 {0}> () n = Gather <axis = 0> (s, i0)
    i1 = Constant <value = int64 {1}> () t = Gather <axis = 0> (s, i1)
    un = Unsqueeze <axes = [0]> (n) ut = Unsqueeze <axes = [0]> (t) two = Constant <value_ints = [2]> ()
    half = Constant <value = int64 {2}> () width = Constant <value = int64 {4}> () d = Div (width, half)
    ud = Unsqueeze <axes = [0]> (d) target = Concat <axis = 0> (un, ut, two, ud) h = Reshape (x, target)
    p = Transpose <perm = [0, 2, 1, 3]> (h) rest = Constant <value_ints = [-1]> ()
    flat = Concat <axis = 0> (un, two, rest) q = Reshape (p, flat)
    m = ReduceMean <axes = [2], keepdims = 0> (q) y = MatMul (m, w)
"""


def test_sizes_that_the_graph_computes_leave_no_trace() -> None:
    source = model(SHAPES, "float[n, 4] y", "float[n, t, 4] x", {"w": (2, 4)}, opset=12)
    program = import_onnx(source, rows(2, 6, 4))
    assert_equal(program, source, rows(3, 5, 4))
    operators = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not [op for op in operators if "foldcut" in op or "index" in op or "gather" in op or "cat" in op]
    content = to_onnx(program)
    assert_same_interface(content, source)
    assert_equal(program, content, rows(1, 7, 4))


def test_the_words_of_the_file_survive() -> None:
    """Whoever reads metadata or doc strings of the file finds them in the rewritten one."""
    source = model("h = MatMul (x, w) y = Relu (h)", "float[n, 3] y", weights={"w": (4, 3)}, opset=13)
    helper.set_model_props(source, {"classes": "cat,dog", "stride": "32"})
    source.doc_string, source.domain, source.model_version = "a model", "org.example", 7
    source.graph.name, source.graph.doc_string = "the graph", "of the graph"
    source.graph.input[0].doc_string, source.graph.output[0].doc_string = "of the input", "of the output"
    content = to_onnx(import_onnx(source))
    assert_same_interface(content, source)
    written = onnx.load_model_from_string(content)
    assert {p.key: p.value for p in written.metadata_props} == {"classes": "cat,dog", "stride": "32"}
    for name in ("doc_string", "domain", "model_version", "ir_version"):
        assert getattr(written, name) == getattr(source, name)
    assert (written.graph.name, written.graph.doc_string) == ("the graph", "of the graph")
    assert (written.graph.input[0].doc_string, written.graph.output[0].doc_string) == ("of the input", "of the output")


def test_weights_beside_the_file_both_ways(tmp_path: Path) -> None:
    source = model("h = MatMul (x, w) y = MatMul (h, v)", "float[n, 3] y", weights={"w": (4, 200), "v": (200, 3)})
    inside, outside = tmp_path / "a.onnx", tmp_path / "out" / "b.onnx"
    outside.parent.mkdir()
    copy = onnx.ModelProto.FromString(source.SerializeToString())  # saving moves the weights out of the model
    onnx.save_model(copy, inside, save_as_external_data=True, location="a.data", size_threshold=100)
    program = import_onnx(inside)
    assert_equal(program, source, rows(3, 4))
    paths = save_onnx(program, outside, inline_bytes=1000)
    assert [p.name for p in paths] == ["b.onnx", "b.onnx.data"]
    assert outside.stat().st_size < 5000 < 5600 <= paths[1].stat().st_size
    again = import_onnx(outside)
    torch.testing.assert_close(again(rows(3, 4)), program(rows(3, 4)))
    assert set(dict(again.module.named_parameters())) == {"w", "v"}
    assert reference_session(str(outside)).get_outputs()[0].name == "y"


def test_a_small_model_stays_in_one_file(tmp_path: Path) -> None:
    source = model("y = MatMul (x, w)", "float[n, 3] y", weights={"w": (4, 3)})
    assert save_onnx(import_onnx(source), tmp_path / "c.onnx") == (tmp_path / "c.onnx",)


def test_an_example_has_to_fit() -> None:
    source = model("y = MatMul (x, w)", "float[n, 3] y", weights={"w": (4, 3)})
    for example, message in (
        (rows(2, 4).double(), "wrong type"),
        (rows(2, 5), "wrong shape"),
        ((rows(2, 4), rows(2, 4)), "another number of inputs"),
        ({"z": rows(2, 4)}, "not the model's"),
    ):
        with pytest.raises(CaptureError, match=message):
            import_onnx(source, example)
    assert_equal(import_onnx(source, {"x": rows(2, 4)}), source, rows(3, 4))


def test_a_file_newer_than_onnx_runtime_is_checked_by_onnxs_own_evaluator(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime lags behind the newest operator sets; the import does not."""

    def refuse(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("opset 28 is under development and support for this is limited")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3] x) => (float[N, 3] y) { z = Exp (x) y = Relu (z) }"""
    )
    program = import_onnx(model)
    x = torch.randn(4, 3)
    assert torch.allclose(program(x), x.exp())
    assert isinstance(reference_session(model.SerializeToString()), ReferenceEvaluator)


def test_paddings_worked_out_from_the_shape_are_followed() -> None:
    """As the older exporter writes functional.pad: zeros in front, pairs turned round, reshaped, transposed."""
    source = model(
        """s = Shape (x) two = Constant <value_ints = [2]> () w = Gather (s, two)
        five = Constant <value_ints = [5]> () rest = Mod (w, five) missing = Sub (five, rest)
        zero = Constant <value_ints = [0]> () last = Concat <axis = 0> (zero, missing)
        four = Constant <value_ints = [4]> () front = ConstantOfShape <value = int64[1] {0}> (four)
        all = Concat <axis = 0> (last, front) pairs_shape = Constant <value_ints = [-1, 2]> ()
        pairs = Reshape (all, pairs_shape)
        from = Constant <value_ints = [-1]> () to = Constant <value_ints = [-9223372036854775807]> ()
        reversed = Slice (pairs, from, to, zero, from) turned = Transpose <perm = [1, 0]> (reversed)
        flat = Reshape (turned, from) pads = Cast <to = 7> (flat)
        y = Pad (x, pads)""",
        "float[n, 3, m] y",
        inputs="float[n, 3, 7] x",
    )
    program = import_onnx(source)
    assert not any(is_call(node, torch.ops.foldcut.onnx_node) for node in program.graph.nodes)
    assert program.outputs[0].shape[1:] == (3, 10)
    assert_equal(program, source, rows(2, 3, 7))


@pytest.mark.parametrize(
    ("factor", "relative", "agrees"),
    [(1.0, 5e-5, True), (1.0, 5e-4, False), (1e4, 5e-4, True), (1e4, 5e-2, False), (1e4, float("nan"), False)],
)
def test_only_rounding_counts_as_agreement(factor: float, relative: float, agrees: bool) -> None:
    """Sin of a large multiple makes much of the last digits of its input; the factor says how much."""
    program = import_onnx(
        model(f"f = Constant <value_floats = [{factor}]> () a = Mul (x, f) y = Sin (a)", "float[n, 4] y")
    )
    difference = Difference(absolute=relative, relative=relative, cosine=1.0)
    assert _agrees(program, (rows(8, 4),), difference, 1e-4) is agrees


def test_another_structure_never_agrees() -> None:
    program = import_onnx(model("y = Sin (x)", "float[n, 4] y"))
    difference = Difference(absolute=0.0, relative=0.0, cosine=1.0, same_structure=False)
    assert not _agrees(program, (rows(8, 4),), difference, 1e-4)


@pytest.mark.parametrize("word", ["from", "None", "class", "self", "torch", "inf", "device", "aten"])
def test_words_of_python_are_names_like_any_other(word: str) -> None:
    source = model(
        f"{word}_ = Mul (x, {word}) y = MatMul ({word}_, w)", "float[n, 2] y", weights={word: (4,), "w": (4, 2)}
    )
    assert_equal(import_onnx(source), source, rows(3, 4))
    named = model("y = MatMul (x, w)", "float[n, 2] y", weights={"w": (4, 2)})
    named.graph.input[0].name = named.graph.node[0].input[0] = word
    assert_equal(import_onnx(named), named, rows(3, 4))
