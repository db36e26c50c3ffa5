"""What goals bound that can be counted without a measurement."""

from __future__ import annotations

from ..ir.cost import program_cost
from ..ir.program import Program
from .plan import CountedGoal, Parameters


def counted(program: Program, goal: CountedGoal) -> int:
    """What a goal bounds of a network: its multiply-accumulates or its trained values."""
    return program.parameter_count() if isinstance(goal, Parameters) else program_cost(program).macs


def counted_whole(original: Program, goal: CountedGoal) -> int:
    """What a goal's share is of: `counted` of the network as the user has it, where vectors that several layers share
    count once."""
    copied = original.copied_parameters if isinstance(goal, Parameters) else 0
    return counted(original, goal) - copied
