"""What a plan's measurement is kept under."""

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any, cast

import pytest
from foldcut.compiler.goals.latency_budget import LatencyBudget
from foldcut.compiler.ir.program import Program
from foldcut.compiler.plan.proposals import Claims, Item, Mix, Proposal
from foldcut.compiler.rewrite.budget import changes_of
from foldcut.passes.drop.decision import DropBlock
from foldcut.runtime.probe.stored_latency import StoredLatency


class Noisy:
    """Measures something else each time, and keeps what it measured."""

    def __init__(self) -> None:
        self.kept: dict[str, float] = {}

    def ratio(self, name: str, inputs: Sequence[Any], rewritten: Callable[[], Program]) -> float:
        del rewritten
        return self.kept.setdefault(f"{name} {inputs!r}", 0.5 + 0.1 * len(self.kept))


def no_program(_: object = None) -> Program:
    raise AssertionError("not asked for")


@pytest.mark.parametrize("order", permutations(range(3)))
def test_a_plan_is_measured_once_in_whatever_order_its_changes_were_chosen(order: tuple[int, ...]) -> None:
    """A rewrite that measures its own choice, and the search that measures the plan of it: one measurement. Two, and
    the choice may reach a goal that its plan misses, with nothing else offered."""
    drops = [DropBlock(entry=f"a{i}", exit=f"b{i}", path=f"layer.{i}", error=0.1 * i) for i in range(3)]
    claims = [Claims(removes=frozenset({drop.exit})) for drop in drops]
    mix: Mix = {}
    for drop, claim in zip(drops, claims, strict=True):
        proposal = Proposal(error=0.1, saving=0.2, decision=drop)
        mix[Item(kind="drop_blocks", name=drop.exit, claims=claim, proposals=(proposal,))] = proposal
    latency = Noisy()
    budget = LatencyBudget(0.7, cast(StoredLatency, latency), no_program)
    assert budget.share(changes_of([drops[i] for i in order]), no_program) == budget.ratio(mix)
    assert len(latency.kept) == 1
