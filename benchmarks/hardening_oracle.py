"""What a network computes once some slices of its weights are gone: the oracle of hardening.py.

It runs the ORIGINAL module, eagerly, with full-size tensors. Beside every tensor goes a mask of the same shape that
says which elements are gone. Nothing is known of channels, units or groups: only elements, and what each operator did.

- It starts from the weights alone: which of their elements are missing from the cut program's, identified by value.
  What the activations lose follows from the operators, not from foldcut's analysis.
- A contraction (convolution, matrix product) leaves out the terms of which a factor is gone, and its result is gone
  where no term is left. Which terms are left is probed numerically: the same operator runs on 1 where alive, 0 where
  gone.
- Data movement runs itself on the masks. Element by element, a result is gone where any operand is.
- Layer and group norms take their statistics over what is alive, and whose scale and shift are. Any other reduction
  over elements of which some are gone counts them as zeros, as a network would whose units are zeroed: a cut through
  such a reduction is wrong.
- A constant that is computed in the graph (a normalised weight) has the value that it had before anything was cut.

An operator that is none of these raises `UnknownError`: the oracle cannot tell then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

aten = torch.ops.aten
Mask = torch.Tensor | None
_VIEWS = (aten.view, aten._unsafe_view, aten._reshape_alias)


class UnknownError(Exception):
    """The oracle does not know what an operator does with elements that are gone."""


class Marked(torch.Tensor):
    """A tensor with the mask of its elements that are gone (None: none are). `constant`: no input had a part in it."""

    value: torch.Tensor
    gone: Mask
    constant: bool

    @staticmethod
    def __new__(cls, value: torch.Tensor, gone: Mask = None, constant: bool = False) -> Marked:
        marked = torch.Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=value.device,
        )
        marked.value, marked.constant = value, constant
        marked.gone = gone if gone is not None and bool(gone.any()) else None
        return marked

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Marked({tuple(self.shape)}, gone={0 if self.gone is None else int(self.gone.sum())})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return _dispatch(func, args, kwargs or {})


def _marked(tree: Any) -> list[Marked]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Marked)]


def _values(tree: Any) -> Any:
    """The full values: what counts for constants."""
    return pytree.tree_map(lambda leaf: leaf.value if isinstance(leaf, Marked) else leaf, tree)


def _filled(tree: Any) -> Any:
    """The values with zeros where they are gone."""
    return pytree.tree_map(_fill, tree)


def _fill(leaf: Any) -> Any:
    if not isinstance(leaf, Marked):
        return leaf
    return leaf.value if leaf.gone is None else leaf.value.masked_fill(leaf.gone, 0)


def _gone(leaf: Any) -> torch.Tensor:
    if isinstance(leaf, Marked) and leaf.gone is not None:
        return leaf.gone
    return torch.zeros(leaf.shape, dtype=torch.bool)


def _alive(leaf: torch.Tensor) -> torch.Tensor:
    return (~_gone(leaf)).float()


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    marked = _marked((args, kwargs))
    constant = all(m.constant for m in marked)
    if func._schema.is_mutable and func.overloadpacket is not aten.native_batch_norm:
        return _in_place(func, args, kwargs)
    if all(m.gone is None for m in marked):
        result = func(*_values(args), **_values(kwargs))
        return _wrapped(result, pytree.tree_map(lambda _: None, result), constant)
    packet = func.overloadpacket
    rule = _RULES.get(packet)
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = _pointwise
    if rule is None:
        raise UnknownError(str(packet).removeprefix("aten."))
    bound = _bound(func, args, kwargs)
    result, gone = rule(func, args, kwargs, bound)
    if constant:
        result = func(*_values(args), **_values(kwargs))
    return _wrapped(result, gone, constant)


def _in_place(func: Any, args: Any, kwargs: Any) -> Any:
    """Only what works element by element on its first operand."""
    if torch.Tag.pointwise not in func.tags and func.overloadpacket is not aten.copy_:
        raise UnknownError(f"{func.overloadpacket} in place")
    func(*_values(args), **_values(kwargs))
    target = args[0]
    if isinstance(target, Marked):
        target.gone = _any_gone(_marked((args, kwargs)), target.shape)
    return target


def _wrapped(result: Any, gone: Any, constant: bool) -> Any:
    if isinstance(result, torch.Tensor):
        if constant and COMPUTED:
            gone = _recognised(result, gone)
        return Marked(result, gone, constant)
    if isinstance(result, (tuple, list)):
        gone = [gone] * len(result) if gone is None else gone
        return type(result)(_wrapped(r, g, constant) for r, g in zip(result, gone, strict=True))
    return result


#: Weights that the cut program's original has and the module has not, with what they lost.
COMPUTED: list[tuple[torch.Tensor, torch.Tensor]] = []


def _recognised(result: torch.Tensor, gone: Any) -> Any:
    """What a constant lost that the graph computes here, and that was computed before the cut there."""
    for value, lost in COMPUTED:
        if value.shape == result.shape and torch.allclose(value, result, rtol=1e-4, atol=1e-6):
            return lost if gone is None else gone | lost
    return gone


def _bound(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    names = func._schema.arguments
    found = {a.name: a.default_value for a in names if a.has_default_value()}
    return found | {a.name: v for a, v in zip(names, args, strict=False)} | dict(kwargs)


def _any_gone(marked: Sequence[Marked], shape: Sequence[int]) -> Mask:
    found = None
    for leaf in marked:
        if leaf.gone is not None:
            wide = leaf.gone.expand(shape)
            found = wide.clone() if found is None else found | wide
    return found


# Each rule gives (value, gone), or tuples of them.


def _pointwise(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    del bound
    result = func(*_values(args), **_values(kwargs))
    return result, _any_gone(_marked((args, kwargs)), result.shape)


def _movement(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    """The operator itself on the masks; integer operands without a mask are indices."""
    del bound

    def mask(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if isinstance(leaf, Marked) and (leaf.is_floating_point() or leaf.gone is not None):
            if func.overloadpacket is not aten.as_strided:
                return _gone(leaf)
            laid = torch.empty_strided(leaf.value.shape, leaf.value.stride(), dtype=torch.bool)
            return laid.copy_(_gone(leaf))
        if leaf.is_floating_point():
            return torch.zeros(leaf.shape, dtype=torch.bool)
        return leaf.value if isinstance(leaf, Marked) else leaf

    result = func(*_values(args), **_values(kwargs))
    if func.overloadpacket in _VIEWS:  # the mask may lie in memory in another way
        return result, _gone(args[0]).reshape(result.shape)
    return result, func(*pytree.tree_map(mask, args), **pytree.tree_map(mask, kwargs))


def _spatial(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    """Pooling, resampling, padding: the operator on the mask must say for each result that all or none is gone."""
    del bound
    masked = pytree.tree_map(lambda a: _gone(a).float() if isinstance(a, Marked) else a, args)
    result, share = func(*_filled(args), **_values(kwargs)), func(*masked, **_values(kwargs))
    first = share[0] if isinstance(share, tuple) else share
    if bool(((first > 1e-4) & (first < 1 - 1e-4)).any()):
        raise UnknownError(f"{func.overloadpacket} over elements of which some are gone")
    gone = first > 0.5
    return result, (gone, None) if isinstance(share, tuple) else gone


def _pad(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    del bound
    return func(*_values(args), **_values(kwargs)), func(_gone(args[0]).float(), args[1], 0) > 0.5


def _product(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    """mm, bmm, mv, dot."""
    del bound
    live = func(*(_alive(a) for a in args))
    return func(*_filled(args), **kwargs), live < 0.5


def _add_product(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    """addmm, baddbmm: the addend may be gone as well."""
    del bound
    live = func(torch.zeros(args[0].shape), *(_alive(a) for a in args[1:3]))
    return func(*_filled(args), **kwargs), (live < 0.5) | _gone(args[0]).expand(live.shape)


def _trilinear(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    """nn.Bilinear: products of three tensors, summed."""
    del bound
    live = func(*(_alive(a) for a in args[:3]), *args[3:], **kwargs)
    return func(*_filled(args), **kwargs), live < 0.5


def _glu(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    """The first half gated by the second."""
    first, second = _gone(args[0]).chunk(2, bound["dim"])
    return func(*_values(args), **kwargs), first | second


def _linear(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    live = func(_alive(bound["input"]), _alive(bound["weight"]))
    gone = live < 0.5
    return func(*_filled(args), **_filled(kwargs)), gone if bound["bias"] is None else gone | _gone(bound["bias"])


def _convolution(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    live = func(_alive(args[0]), _alive(args[1]), None, *args[3:])
    reached = func(torch.ones(args[0].shape), torch.ones(args[1].shape), None, *args[3:])
    gone = live < 0.5
    untouched = reached < 0.5  # between the strides of a transposed convolution: gone with the rest of the channel
    if bool(untouched.any()):
        gone = _all_of(gone | untouched).expand(live.shape)
    if bound["bias"] is not None:
        gone = gone | _gone(bound["bias"]).view(1, -1, *[1] * (gone.dim() - 2))
    return func(*_filled(args), **_filled(kwargs)), gone


def _all_of(gone: torch.Tensor) -> torch.Tensor:
    """Whether a whole channel is gone, laid along dim 1."""
    return gone.flatten(2).all(-1).view(*gone.shape[:2], *[1] * (gone.dim() - 2))


def _batch_norm(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    x = args[0]
    gone = _gone(x).clone()
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(bound.get(name), torch.Tensor):
            gone |= _gone(bound[name]).view(1, -1, *[1] * (x.dim() - 2))
    result = func(*_values(args), **_values(kwargs))
    if not isinstance(result, (tuple, list)):
        return result, gone
    return tuple(result), (gone, *[None] * (len(result) - 1))


def _standardised(x: Marked, dims: Sequence[int], eps: float) -> torch.Tensor:
    """Mean 0 and variance 1 along `dims`, over what is alive."""
    alive = ~_gone(x)
    count = alive.sum(dims, keepdim=True).clamp(min=1)
    value = x.value.masked_fill(~alive, 0)
    centred = (value - value.sum(dims, keepdim=True) / count).masked_fill(~alive, 0)
    return centred * torch.rsqrt((centred * centred).sum(dims, keepdim=True) / count + eps)


def rms_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> Marked:
    """Root mean square 1 along the last dimensions, over what is alive. torch takes its own to pieces before a tensor
    subclass sees it, and the mean among them would count what is gone."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims, gone = list(range(x.dim() - len(shape), x.dim())), _gone_at(x, weight)
    value = _values(x).masked_fill(gone, 0)
    count = (~gone).sum(dims, keepdim=True).clamp(min=1)
    y = value * torch.rsqrt((value * value).sum(dims, keepdim=True) / count + eps)
    if weight is not None:
        y = y * _values(weight)
    return Marked(y, gone)


