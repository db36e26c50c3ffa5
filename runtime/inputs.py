"""A model's inputs as a session declares them: checked against arrays, or filled with random values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..compiler.errors import BackendError
from .backend import Array

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

    `dtype` is None when numpy has no such type (strings, bfloat16); `declared` is ORT's name of it.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype[Any] | None
    declared: str

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
    if not spec.shape:
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
