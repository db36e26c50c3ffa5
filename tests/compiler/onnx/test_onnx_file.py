"""Files that nobody vouches for: damaged and hostile ones end in an error, at once and without memory."""

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.onnx_import.importer import import_onnx
from foldcut.compiler.support.errors import CaptureError
from onnx import helper, numpy_helper, parser

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def parsed(nodes: str, inputs: str = "float[n, 4] x", outputs: str = "float[n, 4] y") -> onnx.ModelProto:
    """A model from ONNX's text form; `w`, where it is read, is a 4 x 4 matrix."""
    model = parser.parse_model(f"{HEAD} net ({inputs}) => ({outputs}) {{ {nodes} }}")
    if any("w" in node.input for node in model.graph.node):
        array = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, "w"))
    return model


def linear() -> onnx.ModelProto:
    return parsed("y = MatMul (x, w)")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.fixture
def bounded() -> Iterator[None]:
    """The test may neither take long nor need 500 MB more than any test before it."""
    begun, before = time.monotonic(), peak_bytes()
    yield
    assert time.monotonic() - begun < 10
    assert peak_bytes() - before < 500_000_000


def changed(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = linear()
    change(model)
    return model


def dims(*sizes: int) -> Callable[[onnx.ModelProto], object]:
    def change(model: onnx.ModelProto) -> None:
        del model.graph.initializer[0].dims[:]
        model.graph.initializer[0].dims.extend(sizes)

    return change


def payload(data: bytes) -> Callable[[onnx.ModelProto], object]:
    return lambda model: setattr(model.graph.initializer[0], "raw_data", data)


def in_opset(version: int) -> Callable[[onnx.ModelProto], object]:
    return lambda model: setattr(model.opset_import[0], "version", version)


def typed(number: int) -> Callable[[onnx.ModelProto], object]:
    return lambda model: setattr(model.graph.initializer[0], "data_type", number)


def nested(depth: int) -> onnx.ModelProto:
    """Branches within branches."""
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["r"])], "leaf", [], [onnx.ValueInfoProto(name="r")])
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["r"], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([node], "inner", [], [onnx.ValueInfoProto(name="r")])
    model = parsed("y = Relu (x)", "float[n, 4] x, bool c")
    model.graph.node.append(graph.node[0])
    return model


DAMAGED = {
    "data that is too short": (changed(payload(b"\0" * 63)), "does not fit its shape"),
    "data that is too long": (changed(payload(b"\0" * 65)), "does not fit its shape"),
    "a negative dimension": (changed(dims(-4, -4)), "negative dimension"),
    "huge dimensions": (changed(dims(1 << 40, 1 << 40)), "does not fit its shape"),
    "dimensions whose product overflows": (changed(dims(1 << 32, 1 << 32, 4, 4)), "does not fit its shape"),
    "an unknown data type": (changed(typed(999)), "unknown data type"),
    "an old operator set": (changed(in_opset(8)), "operator set"),
    "a future operator set": (changed(in_opset(1000)), "operator set"),
    "no operator set": (changed(lambda m: m.opset_import.pop()), "operator set"),
    "no graph": (changed(lambda m: m.ClearField("graph")), "no graph"),
    "a cycle": (parsed("a = Relu (b) b = Relu (a) y = Add (x, b)"), ""),
    "a missing value": (parsed("y = Add (x, nowhere)"), ""),
    "two nodes of one result": (parsed("y = Relu (x) y = Exp (x)"), ""),
    "an output that nothing computes": (parsed("z = Relu (x)"), ""),
    "a wrong number of inputs": (parsed("y = MatMul (x)"), ""),
    "an unknown attribute": (parsed("y = Relu <alpha = 1.0> (x)"), ""),
    "a matrix that does not fit": (changed(lambda m: (dims(8, 2)(m),)), ""),
    "branches that nest": (nested(10), "nest deeper"),
    "an unknown operator": (parsed("y = NoSuchOperator (x)"), ""),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_model_is_refused(bounded: None, name: str) -> None:
    model, message = DAMAGED[name]
    with pytest.raises(CaptureError, match=message):
        import_onnx(model.SerializeToString())


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"PK\x03\x04 a zip file", b"\x08", linear().SerializeToString()[:-40]]
)
def test_bytes_that_are_no_model_are_refused(bounded: None, content: bytes, tmp_path: Path) -> None:
    with pytest.raises(CaptureError):
        import_onnx(content)
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(CaptureError):
        import_onnx(path)


