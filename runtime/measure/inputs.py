"""What goes into a backend: the bytes of an ONNX file, and arrays for the inputs that it declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...compiler.onnx.file import model_tensors
from ...compiler.onnx.model_file import OnnxFile, OnnxModel
from ...compiler.onnx.signature import OnnxSignature, OnnxValue
from ...compiler.support.errors import BackendError, CompilerError, first_line
from .backend import Array

#: ONNX Runtime's names of element types, by their number in ONNX (TensorProto.DataType).
_ELEMENTS = {
    1: "float",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    8: "string",
    9: "bool",
    10: "float16",
    11: "double",
    12: "uint32",
    13: "uint64",
    16: "bfloat16",
}

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bool)": np.dtype(np.bool_),
    **{f"tensor({kind}{bits})": np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One input. A dimension is a size, or if dynamic its name, or None where it has no name.

    `dtype` is None when numpy has no such type (strings, bfloat16); `declared` is ORT's name of it. An empty `shape`
    is a rank that is not known, unless `scalar` says that there are no dimensions.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype[Any] | None
    declared: str
    scalar: bool = False

    def dimension_name(self, axis: int) -> str:
        """Name the dimension at `axis`: its own name, or ``input.axis`` where it has none."""
        dimension = self.shape[axis]
        return dimension if isinstance(dimension, str) and dimension else f"{self.name}.{axis}"

    def random(self, generator: np.random.Generator, sizes: Mapping[str, int]) -> Array:
        """Draw an array of this shape. Raises BackendError if a dynamic dimension has none of `sizes`."""
        if self.dtype is None:
            raise BackendError(
                f"cannot make up values of type {self.declared} for the input '{self.name}'",
                hint="pass inputs of your own",
            )
        shape = tuple(self._size(axis, sizes) for axis in range(len(self.shape)))
        if self.dtype.kind == "f":
            return generator.standard_normal(shape).astype(self.dtype)
        if self.dtype.kind == "b":
            return np.ones(shape, dtype=self.dtype)
        return generator.integers(0, 2, size=shape).astype(self.dtype)

    def _size(self, axis: int, sizes: Mapping[str, int]) -> int:
        dimension = self.shape[axis]
        if isinstance(dimension, int):
            return dimension
        name = self.dimension_name(axis)
        size = sizes.get(f"{self.name}.{axis}", sizes.get(name))
        if size is None or size < 1:
            problem = "needs a size" if size is None else f"cannot have the size {size}"
            raise BackendError(
                f"dimension {axis} ('{name}') of the input '{self.name}' is dynamic and {problem}",
                hint=f"pass sizes={{'{name}': ...}}, from 1 up",
            )
        return int(size)


def session_specs(session: Any) -> tuple[InputSpec, ...]:
    """Read the inputs that an ONNX Runtime session must be fed, in its order."""
    return tuple(
        InputSpec(
            name=node.name,
            # ORT writes a dynamic dimension as its name, or None.
            shape=tuple(node.shape or ()),
            dtype=_DTYPES.get(node.type),
            declared=node.type,
        )
        for node in session.get_inputs()
    )


def model_specs(model: OnnxModel) -> tuple[InputSpec, ...]:
    """Read the inputs that a model declares, those that nothing reads included, in the model's order.

    Raises BackendError: bytes are no ONNX model, or their weights lie in other files (a backend that gets bytes would
    look for them wherever the model says).
    """
    import onnx

    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(model.path.read_bytes() if isinstance(model, OnnxFile) else model)
        outside = next((t.name for t in model_tensors(proto) if t.data_location == onnx.TensorProto.EXTERNAL), None)
    except CompilerError as cause:
        raise BackendError(cause.message, actual=cause.actual, hint=cause.hint) from cause
    except Exception as cause:  # protobuf's DecodeError, and whatever else a broken message raises
        raise BackendError(
            f"not an ONNX model: {first_line(cause)}", hint="the file is truncated, damaged or of another format"
        ) from cause
    if not proto.graph.output:
        raise BackendError("not an ONNX model: it has no outputs", hint="the file is damaged or of another format")
    if outside is not None and not isinstance(model, OnnxFile):
        raise BackendError(
            f"the weights of '{outside}' lie outside the model",
            hint="pass OnnxFile(path) of foldcut.compiler.onnx.model_file, which knows where they are",
        )
    return tuple(map(_value_spec, OnnxSignature.of(proto).inputs))


def _value_spec(value: OnnxValue) -> InputSpec:
    element = f"tensor({_ELEMENTS.get(value.element_type, f'ONNX type {value.element_type}')})"
    return InputSpec(
        name=value.name,
        shape=value.shape or (),
        dtype=_DTYPES.get(element),
        declared=element,
        scalar=value.shape == (),
    )


def draw_inputs(
    specs: tuple[InputSpec, ...], batch: int = 1, seed: int = 0, *, sizes: Mapping[str, int] | None = None
) -> dict[str, Array]:
    """Make inputs: floats from N(0, 1), integers 0 or 1, booleans true.

    A dynamic first dimension becomes `batch`, and so does every dimension of that name; a fixed one stays. Other
    dynamic dimensions are looked up in `sizes` by name (``"height"``) or as ``"input.axis"`` (``"x.2"``), which also
    overrides `batch`. Raises BackendError: a size is missing or below 1, or a dtype is not numeric.
    """
    firsts = [spec.dimension_name(0) for spec in specs if spec.shape and not isinstance(spec.shape[0], int)]
    known = {**dict.fromkeys(firsts, batch), **(sizes or {})}
    generator = np.random.default_rng(seed)
    return {spec.name: spec.random(generator, known) for spec in specs}


def onnx_model(model: object, reader: str) -> OnnxModel:
    """Return `model` as bytes, or an `OnnxFile` as it is. Raises BackendError, which names the `reader`, if it is
    something else."""
    if isinstance(model, OnnxFile):
        return model
    if not isinstance(model, (bytes, bytearray, memoryview)):
        raise BackendError(
            f"{reader} builds from the bytes of an ONNX file",
            expected="bytes, or an OnnxFile whose weights lie beside it",
            actual=type(model).__name__,
            hint="pass Path(file).read_bytes() or model_proto.SerializeToString()",
        )
    return bytes(model)


def check_inputs(specs: tuple[InputSpec, ...], inputs: Mapping[str, Array]) -> None:
    """Raise BackendError unless `inputs` has exactly the declared names, dtypes and shapes."""
    names = [spec.name for spec in specs]
    if set(names) != set(inputs):
        raise BackendError(
            "the inputs' names are not the model's",
            expected=", ".join(names) or "no inputs",
            actual=", ".join(inputs) or "no inputs",
            hint="pass one array for each of the model's inputs, under the model's own names",
        )
    for spec in specs:
        _check_array(spec, inputs[spec.name])


def _check_array(spec: InputSpec, array: Array) -> None:
    if not isinstance(array, np.ndarray):
        raise BackendError(
            f"the input '{spec.name}' must be a numpy array",
            actual=type(array).__name__,
            hint="convert it (torch: tensor.numpy())",
        )
    if spec.dtype is None or array.dtype != spec.dtype:
        raise BackendError(
            f"the input '{spec.name}' has the wrong dtype",
            expected=spec.dtype or spec.declared,
            actual=array.dtype,
            hint="cast the array" if spec.dtype else "numpy has no such type: let the model cast its input",
        )
    if not spec.shape and not spec.scalar:
        return  # ORT writes a scalar and an unknown rank alike; its own check comes with the first run
    fits = len(array.shape) == len(spec.shape) and all(
        not isinstance(dimension, int) or dimension == size
        for dimension, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        names = (spec.dimension_name(axis) for axis in range(len(spec.shape)))
        wanted = (d if isinstance(d, int) else name for d, name in zip(spec.shape, names, strict=True))
        raise BackendError(
            f"the input '{spec.name}' has the wrong shape",
            expected=tuple(wanted),
            actual=array.shape,
            hint="names stand for dimensions of any size; the others are fixed in the model",
        )
