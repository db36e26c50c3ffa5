"""What a report says of unit groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...compiler.analysis.provenance import Provenance
from ...compiler.plan.decision import Decision
from ...compiler.rewrite.rewrite import Applied
from .decision import PruneChannels


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
