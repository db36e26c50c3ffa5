"""Pruning to the backend's lattice against pruning to the odd count beside it: ResNet-18 at random keep fractions.

    python benchmarks/lattice.py
    python benchmarks/lattice.py --fractions 20 --output lattice.json

For each fraction every group keeps the nearest multiple of the lattice (`probe_lattice`), once, and once one channel
less or more, whichever is nearer to the fraction: an odd count. Both are measured against each other in pairs. Fails
when the network on the lattice is slower: the interval excludes 1 and the loss is at least 2 %.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from foldcut.compiler.analysis.provenance import Provenance, find_units
from foldcut.compiler.analysis.unit_groups import UnitGroup, surplus_units
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.cost import program_cost
from foldcut.compiler.ir.edit_folds import fold_parameters
from foldcut.compiler.ir.program import Program
from foldcut.passes.cut.cuttable import cuttable_groups
from foldcut.passes.cut.prune_channels import prune_channels
from foldcut.passes.prune.channel_budget import ChannelLimits, free_groups
from foldcut.runtime.measure.backend import resolve_backend
from foldcut.runtime.measure.conditions import Conditions
from foldcut.runtime.measure.loading import loaded
from foldcut.runtime.measure.measure import measure_pair
from foldcut.runtime.measure.timing import Timing, Until
from foldcut.runtime.onnxruntime.backend import random_inputs
from foldcut.runtime.predict.lattice import probe_lattice
from foreign_ops import declare_torchvision_ops
from rows import write_json


def main() -> None:
    arguments = parse_arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    backend = resolve_backend(arguments.backend)
    lattice = probe_lattice(backend, conditions=Conditions(batch=arguments.batch))
    original = make()
    multiple = lattice.multiple_for(original)
    print(
        f"lattice of {backend.name} at batch {arguments.batch}: {dict(lattice.steps)}; ResNet-18 goes to {multiple}s\n"
    )
    for kind, times in lattice.times.items():
        print(f"{kind}: {', '.join(f'{count}: {time:.2f}' for count, time in sorted(times.items()))}")
    provenance = find_units(original)
    groups, _ = cuttable_groups(provenance, free_groups(provenance, ChannelLimits(multiple_of=1)))
    print("\n| keep | MACs on the lattice | MACs beside it | latency on the lattice over beside it (95 %) | |")
    print(f"|{'---|' * 5}", flush=True)
    rows: list[dict[str, Any]] = []
    for fraction in np.random.default_rng(arguments.seed).uniform(0.2, 0.95, arguments.fractions):
        row = compare(provenance, groups, float(fraction), multiple, backend, arguments)
        rows.append(row)
        print(table_row(row), flush=True)
        if arguments.output:
            found = {"environment": backend.environment(), "steps": dict(lattice.steps), "rows": rows}
            write_json(arguments.output, found)
    slower = [row for row in rows if row["verdict"] == "slower"]
    faster = sum(row["verdict"] == "faster" for row in rows)
    print(f"\n{len(rows)} fractions: on the lattice faster {faster} times, slower {len(slower)} times; ", end="")
    print(f"median ratio {np.median([row['ratio'] for row in rows]):.3f}")
    sys.exit(1 if slower else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fractions", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="for one measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file, written after each row")
    return parser.parse_args()


def make() -> Program:
    declare_torchvision_ops()
    from torchvision import models

    torch.manual_seed(0)
    return fold_parameters(capture(models.resnet18().eval(), torch.randn(2, 3, 224, 224)))


def compare(
    provenance: Provenance,
    groups: list[UnitGroup],
    fraction: float,
    multiple: int,
    backend: Any,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One fraction: both networks, measured against each other; the ratio is on the lattice over beside it."""
    models, macs = [], []
    for odd in (True, False):
        counts = {g.name: count_for(len(g), fraction, multiple, odd) for g in groups}
        program = prune_channels(provenance, surplus_units(groups, counts)).program
        models.append(to_onnx(program))
        macs.append(program_cost(program).macs / program_cost(provenance.program).macs)
    inputs = random_inputs(models[0], arguments.batch, arguments.seed)
    with loaded(backend, [(model, inputs) for model in models]) as (beside, on):
        measured = measure_pair(beside, on, Timing(seed=arguments.seed), until=Until(max_seconds=arguments.max_seconds))
    return {
        "keep": fraction,
        "macs_beside": macs[0],
        "macs_on": macs[1],
        "ratio": measured.ratio,
        "low": measured.low,
        "high": measured.high,
        "verdict": measured.verdict,
        "contended": measured.contended,
    }


def count_for(total: int, fraction: float, multiple: int, odd: bool) -> int:
    """Channels to keep: the nearest multiple, or one beside it, on the side of the fraction."""
    wanted = fraction * total
    count = min(total, max(multiple, round(wanted / multiple) * multiple))
    if not odd:
        return count
    return count + 1 if wanted > count and count < total else count - 1


def table_row(row: dict[str, Any]) -> str:
    ratio = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
    note = f"{row['verdict']}{', contended' if row['contended'] else ''}"
    return f"| {row['keep']:.3f} | {row['macs_on']:.3f} | {row['macs_beside']:.3f} | {ratio} | {note} |"


if __name__ == "__main__":
    main()
