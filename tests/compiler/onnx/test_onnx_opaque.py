"""Nodes that foldcut has no form of: ONNX Runtime runs them, they go out as they came in, and nothing near is cut."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from foldcut.compiler.analysis.provenance import find_units
from foldcut.compiler.export.exporter import to_exported, to_onnx, to_pt2
from foldcut.compiler.ir.program import Program
from foldcut.compiler.onnx.opaque_node import node_model
from foldcut.compiler.onnx.session import reference_session, run_reference
from foldcut.compiler.onnx_import.importer import import_onnx
from foldcut.compiler.support.errors import CaptureError
from onnx import numpy_helper, parser

WEIGHTS = {
    "w1": (4, 3, 3, 3),
    "w2": (4, 4, 1, 1),
    "fc": (4, 5),
    "lw": (1, 12, 4),
    "lr": (1, 12, 3),
}
IMAGES = "float[n, 3, 8, 8] x"


def model(nodes: str, outputs: str, inputs: str = IMAGES, opset: str = '"" : 17') -> onnx.ModelProto:
    """A model from ONNX's text form; the weights of WEIGHTS that it names are drawn with a fixed seed."""
    found = parser.parse_model(f"<ir_version: 8, opset_import: [{opset}]> net ({inputs}) => ({outputs}) {{ {nodes} }}")
    generator = np.random.default_rng(0)
    read = {name for node in found.graph.node for name in node.input}
    for name, shape in WEIGHTS.items():
        if name in read:
            array = generator.standard_normal(shape).astype(np.float32) * 0.3
            found.graph.initializer.append(numpy_helper.from_array(array, name))
    return found


