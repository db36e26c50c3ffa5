"""ONNX operators that hand on or move data: reshape, transpose, concat, slice, gather, pad."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch.nn import functional

from ..onnx.call import Constant, OnnxCall, Size, Sizes, Unsupported, Value, axes_of, builds, slices_of, torch_dtype

Tensor = torch.Tensor


def _is_number(size: Size) -> bool:
    return isinstance(size, int)


@builds("Reshape")
def _reshape(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    target = list(call.sizes(1)) if call.has(1) else list(call.attr("shape"))
    if not call.attr("allowzero", 0):
        target = [x.shape[i] if _is_number(s) and s == 0 else s for i, s in enumerate(target)]
    return x.reshape(_with_batch(call, x, target))


def _with_batch(call: OnnxCall, x: Tensor, target: list[Size]) -> list[Size]:
    """A target that a file with a fixed batch wrote out, for any batch: the leading dimension grows with it.

    The elements decide: where `x` has more than the target asks for, the target's first dimension is the one that
    holds the batch (heads and windows are folded into it). The import is compared with the file afterwards.
    """
    fixed, batch = call.fixed_batch, call.batch
    if fixed is None or batch is None or not target or any(not _is_number(s) for s in target):
        return target
    if all(_is_number(s) for s in x.shape) or target[0] == -1 or int(target[0]) % fixed:
        return target
    if -1 not in target and reduce(operator.mul, x.shape, 1) == reduce(operator.mul, target, 1):
        return target
    return [int(target[0]) // fixed * batch, *target[1:]]


@builds("Identity")
def _identity(call: OnnxCall) -> Value:
    return call.value(0)


@builds("Dropout")
def _dropout(call: OnnxCall) -> Value:
    """Inference: the input as it is. The mask, where it is read, is all true."""
    if call.has(2) and call.number(2):
        raise Unsupported("dropout in training mode")
    value = call.value(0)
    return value if max(call.used) == 0 else [value, torch.ones_like(call.tensor(0), dtype=torch.bool)]  # type: ignore[return-value]


@builds("DepthToSpace")
def _depth_to_space(call: OnnxCall) -> Tensor:
    x, block = call.tensor(0), call.attr("blocksize")
    if call.attr("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    y = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // block**2, h * block, w * block)


@builds("SpaceToDepth")
def _space_to_depth(call: OnnxCall) -> Tensor:
    x, block = call.tensor(0), call.attr("blocksize")
    n, c, h, w = x.shape
    order = (0, 1, 3, 5, 2, 4) if call.attr("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    y = x.reshape(n, c, h // block, block, w // block, block).permute(order)
    return y.reshape(n, c * block**2, h // block, w // block)


@builds("Flatten")
def _flatten(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    axis = call.attr("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    left = reduce(operator.mul, x.shape[:axis], 1)
    right = reduce(operator.mul, x.shape[axis:], 1)
    return x.reshape(left, right)


@builds("Transpose")
def _transpose(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    return x.permute(call.attr("perm") or list(range(x.dim()))[::-1])


@builds("Squeeze")
def _squeeze(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    axes = axes_of(call, x.dim())
    if axes is None:
        axes = [i for i, s in enumerate(x.shape) if _is_number(s) and s == 1]
    for axis in sorted(axes, reverse=True):
        x = x.squeeze(axis)
    return x


@builds("Unsqueeze")
def _unsqueeze(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    axes = call.attr("axes") or [int(a) for a in call.sizes(1)]
    rank = x.dim() + len(axes)
    for axis in sorted(int(a) % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@builds("Concat")
def _concat(call: OnnxCall) -> Tensor:
    parts = call.tensors()
    axis = call.attr("axis", 0) % max(1, parts[0].dim())
    batch = call.batch
    if call.fixed_batch == 1 and batch is not None and axis != 0 and any(not _is_number(p.shape[0]) for p in parts):
        # a class token of one sample, written out by a file with a fixed batch
        parts = [p.expand(batch, *p.shape[1:]) if _is_number(p.shape[0]) and p.shape[0] == 1 else p for p in parts]
    return torch.cat(parts, axis)


@builds("Split")
def _split(call: OnnxCall) -> Sequence[Tensor]:
    x, axis = call.tensor(0), call.attr("axis", 0)
    sizes = call.attr("split") or (call.sizes(1) if call.has(1) else None)
    if sizes is None:
        length = x.shape[axis]
        chunk = -(-length // call.outputs)
        sizes = [chunk] * (call.outputs - 1) + [length - chunk * (call.outputs - 1)]
    return torch.split(x, list(sizes), axis)  # type: ignore[arg-type]


#: What exporters write for "up to the end".
_ENDS = (2**31 - 1, 2**63 - 1)


@builds("Slice")
def _slice(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    for start, end, axis, step in slices_of(call):
        axis %= x.dim()
        if step > 0:
            x = torch.ops.aten.slice(x, axis, start, end, step)
            continue
        if not all(_is_number(v) for v in (x.shape[axis], start, end)):
            raise Unsupported("a backward slice of a dynamic dimension")
        index = backwards(x.shape[axis], int(start), int(end), int(step))
        whole = index == list(range(x.shape[axis]))[::-1]
        x = x.flip(axis) if whole else x.index_select(axis, torch.tensor(index, dtype=torch.int64))
    return x


def backwards(length: int, start: int, end: int, step: int) -> list[int]:
    """The elements that a slice with a negative step takes. Unlike Python's, it never starts before the first.

    Raises Unsupported for an end past the last element, which ONNX Runtime reads as the beginning.
    """
    if end in _ENDS:
        raise Unsupported("a step back to the very end, which ONNX Runtime takes for the beginning")
    start, end = (i + length if i < 0 else i for i in (start, end))
    return list(range(min(max(start, 0), length - 1), min(max(end, -1), length - 1), step)) if length else []


@builds("Gather")
def _gather(call: OnnxCall) -> Tensor:
    x, axis = call.tensor(0), call.attr("axis", 0)
    indices = call.value(1)
    if isinstance(indices, torch.Tensor):
        if axis == 0 and x.dim() == 2 and isinstance(call.value(0), Constant):
            return functional.embedding(indices, x)
        return x[(slice(None),) * (axis % x.dim()) + (indices,)]
    values = call.known(1)
    if values.ndim == 0:
        return x.select(axis, values.reshape(-1)[0])
    if values.ndim == 1 and isinstance(x.shape[axis], int):
        known = [int(v) % x.shape[axis] for v in values]
        if known == list(range(known[0], known[0] + len(known))) if known else False:
            return x.narrow(axis, known[0], len(known))
        return x.index_select(axis, torch.tensor(known, dtype=torch.int64))
    return x[(slice(None),) * (axis % x.dim()) + (call.tensor(1),)]


def _positive(indices: Tensor, length: Size) -> Tensor:
    """ONNX counts negative indices from the end."""
    counted: Tensor = indices + length  # type: ignore[assignment]
    return torch.where(indices < 0, counted, indices)


@builds("GatherElements")
def _gather_elements(call: OnnxCall) -> Tensor:
    x, axis = call.tensor(0), call.attr("axis", 0)
    return torch.gather(x, axis, _positive(call.tensor(1).long(), x.shape[axis]))


@builds("GatherND")
def _gather_nd(call: OnnxCall) -> Tensor:
    x, indices = call.tensor(0), call.tensor(1)
    if call.attr("batch_dims", 0):
        raise Unsupported("batched indices")
    return x[tuple(_positive(i, s) for i, s in zip(indices.long().unbind(-1), x.shape, strict=False))]


@builds("ScatterElements")
def _scatter_elements(call: OnnxCall) -> Tensor:
    x, axis = call.tensor(0), call.attr("axis", 0)
    indices, updates = _positive(call.tensor(1).long(), x.shape[axis]), call.tensor(2)
    reduction = call.attr("reduction", "none")
    if reduction == "none":
        return torch.scatter(x, axis, indices, updates)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return torch.scatter_reduce(x, axis, indices, updates, names[reduction])


@builds("ScatterND")
def _scatter_nd(call: OnnxCall) -> Tensor:
    x, indices, updates = call.tensor(0), call.tensor(1).long(), call.tensor(2)
    if call.attr("reduction", "none") not in {"none", "add"}:
        raise Unsupported(f"the reduction {call.attr('reduction')}")
    where = tuple(_positive(i, s) for i, s in zip(indices.unbind(-1), x.shape, strict=False))
    return torch.index_put(x, where, updates, accumulate=call.attr("reduction", "none") == "add")


@builds("Expand")
def _expand(call: OnnxCall) -> Tensor:
    x, target = call.tensor(0), call.sizes(1)
    rank = max(x.dim(), len(target))
    have = [1] * (rank - x.dim()) + list(x.shape)
    want = [1] * (rank - len(target)) + list(target)
    sizes = [h if _is_number(w) and w == 1 else w for h, w in zip(have, want, strict=True)]
    if call.fixed_batch is not None and not _is_number(have[0]):
        sizes[0] = have[0]
    return x.expand(sizes)


@builds("Tile")
def _tile(call: OnnxCall) -> Tensor:
    return call.tensor(0).repeat(call.sizes(1))


@builds("Pad")
def _pad(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    if call.opset >= 11:
        pads, value = call.sizes(1), call.number(2, 0)
    else:
        pads, value = call.attr("pads"), call.attr("value", 0.0)
    half = len(pads) // 2
    axes = [int(a) % x.dim() for a in call.sizes(3)] if call.has(3) else list(range(half))
    around: dict[int, tuple[Size, Size]] = {
        axis: (before, after) for axis, before, after in zip(axes, pads[:half], pads[half:], strict=True)
    }
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        call.attr("mode", "constant")
    ]
    first = min(
        (a for a, (b, e) in around.items() if not (_is_number(b) and _is_number(e) and b == e == 0)), default=None
    )
    if first is None:
        return x
    if mode == "constant":
        pairs = [s for axis in range(x.dim() - 1, first - 1, -1) for s in around.get(axis, (0, 0))]
        return functional.pad(x, pairs, value=value)  # type: ignore[arg-type]
    if first < 2 or any(not _is_number(s) or s < 0 for pair in around.values() for s in pair):
        raise Unsupported(f"{mode} padding of batch or channels")
    pairs = [s for axis in range(x.dim() - 1, 1, -1) for s in around.get(axis, (0, 0))]
    return functional.pad(x, pairs, mode=mode)  # type: ignore[arg-type]


@builds("Range")
def _range(call: OnnxCall) -> Tensor:
    start, limit, delta = (call.number(i) for i in range(3))
    return torch.arange(start, limit, delta, dtype=call.dtype(0))


@builds("ConstantOfShape")
def _constant_of_shape(call: OnnxCall) -> Tensor:
    value = call.attr("value")
    if value is None:
        return torch.zeros(call.sizes(0))
    array = np.asarray(value.values)
    return torch.full(call.sizes(0), array.reshape(-1)[0].item(), dtype=torch.from_numpy(array).dtype)


@builds("OneHot")
def _one_hot(call: OnnxCall) -> Tensor:
    indices, depth = call.tensor(0).long(), int(call.number(1))
    off, on = call.tensor(2).unbind(0)
    axis = call.attr("axis", -1)
    hot = _positive(indices, depth).unsqueeze(-1) == torch.arange(depth)
    result = torch.where(hot, on, off)
    return result if axis in (-1, indices.dim()) else result.movedim(-1, axis)


@builds("Trilu")
def _triangle(call: OnnxCall) -> Tensor:
    diagonal = int(call.number(1, 0))
    return (torch.triu if call.attr("upper", 1) else torch.tril)(call.tensor(0), diagonal)


@builds("EyeLike")
def _eye_like(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    dtype = torch_dtype(call.attr("dtype")) if call.attr("dtype") else x.dtype
    column = torch.arange(x.shape[1]) - call.attr("k", 0)
    return (torch.arange(x.shape[0])[:, None] == column[None, :]).to(dtype)


def known(value: Value) -> bool:
    """Whether the value is known while tracing and small: shape arithmetic may then be done on numbers."""
    if isinstance(value, Sizes):
        return True
    return isinstance(value, Constant) and value.array.size <= 64 and value.array.dtype.kind in "iubf"
