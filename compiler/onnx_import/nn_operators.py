"""ONNX operators of neural networks: convolution, matrix product, norms, pooling, resizing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..onnx.call import Constant, OnnxCall, Size, Unsupported, Value, builds

Tensor = torch.Tensor

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
_MAX_POOL = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVG_POOL = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
_ADAPTIVE_MAX = {
    1: functional.adaptive_max_pool1d,
    2: functional.adaptive_max_pool2d,
    3: functional.adaptive_max_pool3d,
}


class _Window:
    """Kernel, stride, dilation and padding of a convolution or a pooling over an input."""

    def __init__(self, call: OnnxCall, x: Tensor, kernel: Sequence[int]) -> None:
        self.rank = x.dim() - 2
        if self.rank not in _CONV:
            raise Unsupported(f"{self.rank} spatial dimensions")
        self.kernel = [int(k) for k in kernel]
        self.stride = call.attr("strides") or [1] * self.rank
        self.dilation = call.attr("dilations") or [1] * self.rank
        self.ceil = bool(call.attr("ceil_mode", 0))
        if not len(self.kernel) == len(self.stride) == len(self.dilation) == self.rank:
            raise Unsupported("kernel, strides and dilations differ in length")
        self.before: list[Any]
        self.after: list[Any]
        self.before, self.after = self._padding(call, x)

    def _padding(self, call: OnnxCall, x: Tensor) -> tuple[list[Size], list[Size]]:
        automatic = call.attr("auto_pad", "NOTSET")
        if automatic == "NOTSET":
            pads = call.attr("pads") or [0] * (2 * self.rank)
            return pads[: self.rank], pads[self.rank :]
        if automatic == "VALID":
            return [0] * self.rank, [0] * self.rank
        if call.node.op != "Conv" and any(d != 1 for d in self.dilation):
            raise Unsupported("dilated pooling with automatic padding, which ONNX Runtime pads by the plain kernel")
        before: list[Size] = []
        after: list[Size] = []
        for i in range(self.rank):
            size, stride = x.shape[2 + i], self.stride[i]
            reach = (self.kernel[i] - 1) * self.dilation[i] + 1
            total = torch.sym_max((-(-size // stride) - 1) * stride + reach - size, 0)
            small = total // 2
            before.append(small if automatic == "SAME_UPPER" else total - small)
            after.append(total - small if automatic == "SAME_UPPER" else small)
        return before, after

    @property
    def symmetric(self) -> bool:
        """Whether both sides are padded alike, by numbers: then the operator pads by itself."""
        return all(
            isinstance(b, int) and isinstance(a, int) and a == b for b, a in zip(self.before, self.after, strict=True)
        )

    def padded(self, x: Tensor, value: float = 0.0) -> Tensor:
        """The input with the padding written out."""
        pairs = [p for pair in zip(reversed(self.before), reversed(self.after), strict=True) for p in pair]
        return functional.pad(x, pairs, value=value)


@builds("Conv")
def _conv(call: OnnxCall) -> Tensor:
    x, weight = call.tensor(0), call.tensor(1)
    window = _Window(call, x, weight.shape[2:])
    x, padding = (x, window.before) if window.symmetric else (window.padded(x), [0] * window.rank)
    return _CONV[window.rank](
        x,
        weight,
        call.optional(2),
        window.stride,
        padding,
        window.dilation,
        call.attr("group", 1),
    )


@builds("ConvTranspose")
def _conv_transpose(call: OnnxCall) -> Tensor:
    x, weight = call.tensor(0), call.tensor(1)
    rank = x.dim() - 2
    if rank not in _CONV_TRANSPOSE or call.attr("output_shape") or call.attr("auto_pad", "NOTSET") != "NOTSET":
        raise Unsupported("an output shape that decides the padding")
    pads = call.attr("pads") or [0] * (2 * rank)
    before, after = pads[:rank], pads[rank:]
    extra = call.attr("output_padding") or [0] * rank
    even = before == after
    y = _CONV_TRANSPOSE[rank](
        x,
        weight,
        call.optional(2),
        call.attr("strides") or [1] * rank,
        before if even else [0] * rank,
        extra,
        call.attr("group", 1),
        call.attr("dilations") or [1] * rank,
    )
    if not even:
        for i in range(rank):
            y = torch.narrow(y, 2 + i, before[i], y.shape[2 + i] - before[i] - after[i])
    return y


@builds("Gemm")
def _gemm(call: OnnxCall) -> Tensor:
    a, b = call.tensor(0), call.value(1)
    a = a.t() if call.attr("transA", 0) else a
    alpha, beta = call.attr("alpha", 1.0), call.attr("beta", 1.0)
    bias = call.optional(2)
    weight = _right_factor(b, bool(call.attr("transB", 0)))
    if alpha == 1.0 and (bias is None or (beta == 1.0 and bias.dim() == 1 and bias.shape[0] == weight.shape[0])):
        return functional.linear(a, weight, bias)
    product = functional.linear(a, weight)
    product = product if alpha == 1.0 else product * alpha
    if bias is None or beta == 0.0:
        return product
    return product + (bias if beta == 1.0 else bias * beta)


def _right_factor(value: Value, transposed: bool) -> Tensor:
    """The right factor of a product as `linear` wants it: (out, in)."""
    if isinstance(value, Constant) and value.transposed and not transposed:
        return value.stored()
    tensor = value if isinstance(value, Tensor) else value.tensor()
    return tensor if transposed else tensor.t()


@builds("MatMul")
def _matmul(call: OnnxCall) -> Tensor:
    """A constant matrix on the right is a linear layer; a third input is a bias that normalising has put there."""
    right = call.value(1)
    if isinstance(right, Constant) and right.array.ndim == 2:
        return functional.linear(call.tensor(0), _right_factor(right, False), call.optional(2))
    product = torch.matmul(call.tensor(0), call.tensor(1))
    return product + call.tensor(2) if call.has(2) else product


@builds("BatchNormalization")
def _batch_norm(call: OnnxCall) -> Tensor:
    if call.attr("training_mode", 0) or max(call.used) > 0:
        raise Unsupported("batch norm in training mode")
    x, weight, bias, mean, variance = (call.tensor(i) for i in range(5))
    return functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=call.attr("epsilon", 1e-5))


@builds("InstanceNormalization")
def _instance_norm(call: OnnxCall) -> Tensor:
    return functional.instance_norm(
        call.tensor(0), weight=call.tensor(1), bias=call.tensor(2), eps=call.attr("epsilon", 1e-5)
    )


@builds("LayerNormalization")
def _layer_norm(call: OnnxCall) -> Tensor:
    if max(call.used) > 0:
        raise Unsupported("mean and deviation as outputs")
    x = call.tensor(0)
    shape = x.shape[call.attr("axis", -1) % x.dim() :]
    weight, bias = call.tensor(1), call.optional(2)
    eps = call.attr("epsilon", 1e-5)
    if weight.shape == shape and (bias is None or bias.shape == shape):
        return functional.layer_norm(x, list(shape), weight, bias, eps)
    y = functional.layer_norm(x, list(shape), None, None, eps) * weight
    return y if bias is None else y + bias


@builds("RMSNormalization")
def _rms_norm(call: OnnxCall) -> Tensor:
    x, weight = call.tensor(0), call.tensor(1)
    shape = x.shape[call.attr("axis", -1) % x.dim() :]
    return functional.rms_norm(x, list(shape), None, call.attr("epsilon", 1e-5)) * weight


@builds("GroupNormalization")
def _group_norm(call: OnnxCall) -> Tensor:
    """Scale and bias are per group up to opset 20, per channel from 21 on."""
    x, weight, bias = (call.tensor(i) for i in range(3))
    groups = call.attr("num_groups")
    if weight.shape[0] != x.shape[1]:
        share = x.shape[1] // groups
        weight, bias = weight.repeat_interleave(share), bias.repeat_interleave(share)
    return functional.group_norm(x, groups, weight, bias, call.attr("epsilon", 1e-5))


@builds("LRN")
def _local_response_norm(call: OnnxCall) -> Tensor:
    size = call.attr("size")
    if size % 2 == 0:
        raise Unsupported("an even size, where torch and ONNX centre the window differently")
    return functional.local_response_norm(
        call.tensor(0), size, call.attr("alpha", 1e-4), call.attr("beta", 0.75), call.attr("bias", 1.0)
    )


@builds("MaxPool")
def _max_pool(call: OnnxCall) -> Tensor:
    if max(call.used) > 0:
        raise Unsupported("the indices of the maxima")
    x = call.tensor(0)
    window = _Window(call, x, call.attr("kernel_shape"))
    narrow = all(isinstance(b, int) and 2 * b <= k for b, k in zip(window.before, window.kernel, strict=True))
    if window.symmetric and narrow:
        return _MAX_POOL[window.rank](x, window.kernel, window.stride, window.before, window.dilation, window.ceil)
    if window.ceil:
        raise Unsupported("uneven padding with a last partial window")
    return _MAX_POOL[window.rank](window.padded(x, -math.inf), window.kernel, window.stride, 0, window.dilation)


@builds("AveragePool")
def _average_pool(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    window = _Window(call, x, call.attr("kernel_shape"))
    if any(d != 1 for d in window.dilation):
        raise Unsupported("a dilated average")
    pool, padding_counts = _AVG_POOL[window.rank], bool(call.attr("count_include_pad", 0))
    narrow = all(isinstance(b, int) and 2 * b <= k for b, k in zip(window.before, window.kernel, strict=True))
    if window.symmetric and narrow:
        padded = any(window.before)  # without padding the flag says nothing, and torch's default reads better
        return pool(x, window.kernel, window.stride, window.before, window.ceil, padding_counts or not padded)
    if window.ceil:
        raise Unsupported("uneven padding with a last partial window")
    y = pool(window.padded(x), window.kernel, window.stride)
    if padding_counts:
        return y
    share = pool(window.padded(torch.ones_like(x[:1, :1])), window.kernel, window.stride)
    return y / share


@builds("GlobalAveragePool")
def _global_average_pool(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    return torch.mean(x, list(range(2, x.dim())), keepdim=True)


@builds("GlobalMaxPool")
def _global_max_pool(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    return torch.amax(x, list(range(2, x.dim())), keepdim=True)


@builds("Upsample")
def _upsample(call: OnnxCall) -> Tensor:
    scales = [_ratio(s) for s in call.sizes(1)] if call.has(1) else call.attr("scales")
    if call.attr("mode", "nearest") != "nearest":
        raise Unsupported("linear upsampling of opset 9")
    return _nearest(call.tensor(0), None, scales, "asymmetric", "floor")


@builds("Resize")
def _resize(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    scales, sizes = _targets(call, x)
    mode = call.attr("mode", "nearest")
    where = call.attr("coordinate_transformation_mode", "half_pixel" if call.opset >= 11 else "asymmetric")
    if call.attr("keep_aspect_ratio_policy", "stretch") != "stretch" or where == "tf_crop_and_resize":
        raise Unsupported("an aspect ratio or a crop that decides the size")
    if mode == "nearest":
        return _nearest(
            x, sizes, scales, where, call.attr("nearest_mode", "round_prefer_floor" if call.opset >= 11 else "floor")
        )
    names = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}
    spatial = x.dim() - 2
    aligned = {"half_pixel": False, "pytorch_half_pixel": False, "align_corners": True}.get(where)
    cubic_ok = mode != "cubic" or (call.attr("cubic_coeff_a", -0.75) == -0.75 and not call.attr("exclude_outside", 0))
    if aligned is None or (mode, spatial) not in names or not cubic_ok or call.attr("antialias", 0):
        raise Unsupported(f"resizing {mode} with {where}")
    if where == "pytorch_half_pixel" and 1 in _target_sizes(x, sizes, scales):
        raise Unsupported("resizing to a single row, where pytorch_half_pixel takes the first")
    return functional.interpolate(
        x,
        size=None if sizes is None else sizes[2:],  # type: ignore[arg-type]
        scale_factor=None if scales is None else scales[2:],
        mode=names[mode, spatial],
        align_corners=aligned,
    )


def _targets(call: OnnxCall, x: Tensor) -> tuple[list[float] | None, list[Size] | None]:
    """(scales, sizes) over all dimensions, one of them None; batch and channels may not change."""
    scales: list[float] | None = None
    sizes: list[Size] | None = None
    position = 2 if call.opset >= 11 else 1
    axes = [a % x.dim() for a in call.attr("axes", range(x.dim()))]
    if call.has(position) and len(call.sizes(position)):
        scales = [1.0] * x.dim()
        for axis, scale in zip(axes, call.sizes(position), strict=True):
            scales[axis] = _ratio(scale)
    elif call.has(3):
        sizes = list(x.shape)
        for axis, size in zip(axes, call.sizes(3), strict=True):
            sizes[axis] = size
    else:
        raise Unsupported("neither scales nor sizes")
    if scales is not None and (scales[0] != 1.0 or scales[1] != 1.0):
        raise Unsupported("resizing of batch or channels")
    if sizes is not None and sizes[1] != x.shape[1]:
        raise Unsupported("resizing of channels")
    return scales, sizes


def _ratio(scale: Any) -> float:
    """The ratio that a single-precision scale stands for: 5/3, where 1.6666666 would leave 4 of 3 rows, not 5."""
    near = Fraction(float(scale)).limit_denominator(1024)
    return float(near) if np.float32(float(near)) == np.float32(scale) else float(scale)


def _target_sizes(x: Tensor, sizes: list[Size] | None, scales: list[float] | None) -> list[Size | None]:
    """Sizes of the spatial dimensions after resizing, as far as they are numbers."""
    if sizes is not None:
        return [s if isinstance(s, int) else None for s in sizes[2:]]
    pairs = zip(x.shape[2:], (scales or [])[2:], strict=True)
    return [math.floor(size * scale) if isinstance(size, int) else None for size, scale in pairs]


def _nearest(x: Tensor, sizes: list[Size] | None, scales: list[float] | None, where: str, rounding: str) -> Tensor:
    """Whole enlargements by torch's own operator, everything else by the index of each output row and column."""
    whole = scales is not None and all(float(s).is_integer() and s >= 1 for s in scales)
    same = (where, rounding) == ("asymmetric", "floor") or (
        where in {"half_pixel", "pytorch_half_pixel"} and rounding in {"round_prefer_floor", "round_prefer_ceil"}
    )
    if whole and same and scales is not None and x.dim() in (3, 4, 5):
        return functional.interpolate(x, scale_factor=list(scales[2:]), mode="nearest")
    for axis in range(2, x.dim()):
        source = x.shape[axis]
        if not isinstance(source, int):
            raise Unsupported("nearest resizing of a dynamic dimension")
        scale = scales[axis] if scales is not None else float(sizes[axis]) / source  # type: ignore[index]
        target = math.floor(source * scale) if scales is not None else int(sizes[axis])  # type: ignore[index]
        index = _nearest_index(source, target, scale, where, rounding)
        if list(index) != list(range(source)):
            x = torch.index_select(x, axis, torch.as_tensor(index))
    return x


