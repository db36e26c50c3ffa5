"""How many units each group keeps: a uniform share, or a goal allocated by the error curves of the groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import fx

from ...compiler.analysis.labels import slim
from ...compiler.analysis.provenance import Provenance
from ...compiler.analysis.unit_groups import UnitGroup
from ...compiler.ir.cost import node_macs
from ...compiler.ir.program import Program, data_inputs, output_nodes
from ...compiler.support.errors import GoalError
from ...compiler.support.setting_checks import Allowed, check_number, check_texts, check_whole, settled

#: What channel counts go to multiples of by default.
STEP = 8


@dataclass(frozen=True, kw_only=True)
class ChannelLimits:
    """What channel pruning may remove.

    Arguments:
        multiple_of: Channel counts are multiples of this. A group that cannot be cut to one keeps all its units. If
            None, 8; for `Macs` and `Parameters` several multiples are tried, and units are given back one by one.
        least: Least share of the units of a group that stays, 0 to 1.
        ignore: Shell-style patterns of unit groups that stay whole (``head*``), or names of outputs, for all that
            serves that output only.

    Raises:
        GoalError: If a setting is out of range or of the wrong type.

    Example:
        >>> foldcut.ChannelLimits(least=0.25).multiple
        8
    """

    multiple_of: int | None = None
    least: float = 0.0
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_whole("multiple_of", self.multiple_of, Allowed(least=1, none=True), error=GoalError)
        check_number("least", self.least, Allowed(least=0, most=1, words="a share from 0 to 1"), error=GoalError)
        check_texts("ignore", self.ignore, error=GoalError)
        settled(self)

    @property
    def multiple(self) -> int:
        """The multiple of channel counts where none is searched for."""
        return STEP if self.multiple_of is None else self.multiple_of


def lattice_counts(group: UnitGroup, limits: ChannelLimits, multiple: int) -> list[int]:
    """The counts below all units that a group may be cut to, in multiples of so many channels."""
    limits = replace(limits, multiple_of=multiple)
    return list(range(_least(group, limits), len(group), group.step(multiple)))


def free_groups(provenance: Provenance, limits: ChannelLimits) -> list[UnitGroup]:
    """The prunable groups that are not ignored. Raises GoalError when there is none or a pattern matches nothing."""
    program = provenance.program
    outputs = [spec.name for spec in program.outputs]
    patterns = [p for p in limits.ignore if p not in outputs]
    shielded = _serving_only(program, [o for o in limits.ignore if o in outputs])
    for pattern in patterns:
        if not any(fnmatchcase(g.name, pattern) for g in provenance.groups):
            raise GoalError(
                f"ignore: no unit group matches {pattern!r}",
                hint=f"outputs: {', '.join(outputs)}; groups: `foldcut inspect` lists them",
            )
    found = [
        g
        for g in provenance.prunable
        if not any(fnmatchcase(g.name, p) for p in patterns) and not shielded.intersection(p for p, _ in g.producers)
    ]
    if not found:
        reasons = list(dict.fromkeys(g.reason for g in provenance.groups if g.reason))
        raise GoalError(
            f"nothing can be pruned: {'; '.join(reasons[:3]) or 'no layer makes channels that another consumes'}",
            hint="`foldcut inspect` lists the unit groups and why they are locked",
        )
    return found


def _serving_only(program: Program, names: Sequence[str]) -> set[str]:
    """Parameters that only the named outputs depend on."""
    if not names:
        return set()
    reach: dict[bool, set[fx.Node]] = {True: set(), False: set()}
    for spec, node in zip(program.outputs, output_nodes(program.graph), strict=True):
        stack, seen = [node], reach[spec.name in names]
        while stack:
            current = stack.pop()
            if current not in seen:
                seen.add(current)
                stack += current.all_input_nodes
    return {str(n.target) for n in reach[True] - reach[False] if n.op == "get_attr"}


def uniform_counts(groups: Sequence[UnitGroup], keep: float, limits: ChannelLimits) -> dict[str, int]:
    """Units to keep of each group for one share of all."""
    return {g.name: max(g.count_for(keep, limits.multiple), _least(g, limits)) for g in groups}


def _least(group: UnitGroup, limits: ChannelLimits) -> int:
    step = group.step(limits.multiple)
    return min(len(group), max(1, math.ceil(limits.least * len(group) / step)) * step)


class CutModel:
    """What a program costs as a function of the units kept, without building the smaller program.

    The cost is a sum of parts, `costs`; each shrinks by the share of its channels that stay, dimension by dimension.
    `axes` name a part and the labels along one of its dimensions.
    """

    def __init__(
        self,
        provenance: Provenance,
        groups: Sequence[UnitGroup],
        costs: Sequence[float],
        axes: Sequence[tuple[int, torch.Tensor]],
    ) -> None:
        self.groups = groups
        self.costs = torch.tensor(costs, dtype=torch.float64)
        owner = torch.full((provenance.size,), -1)
        for index, group in enumerate(groups):
            owner[group.units] = index
        self.rows = torch.tensor([row for row, _ in axes], dtype=torch.long)
        factors = [self._factor(owner, labels) for _, labels in axes]
        self.factors = torch.stack(factors) if factors else torch.zeros(0, len(groups), dtype=torch.float64)

    @classmethod
    def of(cls, unit: str, provenance: Provenance, groups: Sequence[UnitGroup]) -> CutModel:
        """What is counted by the name of `Cost`: ``macs`` or ``parameters``."""
        models = {"macs": cls.of_macs, "parameters": cls.of_parameters}
        return models[unit](provenance, groups)

    @classmethod
    def of_macs(cls, provenance: Provenance, groups: Sequence[UnitGroup]) -> CutModel:
        """MACs: each contraction's shrink by the share of its consumed, made and carried channels that stay."""
        program = provenance.program
        nodes = [n for n in program.graph.nodes if node_macs(program, n)]
        place = {n.name: i for i, n in enumerate(nodes)}
        axes = []
        for slot in provenance.slots:
            parameter = program.tensor(slot.parameter)
            if parameter.dim() > 1 and slot.node in place:
                axes.append((place[slot.node], slot.labels))
        stored = {slot.node for slot in provenance.slots}
        for node in nodes:
            if node.name not in stored:
                for operand in data_inputs(node)[:1]:
                    labels = provenance.values.get(operand.name)
                    if isinstance(labels, torch.Tensor):
                        axes.append((place[node.name], slim(labels).reshape(-1)))
        return cls(provenance, groups, [float(node_macs(program, n)) for n in nodes], axes)

    @classmethod
    def of_parameters(cls, provenance: Provenance, groups: Sequence[UnitGroup]) -> CutModel:
        """Trained values: each parameter shrinks by the share of the channels along its dimensions that stay."""
        program = provenance.program
        trained = {p.data_ptr(): p.numel() for p in program.module.parameters()}
        place = {pointer: i for i, pointer in enumerate(trained)}
        axes = {
            (place[pointer], slot.dim): slot.labels  # tensors that share storage count once
            for slot in provenance.slots
            if (pointer := program.tensor(slot.parameter).data_ptr()) in place
        }
        found = [(row, labels) for (row, _), labels in axes.items()]
        covered = {row for row, _ in found}
        # the rest goes element by element: scales and shifts of a norm, a table
        for name, labels in provenance.constants.items():
            row = place.get(program.tensor(name).data_ptr())
            if row is not None and row not in covered:
                covered.add(row)
                found.append((row, slim(labels).reshape(-1)))
        return cls(provenance, groups, [float(count) for count in trained.values()], found)

    def _factor(self, owner: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Share of the channels that each group has, per unit."""
        owners = owner[labels]
        counts = torch.bincount(owners[owners >= 0], minlength=len(self.groups)).double()
        sizes = torch.tensor([len(g) for g in self.groups], dtype=torch.float64)
        return counts / len(labels) / sizes

    def __call__(self, counts: Sequence[int]) -> float:
        return float(self._per_node(self._shares(counts)).sum())

    def _shares(self, counts: Sequence[int]) -> torch.Tensor:
        """What is left of each factor's channels."""
        gone = torch.tensor([len(g) - c for g, c in zip(self.groups, counts, strict=True)], dtype=torch.float64)
        return (1 - self.factors @ gone).clamp(min=0)

    def _per_node(self, shares: torch.Tensor) -> torch.Tensor:
        return self.costs * torch.ones_like(self.costs).scatter_reduce(0, self.rows, shares, "prod")

    def slopes(self, counts: Sequence[int]) -> torch.Tensor:
        """What one unit less of each group saves."""
        shares = self._shares(counts)
        return (self._per_node(shares)[self.rows] / shares.clamp(min=1e-12)) @ self.factors


def group_shares(provenance: Provenance) -> list[float]:
    """For each group, the share of all MACs in the layers that make, carry or consume its units; shares overlap."""
    model = CutModel.of_macs(provenance, provenance.groups)
    total = float(model.costs.sum())
    if not len(model.rows) or total == 0:
        return [0.0] * len(provenance.groups)
    touched = torch.zeros(len(model.costs), len(provenance.groups), dtype=torch.bool)
    touched.index_put_((model.rows,), model.factors > 0, accumulate=True)
    return [float(s) for s in (touched.double() * model.costs.unsqueeze(1)).sum(0) / total]


def allocate(
    model: CutModel, curves: Mapping[str, torch.Tensor], target: float, limits: ChannelLimits
) -> tuple[dict[str, int], bool]:
    """Cut where what it saves costs the least error until at most `target` is left of the model's cost; the counts, and
    whether that was reached.

    `curves` holds, for each group, the error with 0, 1, 2 ... units kept. Greedy on the slope of each curve's lower
    convex hull ahead of where the group stands, so that a flat part behind a step is seen.
    """
    groups = model.groups
    counts = [len(g) for g in groups]
    while model(counts) > target:
        slopes = model.slopes(counts)
        best: tuple[float, int, int] | None = None
        for index, group in enumerate(groups):
            found = _best_cut(group, curves[group.name], counts[index], limits)
            if found is None or slopes[index] <= 0:
                continue
            price = found[0] / float(slopes[index])
            if best is None or price < best[0]:
                best = (price, index, found[1])
        if best is None:
            return {g.name: c for g, c in zip(groups, counts, strict=True)}, False
        _, index, goal = best
        counts[index] = _enough(model, counts, index, goal, target, groups[index].step(limits.multiple))
    return {g.name: c for g, c in zip(groups, counts, strict=True)}, True


def _enough(model: CutModel, counts: list[int], index: int, goal: int, target: float, step: int) -> int:
    """The first count on the way down to `goal` that meets the target, else `goal`."""
    lattice = list(range((counts[index] - 1) // step * step, goal - 1, -step))
    for count in lattice:
        if model([*counts[:index], count, *counts[index + 1 :]]) <= target:
            return count
    return goal


def _best_cut(group: UnitGroup, curve: torch.Tensor, count: int, limits: ChannelLimits) -> tuple[float, int] | None:
    """(added error per unit, count to go to) with the least slope among the lattice counts below."""
    step, least = group.step(limits.multiple), _least(group, limits)
    lower = torch.arange((count - 1) // step * step, least - 1, -step) if count > least else torch.empty(0)
    if not len(lower):
        return None
    lower = lower.long()
    slopes = (curve[lower] - curve[count]).clamp(min=0) / (count - lower)
    best = int(slopes.argmin())
    return float(slopes[best]), int(lower[best])
