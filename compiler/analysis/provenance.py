"""Channel provenance: which weight slices must go together when a channel goes.

Labels run through the graph once (see `labels`, `label_rules`, `contraction_labels`): each activation gets a tensor of
labels that say which channel each element belongs to, and a union-find holds what must be cut together. A *unit* is
one class: a channel, or an attention head, or a channel of a residual stream with everything coupled to it. Units with
the same producers form a *group*. Nothing here knows an architecture; an operator without a rule locks what it reads.
The cost is one pass over the graph with vectorised work on each label tensor, so it is linear in graph size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from ..ir.program import Program, is_tensor, output_nodes
from ..support.errors import RewriteError
from ..support.one_at_a_time import alone
from .label_rules import rule_for
from .label_trace import Slot, Trace, Value, leaves_of, meets_fixed
from .labels import FIXED, lifted, slim
from .unit_groups import UnitGroup, form_groups

#: Rounds of settling constraints that wait for each other; networks need two or three.
MOST_ROUNDS = 50


@dataclass(frozen=True, kw_only=True, eq=False)
class Provenance:
    """The units of a program, and every tensor that a cut of them touches.

    Labels run through the graph once. Each activation gets a tensor of labels that say which unit an element belongs
    to. The cost is linear in the size of the graph.

    Arguments:
        program: The program analysed.
        values: For each node, the label of every element of its value; 0 where it belongs to no unit.
        slots: Parameter dimensions that follow the channels, with one label per index.
        constants: Labels of the parameters and buffers that meet activations elementwise, by name.
        groups: All unit groups in graph order, prunable and locked.
        unknown: Operators without a rule, and the nodes where they occur.
        size: Number of labels.
        inputless: Nodes that no input reaches: constants computed by the graph.
        followed: Those of them that follow a cut of what they read.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        >>> for group in foldcut.find_units(foldcut.capture(net, torch.randn(2, 8))).groups:
        ...     print(group.name, len(group), group.reason)
        0 16 None
        2 4 a network output (linear_1)
    """

    program: Program
    values: Mapping[str, Value] = field(repr=False)
    slots: tuple[Slot, ...] = field(repr=False)
    constants: Mapping[str, torch.Tensor] = field(repr=False)
    groups: tuple[UnitGroup, ...]
    unknown: Mapping[str, tuple[str, ...]]
    size: int
    #: constants that the graph computes, and those of them that follow the cut of what they read
    inputless: frozenset[str] = field(default=frozenset(), repr=False)
    followed: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def prunable(self) -> tuple[UnitGroup, ...]:
        """The groups that may lose units."""
        return tuple(g for g in self.groups if g.reason is None)

    @cached_property
    def consumers(self) -> Mapping[int, tuple[int, ...]]:
        """For each unit, the indices of the ``in`` slots that consume it."""
        found: dict[int, list[int]] = {}
        for index, slot in enumerate(self.slots):
            if slot.role == "in":
                for unit in slot.labels.unique().tolist():
                    found.setdefault(unit, []).append(index)
        return {unit: tuple(slots) for unit, slots in found.items()}

    def removal(self, units: torch.Tensor | Iterable[int]) -> torch.Tensor:
        """A mask of the units to remove.

        Arguments:
            units: Labels of units of prunable groups.

        Returns:
            A bool tensor over all labels, True for the units to remove.

        Raises:
            RewriteError: If a unit is locked or unknown.
        """
        wanted = torch.as_tensor(units if isinstance(units, torch.Tensor) else list(units), dtype=torch.long)
        mask = torch.zeros(self.size, dtype=torch.bool)
        free = torch.cat([g.units for g in self.prunable]) if self.prunable else wanted[:0]
        if bool((~torch.isin(wanted, free)).any()):
            bad = wanted[~torch.isin(wanted, free)]
            raise RewriteError(
                f"{len(bad)} of the units to remove are locked or not units of this program",
                actual=bad[:8].tolist(),
                hint="take units from the prunable groups of this very analysis",
            )
        mask[wanted] = True
        return mask

    def kept(self, labels: torch.Tensor, removed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The indices of a tensor that stay when units are removed.

        Arguments:
            labels: The label of each element of the tensor.
            removed: A mask over all labels, from `removal`.

        Returns:
            One entry per dimension: the indices that stay, or None if all do.

        Raises:
            RewriteError: If the removed elements are not whole slices.
        """
        small = slim(labels)
        gone = removed[small]
        if not bool(gone.any()):
            return (None,) * labels.dim()
        result: list[torch.Tensor | None] = []
        covered = torch.zeros_like(gone)
        for dim in range(labels.dim()):
            others = [d for d in range(labels.dim()) if d != dim]
            whole = gone.all(dim=tuple(others)) if len(others) > 1 else gone.all(others[0]) if others else gone
            if small.shape[dim] != labels.shape[dim] or not bool(whole.any()):
                result.append(None)
                continue
            result.append((~whole).nonzero().reshape(-1))
            covered |= whole.view([-1 if d == dim else 1 for d in range(labels.dim())])
        if not torch.equal(covered, gone):
            raise RewriteError("the units to remove do not make whole slices of every tensor")
        return tuple(result)

    def node_kept(self, node: fx.Node, removed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The indices of the value of a node that stay when units are removed.

        Arguments:
            node: A node of the program.
            removed: A mask over all labels, from `removal`.

        Returns:
            One entry per dimension, as from `kept`. Empty if the value is not a single tensor.

        Raises:
            RewriteError: If the removed elements are not whole slices.
        """
        value = self.values.get(node.name)
        if not isinstance(value, torch.Tensor):
            return ()
        try:
            return self.kept(value, removed)
        except RewriteError as cause:
            raise RewriteError(cause.message, node=node.name, excerpt=self.program.excerpt(node)) from cause


def find_units(program: Program) -> Provenance:
    """Find the coupled channels of a program: which slices of its weights must be removed together.

    Residual streams, attention heads, grouped and depthwise convolutions, gates and concatenations are followed by
    the same rules; no architecture is known by name. An operator without a rule never fails: what it reads is locked,
    with the reason.

    Arguments:
        program: The program to analyse. It is not changed.

    Returns:
        The `Provenance` with the unit groups, prunable and locked.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
        >>> group = foldcut.find_units(foldcut.capture(net, torch.randn(2, 3, 8, 8))).prunable[0]
        >>> len(group), group.consumers
        (8, (('3.weight', 1),))
    """
    with alone():
        trace = Trace(program, rule_for)
        for node in program.graph.nodes:
            _visit(trace, node)
        for node in output_nodes(program.graph):
            if trace.is_fixed_value(node):
                trace.lock_constant(node, f"a network output ({node.name})")
                continue
            for leaf in leaves_of(trace.values.get(node.name)):
                trace.labels.lock(leaf, f"a network output ({node.name})")
        _settle(trace)
        return _resolved(trace)


def _visit(trace: Trace, node: fx.Node) -> None:
    if node.op == "placeholder":
        trace.store(node, trace.fixed_like(node))
    if node.op == "call_function" and all(
        n.op == "get_attr" or n.name in trace.inputless for n in node.all_input_nodes
    ):
        trace.inputless.add(node.name)
        return  # labels are made when something asks for them
    if node.op != "call_function" or not (is_tensor(node) or isinstance(node.meta.get("val"), (tuple, list))):
        return
    rule = rule_for(node)
    if rule is None:
        trace.unknown.setdefault(str(node.target), []).append(node.name)
        trace.store(node, trace.lock_node(node, f"{node.target} is not understood, at {node.name}"))
        return
    try:
        value = rule(trace, node)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as cause:
        # a form of the operator that the rule does not cover: locked like an operator without a rule
        trace.unknown.setdefault(str(node.target), []).append(node.name)
        value = trace.lock_node(node, f"{node.target} in a form that is not understood, at {node.name}: {cause}")
    trace.store(node, value)


def _settle(trace: Trace) -> None:
    """Unite until every tensor is rectangular, every constant follows what it meets, and every parameter is cut one
    way."""
    for _ in range(MOST_ROUNDS):
        changed = trace.lock_constants()
        changed |= _settle_slots(trace)
        changed |= _settle_crossed(trace)
        changed |= _settle_met(trace)
        if not changed:
            return
    for slot in trace.slots:
        trace.labels.lock(slot.labels, "its constraints do not settle")


def _settle_slots(trace: Trace) -> bool:
    """A parameter that several nodes read is cut one way only; one that something else reads is not cut."""
    changed = False
    first: dict[tuple[str, int], torch.Tensor] = {}
    for slot in trace.slots:
        known = first.setdefault((slot.parameter, slot.dim), slot.labels)
        if known is not slot.labels:
            changed |= trace.labels.unite(known, slot.labels, f"shares {slot.parameter} with a value without channels")
        own = trace.constants.get(slot.parameter)
        if own is not None:
            laid = slot.labels.view([-1 if d == slot.dim else 1 for d in range(own.dim())])
            changed |= trace.labels.unite(own, laid, f"{slot.parameter} has another reader")
    return changed


def _settle_crossed(trace: Trace) -> bool:
    """Keep tensors rectangular: where classes cross, tie all dimensions but the one that leaves the most."""
    changed = False
    # classes only grow, so what is rectangular stays so
    crossed, trace.crossed = trace.crossed, []
    for labels in crossed:
        changed |= _make_rectangular(trace, labels, trace.labels.varying(labels))
    stored = [(("stored", name), labels) for name, labels in trace.constants.items()]
    for name, labels in [*stored, *((("computed", name), labels) for name, labels in trace.derived.items())]:
        if name not in trace.rectangular and not trace.labels.all_free(labels):
            varying = trace.labels.varying(labels)
            if varying:
                trace.rectangular.add(name)
                changed |= _make_rectangular(trace, labels, varying)
    return changed


def _make_rectangular(trace: Trace, labels: torch.Tensor, varying: tuple[int, ...]) -> bool:
    if not varying:
        return False
    kept = trace.labels.kept_dim(labels, varying) if len(varying) > 1 else varying[0]
    others = [d for d in range(labels.dim()) if d != kept]
    return trace.labels.tie(labels, others, "its tensor would not stay rectangular")


def _settle_met(trace: Trace) -> bool:
    """A constant is cut along the dimension in which the activation that it meets is cut, where it has that
    dimension."""
    changed, waiting = False, []
    for own, labels, where in trace.met:
        varying = trace.labels.varying(labels)
        laid = lifted(own, labels.dim())
        if any(laid.shape[d] > 1 for d in varying):
            changed |= trace.labels.unite(laid, labels, meets_fixed(where))
        else:
            waiting.append((own, labels, where))
    trace.met = waiting
    return changed


def _resolved(trace: Trace) -> Provenance:
    """Every label as its root."""

    def roots(value: Value) -> Value:
        if isinstance(value, torch.Tensor):
            found = trace.labels.find(slim(value))
            return found.masked_fill(trace.labels.is_free(found), FIXED).expand(value.shape)
        return tuple(roots(v) for v in value) if isinstance(value, tuple) else value

    slots = tuple(
        Slot(parameter=s.parameter, dim=s.dim, role=s.role, node=s.node, labels=roots(s.labels)) for s in trace.slots
    )
    return Provenance(
        program=trace.program,
        values={name: roots(value) for name, value in trace.values.items()},
        slots=slots,
        constants={name: roots(own) for name, own in trace.constants.items()},
        groups=form_groups(trace, slots),
        unknown={target: tuple(nodes) for target, nodes in trace.unknown.items()},
        size=len(trace.labels),
        inputless=frozenset(trace.inputless),
        followed=frozenset((trace.inputless & set(trace.values)) - set(trace.derived)),
    )