def images(count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def reference(model: onnx.ModelProto | bytes, *inputs: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    content = model if isinstance(model, bytes) else model.SerializeToString()
    session = reference_session(content)
    return run_reference(session, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})


def outputs(program: Program, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    results = program(inputs)
    return results if isinstance(results, tuple) else (results,)


def opaque_nodes(program: Program) -> list[str]:
    """The ONNX operators behind the Program's opaque nodes."""
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.foldcut.onnx_node.default]
    return [node_model(n.args[1]).graph.node[0].op_type for n in nodes]


CASES: dict[str, tuple[onnx.ModelProto, list[str]]] = {
    "pooling by a norm": (
        model(
            """c = Conv <pads = [1, 1, 1, 1]> (x, w1)
            p = LpPool <kernel_shape = [2, 2], strides = [2, 2], p = 3> (c)
            r = Relu (p) d = Conv (r, w2) y = GlobalAveragePool (d)""",
            "float[n, 4, 1, 1] y",
        ),
        ["LpPool"],
    ),
    "a fused operator of ONNX Runtime": (
        model(
            """c = Conv <pads = [1, 1, 1, 1]> (x, w1) g = com.microsoft.FastGelu (c) d = Conv (g, w2)
            y = GlobalAveragePool (d)""",
            "float[n, 4, 1, 1] y",
            opset='"" : 17, "com.microsoft" : 1',
        ),
        ["FastGelu"],
    ),
    "quantised as it runs": (
        model(
            """c = Conv <pads = [1, 1, 1, 1]> (x, w1) cq, scale, zero = DynamicQuantizeLinear (c)
            cd = DequantizeLinear (cq, scale, zero) d = Conv (cd, w2) y = GlobalAveragePool (d)""",
            "float[n, 4, 1, 1] y",
        ),
        ["DynamicQuantizeLinear", "DequantizeLinear"],
    ),
    "the best of a row": (
        model(
            """c = Conv <pads = [1, 1, 1, 1]> (x, w1) f = Flatten (c) k = Constant <value_ints = [5]> ()
            best, where = TopK <axis = -1> (f, k)""",
            "float[n, 5] best, int64[n, 5] where",
        ),
        ["TopK"],
    ),
    "a detection head": (
        model(
            """c = Conv <pads = [1, 1, 1, 1]> (x, w1) b = Constant <value_ints = [0, 4, 64]> () r = Reshape (c, b)
            boxes = Transpose <perm = [0, 2, 1]> (r) d = Conv (c, w2) e = Reshape (d, b) scores = Sigmoid (e)
            most = Constant <value_ints = [3]> () share = Constant <value_floats = [0.5]> ()
            least = Constant <value_floats = [0.4]> ()
            chosen = NonMaxSuppression <center_point_box = 1> (boxes, scores, most, share, least)""",
            "float[n, 64, 4] boxes, int64[k, 3] chosen",
        ),
        ["NonMaxSuppression"],
    ),
    "what occurs": (
        model(
            """c = Conv <pads = [1, 1, 1, 1]> (x, w1) f = Floor (c) y, first, back, counts = Unique (f)
            m = ReduceMean <axes = [2, 3], keepdims = 0> (c)""",
            "float[k] y, int64[k] counts, float[n, 4] m",
        ),
        ["Unique"],
    ),
    "recurrent": (
        model(
            """c = Conv <pads = [1, 1, 1, 1]> (x, w1) s = Constant <value_ints = [0, 4, 64]> () r = Reshape (c, s)
            t = Transpose <perm = [2, 0, 1]> (r) all, last = LSTM <hidden_size = 3> (t, lw, lr)
            a = Constant <value_ints = [0]> () y = Squeeze (last, a)""",
            "float[n, 3] y",
        ),
        ["LSTM"],
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[onnx.ModelProto, Program, list[str]]:
    source, ops = CASES[request.param]
    return source, import_onnx(source), ops


def test_the_program_computes_what_onnx_runtime_computes(case: tuple[onnx.ModelProto, Program, list[str]]) -> None:
    source, program, ops = case
    assert sorted(opaque_nodes(program)) == sorted(ops)
    for count in (1, 3):
        x = images(count)
        for ours, theirs in zip(outputs(program, x), reference(source, x), strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-5)


def described(node: onnx.NodeProto) -> tuple[str, str, str, list[str]]:
    attributes = sorted(onnx.helper.printable_attribute(a) for a in node.attribute)
    return node.domain, node.op_type, node.name, attributes


def test_the_nodes_go_out_as_they_came_in(case: tuple[onnx.ModelProto, Program, list[str]]) -> None:
    source, program, ops = case
    content = to_onnx(program)
    written = onnx.load_model_from_string(content)
    onnx.checker.check_model(written)
    kept, original = ([described(n) for n in m.graph.node if n.op_type in ops] for m in (written, source))
    assert sorted(kept) == sorted(original)
    assert {(o.domain, o.version) for o in written.opset_import} == {(o.domain, o.version) for o in source.opset_import}
    for ours, theirs in zip(reference(content, images()), reference(source, images()), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_meets_an_opaque_node_keeps_its_channels(case: tuple[onnx.ModelProto, Program, list[str]]) -> None:
    _, program, _ = case
    provenance = find_units(program)
    assert not [group.name for group in provenance.groups if group.reason is None]
    reasons = {group.name: group.reason for group in provenance.groups}
    assert "w1" not in reasons or "foldcut.onnx_node.default is not understood" in str(reasons["w1"])


def test_nothing_flows_back_through_an_opaque_node(case: tuple[onnx.ModelProto, Program, list[str]]) -> None:
    """What lies behind it trains, what lies before it keeps its weights, and nothing raises."""
    _, program, ops = case
    weights = dict(program.module.named_parameters())
    results = program.module(images())
    results = results if isinstance(results, (tuple, list)) else (results,)
    total = sum(y.sum() for y in results if y.is_floating_point())
    if total.requires_grad:
        total.backward()
    moved = {name for name, weight in weights.items() if weight.grad is not None and bool(weight.grad.any())}
    for weight in weights.values():
        weight.grad = None
    behind = {"LpPool": {"w2"}, "FastGelu": {"w2"}, "NonMaxSuppression": {"w1"}, "Unique": {"w1"}}
    behind["DynamicQuantizeLinear"] = {"w2"}
    assert moved == behind.get(ops[0], set())


def test_a_node_that_onnx_runtime_does_not_know_is_refused() -> None:
    """ONNX has it, ONNX Runtime refuses it: one error, with the node's name."""
    found = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> net (string[n] x) => (string[n] y) { y = Identity (x) }"""
    )
    with pytest.raises(CaptureError, match="torch has no type for the input 'x'"):
        import_onnx(found)


def test_a_saved_network_with_opaque_nodes_loads_in_a_fresh_process(tmp_path: Path) -> None:
    """`import foldcut` registers the operator; neither onnx nor ONNX Runtime is imported before a node runs."""
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 2, 8, 8] x) => (float[N, 2, 4, 4] y) { y = LpPool <kernel_shape = [2, 2], strides = [2, 2]> (x) }"""
    )
    program = import_onnx(model)
    saved = tmp_path / "net.pt2"
    saved.write_bytes(to_pt2(to_exported(program)))
    code = (
        "import sys, torch, foldcut\n"
        "assert not {'onnx', 'onnxruntime'} & set(sys.modules)\n"
        f"net = foldcut.capture({str(saved)!r})\n"
        "print(float(net(torch.ones(3, 2, 8, 8)).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert float(done.stdout.split()[-1]) == pytest.approx(3 * 2 * 16 * 2.0)
