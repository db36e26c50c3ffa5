"""Goals that bound what can be counted without a measurement: multiply-accumulates and parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..ir.cost import program_cost
from ..ir.program import Program
from ..plan.goal import Delivered, Goal
from ..rewrite.budget import Shape
from ..rewrite.context import Context
from ..rewrite.rewrite import Applied
from ..rewrite.search import PlanSearch
from ..support.errors import GoalError
from .counted_budget import CountedBudget

#: What rounding may do to a share of a count.
ROUNDING = 1e-9


@dataclass(frozen=True)
class CountedGoal(Goal):
    """Come down to at most `ratio` times what the original has of something that is counted."""

    ratio: float

    mixes = True
    #: What is counted, as `Cost` calls it, in short, and in words.
    unit: ClassVar[str]
    short: ClassVar[str]
    what: ClassVar[str]
    _example: ClassVar[str]

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, (int, float)) or isinstance(self.ratio, bool) or not 0 < self.ratio < 1:
            name = type(self).__name__
            raise GoalError(
                f"{name}({self.ratio!r}) is not a goal",
                hint=f"give a ratio between 0 and 1: {self._example}",
            )

    def counted(self, program: Program) -> int:
        """How much of it a network has."""
        raise NotImplementedError

    def whole(self, original: Program) -> int:
        """How much the network as the user has it, at least 1: what the ratio is of."""
        return max(1, self.counted(original))

    def budget(self, ctx: Context, shape: Shape) -> CountedBudget:
        return CountedBudget(self.ratio, self.unit, self.counted, self.whole(ctx.teacher), shape)

    def sought(self, search: PlanSearch) -> tuple[Applied, bool]:
        search.offer(self.ratio)
        found = search.searched(self.ratio)
        return search.made(found), found.met

    def recounted(self, delivered: Delivered) -> bool:
        return self.counted(delivered.program) <= (self.ratio + ROUNDING) * self.whole(delivered.teacher)

    def unmet(self, result: Any) -> str:
        ratio = self.counted(result.program) / self.whole(result.outcome.ctx.teacher)
        return f"{self} cannot be met: with all that may be cut at its least, the ratio is {ratio:.3f}"

    def words(self) -> str:
        return f"at most {self.ratio:g} of the original's {self.what}"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "ratio": float(self.ratio)}

    def __str__(self) -> str:
        return f"{self.short} ratio {self.ratio:g}"


@dataclass(frozen=True)
class Macs(CountedGoal):
    """Come down to at most `ratio` times the original's multiply-accumulates, cut where it costs the least error."""

    kind = "macs"
    unit = "macs"
    short = "MACs"
    what = "multiply-accumulates"
    _example = "Macs(0.6) asks for 40 % fewer multiply-accumulates"

    def counted(self, program: Program) -> int:
        return program_cost(program).macs


@dataclass(frozen=True)
class Parameters(CountedGoal):
    """Come down to at most `ratio` times the original's trained values, cut where it costs the least error: for a limit
    on the size of a file or on memory. Vectors that several layers of the original share count once."""

    kind = "parameters"
    unit = "parameters"
    short = what = "parameters"
    _example = "Parameters(0.5) asks for half of the parameters"

    def counted(self, program: Program) -> int:
        return program.parameter_count()

    def whole(self, original: Program) -> int:
        return max(1, self.counted(original) - original.copied_parameters)
