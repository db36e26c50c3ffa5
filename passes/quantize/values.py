"""Which values stand on integer grids when a layer is quantised."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

import torch
from torch import fx

from ...compiler.analysis.operator_kinds import index_operands, kind_of
from ...compiler.ir.cost import node_macs
from ...compiler.ir.program import Program, argument, dtype_name, is_call, is_tensor
from ...compiler.ir.segments import is_dequantized, is_quantized
from ...compiler.support.errors import RewriteError
from ..solve.layers import Layer, find_layers
from .decision import QuantizeLayer
from .edit_quantize import ValueGrid
from .ranges import GridKind

aten = torch.ops.aten
AS_SAVED = "pass a plan.json as it was saved"
#: What runtimes compute with the layer in front, in its grid: a range is cut off, nothing else changes.
_CLIPS = (aten.relu, aten.relu6, aten.hardtanh, aten.clamp, aten.clamp_min)
#: What they pass on is among what they read.
_PICKS = (
    *(aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.clone, aten.contiguous),
    *(aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d),
)
#: Runtimes compute them in integers where all that they read and what they make is on grids.
_JOINS = (aten.add, aten.cat)


def quantizable(program: Program) -> dict[str, Layer]:
    """The layers that can be quantised, by node name: those that can be re-solved, with a float32 input."""
    layers, _ = find_layers(program)
    return {name: layer for name, layer in layers.items() if not _hindrance(program, layer)}


def unquantizable(program: Program) -> list[tuple[str, str]]:
    """The other layers, and calls that cost multiply-accumulates, each with the reason."""
    layers, rejects = find_layers(program)
    found = {reject.node: reject.reason for reject in rejects}
    found |= {name: _hindrance(program, layer) for name, layer in layers.items()}
    for name, node in program.nodes.items():
        if is_dequantized(argument(node, 1, "weight")):
            found[name] = "it is in integers already"
        elif name not in found and node_macs(program, node):
            found[name] = "it is no convolution or linear layer with a weight of its own"
    return [(name, reason) for name, reason in found.items() if reason]


def _hindrance(program: Program, layer: Layer) -> str:
    """Why a layer cannot be quantised; empty where it can."""
    dtype = program.nodes[layer.input].meta["val"].dtype
    if dtype != torch.float32:
        return f"it computes in {dtype_name(dtype)}, not in float32"
    node = program.nodes[layer.node]
    if layer.bias is None and argument(node, 2, "bias") is not None:
        return "its bias is shared with another layer"
    # two grids in a row: runtimes make one of them, of other steps
    beside = is_dequantized(program.nodes[layer.input]) or any(map(is_quantized, clipped(node).users))
    return "it stands beside what is in integers already" if beside else ""


def standing_for(program: Program, names: Iterable[str]) -> dict[str, list[str]]:
    """The layers that now stand where each of the named ones stood: itself, and what a chain put in front of it."""
    there = quantizable(program)
    found: dict[str, list[str]] = {name: [name] if name in there else [] for name in names}
    for name in there:
        whole = program.nodes[name].meta.get("stands_for")
        if whole in found and whole != name:
            found[whole].append(name)
    return found


def standing_of(program: Program, decisions: Sequence[QuantizeLayer]) -> dict[str, list[str]]:
    """The layers that stand for each of the decisions'.

    Raises RewriteError where there is none, where two decisions are about one, and where they are for kernels that
    differ: values are handed on from one layer to the next.
    """
    names = [decision.layer for decision in decisions]
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise RewriteError(f"two decisions are about {twice[0]!r}", hint="quantise each layer once")
    for decision in decisions[1:]:
        if decision.kernels != decisions[0].kernels:
            raise RewriteError(
                "the layers of a plan are for the kernels of one backend",
                node=decision.layer,
                expected=decisions[0].kernels,
                actual=decision.kernels,
                hint=AS_SAVED,
            )
    found = standing_for(program, names)
    for name, standing in found.items():
        if not standing:
            raise RewriteError(f"no layer {name!r} to quantise", hint="apply a plan to the network it was made for")
    return found


def values_of(program: Program, layers: Iterable[str]) -> list[str]:
    """The values in front of the layers and behind them, in topological order. Behind a layer, what alone clips it
    counts with it; what the network returns stays as it is. Where such a value is a sum or a concatenation, what is
    only moved on its way there from another such value is one as well: it stays on that one's grid, so nothing is lost.
    """
    found: dict[str, None] = {}
    for name in layers:
        node = program.nodes[name]
        source = node.args[0]
        assert isinstance(source, fx.Node)
        found[source.name] = None
        behind = clipped(node)
        if not any(user.op == "output" for user in behind.users):
            found[behind.name] = None
    for name in list(found):
        node = program.nodes[name]
        while is_call(node, *_CLIPS) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        if is_call(node, *_JOINS):
            moved = [operand for operand in node.all_input_nodes if is_tensor(operand)]
            found |= dict.fromkeys(operand.name for operand in moved if _held_by(operand, found) != operand.name)
    return sorted(found, key=program.order.__getitem__)


def held_by(program: Program, values: Sequence[str]) -> dict[str, str]:
    """For each of some values, in topological order, the first of them that holds all of its elements: what is only
    moved or picked (by a max pooling, say) stays on the grid that it is on, exactly."""
    found: dict[str, str] = {}
    for name in values:
        found[name] = found.get(source := _held_by(program.nodes[name], found), source)
    return found


def stays_on_grids(node: fx.Node) -> bool:
    """Whether a call passes on integers where it reads them: it moves, picks or clips them, or runtimes compute it in
    integers."""
    return is_tensor(node) and (is_call(node, *_CLIPS, *_JOINS) or _picked_from(node) is not None)


def _held_by(node: fx.Node, values: Container[str]) -> str:
    """The nearest of some values that a value is moved or picked from; the value itself where there is none."""
    before = _picked_from(node)
    while before is not None and before.name not in values:
        before = _picked_from(before)
    return node.name if before is None else before.name


def _picked_from(node: fx.Node) -> fx.Node | None:
    """The operand whose elements, and zeros, are all that a call passes on."""
    if not is_tensor(node) or not node.meta["val"].is_floating_point():
        return None
    if not (_pads_with_zeros(node) or is_call(node, *_PICKS) or kind_of(node) == "movement"):
        return None
    operands = [
        operand for operand in node.all_input_nodes if is_tensor(operand) and operand not in index_operands(node)
    ]
    return operands[0] if len(operands) == 1 else None


def _pads_with_zeros(node: fx.Node) -> bool:
    if is_call(node, aten.constant_pad_nd):
        return argument(node, 2, "value", 0) == 0
    return (
        is_call(node, aten.pad)
        and argument(node, 2, "mode", "constant") == "constant"
        and not argument(node, 3, "value")
    )


def usual_grids(program: Program, values: Sequence[str], kind: GridKind) -> dict[str, ValueGrid]:
    """Grids of any scale for values, with zero where data would put it: at the lower end of what is cut off below zero.
    Runtimes fuse such a clip with the layer in front only then."""
    found = {}
    for name, held in held_by(program, values).items():
        least = least_of(program.nodes[held])
        found[name] = kind.over(0.0 if least is not None and least >= 0 else -4.0, 4.0)
    return found


def least_of(node: fx.Node) -> float | None:
    """Where a clip cuts its values off below; None for other nodes, and where nothing is cut off there."""
    if is_call(node, aten.relu, aten.relu6):
        return 0.0
    least = None
    if is_call(node, aten.hardtanh):
        least = argument(node, 1, "min_val", -1.0)
    elif is_call(node, aten.clamp, aten.clamp_min):
        least = argument(node, 1, "min")
    return float(least) if isinstance(least, (int, float)) else None


def clipped(node: fx.Node) -> fx.Node:
    """The last of the calls that alone read a value and cut off a range of it; the value itself where there is none."""
    while len(node.users) == 1:
        (user,) = node.users
        if not (is_call(user, *_CLIPS) and is_tensor(user) and user.args[0] is node):
            break
        node = user
    return node
