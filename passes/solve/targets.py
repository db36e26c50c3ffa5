"""What a re-solved layer must reproduce.

Behind a layer, values that depend on its output per channel and affinely (batch norm in eval mode, layer scale, a
constant bias, a permutation or reshape) are followed up to the *anchor*: the residual addition that the layer feeds,
or the last affine value. There the student is compared with the teacher,

    R = T(anchor') - S(anchor),

and the residual is pulled back through the affine chain to the layer's output, where the solve corrects it. At an
addition S holds the student's own shortcut, so R is (teacher's stream after the add) - (student's shortcut) -
(branch): each solved add pulls the stream back to the teacher's. anchor' is the teacher's *counterpart* of the
anchor: itself, or, where the node behind it now stands in for the exit of a dropped region, the matching node of that
region, so the layer before a dropped block learns to do that block's work too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...compiler.devices.precision import in_float64, widest
from ...compiler.ir.edit import signature
from ...compiler.ir.execute import device_of
from ...compiler.ir.norms import BatchNorm, batch_norm_of
from ...compiler.ir.program import Program, argument, is_call, is_constant, is_tensor
from .layers import Layer

aten = torch.ops.aten
_SHAPES = (aten.view, aten.reshape, aten.unsqueeze, aten.squeeze, aten.flatten)
#: Calls that put elements elsewhere.
_MOVES = (aten.permute, aten.transpose, aten.roll, *_SHAPES)
Residual = Callable[[torch.Tensor], torch.Tensor]

#: Indices that a channel cut left along each dimension; None where all are left.
Kept = tuple[torch.Tensor | None, ...]

#: The zone of a following activation in which its output does not change: values at or below `low`, at or above `high`.
FlatZone = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a layer is compared with the teacher, and how the residual gets back to its output.

    `anchor` is a student node, `counterparts` the teacher nodes it is compared with, none where the teacher has nothing
    of the kind. `shift` names the tensor that can
    take a change of the layer's bias, `shift_scale` what to multiply it by (a batch norm's own bias sits behind its
    scale); None when nothing can. `zone` is the flat zone of the activation behind the anchor, when it is the
    anchor's only reader. `pointwise`: an element of the anchor is at the place of the output that it depends on.
    """

    layer: Layer
    anchor: str
    counterparts: tuple[str, ...]
    steps: tuple[Residual, ...] = field(repr=False)
    shift: str | None
    shift_scale: torch.Tensor | None
    zone: FlatZone | None
    kept: Kept = ()
    pointwise: bool = False

    def teacher_value(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the anchor should be: the mean of its counterparts' values in the teacher, in those channels that the
        student still has."""
        first, *others = (values[name] for name in self.counterparts)
        return select_kept(sum(others, first) / len(self.counterparts) if others else first, self.kept)

    def pull_back(self, residual: torch.Tensor) -> torch.Tensor:
        """A residual at the anchor as the residual at the layer's output. Channels of scale zero get zero: nothing
        can be mended there."""
        for step in reversed(self.steps):
            residual = step(residual)
        return residual


def output_gain(program: Program, target: Target) -> torch.Tensor:
    """How much each output of a layer is multiplied by on its way to the anchor, (groups, out/groups), not negative.

    Errors of different outputs are compared behind that factor: a batch norm folded into the layer then changes no
    comparison, and an output that the norm silences does not count.
    """
    node = program.nodes[target.anchor]
    device = device_of(program)
    back = target.pull_back(torch.ones(program.shape(node, batch=1), dtype=widest(device), device=device))
    ratio = target.layer.outputs(back)[:, :, 0]
    return torch.where(
        ratio == 0, torch.zeros_like(ratio), 1 / torch.where(ratio == 0, torch.ones_like(ratio), ratio)
    ).abs()


def select_kept(value: torch.Tensor, kept: Kept) -> torch.Tensor:
    """The part of a teacher's value that the student still has; the value itself when that is all of it."""
    for dim, indices in enumerate(kept):
        if indices is not None:
            value = value.index_select(dim, indices.to(value.device))
    return value


def trace_target(
    program: Program, layer: Layer, counterparts: Mapping[str, str], kept: Mapping[str, Kept] | None = None
) -> Target:
    """Follow the affine chain behind a layer and build its target. `kept` names what channel cuts left of each
    node."""
    node = program.nodes[layer.node]
    steps: list[Residual] = []
    norm: BatchNorm | None = None
    outputs, pointwise = int(program.module.get_parameter(layer.weight).shape[0]), True
    while (following := _only_user(node)) is not None:
        if is_call(following, aten.add) and _is_residual_join(following, node):
            node = following
            break
        if (found := batch_norm_of(program, following)) is not None and following.args[0] is node:
            norm = norm or (found if not steps else None)
            steps.append(_divide_by(_along_channels(found.scale, node), device_of(program)))
            node = program.nodes[found.output]
            continue
        step = _affine_step(program, following, node, outputs)
        if step is None:
            break
        steps.append(step)
        pointwise = pointwise and not is_call(following, *_MOVES)
        node = following
    shift, scale = _shift(program, layer, norm)
    return Target(
        layer=layer,
        anchor=node.name,
        counterparts=(node.name, counterparts[node.name]) if node.name in counterparts else (node.name,),
        steps=tuple(steps),
        shift=shift,
        shift_scale=scale,
        zone=_flat_zone(node),
        kept=kept_on((kept or {}).get(node.name, ()), device_of(program)),
        pointwise=pointwise,
    )


def counterparts(student: Program, teacher: Program, dropped: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Student node -> the teacher node whose role it plays now, for the nodes where that is another one.

    `dropped` lists (entry, exit) of the regions dropped, in teacher names. An entry plays its region's exit, along
    chains of dropped regions; what feeds the entry through the same activation plays what feeds the exit.
    """
    following = dict(dropped)
    roles: dict[str, str] = {}
    for entry in following:
        if entry in student.nodes:
            role = entry
            while role in following:
                role = following[role]
            roles.update(_same_activation(student, teacher, entry, role))
    return roles


def _same_activation(student: Program, teacher: Program, entry: str, role: str) -> dict[str, str]:
    """entry -> role, and so on upwards while both are made by the same one-operand operation."""
    roles = {entry: role}
    node, other = student.nodes[entry], teacher.nodes[role]
    while _same_operation(node, other):
        node, other = node.all_input_nodes[0], other.all_input_nodes[0]
        if node.op != "call_function" or len(node.users) != 1 or not is_tensor(node):
            break
        roles[node.name] = other.name
    return roles


def _same_operation(node: fx.Node, other: fx.Node) -> bool:
    """Whether both apply one operation with one setting to a single operand of one shape."""
    if node.target != other.target or len(node.all_input_nodes) != 1 or len(other.all_input_nodes) != 1:
        return False
    settings = [[a for a in n.args if not isinstance(a, fx.Node)] for n in (node, other)]
    operands = (node.all_input_nodes[0], other.all_input_nodes[0])
    return settings[0] == settings[1] and signature(operands[0]) == signature(operands[1])


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_residual_join(join: fx.Node, branch: fx.Node) -> bool:
    """An unscaled, unbroadcast addition of two activations."""
    operands = [a for a in join.args if isinstance(a, fx.Node)]
    return (
        len(operands) == 2
        and not any(is_constant(o) or not is_tensor(o) for o in operands)
        and argument(join, 2, "alpha", 1) == 1
        and [str(d) for d in branch.meta["val"].shape] == [str(d) for d in join.meta["val"].shape]
    )


def kept_on(kept: Kept, device: torch.device) -> Kept:
    """Indices where they pick values: moved once, not for each batch."""
    return tuple(None if indices is None else indices.to(device) for indices in kept)


def _along_channels(scale: torch.Tensor, node: fx.Node) -> torch.Tensor:
    return scale.view(-1, *[1] * (node.meta["val"].dim() - 2))


def _divide_by(scale: torch.Tensor, device: torch.device) -> Residual:
    """1 / scale on a device, and 0 where the scale is zero."""
    inverse = torch.where(
        scale == 0, torch.zeros_like(scale), 1 / torch.where(scale == 0, torch.ones_like(scale), scale)
    )
    inverse = inverse.to(device, widest(device))

    def step(residual: torch.Tensor) -> torch.Tensor:
        return residual * inverse.to(residual.dtype)

    return step


def _affine_step(program: Program, following: fx.Node, node: fx.Node, outputs: int) -> Residual | None:
    """The way back through one per-channel affine or data-movement node, or None where the chain ends."""
    if is_call(following, aten.mul, aten.add, aten.sub):
        return _constant_step(program, following, node, outputs)
    if is_call(following, aten.clone, aten.contiguous, aten.dropout, aten.detach, aten.alias):
        return lambda residual: residual
    if is_call(following, aten.permute):
        inverse = [0] * len(following.args[1])  # type: ignore[arg-type]
        for position, dim in enumerate(following.args[1]):  # type: ignore[arg-type]
            inverse[int(dim)] = position
        return lambda residual: residual.permute(inverse)
    if is_call(following, aten.transpose):
        first, second = following.args[1:3]
        return lambda residual: residual.transpose(first, second)  # type: ignore[arg-type]
    if is_call(following, aten.roll):
        shifts, dims = following.args[1], argument(following, 2, "dims", [])
        back = [-int(s) for s in shifts]  # type: ignore[union-attr, arg-type]
        return lambda residual: torch.roll(residual, back, dims)
    if is_call(following, *_SHAPES):
        trailing = _trailing_shape(node)
        return None if trailing is None else (lambda residual: residual.reshape(-1, *trailing))
    return None


def _trailing_shape(node: fx.Node) -> tuple[int, ...] | None:
    """All dims but the first as numbers, when they are static."""
    shape = node.meta["val"].shape
    return tuple(int(d) for d in shape[1:]) if all(isinstance(d, int) for d in shape[1:]) else None


def _constant_step(program: Program, following: fx.Node, node: fx.Node, outputs: int) -> Residual | None:
    if node.meta["val"].shape != following.meta["val"].shape or argument(following, 2, "alpha", 1) != 1:
        return None
    left, right = following.args[0], following.args[1]
    other: Any = right if left is node else left
    if other is node or (isinstance(other, fx.Node) and not is_constant(other)):
        return None
    constant = program.constant(other).detach() if isinstance(other, fx.Node) else torch.tensor(float(other))
    if is_call(following, aten.mul):
        # only one factor per channel: a factor that changes along rows would weight the rows of the fit
        return (
            _divide_by(in_float64(constant), device_of(program))
            if constant.numel() == 1 or (constant.numel() == outputs and max(constant.shape) == outputs)
            else None
        )
    if is_call(following, aten.sub) and left is not node:
        return lambda residual: -residual
    return lambda residual: residual


def _shift(program: Program, layer: Layer, norm: BatchNorm | None) -> tuple[str | None, torch.Tensor | None]:
    """The layer's own bias, else that of the norm behind it, when it is a parameter that nothing else reads."""
    if layer.bias is not None:
        return layer.bias, None
    if norm is not None and program.owned(program.nodes[norm.node].args[2]):
        return norm.bias, norm.scale
    return None, None


def _flat_zone(node: fx.Node) -> FlatZone | None:
    following = _only_user(node)
    if following is None:
        return None
    if is_call(following, aten.relu):
        return (0.0, math.inf)
    if is_call(following, aten.hardtanh):
        return float(argument(following, 1, "min_val", -1.0)), float(argument(following, 2, "max_val", 1.0))
    if is_call(following, aten.clamp, aten.clamp_min):
        low, high = argument(following, 1, "min"), argument(following, 2, "max")
        if any(isinstance(bound, fx.Node) for bound in (low, high)):
            return None
        return (-math.inf if low is None else float(low), math.inf if high is None else float(high))
    if is_call(following, aten.relu6):
        return (0.0, 6.0)
    return None


def residual_at(teacher: torch.Tensor, student: torch.Tensor, zone: FlatZone | None) -> torch.Tensor:
    """T - S, or with a flat zone the least change of S that makes the following activation agree with the teacher's.

    Where the teacher's value lies in a flat part of the activation, every student value in the same part is as good.
    """
    if zone is None:
        return teacher - student
    low, high = zone
    residual = teacher - student
    if low > -math.inf:
        residual = torch.where(teacher <= low, (low - student).clamp(max=0), residual)
    if high < math.inf:
        residual = torch.where(teacher >= high, (high - student).clamp(min=0), residual)
    return residual


__all__ = [
    "FlatZone",
    "Kept",
    "Target",
    "counterparts",
    "kept_on",
    "output_gain",
    "residual_at",
    "select_kept",
    "trace_target",
]