def _nearest_index(source: int, target: int, scale: float, where: str, rounding: str) -> np.ndarray[Any, Any]:
    """Which source row each output row takes (the definition in the ONNX operator document)."""
    position = np.arange(target, dtype=np.float64)
    if where == "asymmetric":
        position = position / scale
    elif where == "align_corners":
        position = position * (source - 1) / max(target - 1, 1)
    elif where == "half_pixel" or (where == "pytorch_half_pixel" and target > 1):
        position = (position + 0.5) / scale - 0.5
    elif where == "pytorch_half_pixel":
        position = np.zeros_like(position)
    else:
        raise Unsupported(f"nearest resizing with {where}")
    rounding_functions: dict[str, Callable[[Any], Any]] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda p: np.ceil(p - 0.5),
        "round_prefer_ceil": lambda p: np.floor(p + 0.5),
    }
    if rounding not in rounding_functions:
        raise Unsupported(f"rounding {rounding}")
    return np.clip(rounding_functions[rounding](position).astype(np.int64), 0, source - 1)


@builds("GridSample")
def _grid_sample(call: OnnxCall) -> Tensor:
    mode = call.attr("mode", "linear" if call.opset >= 20 else "bilinear")
    x = call.tensor(0)
    name = {
        "linear": "bilinear",
        "bilinear": "bilinear",
        "nearest": "nearest",
        "cubic": "bicubic",
        "bicubic": "bicubic",
    }[mode]
    return functional.grid_sample(
        x,
        call.tensor(1),
        mode=name,
        padding_mode=call.attr("padding_mode", "zeros"),
        align_corners=bool(call.attr("align_corners", 0)),
    )
