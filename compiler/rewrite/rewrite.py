"""The protocol of rewrites. The driver knows nothing else of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from ...passes.solve.changes import Changes
from ...passes.solve.resolve_network import LayerError
from ..ir.program import Program
from ..plan.decision import Decision
from ..plan.goal import Goal
from ..plan.joint_search import TriedPlan
from ..plan.proposals import Item, Mix
from ..support.errors import GoalError, Reject
from .budget import Budget, Savings
from .context import Context

R = TypeVar("R", bound="Rewrite")


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a rewrite can do towards a goal: items of which a search takes some, and why the rest is left alone.

    `starts` are whole plans of these items that are worth a trial; `savings` says how what the items save adds up where
    that is not one by one; `report` goes into report.json as it is.
    """

    items: tuple[Item, ...] = ()
    rejects: tuple[Reject, ...] = ()
    starts: tuple[Mix, ...] = ()
    savings: Savings | None = None
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OwnPlan:
    """The plan of one rewrite for a goal in units of its own, and whether it reaches the goal."""

    decisions: tuple[Decision, ...]
    met: bool = True
    rejects: tuple[Reject, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A program with decisions in effect, and what a solve has to know about them.

    `decisions` are those that are in effect, as the plan is to hold them. `plain` is the same network before any weight
    was solved, None where there is no other. `changes` are what a solve has to know; `errors` the relative output
    errors on the judging samples, stage by stage; `tried` the plans that were compared on the way."""

    program: Program
    decisions: tuple[Decision, ...] = ()
    plain: Program | None = None
    changes: Changes = field(default_factory=Changes)
    layers: tuple[LayerError, ...] = ()
    rejects: tuple[Reject, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict, repr=False)
    errors: Mapping[str, float] = field(default_factory=dict)
    tried: tuple[TriedPlan, ...] = ()


class Rewrite:
    """One kind of change of a network: offered, priced, carried out. Subclass it as a frozen dataclass whose fields are
    its settings, and pass an instance in `rewrites=`; nothing has to be registered.

    Rewrites of one plan are applied by `phase`, the lowest first: each sees the network that those before it leave.
    After all of them the layers are solved once more, by the driver.
    """

    #: In plan.json, in `rewrites=` and in reports: the `kind` of its decisions.
    name: ClassVar[str]
    #: What it does, as a report says it: ``drop blocks``.
    verb: ClassVar[str]
    #: How a report draws it: ``drops``, ``channels``, ``ranks`` (a triangle, a square, a diamond), or ``mix``.
    mark: ClassVar[str] = "mix"
    #: Its class of decisions.
    decides: ClassVar[type[Decision]]
    phase: ClassVar[int] = 50
    #: Whether what the network then computes is solved before the next rewrite looks at it.
    solves_before_next: ClassVar[bool] = False
    #: Names of what the user wants left alone, patterns as those of a shell.
    ignore: tuple[str, ...] = ()
    #: What those names are names of.
    ignores: ClassVar[str] = "layer"

    @classmethod
    def configured(cls: type[R], settings: Any) -> R:
        """The rewrite as `foldcut.PipelineSettings` sets it, where it is used by its name: by default as it comes."""
        del settings
        return cls()

    def serves(self, goal: Goal) -> bool:
        """Whether it can be used towards a goal: by default, all for which plans of several rewrites are searched."""
        return goal.mixes

    def by_default(self, goal: Goal) -> bool:
        """Whether it is used where none is named."""
        return self.serves(goal)

    def prepared(self: R, ctx: Context) -> R:
        """The rewrite with settings that depend on the backend. Raises BackendError."""
        del ctx
        return self

    def named(self, program: Program) -> Sequence[str]:
        """The names that `ignore` may use of a program."""
        del program
        return ()

    def ignoring(self: R, patterns: tuple[str, ...]) -> R:
        """The rewrite that leaves these alone."""
        return replace(self, ignore=patterns)  # type: ignore[type-var]

    def offer(self, ctx: Context, budget: Budget) -> Offer:
        """What it can do to `ctx.teacher` towards the aim of a budget. Never changes the program."""
        raise NotImplementedError

    def own_plan(self, ctx: Context) -> OwnPlan:
        """The plan for `ctx.goal`, a goal in its own units. Raises GoalError where nothing can be done."""
        raise GoalError(f"{self.name} has no plan of its own for {ctx.goal}")

    def still(self, program: Program, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Those of the decisions of a search that still save something on what earlier rewrites have left."""
        del program
        return decisions

    def requires(self, program: Program, decisions: Sequence[Decision]) -> None:
        """Raise RewriteError or PlanError where the program does not have what a decision is about."""

    def ensures(self, before: Program, after: Program, decisions: Sequence[Decision]) -> None:
        """Raise RewriteError where a rewritten program is not what the decisions say that took effect. That inputs and
        outputs stay what they were is checked by the driver."""

    def shape(self, program: Program, decisions: Sequence[Decision]) -> Program:
        """The network that decisions lead to, with any weights: the same graph and shapes, so the same latency."""
        raise NotImplementedError

    def apply(self, program: Program, decisions: Sequence[Decision], ctx: Context) -> Applied:
        """The network with the decisions in effect, and weights that suit it as well as this rewrite alone can say."""
        raise NotImplementedError

    def plain(self, program: Program, decisions: Sequence[Decision]) -> Program:
        """The same without data: by default the `shape`."""
        return self.shape(program, decisions)

    def unsolved_by(self) -> tuple[str, ...]:
        """The settings that forbid the solve of all layers after it, by name: ``ChannelSettings.resolve=False``."""
        return ()

    def report(self, ctx: Context, applied: Applied) -> Mapping[str, Any]:
        """What report.json says about it beside its decisions."""
        del ctx, applied
        return {}
