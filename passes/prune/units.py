"""Units of decisions, the groups that may be cut, why others may not, and what a report says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...compiler.analysis.provenance import Provenance, find_units
from ...compiler.analysis.unit_groups import UnitGroup
from ...compiler.ir.program import Program
from ...compiler.plan.decision import Decision
from ...compiler.rewrite.rewrite import Applied
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


def unit_groups(provenance: Provenance, decisions: Sequence[Decision] = ()) -> list[dict[str, Any]]:
    """The unit groups of a program as plain data: sizes, what makes and consumes them, kept and total, why locked."""
    kept = {d.group: len(d.kept) for d in decisions if isinstance(d, PruneChannels)}
    return [
        {
            "group": g.name,
            "kept": kept.get(g.name, len(g)),
            "total": len(g),
            "widths": list(g.widths),
            "producers": [name for name, _ in g.producers],
            "consumers": [name for name, _ in g.consumers],
            "locked": g.reason,
        }
        for g in provenance.groups
    ]


def groups_report(provenance: Provenance, applied: Applied, multiple: int) -> Mapping[str, Any]:
    """The groups, with the error curve of each selection and what the greedy choice is sure to reach, and what channel
    counts went to multiples of."""
    groups = unit_groups(provenance, applied.decisions)
    selections = applied.report.get("selections", {})
    for group in groups:
        selection = selections.get(group["group"])
        if selection is not None:
            group["errors"] = [round(float(e), 6) for e in selection.errors]
            group["submodularity_ratio"], group["guarantee"] = selection.ratio_bound, selection.guarantee
    return {"groups": groups, "multiple_of": multiple}
