"""The rewrite: bypass regions of a Program."""

from __future__ import annotations

from collections.abc import Iterable

from ...compiler.analysis.regions import Region
from ...compiler.ir.edit import bypass
from ...compiler.ir.program import Program
from ..solve.changes import Changes
from .decision import DropBlock


def drop_blocks(program: Program, drops: Iterable[Region | DropBlock]) -> Program:
    """Bypass regions, named by the nodes of `program`; they may follow each other and come in any order.

    Nodes, parameters and batch dimension that survive keep their names. Exact where a region's branch is zero;
    otherwise the layers behind have to be re-solved (`resolve_network`). Raises RewriteError when a region is not in
    the program or not well typed.
    """
    result = program
    done: list[Region | DropBlock] = []
    for drop in drops:
        result = bypass(result, standing_for(drop.entry, done), drop.exit, note=f"drop {drop.path or drop.exit}")
        done.append(drop)
    return result


def standing_for(name: str, drops: Iterable[Region | DropBlock]) -> str:
    """The node that stands for `name` once the regions are dropped."""
    entries = {drop.exit: drop.entry for drop in drops}
    while name in entries:
        name = entries[name]
    return name


def changes_of_drops(drops: Iterable[Region | DropBlock]) -> Changes:
    """What `resolve_network` has to know."""
    return Changes(dropped=tuple((drop.entry, drop.exit) for drop in drops))
