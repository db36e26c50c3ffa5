"""The re-solve with its results kept: looked up by what goes into it, and computed where it is not found."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ...passes.solve.changes import Changes
from ...passes.solve.resolve_network import LayerError, Resolved, ResolveSettings, resolve_network
from ..ir.program import Program
from ..store.analysis_store import Tensors
from ..store.changed_tensors import changed, with_changes
from ..support.errors import Reject
from .context import Context


def stored_resolve(ctx: Context, student: Program, changes: Changes, settings: ResolveSettings) -> Resolved:
    """`resolve_network` toward the original, or its result of before."""

    def compute() -> tuple[dict[str, Any], Tensors]:
        found = resolve_network(ctx.teacher, student, ctx.solve, changes, settings=settings, progress=ctx.progress)
        data = {"layers": [asdict(e) for e in found.layers], "locked": [asdict(r) for r in found.locked]}
        return with_changes(data, student, found.program)

    data, tensors = ctx.store.result("re-solve", [ctx.teacher, student, ctx.solve, changes, settings], compute)
    return Resolved(
        program=changed(student, data, tensors),
        layers=tuple(LayerError(**e) for e in data["layers"]),
        locked=tuple(Reject(**r) for r in data["locked"]),
    )
