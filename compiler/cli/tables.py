"""What the command line shows: tables of regions, unit groups and results, and the same as plain data."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ...passes.prune.channel_budget import group_shares
from ...passes.prune.unit_report import unit_groups
from ..analysis.provenance import find_units
from ..analysis.regions import find_regions
from ..ir.cost import program_cost
from ..ir.program import Program
from ..onnx.compare_files import Comparison
from ..report.report import Report

#: Columns of names, which are never shortened.
NAMES = frozenset({"region", "path", "kind", "block", "group", "locked"})


def show_line(line: str | Text, console: Console) -> None:
    """One line as it is: not wrapped, so that a path can be copied and a log searched; nothing in it counts as
    markup."""
    console.print(Text(line) if isinstance(line, str) else line, soft_wrap=True)


def plain_table(*columns: str) -> Table:
    """A table without lines, whose cells are never shortened."""
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def show_comparison(found: Comparison, tolerance: float, console: Console) -> None:
    """The differences of two ONNX files: a row for each output, a line for each difference of the interface."""
    table = plain_table("output", "max abs", "relative", "cosine")
    for name, difference in found.outputs.items():
        cells = [f"{difference.absolute:.2e}", f"{difference.relative:.2e}", f"{difference.cosine:.6f}"]
        table.add_row(escape(name), *(cells if difference.same_structure else ["shape or dtype differ", "", ""]))
    console.print(table)
    for line in found.interface:
        show_line(f"  {line}", console)
    verdict = "the same" if found.same(tolerance) else "different"
    show_line(f"{verdict} on {found.samples} samples (tolerance {tolerance:g} relative)", console)


def describe(program: Program) -> dict[str, Any]:
    """What `foldcut inspect --json` prints."""
    analysis, cost, provenance = find_regions(program), program_cost(program), find_units(program)
    blocks = {r.name for r in analysis.blocks}
    return {
        "fingerprint": program.fingerprint,
        "inputs": [str(s) for s in program.inputs],
        "outputs": [str(s) for s in program.outputs],
        "macs": cost.macs,
        "parameters": program.parameter_count(),
        "regions": [
            {
                "name": r.name,
                "path": r.path,
                "kind": r.kind,
                "block": r.name in blocks,
                "parent": r.parent,
                "macs": r.cost.macs,
                "parameters": r.cost.parameters,
                "macs_share": r.cost.macs / cost.macs if cost.macs else 0.0,
            }
            for r in analysis.regions
        ],
        "rejects": [{"node": r.node, "reason": r.reason} for r in analysis.rejects],
        "groups": [
            {**group, "macs_share": share}
            for group, share in zip(unit_groups(provenance), group_shares(provenance), strict=True)
        ],
        "unknown": {target: list(nodes) for target, nodes in provenance.unknown.items()},
    }


def show_regions(found: dict[str, Any], out: Console) -> None:
    """A table of what `describe` found."""
    table = Table(
        title=f"removable regions ({found['macs'] / 1e6:.1f} M MACs, {found['parameters'] / 1e6:.2f} M parameters)"
    )
    for column in ("region", "path", "kind", "block", "MACs", "share", "parameters"):
        table.add_column(column, justify="left" if column in NAMES else "right", overflow="fold")
    for r in found["regions"]:
        mark = "yes" if r["block"] else ""
        table.add_row(
            escape(r["name"]),
            escape(r["path"]),
            r["kind"],
            mark,
            f"{r['macs'] / 1e6:.2f} M",
            f"{r['macs_share']:.1%}",
            f"{r['parameters']:,}",
        )
    out.print(table)
    for reject in found["rejects"]:
        show_line(f"left alone: {reject['node']}: {reject['reason']}", out)


def show_groups(found: dict[str, Any], out: Console) -> None:
    """A table of the unit groups: what can be pruned, and why the others cannot."""
    table = Table(title="unit groups (channels that go together)")
    for column in ("group", "units", "channels a unit", "consumers", "MACs share", "locked"):
        table.add_column(column, justify="left" if column in NAMES else "right", overflow="fold")
    for g in found["groups"]:
        widths = "/".join(map(str, g["widths"]))
        share = f"{g['macs_share']:.1%}"
        table.add_row(
            escape(g["group"]), str(g["total"]), widths, str(len(g["consumers"])), share, escape(g["locked"] or "")
        )
    out.print(table)
    for target, nodes in found["unknown"].items():
        show_line(f"not understood: {target} ({len(nodes)} times, first at {nodes[0]})", out)


def show_report(report: Report, out: Console) -> None:
    """The before/after table and what was dropped."""
    table = Table(title="before and after")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for row in report.rows():
        table.add_row(*row)
    out.print(table)
    for decision, words in zip(report.decisions, report.words, strict=True):
        error = decision.get("error")
        predicted = "" if error is None else f" (predicted error {error:.4f})"
        show_line(f"{words['what']}: {words['how']}{predicted}", out)
