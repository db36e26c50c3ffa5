"""The operator table against ONNX's own tests: single nodes with the outputs that the standard demands."""

import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from foldcut.compiler.onnx.call import _SIZES, DTYPES, OnnxCall, Sizes, Unsupported, builder_of, table
from foldcut.compiler.onnx.file import OLDEST_OPSET, opset, read_onnx
from foldcut.compiler.onnx.normalise import normalised
from foldcut.compiler.onnx_import import module as onnx_module
from foldcut.compiler.onnx_import.module import OnnxModule
from foldcut.compiler.support.errors import CaptureError
from onnx import numpy_helper

Array = np.ndarray[Any, Any]
STANDARD = ("", "ai.onnx")


#: The operator set up to which ONNX Runtime promises support.
NEWEST_SETTLED = 26
#: Cases whose outputs may differ, with the reason. An entry ending in * is a prefix.
DIFFERENT = {
    "test_training_dropout*": "random numbers",
    "test_resize_downsample_scales_linear_align_corners": "ONNX Runtime and torch round the target size, ONNX does not",
    "test_resize_downsample_scales_cubic_align_corners": "the same",
}
#: Operators whose cases all go through ONNX Runtime, constants or not, with the reason.
OPAQUE = {
    "ConstantOfShape": "the shape is the first input, which stays data",
    "LayerNormalization": "the tests read mean and deviation as well",
    "Range": "the first number is the first input, which stays data",
}
#: Cases that need not import: they have to be refused instead, with the reason.
REFUSED = {
    "test_cast_no_saturate_*": "eight-bit floats that overflow: torch has no such cast, numpy no such type",
    "test_castlike_no_saturate_*": "the same",
    "test_quantizelinear_e*": "eight-bit floats, which numpy cannot hand to ONNX Runtime",
    "test_dequantizelinear_e*": "the same",
    "test_max_uint16": "neither torch nor ONNX Runtime computes with the type",
    "test_min_uint16": "the same",
    "test_onehot_with_bfloat16_values": "ONNX Runtime would have to hand over bfloat16, which numpy lacks",
    "test_range_bfloat16_type_positive_delta": "the same",
    "test_range_float16_type_positive_delta": "only the operator set under development has it, ONNX Runtime does not",
    "test_reduce_max_empty_set_bool": "ONNX Runtime has no least truth value",
}


@dataclass(frozen=True)
class Case:
    """One node with inputs and the outputs that ONNX demands."""

    name: str
    model: onnx.ModelProto
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]

    @property
    def op(self) -> str:
        """The operator under test: the name of a test for a function's body is that of the function."""
        return str(self.model.graph.node[0].op_type)

    def frozen(self) -> "Case":
        """The case with every input but the first as an initializer, as files from exporters have them."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        model.ir_version = max(4, model.ir_version)  # before, initializers had to be inputs too
        for value, array in list(zip(model.graph.input, self.inputs, strict=True))[1:]:
            model.graph.initializer.append(numpy_helper.from_array(array, value.name))
        del model.graph.input[1:]
        return Case(self.name, model, self.inputs[:1], self.outputs)


def _array(value: Any) -> Array:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _covered(model: onnx.ModelProto) -> bool:
    """Whether the table claims all nodes, and torch has the types of all values that go in and out."""
    values = (*model.graph.input, *model.graph.output)
    return (
        opset(model) >= OLDEST_OPSET
        and all(node.op_type in table() and node.domain in STANDARD for node in model.graph.node)
        and all(value.type.HasField("tensor_type") for value in values)
        and all(value.type.tensor_type.elem_type in DTYPES for value in values)
    )


def _settled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in an operator set that the importer and ONNX Runtime know, where its node exists there: onnx writes
    its tests in the set that brought the node, or the one that it is working on."""
    version = min(max(opset(model), OLDEST_OPSET), NEWEST_SETTLED)
    if opset(model) == version:
        return model
    settled = onnx.ModelProto()
    settled.CopyFrom(model)
    for entry in settled.opset_import:
        entry.version = version if entry.domain in STANDARD else entry.version
    try:
        onnx.checker.check_model(settled, full_check=True)
    except Exception:  # a type or an attribute that came later
        return model
    return settled


@pytest.fixture(scope="module")
def cases() -> dict[str, list[Case]]:
    """Operator -> its cases, made by the onnx package (which draws random inputs and computes with numpy)."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_model_tests(kind="node")
    by_op: dict[str, list[Case]] = defaultdict(list)
    for test in found:
        model = _settled(test.model)
        if not _covered(model):
            continue
        for inputs, outputs in test.data_sets:
            case = Case(test.name, model, tuple(map(_array, inputs)), tuple(map(_array, outputs)))
            by_op[case.op].append(case)
    return dict(by_op)


@pytest.fixture
def opaque_nodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that were left to ONNX Runtime, as they come."""
    found: list[str] = []
    real = onnx_module.opaque

    def counting(call: OnnxCall) -> Any:
        found.append(call.node.op)
        return real(call)

    monkeypatch.setattr(onnx_module, "opaque", counting)
    return found