def test_a_path_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"cannot read .*nothing\.onnx"):
        import_onnx(tmp_path / "nothing.onnx")
    with pytest.raises(CaptureError, match="cannot read"):
        import_onnx(tmp_path)


HUGE = {
    "ConstantOfShape": """s = Constant <value_ints = [1099511627776]> () big = ConstantOfShape (s)
        z = ReduceSum <keepdims = 0> (big) y = Add (x, z)""",
    "Expand": """o = Constant <value_float = 1.0> () s = Constant <value_ints = [1048576, 1048576]> ()
        big = Expand (o, s) z = ReduceSum <keepdims = 0> (big) y = Add (x, z)""",
    "Tile": """o = Constant <value_floats = [1.0]> () s = Constant <value_ints = [1099511627776]> ()
        big = Tile (o, s) z = ReduceSum <keepdims = 0> (big) y = Add (x, z)""",
    "Range": """a = Constant <value_float = 0.0> () b = Constant <value_float = 1e12> ()
        c = Constant <value_float = 1.0> () big = Range (a, b, c) z = ReduceSum <keepdims = 0> (big) y = Add (x, z)""",
    "Tile of Tile": """o = Constant <value_floats = [1.0]> () s = Constant <value_ints = [1000000]> ()
        big = Tile (o, s) bigger = Tile (big, s) z = ReduceSum <keepdims = 0> (bigger) y = Add (x, z)""",
    "MatMul": """s = Constant <value_ints = [100000, 1]> () t = Constant <value_ints = [1, 100000]> ()
        a = ConstantOfShape (s) b = ConstantOfShape (t) big = MatMul (a, b) z = ReduceSum <keepdims = 0> (big)
        y = Add (x, z)""",
    "Add": """s = Constant <value_ints = [100000, 1]> () t = Constant <value_ints = [1, 100000]> ()
        a = ConstantOfShape (s) b = ConstantOfShape (t) big = Add (a, b) z = ReduceSum <keepdims = 0> (big)
        y = Add (x, z)""",
    "Einsum": """s = Constant <value_ints = [100000]> () a = ConstantOfShape (s)
        big = Einsum <equation = "i,j->ij"> (a, a) z = ReduceSum <keepdims = 0> (big) y = Add (x, z)""",
    "sizes that depend on values": """s = Constant <value_ints = [50000]> () o = ConstantOfShape (s) p = Exp (o)
        a = NonZero (p) b = Transpose (a) big = Add (a, b) z = ReduceSum <keepdims = 0> (big)
        f = Cast <to = 1> (z) y = Add (x, f)""",
    "a branch": """i = Cast <to = 9> (x) j = Cast <to = 6> (i) k = ReduceMax <keepdims = 0> (j) c = Cast <to = 9> (k)
        z = If (c) <
            then_branch = g () => (float r) { s = Constant <value_ints = [1099511627776]> ()
                b = ConstantOfShape (s) r = ReduceSum <keepdims = 0> (b) },
            else_branch = h () => (float r) { r = Constant <value_float = 1.0> () }
        > y = Add (x, z)""",
    "Pad": """o = Constant <value_floats = [1.0]> () s = Constant <value_ints = [0, 1099511627776]> ()
        big = Pad (o, s) z = ReduceSum <keepdims = 0> (big) y = Add (x, z)""",
    "OneHot": """i = Constant <value_ints = [1, 2]> () d = Constant <value_ints = [1099511627776]> ()
        v = Constant <value_floats = [0.0, 1.0]> () big = OneHot (i, d, v) z = ReduceSum <keepdims = 0> (big)
        y = Add (x, z)""",
}


