"""The goal of a compile: the base class of goals, with a JSON round trip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...runtime.measure.regime import Regime
from ..ir.program import Program
from ..support.errors import PlanError
from .decision import counted_words

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
    """What a compile has to reach. Base class.

    Subclass it as a frozen dataclass with a `kind`. Defining the subclass registers its `kind`, so that plans are
    read with it. A goal with `mixes` set implements `budget` and `sought`, and plans of several rewrites are searched
    for. Any other goal is in units of one rewrite (blocks, ranks), which makes the plan. `measured` says that plans
    have to save latency, `bounds_error` that the output error on the test samples decides, `needs_change` that an
    unchanged network does not reach the goal, and `needs_metric` that it is about the metric passed as ``evaluate``.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Layers(foldcut.Goal):
        ...     count: int
        ...     kind = "layers"
        >>> Layers(3).to_dict()
        {'kind': 'layers', 'count': 3}
        >>> Layers.from_dict({"kind": "layers", "count": 3}) == Layers(3), Layers(3).mixes
        (True, False)
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
    #: Whether it goes by a metric of the user's.
    needs_metric: ClassVar[bool] = False
    _known: ClassVar[dict[str, type[Goal]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in cls.__dict__:
            Goal._known[cls.kind] = cls

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: the kind, and the fields that are not None."""
        fields: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return {"kind": self.kind, **{name: value for name, value in fields.items() if value is not None}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Goal:
        """Read a goal back.

        Arguments:
            data: The result of `to_dict`.

        Returns:
            The goal.

        Raises:
            GoalError, KeyError, TypeError: If `data` is anything else.
        """
        return cls(**{name: value for name, value in data.items() if name != "kind"})

    def words(self) -> str:
        """The goal as reports word it."""
        return str(self)

    def settled(self, ctx: Context) -> Goal:
        """The goal once the original has been measured.

        Arguments:
            ctx: The context of the compile.

        Returns:
            The goal, in terms of a ratio if it was not.
        """
        del ctx
        return self

    def budget(self, ctx: Context, shape: Shape) -> PlanBudget:
        """The quantity that the goal bounds. Only called if `mixes`.

        Arguments:
            ctx: The context of the compile.
            shape: Builds the network of a plan, with any weights.

        Returns:
            The budget that a search for plans goes by.
        """
        raise NotImplementedError

    def sought(self, search: PlanSearch) -> tuple[Applied, bool]:
        """Search for the network that reaches the goal best. Only called if `mixes`.

        Arguments:
            search: The search over plans.

        Returns:
            The network, and whether its plan was found to reach the goal.
        """
        raise NotImplementedError

    @property
    def share(self) -> float | None:
        """The latency ratio to reach, or None. A network that misses it is planned again for a smaller one."""
        return None

    def at(self, share: float) -> Goal:
        """The same goal at another latency ratio.

        Arguments:
            share: The latency ratio.

        Returns:
            The goal.
        """
        raise NotImplementedError

    def recounted(self, delivered: Delivered) -> bool:
        """Count again in the finished network what its plan promised.

        Arguments:
            delivered: The original, the finished network, and what its plan said.

        Returns:
            Whether the finished network has what the goal counts.
        """
        return delivered.planned and delivered.in_effect()

    def unmet(self, result: Any) -> str:
        """Word how far a result is from the goal, for the `GoalError`.

        Arguments:
            result: The best `Compiled`.

        Returns:
            One sentence: by default what was done, and the measured latency ratio.
        """
        m = result.outcome.measurement
        done = " and ".join(counted_words(result.plan.decisions)) or "nothing done"
        return f"{self} is not met: with {done}, the ratio is {m.ratio:.3f} ({m.low:.3f} to {m.high:.3f})"

    def within(self, error: float) -> bool:
        """Whether the goal allows a relative output error.

        Arguments:
            error: The error.

        Returns:
            False where it is beyond a bound of the goal.
        """
        del error
        return True

    def reached(self, measurement: Measurement, recounted: bool, error: float | None = None) -> bool:
        """The verdict on a finished network.

        Arguments:
            measurement: Its measured latency against the original.
            recounted: The result of `recounted`.
            error: Its relative output error on the test samples, if known.

        Returns:
            Whether the goal is met.
        """
        del measurement, error
        return recounted


def read_goal(data: Mapping[str, Any]) -> Goal:
    """The goal that `to_dict` wrote. Raises PlanError for anything else."""
    known = Goal._known.get(data["kind"]) if isinstance(data.get("kind"), str) else None
    if known is None:
        raise PlanError(f"unknown goal {dict(data)!r}", hint="the plan was written by another version of foldcut")
    return known.from_dict(data)
