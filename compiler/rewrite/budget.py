"""What a goal bounds, and what changes save of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from ...runtime.probe.stored_latency import StoredLatency
from ..ir.program import Program
from ..plan.decision import Decision
from ..plan.means import Adjust
from ..plan.proposals import Item, Mix, Proposal

#: Makes the network that a plan leads to, with any weights.
Shape = Callable[[Mix], Program]


class Budget(Protocol):
    """What plans save of the latency, the multiply-accumulates or the parameters of a network.

    `unit` is ``latency``, ``macs`` or ``parameters``; `aim` the share of the original's that a plan is to leave;
    `whole` how much the original has, where that is counted. Where latency is bounded, `latency` measures it.
    """

    unit: str
    aim: float
    whole: float
    latency: StoredLatency | None

    def share(self, changes: Any, program: Callable[[], Program]) -> float:
        """What a network leaves of what is bounded.

        Arguments:
            changes: What distinguishes the network from others, as plain data. What is known of it is not found out
                again.
            program: Makes the network.

        Returns:
            Its share of the original's.
        """

    def savings(self, variants: Mapping[str, Callable[[], Program]]) -> dict[str, float]:
        """About what each of some variants of the original saves.

        Arguments:
            variants: Functions that make the variants, by name.

        Returns:
            The share of the original's that each saves, by name.
        """


class Savings(Protocol):
    """How what the items of one rewrite save adds up, where that is not one by one."""

    def saved(self, mix: Mix) -> float:
        """The share that the items of a plan save together."""

    def added(self, mix: Mix) -> Callable[[Item, Proposal | None], float]:
        """About what another proposal of an item, or none, adds to the share that a plan leaves: exact to first
        order."""

    def finer(self, item: Item, taken: Proposal) -> tuple[Item, Proposal]:
        """The item with every step from the proposal that was taken on, and that proposal among them."""


class PlanBudget(Budget, Protocol):
    """A budget that a search for plans goes by. `models` say how savings add up, by the name of the rewrite whose items
    they are of, where that is not one by one."""

    models: dict[str, Savings]

    def ratio(self, mix: Mix) -> float:
        """The share that a plan leaves."""

    def adjuster(self, target: float) -> Adjust | None:
        """What brings plans within a target where single steps are known exactly; None where they are not."""

    def finest(self, mix: Mix, target: float) -> Mix:
        """The plan as near to a target as steps bring it."""


def keyed(mix: Mix) -> list[Any]:
    """What becomes of the network by a plan, as plain data."""
    return changes_of([proposal.decision for proposal in mix.values()])


def changes_of(decisions: Iterable[Decision]) -> list[Any]:
    """What becomes of the network by decisions, as plain data: the same in whatever order they were come to, so that a
    plan that was measured once is not measured again."""
    return sorted(([decision.kind, decision.change] for decision in decisions), key=repr)
