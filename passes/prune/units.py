"""Units of decisions, the groups that may be cut, and why others may not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...compiler.analysis.provenance import Provenance, find_units
from ...compiler.analysis.unit_groups import UnitGroup
from ...compiler.ir.program import Program
from ...compiler.support.errors import PlanError, Reject
from .decision import PruneChannels
from .submodular import Selection


def units_of(program: Program) -> Provenance:
    """`find_units`, once for each program."""
    return program.derived(find_units)


def channel_decision(group: UnitGroup, selection: Selection) -> PruneChannels:
    """A selection as a plan's decision."""
    kept = tuple(sorted(int(i) for i in selection.order))
    return PruneChannels(group=group.name, kept=kept, total=len(group), error=float(selection.errors[-1]))


def removed_units(provenance: Provenance, decisions: Sequence[PruneChannels]) -> torch.Tensor:
    """The units that the decisions of a plan remove. Raises PlanError when a group is not the one planned for."""
    groups = {g.name: g for g in provenance.prunable}
    removed = []
    for decision in decisions:
        group = groups.get(decision.group)
        if group is None or len(group) != decision.total or max(decision.kept, default=-1) >= len(group):
            raise PlanError(
                f"no prunable unit group {decision.group!r} with {decision.total} units",
                hint="apply the plan to the network that it was made for",
            )
        removed.append(group.without(decision.kept))
    return torch.cat(removed) if removed else torch.zeros(0, dtype=torch.long)


def group_rejects(provenance: Provenance) -> tuple[Reject, ...]:
    """The locked groups with their reasons, and the operators that were not understood."""
    locked = [Reject(reason=g.reason, node=g.name) for g in provenance.groups if g.reason]
    unknown = [
        Reject(reason=f"{target} is not understood ({len(nodes)} times)", node=nodes[0])
        for target, nodes in provenance.unknown.items()
    ]
    return (*locked, *unknown)
