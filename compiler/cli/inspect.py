"""`foldcut inspect`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...passes.prune.channel_budget import group_shares
from ...passes.prune.units import unit_groups
from ..analysis.provenance import find_units
from ..analysis.regions import find_regions
from ..frontend.capture import Model, capture
from ..ir.cost import program_cost
from ..ir.edit_folds import fold_parameters
from ..ir.program import Program
from ..support.errors import CaptureError
from ..support.strict_json import json_text
from .console import guarded, out, show_line
from .options import InspectOptions
from .samples import Reader, read_model, read_shape, sample_reader

#: Columns of names, which are never shortened.
NAMES = frozenset({"region", "path", "kind", "block", "group", "locked"})


def run(options: InspectOptions) -> None:
    """Carry it out."""

    def work() -> None:
        read = sample_reader(options.calib, options, input_shape=options.input_shape)
        loaded = read_model(options)
        program = fold_parameters(capture(loaded, _example(loaded, options.input_shape, read)))
        if options.graph:
            print(program.text(), end="")
            return
        found = describe(program)
        if options.as_json:
            print(json_text(found))
        else:
            show_regions(found, out)
            show_groups(found, out)

    guarded(work, debug=options.debug)


def _example(model: Model, shape: str | None, read: Reader | None) -> Any:
    import torch

    if read is not None:
        return read(2).batch(slice(None))
    if shape is not None:
        return torch.randn(2, *read_shape(shape), generator=torch.Generator().manual_seed(0))
    if isinstance(model, torch.nn.Module):
        raise CaptureError("the input shape is not known", hint="give --input-shape C,H,W or --calib DATA")
    return None


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
