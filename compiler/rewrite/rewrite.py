"""The protocol of rewrites. The driver uses nothing else of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from ...passes.solve.changes import Changes
from ...passes.solve.resolve_network import LayerError
from ..ir.program import Program
from ..plan.decision import Decision
from ..plan.goal import Goal
from ..plan.proposals import Item, Mix
from ..plan.tried import TriedPlan
from ..support.errors import GoalError, Reject
from .budget import Budget, Savings
from .context import Context
from .work import Work

R = TypeVar("R", bound="Rewrite")


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a rewrite can do towards a goal.

    Arguments:
        items: What can be changed, each with proposals of which a search takes at most one.
        rejects: What was left unchanged, with the reason.
        starts: Whole plans of these items that are worth a trial.
        savings: How the savings of several items combine. None if they add up.

    Example:
        >>> from foldcut.compiler.plan.proposals import Claims, Item, Proposal
        >>> drop = foldcut.DropBlock(entry="relu", exit="relu_1")
        >>> proposal = Proposal(error=0.01, saving=0.2, decision=drop)
        >>> item = Item(kind=drop.kind, name=drop.region, claims=Claims(), proposals=(proposal,))
        >>> foldcut.Offer(items=(item,)).items[0].name
        'relu>relu_1'
    """

    items: tuple[Item, ...] = ()
    rejects: tuple[Reject, ...] = ()
    starts: tuple[Mix, ...] = ()
    savings: Savings | None = None


