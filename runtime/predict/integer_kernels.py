"""Which integers the kernels of a backend multiply without overflow: found by running small layers on it.

On CPUs without VNNI, 16-bit sums of two products of 8-bit integers saturate in some kernels (onnxruntime's on AVX2): a
network then computes something else than its file says, without a word. Weights of 7 bits cannot overflow there. What
a machine does is tried, not read off its name. TensorRT takes no zero points and no int32 biases: its DequantizeLinear
reads integers of 8 bits and less.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...compiler.support.errors import BackendError, CompilerError, named_first_line
from ...compiler.support.setting_checks import Allowed, check_switch, check_whole, check_word, refuse, settled
from ..measure.backend import Array, Backend
from ..measure.environment import lasting
from ..measure.measurement_cache import MeasurementCache

#: So many values may be off by one step: sums that lie between two integers are rounded either way.
_TIES = 0.01
_CHANNELS, _OUTPUTS, _SIZE = 64, 16, 9
_FORMAT = 2
VALUES, BIASES = ("uint8", "int8"), ("int32", "float32")


@dataclass(frozen=True, kw_only=True)
class IntegerKernels:
    """Integers that a backend computes with exactly.

    Arguments:
        values: Integers of values: ``uint8`` or ``int8``.
        symmetric: Whether zero is in the middle of their range, for ``int8``.
        weight_limit: Weights are integers from ``-weight_limit`` to ``weight_limit``: at most 127.
        bias: How biases are stored: ``int32``, in steps of the sums of products, or ``float32``.
        refused: Why nothing finer is used, as the backend that was tried gave reason to. Empty where it was not tried.

    Raises:
        CompilerError: If a setting is none of these.
    """

    values: str = "uint8"
    symmetric: bool = False
    weight_limit: int = 127
    bias: str = "int32"
    refused: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check_word("values", self.values, VALUES)
        check_switch("symmetric", self.symmetric)
        check_whole("weight_limit", self.weight_limit, Allowed(least=1, most=127))
        check_word("bias", self.bias, BIASES)
        settled(self)
        if self.symmetric and self.values != "int8":
            refuse("values", self.values, "int8", why="cannot be symmetric")

    def __str__(self) -> str:
        zero = "zero in the middle" if self.symmetric else "any zero point"
        return f"{self.values} values with {zero}, weights up to {self.weight_limit}, biases in {self.bias}"


#: What is tried, the finest first: uint8 with any zero uses its range best; some backends take symmetric int8 only.
#: Biases in floating point come last: where they are not needed, runtimes compute such a layer in floating point.
CANDIDATES = tuple(
    IntegerKernels(values=values, symmetric=symmetric, weight_limit=limit, bias=bias)
    for bias in BIASES
    for limit in (127, 63)
    for values, symmetric in (("uint8", False), ("int8", False), ("int8", True))
)


def probe_integers(backend: Backend, *, threads: int = 1, cache: MeasurementCache | None = None) -> IntegerKernels:
    """The first of `CANDIDATES` that the backend computes as ONNX defines it; kept in `cache` under its environment.

    A 3 x 3 convolution and a linear layer are run on values and weights at the ends of their ranges, and compared with
    sums of integers. Raises BackendError where none is exact.
    """
    cache = cache if cache is not None else MeasurementCache(None)
    key = f"integers {_FORMAT} | threads {threads} | {lasting(backend.environment())}"
    known = cache.get([key])
    if key not in known:
        known[key] = {"wrong": _all_wrong(backend, threads)}
        cache.put({key: known[key]})
    wrong: list[str] = known[key]["wrong"]
    if len(wrong) < len(CANDIDATES):
        why = f"{backend.name} with {CANDIDATES[0]}: {wrong[0]}" if wrong else ""
        return replace(CANDIDATES[len(wrong)], refused=why)
    raise BackendError(
        f"{backend.name} does not compute int8 layers as ONNX defines them: {'; '.join(dict.fromkeys(wrong))}",
        hint="leave out quantize, or use another backend",
    )


def _all_wrong(backend: Backend, threads: int) -> list[str]:
    """What the backend gets wrong with each of the candidates up to the first that is exact."""
    found = []
    for candidate in CANDIDATES:
        wrong = _wrong(backend, candidate, threads)
        if not wrong:
            break
        found.append(wrong)
    return found


def _wrong(backend: Backend, kernels: IntegerKernels, threads: int) -> str:
    """What the backend gets wrong, in words; empty where it is exact."""
    for kind in ("conv", "linear"):
        model, inputs, expected, step = _layer(kind, kernels)
        try:
            runner = backend.load(backend.build(model, inputs), inputs, threads=threads)
            with closing(runner):
                runner.run()
                found = np.asarray(runner.outputs()[0])
        except CompilerError as refusal:
            return refusal.message
        except Exception as cause:  # a backend of the user's may end in any way: then it has no such kernels
            return named_first_line(cause)
        if found.shape != expected.shape or not bool(np.isfinite(found).all()):
            return f"a {kind} layer's outputs are not numbers of its shape"
        off = np.abs(np.rint((found - expected) / step))
        if off.max() > 1 or (off > 0).mean() > _TIES:
            return f"{(off > 0).mean():.0%} of a {kind} layer's outputs differ, by up to {off.max():.0f} steps"
    return ""


def _layer(kind: str, kernels: IntegerKernels) -> tuple[bytes, Mapping[str, Array], Array, float]:
    """A layer as ONNX, its inputs, what it computes, and the step of its outputs."""
    chance = np.random.default_rng(0)
    dtype = np.dtype(kernels.values)
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    zero = 0 if kernels.symmetric else (low + high + 1) // 2 - 64
    conv = kind == "conv"
    shape = (1, _CHANNELS, _SIZE, _SIZE) if conv else (_SIZE, _CHANNELS)
    # most values at the upper end, and weights at either end in long runs: sums of neighbours are as large as they get
    values = np.where(chance.random(shape) < 0.8, high, chance.integers(low, high + 1, shape))
    limit = kernels.weight_limit
    ends = np.where(chance.random((_OUTPUTS, _CHANNELS, 1, 1)) < 0.5, -limit, limit)
    weight = np.where(chance.random((_OUTPUTS, _CHANNELS, 3, 3)) < 0.9, ends, chance.integers(-limit, limit + 1))
    weight = weight if conv else weight[:, :, 0, 0]
    bias = chance.integers(-1000, 1000, _OUTPUTS)
    scale, weight_scale = 0.0117, np.linspace(0.003, 0.005, _OUTPUTS)
    sums = (_convolved if conv else _multiplied)(values - zero, weight) + bias.reshape((-1, 1, 1) if conv else (-1,))
    real = sums * (scale * weight_scale).reshape((-1, 1, 1) if conv else (-1,))
    step = float(np.abs(real).max() / 100)
    expected = (np.clip(np.rint(real / step) + zero, low, high) - zero) * step
    tensors: dict[str, Any] = {
        "w": weight.astype(np.int8),
        "ws": weight_scale.astype(np.float32),
        "wz": np.zeros(_OUTPUTS, np.int8),
        "s": np.float32(scale),
        "t": np.float32(step),
        "z": np.asarray(zero, dtype),
    }
    bias_scale = (np.float32(scale) * weight_scale.astype(np.float32)).astype(np.float32)
    if kernels.bias == "int32":
        tensors |= {"b": bias.astype(np.int32), "bs": bias_scale, "bz": np.zeros(_OUTPUTS, np.int32)}
    else:
        tensors |= {"bd": bias.astype(np.float32) * bias_scale}
    model = _model(conv, shape, expected.shape, tensors)
    return model, {"x": ((values - zero) * scale).astype(np.float32)}, expected.astype(np.float32), step


def _model(conv: bool, before: tuple[int, ...], after: tuple[int, ...], tensors: Mapping[str, Any]) -> bytes:
    node = helper.make_node
    layer = (
        node("Conv", ["xd", "wd", "bd"], ["y"], pads=[1] * 4)
        if conv
        else node("Gemm", ["xd", "wd", "bd"], ["y"], transB=1)
    )
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        *([node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0)] if "b" in tensors else []),
        layer,
        node("QuantizeLinear", ["y", "t", "z"], ["yq"]),
        node("DequantizeLinear", ["yq", "t", "z"], ["out"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "integers",
        [value("x", TensorProto.FLOAT, before)],
        [value("out", TensorProto.FLOAT, after)],
        [numpy_helper.from_array(np.asarray(tensor), name) for name, tensor in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _convolved(values: Array, weight: Array) -> Array:
    """Sums of integers: a 3 x 3 convolution, padded by zeros."""
    padded = np.pad(values, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", patches, weight)


def _multiplied(values: Array, weight: Array) -> Array:
    return values @ weight.T
