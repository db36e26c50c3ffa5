"""The state of one run of labels through a graph: what rules read and write."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.execute import ConcreteValues
from ..ir.program import Program, is_constant, is_tensor
from .labels import FIXED, Labels, along, compress, fixed, lifted, slim
from .operator_kinds import follows_one, kind_of

#: A constant with more elements than this gets no labels of its own when it meets activations or is moved.
LARGEST_CONSTANT = 1 << 22

#: Labels of one value: a tensor, a tuple of them for several outputs, None for what is no tensor.
Value = Any
Rule = Callable[["Trace", fx.Node], Value]


@dataclass(frozen=True, kw_only=True, eq=False)
class Slot:
    """One dimension of a parameter that follows the channels: `labels` has one entry per index.

    `role` is ``out`` where the channels are made, ``in`` where they are consumed, ``carry`` where a grouped layer
    passes them on.
    """

    parameter: str
    dim: int
    role: str
    node: str
    labels: torch.Tensor


class Trace:
    """Labels of every value so far, the slots found, and the constraints that have to wait until all is known."""

    def __init__(self, program: Program, rules: Callable[[fx.Node], Rule | None]) -> None:
        self.program = program
        self._rules = rules
        self.labels = Labels()
        self.values: dict[str, Value] = {}
        self.slots: list[Slot] = []
        #: tensors that vary along more than one dimension, to be made rectangular
        self.crossed: list[torch.Tensor] = []
        #: (labels of a constant, labels of the activation that it meets), aligned from the last dimension
        self.met: list[tuple[torch.Tensor, torch.Tensor, str]] = []
        self.constants: dict[str, torch.Tensor] = {}
        self.unknown: dict[str, list[str]] = {}
        self.concrete = ConcreteValues(program)
        #: constants that are settled along one dimension
        self.rectangular: set[tuple[str, str]] = set()
        #: parameter -> why no dimension of it may be cut
        self.locked_parameters: dict[str, str] = {}
        #: (parameter, dimension) -> why it may not be cut along it
        self.locked_dims: dict[tuple[str, int], str] = {}
        #: nodes that no input reaches: constants that the graph computes
        self.inputless: set[str] = set()
        #: those that are evaluated before a cut, since no part of them follows from a part of what they read
        self.derived: dict[str, torch.Tensor] = {}
        #: derived or followed constant -> why it keeps its size
        self.locked_computed: dict[str, str] = {}

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.program.shape(node)

    def of(self, value: Any) -> torch.Tensor:
        """The labels of an operand: an activation's, a constant's own, FIXED for a number."""
        if not isinstance(value, fx.Node):
            return torch.tensor(FIXED)
        if is_constant(value):
            return self.constant(value)
        if value.name in self.inputless and is_tensor(value):
            return self.computed(value)
        found = self.values.get(value.name)
        if isinstance(found, torch.Tensor):
            return found
        return fixed(self.shape(value)) if is_tensor(value) else torch.tensor(FIXED)

    def constant(self, node: fx.Node) -> torch.Tensor:
        """A constant's own labels, one per element, made when first asked for. Names of one tensor share them."""
        name = self.name(node)
        if name not in self.constants:
            self.constants[name] = self._own(tuple(self.program.constant(node).shape))
        return self.constants[name]

    def computed(self, node: fx.Node) -> torch.Tensor:
        """The labels of a constant that the graph computes, made when first asked for.

        Where it only moves or maps the elements of one tensor, they are those of that tensor. Anything else (a softmax
        of a parameter, a table over its norm) is a constant of its own, evaluated before it is cut.
        """
        if node.name not in self.values:
            rule = self._rules(node)
            uniform = kind_of(node) == "uniform"
            try:
                found = rule(self, node) if rule and (uniform or follows_one(node)) else None
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
                found = None
            if not isinstance(found, torch.Tensor):
                found = self._own(self.shape(node))
                self.derived[node.name] = found
            self.values[node.name] = found
        found = self.values[node.name]
        assert isinstance(found, torch.Tensor)
        return found

    def _own(self, shape: Sequence[int]) -> torch.Tensor:
        count = math.prod(shape)
        return self.labels.fresh(count, free=True).reshape(tuple(shape)) if count <= LARGEST_CONSTANT else fixed(shape)

    def is_fixed_value(self, value: Any) -> bool:
        """Whether the operand is a tensor that no input reaches, stored or computed."""
        return is_constant(value) or (isinstance(value, fx.Node) and is_tensor(value) and value.name in self.inputless)

    def name(self, node: fx.Node) -> str:
        """The first name under which the graph reads this tensor."""
        return self.program.first_names[str(node.target)]

    def slot(self, parameter: fx.Node, dim: int, role: str, node: fx.Node, labels: torch.Tensor) -> None:
        self.slots.append(Slot(parameter=self.name(parameter), dim=dim, role=role, node=node.name, labels=labels))

    def meet(self, operands: Sequence[torch.Tensor], shape: Sequence[int], where: str) -> torch.Tensor:
        """Labels of an elementwise result. Operands that share a varying dimension are united; constants wait.

        An operand of size 1 along every dimension in which the other varies puts no constraint on it.
        """
        shape = list(shape)
        reason = meets_fixed(where)
        active = [o for o in operands if not (o.dim() == 0 and int(o) == FIXED)]
        if not active:
            return fixed(shape)
        free = [o for o in active if self.labels.all_free(o)]
        real = [o for o in active if not self.labels.all_free(o)] or free
        result = lifted(real[0], len(shape))
        for other in real[1:]:
            result = self._join(result, lifted(other, len(shape)), reason)
        if real is not free:
            self.met.extend((lifted(constant, len(shape)), result, where) for constant in free)
        return compress(result.expand(shape))

    def _join(self, first: torch.Tensor, second: torch.Tensor, reason: str) -> torch.Tensor:
        one, two = self.labels.varying(first), self.labels.varying(second)
        linked = any(first.shape[d] > 1 and second.shape[d] > 1 for d in {*one, *two})
        if linked or (one and two):
            self.labels.unite(first, second, reason)
        shape = torch.broadcast_shapes(first.shape, second.shape)
        lead = first if one or not two else second
        return lead.expand(shape)

    def tie_others(self, labels: torch.Tensor, dim: int, where: str) -> None:
        """Tie along all dimensions but one, for an operator that treats each channel of it alike."""
        self.labels.tie(labels, [d for d in range(labels.dim()) if d != dim], meets_fixed(where))

    def channel_parameters(self, x: torch.Tensor, parameters: Sequence[Any], dim: int, where: str) -> None:
        """Per-channel parameters (of a norm) meet an activation along one dimension."""
        for parameter in parameters:
            if self.is_fixed_value(parameter):
                own = self.of(parameter).reshape(-1)
                self.met.append(
                    (along(own, dim, [own.numel() if d == dim % x.dim() else 1 for d in range(x.dim())]), x, where)
                )
            elif isinstance(parameter, fx.Node):
                self.labels.lock(x, f"meets a computed parameter at {where}")

    def lock_node(self, node: fx.Node, reason: str) -> Value:
        """Lock everything that a node reads; its result has no channels."""
        for operand in node.all_input_nodes:
            if self.is_fixed_value(operand):
                self.lock_constant(operand, reason)
            else:
                for leaf in leaves_of(self.values.get(operand.name)):
                    self.labels.lock(leaf, reason)
        return self.fixed_like(node)

    def lock_constant(self, node: fx.Node, reason: str) -> None:
        """What reads this constant needs all of it; `lock_constants` puts that into effect."""
        if is_constant(node):
            if self.program.constant(node).dim():
                self.locked_parameters.setdefault(self.name(node), reason)
        elif node.name not in self.locked_computed:
            self.locked_computed[node.name] = reason
            if follows_one(node):
                for operand in node.all_input_nodes:
                    if self.is_fixed_value(operand):
                        self.lock_constant(operand, reason)

    def lock_dim(self, parameter: fx.Node, dim: int, reason: str) -> None:
        """The parameter may not be cut along this dimension."""
        self.locked_dims.setdefault((self.name(parameter), dim), reason)

    def lock_constants(self) -> bool:
        """Lock the labels of constants that have to keep their size, whoever else reads them. True when anything
        changed."""
        for name, labels in self.constants.items():
            if name in self.locked_parameters:
                self.labels.lock(labels, self.locked_parameters[name])
        for name, reason in self.locked_computed.items():
            for leaf in leaves_of(self.values.get(name)):
                self.labels.lock(leaf, reason)
        changed = False
        for (name, dim), reason in self.locked_dims.items():
            own = self.constants.get(name)
            if own is not None:
                if dim in self.labels.varying(own):
                    self.labels.lock(own, reason)
                changed |= self.labels.tie(own, [dim], reason)
        for slot in self.slots:
            why = self.locked_dims.get((slot.parameter, slot.dim)) or self.locked_parameters.get(slot.parameter)
            if why is not None:
                self.labels.lock(slot.labels, why)
        return changed

    def fixed_like(self, node: fx.Node) -> Value:
        """FIXED labels in the form of a node's value."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return fixed(self.shape(node))
        if isinstance(value, (tuple, list)):
            return tuple(
                fixed([self.program.dim(d) for d in v.shape]) if isinstance(v, torch.Tensor) else None for v in value
            )
        return None

    def shapes(self, node: fx.Node) -> list[tuple[int, ...]]:
        """Shapes of a node's results at batch 1."""
        value = node.meta.get("val")
        values = value if isinstance(value, (tuple, list)) else [value]
        return [tuple(self.program.dim(d) for d in v.shape) for v in values if isinstance(v, torch.Tensor)]

    def store(self, node: fx.Node, value: Value) -> None:
        """Keep the labels of a node; those that vary along several dimensions are noted for later."""
        self.values[node.name] = value
        for leaf in leaves_of(value):
            small = slim(leaf)
            if len(self.labels.varying(small)) > 1:
                self.crossed.append(small)


def meets_fixed(where: str) -> str:
    """Why labels are locked that were to be united with FIXED at a node."""
    return f"meets a value without channels at {where}"


def leaves_of(value: Value) -> list[torch.Tensor]:
    """The label tensors of a value with one result or several."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in value if isinstance(leaf, torch.Tensor)] if isinstance(value, (tuple, list)) else []