@dataclass(frozen=True, kw_only=True)
class OwnPlan:
    """The plan of one rewrite for a goal in its own units, and whether it reaches the goal."""

    decisions: tuple[Decision, ...]
    met: bool = True
    rejects: tuple[Reject, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A program with decisions in effect, and what the re-solve needs to know about them.

    Arguments:
        program: The rewritten program.
        decisions: The decisions in effect, as the plan will hold them.
        plain: The same network before any weight was re-solved. None if there is no other.
        changes: Dropped regions, kept channels and replaced nodes, for the re-solve.
        layers: Squared error of each re-solved layer, before and after.
        rejects: What was refused, with the reason.
        report: What `Rewrite.report` goes by.
        before_last: The network before the rewrites that come last, which is the one to train. None if there are none.
        errors: Relative output error on the judging samples after each stage.
        tried: The plans that were compared.
        unmimicked: Why it was not trained on the features of the original, where that was asked for.
        trained: Whether it has been through that training, or is to go without: nothing is trained after it.

    Example:
        >>> program = foldcut.capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval(), torch.randn(2, 4))
        >>> drop = foldcut.DropBlock(entry="input_1", exit="linear")
        >>> smaller = foldcut.Drop().shape(program, [drop])
        >>> foldcut.Applied(program=smaller, decisions=(drop,)).program.parameter_count()
        10
    """

    program: Program
    decisions: tuple[Decision, ...] = ()
    plain: Program | None = None
    changes: Changes = field(default_factory=Changes)
    layers: tuple[LayerError, ...] = ()
    rejects: tuple[Reject, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict, repr=False)
    before_last: Applied | None = field(default=None, repr=False)
    errors: Mapping[str, float] = field(default_factory=dict)
    tried: tuple[TriedPlan, ...] = ()
    unmimicked: str | None = None
    trained: bool = False


class Rewrite:
    """One kind of change of a network. Base class.

    Subclass it as a frozen dataclass whose fields are its settings, and pass an instance in `rewrites=`. Nothing has
    to be registered. The rewrites of a plan are applied by `phase`, the lowest first; each sees the network that
    those before it left. After all of them the driver re-solves the layers once more, unless the settings forbid it.

    A subclass sets `name` (in ``plan.json`` and in `rewrites=`), `verb` and `mark` (what reports call it, and how
    they draw it) and `decides` (its class of decisions), and implements `offer`, `shape` and `apply`; for a goal in
    its own units, `own_plan` too.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Nothing(foldcut.Rewrite):
        ...     name = "nothing"
        ...     def shape(self, program, decisions):
        ...         return program
        >>> Nothing().serves(foldcut.Macs(0.5)), Nothing().serves(foldcut.Blocks(1))
        (True, False)
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
    #: Whether what the network then computes is solved before the next rewrite looks at it; in a trial of a plan, all
    #: is solved once, behind the last.
    solves_before_next: ClassVar[bool] = False
    #: Whether it is applied to the finished network: after all others, the final re-solve and mimicking. Nothing is
    #: solved after it.
    comes_last: ClassVar[bool] = False
    #: Names of what the user wants left alone, patterns as those of a shell.
    ignore: tuple[str, ...] = ()
    #: What those names are names of.
    ignores: ClassVar[str] = "layer"

    @classmethod
    def configured(cls: type[R], settings: Any) -> R:
        """The rewrite with the settings of a pipeline, for a rewrite that is used by its name.

        Arguments:
            settings: The `PipelineSettings`.

        Returns:
            The rewrite; by default, with its own defaults.
        """
        del settings
        return cls()

    def serves(self, goal: Goal) -> bool:
        """Whether the rewrite can be used towards a goal. By default, towards every goal that mixes rewrites.

        Arguments:
            goal: The goal.

        Returns:
            True if it can.
        """
        return goal.mixes

    def by_default(self, goal: Goal) -> bool:
        """Whether the rewrite is used when `rewrites=` is not given.

        Arguments:
            goal: The goal.

        Returns:
            True if it is; by default, wherever it `serves`.
        """
        return self.serves(goal)

    def prepared(self: R, ctx: Context) -> R:
        """Adapt the settings to the backend.

        Arguments:
            ctx: The context of the compile.

        Returns:
            The rewrite to use; by default, itself.

        Raises:
            BackendError: If the backend cannot be probed.
        """
        del ctx
        return self

    def multiples(self, ctx: Context) -> Mapping[str, int]:
        """What the channel counts of layers have to be multiples of for this rewrite to gain most.

        Rewrites that cut channels then offer such counts. Kernels for integers, say, may compute sixteen channels at a
        time, and what is left of them one by one.

        Arguments:
            ctx: The context of the compile.

        Returns:
            The multiples by the name of the layer's node; by default, none.

        Raises:
            BackendError: If the backend cannot be asked. Counts are then offered without regard to this rewrite.
        """
        del ctx
        return {}

    def named(self, program: Program) -> Sequence[str]:
        """The names that patterns in `ignore` are matched with.

        Arguments:
            program: The original network.

        Returns:
            The names.
        """
        del program
        return ()

    def ignoring(self: R, patterns: tuple[str, ...]) -> R:
        """The same rewrite with other patterns in `ignore`.

        Arguments:
            patterns: Shell-style patterns.

        Returns:
            The rewrite.
        """
        return replace(self, ignore=patterns)  # type: ignore[type-var]

    def work(self, ctx: Context) -> Mapping[str, Work]:
        """Estimate how much the stages of this rewrite have to do, which must be quick. The time of a compile that is
        shown while it runs is estimated from it.

        Arguments:
            ctx: The context of the compile. Its goal says whether `offer` or `own_plan` is to come.

        Returns:
            By the names of stages (``ctx.clock.stage``), in order, forward passes of one sample and seconds as a
            `foldcut.compiler.rewrite.work.Work`. What ``re-solve`` has comes on top of the re-solve itself. By
            default, nothing.
        """
        del ctx
        return {}

    def offer(self, ctx: Context, budget: Budget) -> Offer:
        """Find what can be done to ``ctx.teacher`` towards the aim of a budget. The program is not changed.

        Arguments:
            ctx: The context of the compile.
            budget: The quantity that the goal bounds.

        Returns:
            The `Offer`.
        """
        raise NotImplementedError

    def own_plan(self, ctx: Context) -> OwnPlan:
        """Make the plan for ``ctx.goal``, a goal in the rewrite's own units.

        Arguments:
            ctx: The context of the compile.

        Returns:
            The decisions, and whether they reach the goal.

        Raises:
            GoalError: If nothing can be done.
        """
        raise GoalError(f"{self.name} has no plan of its own for {ctx.goal}")

    def still(self, program: Program, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Select the decisions that still save something.

        Arguments:
            program: The network that earlier rewrites left.
            decisions: Decisions of a search.

        Returns:
            Those to apply; by default, all.
        """
        del program
        return decisions

    def requires(self, program: Program, decisions: Sequence[Decision]) -> None:
        """Check that the program has what the decisions are about. By default, nothing is checked.

        Arguments:
            program: The network before this rewrite.
            decisions: The decisions to apply.

        Raises:
            RewriteError, PlanError: If something is missing.
        """

    def ensures(self, before: Program, after: Program, decisions: Sequence[Decision]) -> None:
        """Check that a rewritten program is what the decisions say. By default, nothing is checked. The driver itself
        checks that inputs and outputs stay the same.

        Arguments:
            before: The network before this rewrite.
            after: The network after it.
            decisions: The decisions that took effect.

        Raises:
            RewriteError: If it is not.
        """

    def shape(self, program: Program, decisions: Sequence[Decision]) -> Program:
        """Build the network of some decisions, with any weights.

        Arguments:
            program: The network before this rewrite.
            decisions: The decisions to apply.

        Returns:
            A program with the final graph and shapes, so with the final latency.
        """
        raise NotImplementedError

    def apply(self, program: Program, decisions: Sequence[Decision], ctx: Context) -> Applied:
        """Build the network of some decisions, with weights fitted to it as well as this rewrite alone can.

        It costs what `shape` says. What it makes is kept, and read again where program, decisions, settings, samples
        and seed are the same, so it must not depend on anything else, ``ctx.goal`` included.

        Arguments:
            program: The network before this rewrite.
            decisions: The decisions to apply.
            ctx: The context of the compile.

        Returns:
            The `Applied` program.
        """
        raise NotImplementedError

    def plain(self, program: Program, decisions: Sequence[Decision]) -> Program:
        """Build the network of some decisions without data.

        Arguments:
            program: The network before this rewrite.
            decisions: The decisions to apply.

        Returns:
            The rewritten program; by default, that of `shape`.
        """
        return self.shape(program, decisions)

    def unsolved_by(self) -> tuple[str, ...]:
        """Names of the settings that forbid the final re-solve: ``ChannelSettings.resolve=False``."""
        return ()

    def report(self, ctx: Context, applied: Applied) -> Mapping[str, Any]:
        """Entries for ``report.json`` beside the decisions. They are in ``details``, under the name of the rewrite.

        Arguments:
            ctx: The context of the compile.
            applied: The network that was made.

        Returns:
            Plain data by name.
        """
        del ctx, applied
        return {}
