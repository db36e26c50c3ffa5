"""What a compile is to reach: the base of all goals, with a JSON round trip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...runtime.measure.regime import Regime
from ..ir.program import Program
from ..support.errors import PlanError

if TYPE_CHECKING:
    from ...runtime.measure.measurement import Measurement
    from ..rewrite.budget import PlanBudget, Shape
    from ..rewrite.context import Context
    from ..rewrite.rewrite import Applied
    from ..rewrite.search import PlanSearch


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """A network that goes out, and what its plan said of it."""

    teacher: Program
    program: Program
    #: How many decisions the plan has.
    decisions: int
    #: Whether the plan was found to reach the goal.
    planned: bool
    #: Whether the network costs what the decisions leave of the original.
    in_effect: Callable[[], bool]


class Goal:
    """A goal is a frozen dataclass with a `kind`; it is known by that from where it is defined on.

    `mixes` says that plans of several rewrites are searched for; a goal that is in units of one rewrite's own (blocks,
    ranks) leaves the plan to that rewrite.
    """

    kind: ClassVar[str]
    mixes: ClassVar[bool] = False
    #: Whether it is latency that plans save.
    measured: ClassVar[bool] = False
    #: Whether it goes by the output error on the test samples.
    bounds_error: ClassVar[bool] = False
    #: What the caches hold when its latency is measured.
    regime: Regime = "hot"
    #: Whether a network that is as it was can reach it.
    needs_change: ClassVar[bool] = False
    _known: ClassVar[dict[str, type[Goal]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in cls.__dict__:
            Goal._known[cls.kind] = cls

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the kind, and what was given."""
        fields: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return {"kind": self.kind, **{name: value for name, value in fields.items() if value is not None}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Goal:
        """The goal that `to_dict` wrote. Raises GoalError, KeyError or TypeError for anything else."""
        return cls(**{name: value for name, value in data.items() if name != "kind"})

    def words(self) -> str:
        """The goal as a report says it."""
        return str(self)

    def settled(self, ctx: Context) -> Goal:
        """The goal once the original has been measured."""
        del ctx
        return self

    def budget(self, ctx: Context, shape: Shape) -> PlanBudget:
        """What it bounds; `shape` makes the network of a plan. Asked for where it `mixes`."""
        raise NotImplementedError

    def sought(self, search: PlanSearch) -> tuple[Applied, bool]:
        """The network that reaches it best, and whether its plan was found to. Asked for where it `mixes`."""
        raise NotImplementedError

    @property
    def share(self) -> float | None:
        """The latency ratio that it asks for: a network that misses it is planned again, for less. None where it asks
        for none."""
        return None

    def at(self, share: float) -> Goal:
        """The same goal at another latency ratio."""
        raise NotImplementedError

    def recounted(self, delivered: Delivered) -> bool:
        """Whether what the goal counts is so in the network that goes out, not in the plan for it."""
        return delivered.planned and delivered.in_effect()

    def unmet(self, result: Any) -> str:
        """How far a result is from the goal, for the error that says so."""
        del result
        return f"{self} is not met"

    def reached(self, measurement: Measurement, recounted: bool, error: float | None = None) -> bool:
        """The verdict on a finished network: its measured latency, whether it was `recounted`, and its relative output
        error on the test samples, where that is known."""
        del measurement, error
        return recounted


def read_goal(data: Mapping[str, Any]) -> Goal:
    """The goal that `to_dict` wrote. Raises PlanError for anything else."""
    known = Goal._known.get(data["kind"]) if isinstance(data.get("kind"), str) else None
    if known is None:
        raise PlanError(f"unknown goal {dict(data)!r}", hint="the plan was written by another version of foldcut")
    return known.from_dict(data)