def _gone_at(x: torch.Tensor, *vectors: torch.Tensor | None) -> torch.Tensor:
    """What is gone of the operand of a norm: also where its own scale or shift is. No other weight tells of zeros that
    were padded in."""
    gone = _gone(x)
    for vector in vectors:
        gone = gone if vector is None else gone | _gone(vector)
    return gone


def _layer_norm(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    del func, args, kwargs
    x, weight, bias = bound["input"], bound["weight"], bound["bias"]
    dims = list(range(x.dim() - len(bound["normalized_shape"]), x.dim()))
    gone = _gone_at(x, weight, bias)
    y = _standardised(Marked(_values(x), gone), dims, bound["eps"])
    y = y if weight is None else y * _values(weight)
    y = y if bias is None else y + _values(bias)
    return (y, y[:0], y[:0]), (gone, None, None)


def _laid(vector: torch.Tensor | None, shape: Sequence[int]) -> Marked | None:
    return None if vector is None else Marked(_values(vector).view(shape), _gone(vector).view(shape))


def _group_norm(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    del func, args, kwargs
    x, groups = bound["input"], bound["group"]
    shape, laid = (x.shape[0], groups, -1), (1, -1, *[1] * (x.dim() - 2))
    scale, shift = (_laid(bound[name], laid) for name in ("weight", "bias"))
    gone = _gone_at(x, scale, shift)
    split = Marked(_values(x).reshape(shape), gone.reshape(shape))
    y = _standardised(split, [2], bound["eps"]).reshape(x.shape)
    y = y if scale is None else y * scale.value
    y = y if shift is None else y + shift.value
    return (y, y[:0], y[:0]), (gone, None, None)


def _reduction(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    """Gone where all is gone; what is gone counts as zero."""
    x = args[0]
    result = func(*_filled(args), **_filled(kwargs))
    dims, keep = bound.get("dim"), bool(bound.get("keepdim", False))
    dims = list(range(x.dim())) if dims is None or dims == [] else dims
    gone = _gone(x)
    for dim in sorted({d % x.dim() for d in (dims if isinstance(dims, (list, tuple)) else [dims])}, reverse=True):
        gone = gone.all(dim, keepdim=keep)
    return result, [gone] * len(result) if isinstance(result, (tuple, list)) else gone


def _normalised(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    """softmax, cumsum, sort: as large as before."""
    del bound
    result = func(*_filled(args), **_filled(kwargs))
    gone = _gone(args[0])
    return result, [gone] * len(result) if isinstance(result, (tuple, list)) else gone


def _embedding(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    del kwargs, bound
    table, ids = args[0], _values(args[1])
    return func(table.value, ids), func(_gone(table).float(), ids) > 0.5


def _fresh(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    """Made anew, whatever the tensor is that says how large."""
    del bound
    return func(*_values(args), **_values(kwargs)), None


def _same(func: Any, args: Any, kwargs: Any, bound: Any) -> Any:
    del bound
    return func(*_values(args), **_values(kwargs)), _gone(args[0])


_NAMES: dict[Callable[..., Any], str] = {
    _movement: "view _unsafe_view _reshape_alias reshape permute transpose t unsqueeze squeeze expand repeat slice "
    "select index_select index gather cat stack split split_with_sizes unbind roll flip pixel_shuffle pixel_unshuffle "
    "diagonal native_channel_shuffle channel_shuffle unfold as_strided tril triu repeat_interleave take",
    _spatial: "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d _adaptive_avg_pool2d max_pool2d "
    "adaptive_max_pool2d adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d avg_pool1d "
    "upsample_nearest3d upsample_bilinear2d upsample_linear1d upsample_bicubic2d upsample_trilinear3d reflection_pad1d "
    "reflection_pad2d replication_pad1d replication_pad2d _upsample_nearest_exact2d adaptive_avg_pool1d "
    "adaptive_max_pool1d max_pool1d",
    _pad: "constant_pad_nd",
    _product: "mm bmm mv dot",
    _add_product: "addmm baddbmm addmv",
    _linear: "linear",
    _trilinear: "_trilinear",
    _glu: "glu",
    _pointwise: "_prelu_kernel hardswish",
    _convolution: "convolution",
    _batch_norm: "_native_batch_norm_legit _native_batch_norm_legit_no_training native_batch_norm",
    _layer_norm: "native_layer_norm",
    _group_norm: "native_group_norm",
    _reduction: "sum mean var std amax amin var_mean std_mean linalg_vector_norm logsumexp prod norm max min any all",
    _normalised: "_softmax _safe_softmax _log_softmax cumsum cumprod sort",
    _embedding: "embedding",
    _fresh: "new_zeros new_ones new_full zeros_like ones_like full_like",
    _same: "clone detach alias _to_copy lift_fresh contiguous",
}
_RULES = {getattr(aten, name): rule for rule, names in _NAMES.items() for name in names.split() if hasattr(aten, name)}
