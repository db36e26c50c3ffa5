"""What a goal sees of the search for plans."""

from __future__ import annotations

from typing import Protocol

from ..metric.reading import Loss
from ..plan.tried import Found
from .rewrite import Applied


class PlanSearch(Protocol):
    """Plans of one network: what is offered for them, what they turn out to save and to lose, the network of one."""

    def offer(self, target: float) -> None:
        """Ask each of the rewrites what it can do towards a share of what is bounded."""

    def searched(self, target: float) -> Found:
        """The best plan that leaves at most a share."""

    def made(self, found: Found) -> Applied:
        """The network of the plan that a search found best, solved with all samples. Raises GoalError when that plan
        changes nothing."""

    def best_made(self, found: Found, target: float) -> Applied:
        """`made`; with a metric, of the plans that leave at most the share and lose about the least, the network that
        is best by it."""

    def finished(self, found: Found) -> tuple[Applied, Loss | None]:
        """The network of the plan that a search found best, trained as well where that is asked for, and what it loses
        in the user's metric: None where that says nothing."""

    def unchanged(self, reason: str) -> Applied:
        """The original as it was, and why."""

    def most_error(self, made: Applied) -> float:
        """The upper end of the interval of a network's output error on the judging samples."""

    def reasons(self) -> str:
        """Why nothing can be done."""
