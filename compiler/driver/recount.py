"""Whether what a goal counts is so in the network that goes out, not in the plan for it."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.cost import program_cost
from ..ir.program import Program
from ..plan.counting import counted, counted_whole
from ..plan.plan import Blocks, Channels, CountedGoal, Decision, DropBlock, Goal, Ranks
from .joint_rewrite import decided_shape

#: What rounding may do to a share of a count.
ROUNDING = 1e-9


def recounted(goal: Goal, teacher: Program, program: Program, decisions: Sequence[Decision], planned: bool) -> bool:
    """Whether the finished `program` reaches a goal that can be counted; others as `planned`.

    A share of the multiply-accumulates or parameters is counted anew. Goals in blocks, channels and ranks are reached
    when the plan asks for as much and every decision of it is in effect.
    """
    if isinstance(goal, CountedGoal):
        return counted(program, goal) <= (goal.ratio + ROUNDING) * counted_whole(teacher, goal)
    if isinstance(goal, Blocks):
        dropped = sum(isinstance(decision, DropBlock) for decision in decisions)
        return dropped >= goal.count and in_effect(teacher, program, decisions)
    if isinstance(goal, (Channels, Ranks)):
        return planned and in_effect(teacher, program, decisions)
    return planned


def in_effect(teacher: Program, program: Program, decisions: Sequence[Decision]) -> bool:
    """Whether a network costs what the decisions leave of the original."""
    wanted = decided_shape(teacher, decisions)
    same_macs = program_cost(program).macs == program_cost(wanted).macs
    return same_macs and program.parameter_count() == wanted.parameter_count()
