"""ONNX operators that compute: elementwise, comparisons, reductions, softmax."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch.nn import functional

from ..onnx.call import Constant, OnnxCall, Sizes, Unsupported, Value, axes_of, builds, torch_dtype

Tensor = torch.Tensor


def _computable(call: OnnxCall) -> OnnxCall:
    """The call itself. Raises Unsupported for types that torch stores but does not compute with."""
    for index in range(len(call.inputs)):
        if call.has(index) and call.dtype(index) in {torch.uint16, torch.uint32, torch.uint64}:
            raise Unsupported(f"torch does not compute with {call.dtype(index)}")
    return call


def _enter_unary(table: dict[str, Callable[[Tensor], Tensor]]) -> None:
    for op, function in table.items():

        def build(call: OnnxCall, function: Callable[[Tensor], Tensor] = function) -> Tensor:
            return function(_computable(call).tensor(0))

        builds(op)(build)


_enter_unary(
    {
        "Abs": torch.abs,
        "Neg": torch.neg,
        "Exp": torch.exp,
        "Log": torch.log,
        "Sqrt": torch.sqrt,
        "Reciprocal": torch.reciprocal,
        "Floor": torch.floor,
        "Ceil": torch.ceil,
        "Round": torch.round,
        "Sign": torch.sign,
        "Sin": torch.sin,
        "Cos": torch.cos,
        "Tan": torch.tan,
        "Asin": torch.asin,
        "Acos": torch.acos,
        "Atan": torch.atan,
        "Sinh": torch.sinh,
        "Cosh": torch.cosh,
        "Tanh": torch.tanh,
        "Asinh": torch.asinh,
        "Acosh": torch.acosh,
        "Atanh": torch.atanh,
        "Erf": torch.erf,
        "Sigmoid": torch.sigmoid,
        "Relu": torch.relu,
        "Softplus": functional.softplus,
        "Softsign": functional.softsign,
        "HardSwish": functional.hardswish,
        "Mish": functional.mish,
        "Not": torch.logical_not,
        "BitwiseNot": torch.bitwise_not,
        "IsNaN": torch.isnan,
    }
)


@builds("LeakyRelu")
def _leaky_relu(call: OnnxCall) -> Tensor:
    return functional.leaky_relu(call.tensor(0), call.attr("alpha", 0.01))


@builds("Elu")
def _elu(call: OnnxCall) -> Tensor:
    return functional.elu(call.tensor(0), call.attr("alpha", 1.0))


@builds("Celu")
def _celu(call: OnnxCall) -> Tensor:
    return functional.celu(call.tensor(0), call.attr("alpha", 1.0))


@builds("Selu")
def _selu(call: OnnxCall) -> Tensor:
    alpha, gamma = call.attr("alpha", 1.67326319217681884765625), call.attr("gamma", 1.05070102214813232421875)
    if abs(alpha - 1.6732632) > 1e-6 or abs(gamma - 1.0507010) > 1e-6:
        return gamma * functional.elu(call.tensor(0), alpha)
    return functional.selu(call.tensor(0))


@builds("ThresholdedRelu")
def _thresholded_relu(call: OnnxCall) -> Tensor:
    return functional.threshold(call.tensor(0), call.attr("alpha", 1.0), 0.0)


@builds("HardSigmoid")
def _hard_sigmoid(call: OnnxCall) -> Tensor:
    alpha, beta = call.attr("alpha", 0.2), call.attr("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and abs(beta - 0.5) < 1e-6:
        return functional.hardsigmoid(call.tensor(0))
    return torch.clamp(call.tensor(0) * alpha + beta, 0.0, 1.0)


@builds("Gelu")
def _gelu(call: OnnxCall) -> Tensor:
    approximate = call.attr("approximate", "none")
    return functional.gelu(call.tensor(0), approximate=approximate)


@builds("Swish")
def _swish(call: OnnxCall) -> Tensor:
    alpha, x = call.attr("alpha", 1.0), call.tensor(0)
    return functional.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@builds("PRelu")
def _prelu(call: OnnxCall) -> Tensor:
    x, slope = call.tensor(0), call.operand(1, call.tensor(0).dim())
    if isinstance(slope, torch.Tensor):
        per_channel = slope.dim() == x.dim() - 1 and all(s == 1 for s in slope.shape[1:])
        if per_channel and x.dim() > 2 and slope.shape[0] == x.shape[1]:
            return functional.prelu(x, slope.flatten())
        return torch.where(x < 0, x * slope, x)
    return functional.leaky_relu(x, slope)


@builds("Clip")
def _clip(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    low, high = call.attr("min"), call.attr("max")
    if call.opset >= 11:
        low = call.operand(1, 0) if call.has(1) else None
        high = call.operand(2, 0) if call.has(2) else None
    if low is None and high is None:
        return x
    if isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor):
        x = x if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype))
        return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype))
    return torch.clamp(x, low, high)


@builds("IsInf")
def _is_inf(call: OnnxCall) -> Tensor:
    positive, negative = call.attr("detect_positive", 1), call.attr("detect_negative", 1)
    x = call.tensor(0)
    if positive and negative:
        return torch.isinf(x)
    if not (positive or negative):
        return torch.zeros_like(x, dtype=torch.bool)
    return x == (math.inf if positive else -math.inf)


@builds("Cast")
def _cast(call: OnnxCall) -> Tensor:
    return _converted(call, torch_dtype(call.attr("to")))


@builds("CastLike")
def _cast_like(call: OnnxCall) -> Tensor:
    return _converted(call, call.dtype(1))


def _converted(call: OnnxCall, dtype: torch.dtype) -> Tensor:
    """Into eight-bit floats ONNX cuts off at the largest number by default; torch has one way for each."""
    x = call.tensor(0)
    if dtype in {torch.float8_e4m3fn, torch.float8_e5m2}:
        if not call.attr("saturate", 1):
            raise Unsupported("a cast to eight-bit floats that lets large numbers overflow")
        largest = torch.finfo(dtype).max
        x = torch.clamp(x, -largest, largest)
    return x.to(dtype)


def _binary(function: Callable[[Any, Any], Tensor]) -> Callable[[OnnxCall], Tensor]:
    def build(call: OnnxCall) -> Tensor:
        a, b = _operands(_computable(call))
        return function(a, b)

    return build


def _operands(call: OnnxCall) -> tuple[Any, Any]:
    """At most one of the two as a number: constants of one element stay numbers, the graph then has no tensor for
    them."""
    second = call.operand(1, _rank(call, 0))
    if isinstance(second, torch.Tensor) and second.dim() >= _rank(call, 0):
        first = call.operand(0, second.dim())
        return first, second
    return call.tensor(0), second


def _rank(call: OnnxCall, index: int) -> int:
    value = call.value(index)
    if isinstance(value, Sizes):
        return int(value.values.ndim)
    return int(value.array.ndim) if isinstance(value, Constant) else value.dim()


def _is_number(value: Any) -> bool:
    return not isinstance(value, torch.Tensor)


def _logical(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[OnnxCall], Tensor]:
    return lambda call: function(call.tensor(0), call.tensor(1))


for _op, _function in {  # with a number on the left Python turns to the tensor's reflected operator
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Equal": operator.eq,
    "Greater": operator.gt,
    "Less": operator.lt,
    "GreaterOrEqual": operator.ge,
    "LessOrEqual": operator.le,
}.items():
    builds(_op)(_binary(_function))

for _op, _pairwise in {
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}.items():
    builds(_op)(_logical(_pairwise))


@builds("Div")
def _div(call: OnnxCall) -> Tensor:
    a, b = _operands(_computable(call))
    if _is_number(a) and b.is_floating_point():
        return b.reciprocal() if a == 1 else b.reciprocal() * a
    a = call.tensor(0)
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@builds("Pow")
def _power(call: OnnxCall) -> Tensor:
    base, exponent = _operands(call)
    result = torch.pow(base, exponent)
    return result.to(call.dtype(0))  # the type of the base, whatever the exponent's


@builds("Mod")
def _modulo(call: OnnxCall) -> Tensor:
    a, b = _computable(call).tensor(0), call.operand(1, _rank(call, 0))
    return torch.fmod(a, b) if call.attr("fmod", 0) else torch.remainder(a, b)


def _fold(function: Callable[[Any, Any], Tensor]) -> Callable[[OnnxCall], Tensor]:
    return lambda call: reduce(function, _computable(call).tensors())


for _op, _variadic in {
    "Sum": lambda a, b: a + b,
    "Min": torch.minimum,
    "Max": torch.maximum,
}.items():
    builds(_op)(_fold(_variadic))


@builds("Mean")
def _mean(call: OnnxCall) -> Tensor:
    parts = call.tensors()
    return reduce(lambda a, b: a + b, parts) / len(parts)


@builds("Where")
def _where(call: OnnxCall) -> Tensor:
    condition = call.tensor(0)
    a, b = (call.operand(i, max(condition.dim(), _rank(call, 3 - i))) for i in (1, 2))
    if _is_number(a) and _is_number(b):
        a = call.tensor(1)  # two numbers would take torch's default type
    return torch.where(condition, a, b)


_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceL1": lambda x, dim, keepdim: torch.sum(torch.abs(x), dim, keepdim=keepdim),
    "ReduceL2": lambda x, dim, keepdim: torch.sqrt(torch.sum(x * x, dim, keepdim=keepdim)),
    "ReduceSumSquare": lambda x, dim, keepdim: torch.sum(x * x, dim, keepdim=keepdim),
    "ReduceLogSum": lambda x, dim, keepdim: torch.log(torch.sum(x, dim, keepdim=keepdim)),
}


def _reduction(function: Callable[..., Tensor]) -> Callable[[OnnxCall], Value]:
    def build(call: OnnxCall) -> Value:
        x = call.tensor(0)
        axes = axes_of(call, x.dim())
        if not axes:
            if call.attr("noop_with_empty_axes", 0):
                if call.node.op in {"ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"}:
                    raise Unsupported("an elementwise step without a reduction")
                return x
            axes = list(range(x.dim()))
        if not axes:
            raise Unsupported("a reduction of a scalar")
        if any(isinstance(x.shape[a], int) and x.shape[a] == 0 for a in axes):
            raise Unsupported("a reduction of nothing")
        return function(x, axes, keepdim=bool(call.attr("keepdims", 1))).to(x.dtype)

    return build


for _op, _reducer in _REDUCTIONS.items():
    builds(_op)(_reduction(_reducer))


@builds("ReduceProd")
def _reduce_prod(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    axes = axes_of(call, x.dim())
    if not axes:
        if axes is not None and call.attr("noop_with_empty_axes", 0):
            return x
        axes = list(range(x.dim()))
    keep = bool(call.attr("keepdims", 1))
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x.to(call.dtype(0))


def _arg(function: Callable[..., Tensor]) -> Callable[[OnnxCall], Tensor]:
    def build(call: OnnxCall) -> Tensor:
        x = call.tensor(0)
        axis, keep = call.attr("axis", 0), bool(call.attr("keepdims", 1))
        if call.attr("select_last_index", 0):
            return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keep)
        return function(x, axis, keepdim=keep)

    return build


builds("ArgMax")(_arg(torch.argmax))
builds("ArgMin")(_arg(torch.argmin))


def _normalised(function: Callable[..., Tensor]) -> None:
    op = {"softmax": "Softmax", "log_softmax": "LogSoftmax"}[function.__name__]

    @builds(op, since=13)
    def along_axis(call: OnnxCall) -> Tensor:
        return function(call.tensor(0), call.attr("axis", -1))

    @builds(op, until=12)
    def over_the_rest(call: OnnxCall) -> Tensor:
        """Before opset 13 everything from `axis` on is one long row."""
        x = call.tensor(0)
        axis = call.attr("axis", 1) % max(1, x.dim())
        if all(isinstance(s, int) and s == 1 for s in x.shape[axis + 1 :]):
            return function(x, axis)
        return function(x.flatten(axis), axis).reshape(x.shape)


_normalised(functional.softmax)
_normalised(functional.log_softmax)


@builds("CumSum")
def _cumulative_sum(call: OnnxCall) -> Tensor:
    x, axis = call.tensor(0), int(call.number(1))
    backwards, exclusive = call.attr("reverse", 0), call.attr("exclusive", 0)
    x = x.flip(axis) if backwards else x
    total = torch.cumsum(x, axis, dtype=x.dtype)
    total = total - x if exclusive else total
    return total.flip(axis) if backwards else total


@builds("Einsum")
def _einsum(call: OnnxCall) -> Tensor:
    return torch.einsum(call.attr("equation"), call.tensors())


@builds("LpNormalization")
def _lp_normalization(call: OnnxCall) -> Tensor:
    x, order, axis = call.tensor(0), call.attr("p", 2), call.attr("axis", -1)
    norm = torch.linalg.vector_norm(x, order, axis, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)  # a zero vector stays zero