def tensor(array: Array) -> torch.Tensor:
    """The array in torch; types that numpy lacks go over by their bits."""
    return onnx_module._torch_tensor("input", array).reshape(array.shape)


def outputs_of(case: Case) -> tuple[torch.Tensor, ...]:
    model = read_onnx(case.model)
    module = OnnxModule(normalised(model), opset(model))
    with torch.no_grad():
        results = module(*map(tensor, case.inputs))
    return results if isinstance(results, tuple) else (results,)


def difference(case: Case) -> str | None:
    """What is wrong with the outputs; None when nothing is. Raises CaptureError when the case is refused."""
    results = outputs_of(case)
    for actual, demanded in zip(results, case.outputs, strict=True):
        wanted = tensor(demanded)
        if (actual.dtype, actual.shape) != (wanted.dtype, wanted.shape):
            return f"{actual.dtype} {tuple(actual.shape)} for {wanted.dtype} {tuple(wanted.shape)}"
        if actual.dtype.is_floating_point and not actual.dtype.is_complex:
            actual, wanted = actual.double(), wanted.double()
        if not np.allclose(actual.numpy(), wanted.numpy(), rtol=1e-3, atol=1e-4, equal_nan=True):
            return f"{actual.numpy()} for {wanted.numpy()}"
    return None


def listed(name: str, entries: Iterable[str]) -> bool:
    return any(name == entry or (entry.endswith("*") and name.startswith(entry[:-1])) for entry in entries)


def wrong(cases: Iterable[Case]) -> str:
    """The cases that neither compute what they should nor are excused; empty when there are none."""
    lines = []
    for case in cases:
        try:
            found = None if listed(case.name, DIFFERENT) else difference(case)
        except CaptureError as error:
            found = None if listed(case.name, REFUSED) else str(error)
        if found is not None:
            lines.append(f"{case.name}: {found[:300]}")
    return "\n".join(lines)


@pytest.mark.parametrize("op", table())
def test_the_operator_computes_what_the_standard_demands(cases: dict[str, list[Case]], op: str) -> None:
    """All inputs are data here: what the table wants constant goes through ONNX Runtime, or is refused."""
    assert not wrong(cases.get(op, ()))


@pytest.mark.parametrize("op", table())
def test_the_operator_with_constants_computes_what_the_standard_demands(
    cases: dict[str, list[Case]], opaque_nodes: list[str], op: str
) -> None:
    """As exporters write it: shapes, axes and the like are initializers. Then the table does the work itself."""
    frozen = [case.frozen() for case in cases.get(op, ())]
    assert not wrong(frozen)
    assert op in OPAQUE or len(opaque_nodes) < len(frozen)


def known_inputs(case: Case) -> tuple[Sizes | None, ...] | None:
    """The inputs as numbers known at import; None where they are too many, or no numbers that shapes are made of."""
    types = {"int32", "int64", "float32", "float64", "bool"}
    if len(case.model.graph.node) > 1 or any(a.size > 64 or a.dtype.name not in types for a in case.inputs):
        return None
    given = iter(Sizes(np.asarray(a.astype(object)), tensor(a).dtype) for a in case.inputs)
    return tuple(next(given) if name else None for name in case.model.graph.node[0].input)


@pytest.mark.parametrize("op", sorted(_SIZES))
def test_the_rule_for_known_numbers_computes_the_same(cases: dict[str, list[Case]], op: str) -> None:
    """Shape arithmetic is done on numbers at import: it has to agree with the operator on the same numbers."""
    for case in cases.get(op, ()):
        inputs = known_inputs(case)
        if inputs is None:
            continue
        call = OnnxCall(gs.import_onnx(case.model).nodes[0], inputs, opset(case.model))
        for build in (_SIZES[op], builder_of(op, call.opset)):
            try:
                built = build(call)
            except Unsupported:
                continue
            for value, demanded in zip(
                built if isinstance(built, (list, tuple)) else [built], case.outputs, strict=True
            ):
                result, wanted = value if isinstance(value, torch.Tensor) else value.tensor(), tensor(demanded)
                assert (result.dtype, result.shape) == (wanted.dtype, wanted.shape), case.name
                torch.testing.assert_close(result, wanted, equal_nan=True, msg=lambda m, n=case.name: f"{n}: {m}")
