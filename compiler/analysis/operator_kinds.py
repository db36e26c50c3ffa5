"""What kind of thing an operator does to the elements of its operands: the one table behind label rules and the proof
of a cut.

Only operators whose every element-wise effect is known are listed. What is not listed has no kind, and is left alone.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..ir.program import is_tensor

aten = torch.ops.aten

_KINDS = {
    # elements go elsewhere, none is computed
    "movement": (
        "view reshape _unsafe_view permute transpose t unsqueeze squeeze expand repeat tile slice select index_select "
        "index gather stack chunk split split_with_sizes tensor_split unbind roll flip pixel_shuffle pixel_unshuffle "
        "channel_shuffle flatten unflatten movedim narrow repeat_interleave expand_as view_as swapaxes"
    ),
    # element by element in the first operand
    "same": (
        "clone contiguous alias detach lift_fresh_copy dropout feature_dropout alpha_dropout to _to_copy hardswish "
        "celu log_sigmoid selu relu6 type_as zeros_like ones_like full_like"
    ),
    # each channel of dimension 1 by itself, over the dimensions behind it
    "spatial": (
        "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d "
        "upsample_bilinear2d upsample_bicubic2d upsample_nearest1d upsample_linear1d upsample_nearest3d "
        "upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
        "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"
    ),
    # some dimensions become one value
    "reduction": (
        "mean sum amax amin max min prod var std var_mean std_mean norm linalg_vector_norm logsumexp any all argmax "
        "argmin"
    ),
    # elements along some dimensions depend on each other, as many come out as went in
    "normalised": "softmax _softmax log_softmax _log_softmax cumsum cumprod logcumsumexp sort softmin",
    # one value everywhere
    "uniform": "zeros ones full new_zeros new_ones new_full",
    "batch_norm": "_native_batch_norm_legit_no_training native_batch_norm batch_norm",
    "layer_norm": "layer_norm native_layer_norm rms_norm",
    "group_norm": "group_norm native_group_norm",
    "pad": "constant_pad_nd pad",
    "concatenate": "cat",
    "prelu": "prelu",
    "convolution": "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d",
    "linear": "linear",
    "embedding": "embedding",
    "addmm": "addmm",
    "attention": "scaled_dot_product_attention",
    "einsum": "einsum",
    "matmul": "matmul mm bmm",
}


def _table() -> dict[object, str]:
    return {
        getattr(aten, name): kind for kind, names in _KINDS.items() for name in names.split() if hasattr(aten, name)
    }


_OF = _table()
#: They read memory by its layout, which says nothing about channels.
_BY_LAYOUT = {aten.as_strided, aten.as_strided_copy, aten.as_strided_scatter}


def kind_of(node: fx.Node) -> str | None:
    """The kind of a call: a key of the table, ``getitem``, ``elementwise`` by torch's own tag, ``movement`` for views
    that the table does not name; None when it is not known."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return "getitem"
    packet = getattr(node.target, "overloadpacket", None)
    if packet in (aten.max, aten.min) and len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        return "elementwise"  # the greater of two tensors
    kind = _OF.get(packet)
    if kind is not None or not isinstance(node.target, torch._ops.OpOverload) or packet in _BY_LAYOUT:
        return kind
    if torch.Tag.pointwise in node.target.tags:
        return "elementwise"
    return "movement" if any(r.alias_info is not None for r in node.target._schema.returns) else None


def index_operands(node: fx.Node) -> list[fx.Node]:
    """Operands that say which elements a movement takes."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet in (aten.index, aten.index_select, aten.gather, aten.take, aten.repeat_interleave):
        found: list[fx.Node] = []
        fx.node.map_arg((node.args[1:], node.kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
        return [n for n in found if is_tensor(n)]
    return []


def follows_one(node: fx.Node) -> bool:
    """Whether a call changes or moves the elements of one tensor each by itself, so that a part of its result can be
    computed from a part of that tensor."""
    kind = kind_of(node)
    if kind not in ("movement", "elementwise", "same") or not is_tensor(node):
        return False
    indices = index_operands(node)
    operands = [n for n in node.all_input_nodes if is_tensor(n) and n not in indices]
    wide = [n for n in operands if n.meta["val"].dim()]
    if len(wide) != 1 or (kind == "movement" and len(operands) != 1):
        return False
    return kind == "movement" or wide[0].meta["val"].shape == node.meta["val"].shape
