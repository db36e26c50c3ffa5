"""What a stage cannot do without: each sample once through the networks, each Gram matrix and each solve once."""

from __future__ import annotations

from ...compiler.ir.cost import program_cost
from ...compiler.ir.program import Program
from .layers import find_layers


def forward_macs(program: Program, samples: int) -> int:
    """Multiply-accumulates of so many samples through a network."""
    return program_cost(program).macs * samples


def least_solve_macs(program: Program, samples: int, rows_per_column: int | None) -> int:
    """Multiply-accumulates of the moments of every layer that can be re-solved, and of one solve of each.

    With n columns, m outputs and p rows in each group of a layer: p n (n + 1) / 2 + p n m for the moments, of which one
    half is known from the other, and n^3 / 6 + n^2 m for the solve. `rows_per_column` caps p at so many times n.
    """
    layers, _ = find_layers(program)
    total = 0.0
    for layer in layers.values():
        weight = program.module.get_parameter(layer.weight)
        columns, outputs = weight[0].numel(), weight.shape[0] // layer.groups
        rows = layer.rows_per_sample(program) * samples
        if rows_per_column is not None:
            rows = min(rows, rows_per_column * columns)
        moments = rows * columns * ((columns + 1) / 2 + outputs)
        total += layer.groups * (moments + columns**3 / 6 + columns**2 * outputs)
    return int(total)
