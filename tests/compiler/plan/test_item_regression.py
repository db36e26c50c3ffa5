"""What single items lose and save, learnt from plans: invented figures."""

import numpy as np
import pytest
from foldcut.compiler.plan.item_regression import error_fit, fitted, saving_fit, unknown
from foldcut.compiler.plan.proposals import Claims, Item, Mix, Proposal, Scale
from foldcut.passes.prune.decision import UnitCount

SCALES = {"factorize": Scale(error=2.0)}
ITEMS = [
    Item(
        kind="factorize",
        name=name,
        claims=Claims(replaces=frozenset(name)),
        proposals=(Proposal(error=0.1, saving=0.1, decision=UnitCount(group=name, count=1, total=2)),),
    )
    for name in "abcd"
]


def mix(names: str) -> Mix:
    return {item: item.proposals[0] for item in ITEMS if item.name in names}


def test_leaving_an_item_out_says_what_it_does() -> None:
    """The kind says 0.2 for each: b loses 0.5 of the lead's 0.9, a the rest."""
    fit = error_fit(ITEMS, SCALES, mix("abc"), 0.9, [(mix("ac"), 0.4), (mix("bc"), 0.5)])
    a, b, _, d = fit.factors
    assert b == pytest.approx(2.5, rel=0.2)
    assert a == pytest.approx(2.0, rel=0.2)
    assert d == pytest.approx(1.0)  # in no plan
    assert fit.spread[1] < fit.spread[3]


def test_a_plan_far_away_counts_little() -> None:
    near = fitted(np.array([[0.1, 0.0]]), np.array([0.3]), unknown(2, 1.0), noise=0.25)
    far = fitted(np.array([[0.1, 0.9]]), np.array([3.0]), unknown(2, 1.0), noise=0.25)
    assert near.factors[0] == pytest.approx(3.0, rel=0.1)
    assert far.factors[0] < 1.5


def test_nothing_is_taken_to_lose_nothing() -> None:
    fit = error_fit(ITEMS, SCALES, mix("ab"), 0.4, [(mix("a"), 0.6)])
    assert fit.factors.min() > 0


def test_savings_hardly_move_before_they_are_measured() -> None:
    """b saves half of what it should; the others what they should."""
    fit = saving_fit(ITEMS, SCALES, mix("ab"), 0.85, [(mix("ab"), 0.85), (mix("a"), 0.9)])
    assert fit.factors[1] == pytest.approx(0.5, rel=0.1)
    assert fit.factors[[0, 2, 3]] == pytest.approx(1.0, rel=0.05)
