"""Unit groups: units with the same producers, the granularity of channel budgets and reports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from .label_trace import Slot, Trace, leaves_of
from .labels import FIXED, slim
from .operator_kinds import kind_of


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitGroup:
    """A group of coupled channels that can be pruned unit by unit.

    A unit is what has to be removed together: a channel, an attention head, or a channel of a residual stream with
    all that is coupled to it. The units of a group are made by the same parameters, with the same number of channels
    in each.

    Arguments:
        name: Name of the first producer, without ``.weight``. Numbered when several groups share it (``stem#2``).
        units: Labels of the units in channel order, an int64 tensor.
        producers: (parameter, dimension) pairs that make the units.
        consumers: (parameter, dimension) pairs that read them.
        widths: Channels per unit in the producers: 1 for a plain channel, the head size for attention.
        reason: Why the group is locked. None if it can be pruned.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        >>> group = foldcut.find_units(foldcut.capture(net, torch.randn(2, 8))).prunable[0]
        >>> group.name, len(group), group.count_for(0.6, multiple_of=4)
        ('0', 16, 8)
    """

    name: str
    units: torch.Tensor = field(repr=False)
    producers: tuple[tuple[str, int], ...]
    consumers: tuple[tuple[str, int], ...]
    widths: tuple[int, ...]
    reason: str | None

    def __len__(self) -> int:
        return len(self.units)

    def without(self, kept: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Select the units to remove.

        Arguments:
            kept: Positions of the units that stay.

        Returns:
            The labels of all other units.
        """
        gone = torch.ones(len(self), dtype=torch.bool)
        gone[torch.as_tensor(kept, dtype=torch.long)] = False
        return self.units[gone]

    def step(self, multiple_of: int) -> int:
        """The least number of units whose channels are a multiple in every producer.

        Arguments:
            multiple_of: What the channel count of each producer has to be a multiple of.

        Returns:
            The number of units.
        """
        return math.lcm(*(multiple_of // math.gcd(multiple_of, width) for width in self.widths))

    def count_for(self, keep: float, multiple_of: int) -> int:
        """The number of units to keep for a share of the group.

        Arguments:
            keep: Share of the units, 0 to 1.
            multiple_of: What the channel count of each producer has to be a multiple of.

        Returns:
            The multiple of `step` nearest to ``keep * len(self)``, at least one step. The whole group if that is no
            smaller.
        """
        step = self.step(multiple_of)
        count = max(1, round(keep * len(self) / step)) * step
        return count if count < len(self) else len(self)


def surplus_units(groups: Sequence[UnitGroup], counts: Mapping[str, int]) -> torch.Tensor:
    """The units of each group behind its first so many."""
    return torch.cat([group.units[counts[group.name] :] for group in groups])


def form_groups(trace: Trace, slots: Sequence[Slot]) -> tuple[UnitGroup, ...]:
    """All groups in graph order. Units are distinguished by which slots make them, how often, which parts of a tensor
    (its halves, a slice of it) take them, and whether they are locked: any unit of a group may stand for another."""
    makers = [s for s in slots if s.role == "out"]
    size = len(trace.labels)
    generator = torch.Generator().manual_seed(0)
    signature = torch.zeros(size, dtype=torch.long)
    first = torch.full((size,), len(makers), dtype=torch.long)
    place = torch.zeros(size, dtype=torch.long)
    for index, slot in enumerate(makers):
        key = torch.randint(1 << 62, (1,), generator=generator)
        signature.scatter_add_(0, slot.labels, key.expand(len(slot.labels)))
        new = first[slot.labels] == len(makers)
        fresh = slot.labels[new]
        place.scatter_(0, fresh.flip(0), new.nonzero().reshape(-1).flip(0))
        first[fresh] = index
    for part in _parts_taken(trace):
        key = torch.randint(1 << 62, (1,), generator=generator)
        signature.scatter_add_(0, part, key.expand(len(part)))
    units = (first < len(makers)).nonzero().reshape(-1)
    units = units[units != FIXED]
    locked = trace.labels.locked(units)
    order = torch.argsort(first[units] * (int(place.max()) + 1) + place[units])
    units, locked = units[order], locked[order]
    keys = torch.stack([signature[units], locked.long()], 1)
    _, inverse = keys.unique(dim=0, return_inverse=True)
    groups = [units[inverse == value] for value in dict.fromkeys(inverse.tolist())]
    readers = [s for s in slots if s.role == "in"]
    return _distinct([_group(trace, members, makers, readers) for members in groups])


def _parts_taken(trace: Trace) -> Iterator[torch.Tensor]:
    """The units in each result of a movement that leaves some of its operand's units out."""
    for node in trace.program.graph.nodes:
        if kind_of(node) != "movement" or node.name in trace.inputless:
            continue
        operands = [leaf for n in node.all_input_nodes for leaf in leaves_of(trace.values.get(n.name))]
        if not operands:
            continue
        whole = torch.cat([trace.labels.find(slim(leaf)).reshape(-1) for leaf in operands]).unique()
        if len(whole) < 2:
            continue
        for leaf in leaves_of(trace.values.get(node.name)):
            part = trace.labels.find(slim(leaf)).unique()
            if len(part) < len(whole):
                yield part


def _distinct(groups: Sequence[UnitGroup]) -> tuple[UnitGroup, ...]:
    """With a number behind the names that come up more than once: ``stem``, ``stem#2``."""
    seen: dict[str, int] = {}
    result = []
    for group in groups:
        number = seen[group.name] = seen.get(group.name, 0) + 1
        result.append(group if number == 1 else replace(group, name=f"{group.name}#{number}"))
    return tuple(result)


def _group(trace: Trace, members: torch.Tensor, makers: Sequence[Slot], readers: Sequence[Slot]) -> UnitGroup:
    lead = members[0]
    made = [(s, int((s.labels == lead).sum())) for s in makers if bool((s.labels == lead).any())]
    read = [s for s in readers if bool(torch.isin(members, s.labels).any())]
    reason: str | None = trace.labels.reason(int(lead)) or None
    if reason is None and len(members) == 1:
        reason = "a single unit: nothing can be left out"
    weights = [(s, count) for s, count in made if trace.program.tensor(s.parameter).dim() > 1] or made
    return UnitGroup(
        name=weights[0][0].parameter.removesuffix(".weight"),
        units=members,
        producers=tuple(dict.fromkeys((s.parameter, s.dim) for s, _ in made)),
        consumers=tuple(dict.fromkeys((s.parameter, s.dim) for s in read)),
        widths=tuple(dict.fromkeys(count for _, count in weights)),
        reason=reason,
    )