@pytest.mark.parametrize("name", HUGE)
def test_a_small_file_cannot_ask_for_much_memory(bounded: None, name: str) -> None:
    """A few bytes that name a tensor of terabytes: refused before anything is allocated."""
    with pytest.raises(CaptureError):
        import_onnx(parsed(HUGE[name]))


def external(folder: Path, **entries: str | int) -> Path:
    """`linear`, its matrix in a file of its own; `entries` say what the model claims about it."""
    model = linear()
    weight = model.graph.initializer[0]
    (folder / "weights.bin").write_bytes(b"\0" * 16 + weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in ({"location": "weights.bin", "offset": 16, "length": 64} | entries).items():
        weight.external_data.add(key=key, value=str(value))
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    program = import_onnx(external(tmp_path))
    expected = numpy_helper.to_array(linear().graph.initializer[0])
    np.testing.assert_array_equal(program.tensor("w").detach().numpy(), expected.T)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../secret.bin"}, "outside the model's folder"),
        ({"location": "sub/../../secret.bin"}, "outside the model's folder"),
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "C:\\secret.bin"}, "outside the model's folder"),
        ({"location": "..\\secret.bin"}, "outside the model's folder"),
        ({"location": ""}, "outside the model's folder"),
        ({"location": "weights\0.bin"}, "outside the model's folder"),
        ({"location": "link.bin"}, "outside the model's folder"),
        ({"location": "linked/secret.bin"}, "outside the model's folder"),
        ({"location": "nothing.bin"}, "are missing"),
        ({"location": "."}, ""),
        ({"offset": 17}, "reach past the end"),
        ({"length": 1 << 60}, "reach past the end"),
        ({"offset": -1}, "reach past the end"),
        ({"offset": "many"}, "no valid extent"),
        ({"length": 60}, "does not fit its shape"),
    ],
)
def test_weights_anywhere_else_are_not_read(tmp_path: Path, entries: dict[str, str | int], message: str) -> None:
    """The secret has the right size: only the check keeps it from being read."""
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"\1" * 80)
    (folder / "link.bin").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises(CaptureError, match=message):
        import_onnx(external(folder, **entries))


def test_bytes_cannot_have_weights_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="lie outside the model"):
        import_onnx(external(tmp_path).read_bytes())


HOSTILE = [
    'x"),__import__("os").system("touch {mark}")#',
    "x');__import__('os').system('touch {mark}')#",
    '"""\n__import__("os").system("touch {mark}")\n"""',
    "a\nimport os; os.system('touch {mark}')",
    "w.__class__.__init__",
    "forward",
    "..",
    "w/with:colon-and space",
    "é\x7f\u202e",
]


