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

#: What rewrites know how to count.
COUNTED = ("macs", "parameters")
#: What rounding may do to a share of a count.
ROUNDING = 1e-9


@dataclass(frozen=True)
class CountedGoal(Goal):
    """At most `ratio` of a quantity of the original that is counted, not measured. Base class of `Macs` and
    `Parameters`.

    Arguments:
        ratio: Share of the original's count, between 0 and 1, both excluded.

    Raises:
        GoalError: If the ratio is out of range.
    """

    ratio: float

    mixes = True
    #: What is counted, as `Cost` calls it, in short, and in words.
    unit: ClassVar[str]
    short: ClassVar[str]
    what: ClassVar[str]
    _example: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.unit not in COUNTED:
            raise TypeError(f"{cls.unit!r} is not among {COUNTED}: subclass Goal, with a budget of its own")

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, (int, float)) or isinstance(self.ratio, bool) or not 0 < self.ratio < 1:
            name = type(self).__name__
            raise GoalError(
                f"{name}({self.ratio!r}) is not a goal",
                hint=f"give a ratio between 0 and 1: {self._example}",
            )

    def counted(self, program: Program) -> int:
        """The count of the network `program`."""
        raise NotImplementedError

    def whole(self, original: Program) -> int:
        """The count of the network `original` as it was given, at least 1."""
        return max(1, self.counted(original))

    def budget(self, ctx: Context, shape: Shape) -> CountedBudget:
        """The budget in counts."""
        return CountedBudget(self.ratio, self.unit, self.counted, self.whole(ctx.teacher), shape)

    def sought(self, search: PlanSearch) -> tuple[Applied, bool]:
        """The plan of least error found that leaves at most `ratio`, and whether it does."""
        search.offer(self.ratio)
        found = search.searched(self.ratio)
        return search.best_made(found, self.ratio), found.met

    def recounted(self, delivered: Delivered) -> bool:
        """Whether the finished network has at most `ratio` of the original's count."""
        return self.counted(delivered.program) <= (self.ratio + ROUNDING) * self.whole(delivered.teacher)

    def unmet(self, result: Any) -> str:
        """The least ratio that was reached, in words."""
        ratio = self.counted(result.program) / self.whole(result.outcome.ctx.teacher)
        return f"{self} cannot be met: with all that may be cut at its least, the ratio is {ratio:.3f}"

    def words(self) -> str:
        """The goal as reports word it."""
        return f"at most {self.ratio:g} of the original's {self.what}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"kind": self.kind, "ratio": float(self.ratio)}

    def __str__(self) -> str:
        return f"{self.short} ratio {self.ratio:g}"


@dataclass(frozen=True)
class Macs(CountedGoal):
    """Goal: at most `ratio` of the original's multiply-accumulates.

    MACs are those of convolutions, linear layers, matrix products and attention, for one sample. They are cut where
    that costs the least error: by pruning channels unless `rewrites` names others.

    Arguments:
        ratio: Share of the original's MACs, between 0 and 1, both excluded.

    Raises:
        GoalError: If the ratio is out of range.

    Example:
        >>> program = foldcut.capture(nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8))
        >>> goal = foldcut.Macs(0.5)
        >>> goal.counted(program), goal.words()
        (32, "at most 0.5 of the original's multiply-accumulates")
    """

    kind = "macs"
    unit = "macs"
    short = "MACs"
    what = "multiply-accumulates"
    _example = "Macs(0.6) asks for 40 % fewer multiply-accumulates"

    def counted(self, program: Program) -> int:
        """The multiply-accumulates of `program` for one sample."""
        return program_cost(program).macs


@dataclass(frozen=True)
class Parameters(CountedGoal):
    """Goal: at most `ratio` of the original's trained values, for a limit on file size or memory.

    Tensors that several layers share count once. Values are cut where that costs the least error: by pruning channels
    unless `rewrites` names others.

    Arguments:
        ratio: Share of the original's parameters, between 0 and 1, both excluded.

    Raises:
        GoalError: If the ratio is out of range.

    Example:
        >>> program = foldcut.capture(nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8))
        >>> foldcut.Parameters(0.5).counted(program)
        36
    """

    kind = "parameters"
    unit = "parameters"
    short = what = "parameters"
    _example = "Parameters(0.5) asks for half of the parameters"

    def counted(self, program: Program) -> int:
        """The number of trained values of `program`."""
        return program.parameter_count()

    def whole(self, original: Program) -> int:
        """The number of trained values of `original`, without the copies that folding made; at least 1."""
        return max(1, self.counted(original) - original.copied_parameters)
