"""How many samples trials read, by what they cost."""

from __future__ import annotations

from ...compiler.ir.cost import program_cost
from ...compiler.ir.program import Program

#: Samples that weigh items against each other, and the multiply-accumulates that this may cost over all items.
WEIGHING_SAMPLES, LEAST_WEIGHING = 64, 8
WEIGHING_MACS = 2 * 10**12


def weighing_samples(program: Program, items: int) -> int:
    """How many samples a trial of each item may read: as many as `WEIGHING_MACS` allow, a few at least."""
    macs = max(1, program_cost(program).macs)
    return max(LEAST_WEIGHING, min(WEIGHING_SAMPLES, WEIGHING_MACS // (items * macs)))
