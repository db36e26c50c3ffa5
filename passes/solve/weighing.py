"""What running and solving networks costs, and how many samples trials read by that."""

from __future__ import annotations

from ...compiler.ir.cost import program_cost
from ...compiler.ir.program import Program
from .layers import find_layers
from .resolve_network import TRIAL_RESOLVE, ResolveSettings

#: Samples that weigh items against each other, and the multiply-accumulates that this may cost over all items.
WEIGHING_SAMPLES, LEAST_WEIGHING = 64, 8
WEIGHING_MACS = 2 * 10**12
#: Samples that a plan is put into effect with while plans are compared.
TRIAL_SAMPLES = 128
#: What a solve takes over its multiply-accumulates at the speed of a forward pass: patches are made, rows read twice. A
#: quick one; and one with care, which refines, judges and often is made twice. ResNet-56 and MobileNetV2 took 2.1 and
#: 8.5, 2.2 and 7.5.
QUICK_EFFORT, FULL_EFFORT = 2.2, 8.0


def weighing_samples(program: Program, items: int) -> int:
    """How many samples a trial of each item may read: as many as `WEIGHING_MACS` allow, a few at least."""
    macs = max(1, program_cost(program).macs)
    return max(LEAST_WEIGHING, min(WEIGHING_SAMPLES, WEIGHING_MACS // (items * macs)))


def solve_macs(program: Program, samples: int, rows_per_column: int | None) -> int:
    """About what it takes to solve all layers of a network: it is run beside the original, and each layer's Gram matrix
    is made from so many rows per column, as far as there are as many, factorised and solved with."""
    cost = program_cost(program).macs * samples * 2
    for layer in find_layers(program)[0].values():
        outputs, columns = program.module.get_parameter(layer.weight).flatten(1).shape
        rows = samples * layer.rows_per_sample(program)
        cost += columns**2 * (min(rows, (rows_per_column or 1) * columns) + columns // 3 + outputs)
    return max(1, cost)


def solve_passes(program: Program, samples: int, *, quick: bool = False) -> float:
    """About how many forward passes of one sample take as long as a solve of all layers from so many; `quick` as while
    plans are compared."""
    settings, effort = (TRIAL_RESOLVE, QUICK_EFFORT) if quick else (ResolveSettings(), FULL_EFFORT)
    macs = max(1, program_cost(program).macs)
    return effort * solve_macs(program, samples, settings.rows_per_column) / macs


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