def hostile(mark: Path) -> onnx.ModelProto:
    """One addition for each name: of a weight, of a node and of the value that it makes."""
    model = parsed("y = Relu (x)")
    del model.graph.node[:]
    value = model.graph.input[0].name = f"in{HOSTILE[0].format(mark=mark)}"
    for number, text in enumerate(HOSTILE):
        name = text.format(mark=mark)
        weight = np.full((1, 4), number, np.float32) + np.arange(4, dtype=np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
        model.graph.node.append(helper.make_node("Add", [value, name], [f"out{name}"], name=f"node{name}"))
        value = f"out{name}"
    model.graph.output[0].name = value
    return model


def test_a_name_never_becomes_code(tmp_path: Path) -> None:
    """fx writes the names of weights, inputs and nodes into the Python code that it runs."""
    mark = tmp_path / "pwned"
    program = import_onnx(hostile(mark))
    assert len(dict(program.module.named_parameters())) == len(HOSTILE)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = x + sum(range(len(HOSTILE))) + len(HOSTILE) * torch.arange(4)
    torch.testing.assert_close(program((x,)), expected)
    torch.testing.assert_close(import_onnx(to_onnx(program))((x,)), expected)
    assert not mark.exists()


def test_everything_that_cannot_be_imported_is_listed_at_once() -> None:
    """Control flow that depends on the data, sequences and unknown domains: one error with names and counts."""
    branch = "then_branch = g () => (float r) { r = Constant <value_float = 2.0> () }"
    other = "else_branch = h () => (float r) { r = Constant <value_float = 1.0> () }"
    model = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17, "my.domain" : 1]> net (float[n, 4] x) => (float[n, 4] y) {{
            s = ReduceSum <keepdims = 0> (x) c = Cast <to = 9> (s)
            [first] a = If (c) <{branch}, {other}>
            [second] b = If (c) <{branch}, {other}>
            [pair] q = SequenceConstruct (x, x) i = Constant <value_int = 1> () [take] t = SequenceAt (q, i)
            [own] m = my.domain.Magic (t) u = Add (m, a) y = Add (u, b)
        }}"""
    )
    with pytest.raises(CaptureError) as caught:
        import_onnx(model)
    text = str(caught.value)
    assert "5 nodes" in text
    for part in (
        "If (2: first, second)",
        "SequenceConstruct (1: pair)",
        "SequenceAt (1: take)",
        "my.domain.Magic (1: own)",
    ):
        assert part in text


def test_a_loop_is_listed() -> None:
    body = "body = g (int64 i, bool c, float[n, 4] v) => (bool d, float[n, 4] w2) { d = Identity (c) w2 = Relu (v) }"
    model = parsed(
        f"m = Constant <value_int = 3> () c = Constant <value = bool {{1}}> () [again] y = Loop (m, c, x) <{body}>"
    )
    with pytest.raises(CaptureError, match=r"Loop \(1: again\)"):
        import_onnx(model)


def test_a_branch_with_a_constant_condition_is_taken() -> None:
    """Branches inside branches too: exporters leave the flags of a function call behind."""
    inner = """c2 = Constant <value = bool {0}> ()
        r = If (c2) <then_branch = p () => (float[n, 4] r1) { r1 = Exp (x) },
                     else_branch = q () => (float[n, 4] r2) { r2 = MatMul (x, w) }>"""
    model = parsed(
        f"""c = Constant <value = bool {{1}}> ()
        z = If (c) <then_branch = g () => (float[n, 4] r) {{ {inner} }},
                    else_branch = h () => (float[n, 4] e) {{ e = Neg (x) }}>
        y = Relu (z)"""
    )
    weight = numpy_helper.to_array(linear().graph.initializer[0])
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    program = import_onnx(model)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program(x), torch.relu(x @ torch.tensor(weight)))


def test_functions_of_the_model_are_inlined() -> None:
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]> net (float[n, 4] x) => (float[n, 4] y) {
            [one] h = my.Swish2 <beta = 2.0> (x) [two] y = my.Swish2 <beta = 1.0> (h)
        }
        <domain: "my", opset_import: ["" : 17]> Swish2 <beta> (a) => (b) {
            k = Constant <value_float: float = @beta> () s = Mul (a, k) g = Sigmoid (s) b = Mul (a, g)
        }"""
    )
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    h = x * torch.sigmoid(2 * x)
    torch.testing.assert_close(import_onnx(model)(x), torch.nn.functional.silu(h))


def test_a_model_of_the_caller_stays_as_it_was() -> None:
    model = parsed("c = Constant <value_float = 2.0> () h = MatMul (x, w) y = Mul (h, c)")
    before = model.SerializeToString(deterministic=True)
    import_onnx(model)
    assert model.SerializeToString(deterministic=True) == before


def test_an_output_of_undeclared_rank_is_read() -> None:
    """ONNX Runtime takes such files, onnx.checker does not."""
    model = linear()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert import_onnx(model)(torch.zeros(3, 4)).shape == (3, 4)
