"""The choice of blocks, on invented errors and savings."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import pytest
from foldcut.compiler.analysis.regions import Region
from foldcut.compiler.ir.cost import Cost
from foldcut.passes.drop.choose_drops import LEAST_SAVING, Choice, choose_drops
from foldcut.passes.drop.decision import DropBlock
from hypothesis import given
from hypothesis import strategies as st

Rule = Callable[[frozenset[str]], float]


def region(name: str, *nodes: str) -> Region:
    """A region whose entry is `name`; it removes the nodes given, or one of its own."""
    return Region(
        entry=name, exit=f"{name}'", kind="residual", nodes=frozenset(nodes or (name,)), path=name, cost=Cost()
    )


class Errors:
    """The error of a set of regions by a rule; notes what it was asked."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.asked: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    def __call__(self, chosen: Sequence[Region], candidates: Sequence[Region]) -> Mapping[str, float]:
        self.asked.append((tuple(r.entry for r in chosen), tuple(r.entry for r in candidates)))
        taken = frozenset(r.entry for r in chosen)
        return {r.name: self.rule(taken | {r.entry}) for r in candidates}

    @property
    def evaluations(self) -> int:
        return sum(len(candidates) for _, candidates in self.asked)


def additive(**weights: float) -> Rule:
    return lambda names: sum(weights[n] for n in names)


def drop(count: int) -> Callable[[Sequence[Region]], bool]:
    return lambda chosen: len(chosen) >= count


def names(choice: Choice) -> list[str]:
    return [r.entry for r in choice.regions]


def test_the_least_error_goes_first() -> None:
    errors = Errors(additive(a=0.3, b=0.1, c=0.2))
    choice = choose_drops([region(n) for n in "abc"], errors=errors, savings=None, enough=drop(2))
    assert names(choice) == ["b", "c"]
    assert choice.met
    assert [d.error for d in choice.decisions] == pytest.approx([0.1, 0.3])
    assert [(d.entry, d.exit, d.path, d.saving) for d in choice.decisions] == [
        ("b", "b'", "b", None),
        ("c", "c'", "c", None),
    ]


def test_no_more_than_asked_for() -> None:
    assert names(choose_drops([region("a")], errors=Errors(additive(a=0)), savings=None, enough=drop(0))) == []


def test_two_blocks_that_stand_in_for_each_other_are_not_both_taken() -> None:
    """Alone, a and b are the cheapest; together they cost the most."""

    def rule(chosen: frozenset[str]) -> float:
        return sum({"a": 0.1, "b": 0.11, "c": 0.2}[n] for n in chosen) + (5.0 if {"a", "b"} <= chosen else 0)

    choice = choose_drops([region(n) for n in "abc"], errors=Errors(rule), savings=None, enough=drop(2))
    assert names(choice) == ["a", "c"]


def test_error_is_weighed_against_the_latency_saved() -> None:
    errors = Errors(additive(a=0.10, b=0.15))
    savings = {"a>a'": 0.05, "b>b'": 0.20}
    choice = choose_drops([region("a"), region("b")], errors=errors, savings=savings, enough=drop(1))
    assert names(choice) == ["b"]
    assert choice.decisions[0].saving == 0.20


def test_of_two_that_lower_the_error_the_one_that_saves_more_goes_first() -> None:
    errors = Errors(additive(a=-0.1, b=-0.1))
    savings = {"a>a'": 0.05, "b>b'": 0.20}
    choice = choose_drops([region("a"), region("b")], errors=errors, savings=savings, enough=drop(1))
    assert names(choice) == ["b"]


def test_regions_that_save_nothing_are_never_taken() -> None:
    savings = {"a>a'": LEAST_SAVING / 2, "b>b'": -0.1, "c>c'": 0.1}
    errors = Errors(additive(a=0, b=0, c=1))
    choice = choose_drops([region(n) for n in "abc"], errors=errors, savings=savings, enough=drop(3))
    assert names(choice) == ["c"]
    assert not choice.met
    assert all(candidates == ("c",) for _, candidates in errors.asked)


def test_an_unmet_goal_keeps_all_that_was_reached() -> None:
    choice = choose_drops(
        [region(n) for n in "abc"], errors=Errors(additive(a=3, b=1, c=2)), savings=None, enough=drop(5)
    )
    assert names(choice) == ["b", "c", "a"]
    assert not choice.met


def test_overlapping_regions_are_never_both_taken() -> None:
    outer, inner, other = region("outer", "n1", "n2"), region("inner", "n2"), region("other", "n3")
    errors = Errors(additive(outer=0.2, inner=0.1, other=0.3))
    choice = choose_drops([outer, inner, other], errors=errors, savings=None, enough=drop(3))
    assert names(choice) == ["inner", "other"]
    assert not choice.met


def test_a_choice_can_be_continued() -> None:
    candidates = [region(n) for n in "abcd"]
    errors = Errors(additive(a=0.1, b=0.2, c=0.3, d=0.4))
    first = choose_drops(candidates[:2], errors=errors, savings=None, enough=drop(3))
    assert not first.met
    second = choose_drops(
        candidates,
        errors=errors,
        savings=None,
        enough=drop(3),
        chosen=first.regions,
        decisions=first.decisions,
    )
    assert names(second) == ["a", "b", "c"]
    assert second.met
    assert [d.error for d in second.decisions] == pytest.approx([0.1, 0.3, 0.6])
    assert all(isinstance(d, DropBlock) for d in second.decisions)


def test_ties_go_by_name() -> None:
    candidates = [region(n) for n in "cba"]
    choice = choose_drops(candidates, errors=Errors(additive(a=1, b=1, c=1)), savings=None, enough=drop(3))
    assert names(choice) == ["a", "b", "c"]


def test_the_state_of_the_network_is_that_of_the_choice_so_far() -> None:
    errors = Errors(additive(a=1, b=2, c=3))
    choose_drops([region(n) for n in "abc"], errors=errors, savings=None, enough=drop(3))
    assert [chosen for chosen, _ in errors.asked] == [(), ("a",), ("a", "b")]


def test_lazy_evaluation_saves_work() -> None:
    letters = "abcdefghijklmnop"
    errors = Errors(additive(**{n: i for i, n in enumerate(letters)}))
    choose_drops([region(n) for n in letters], errors=errors, savings=None, enough=drop(8))
    eager = sum(len(letters) - taken for taken in range(8))
    assert errors.evaluations <= len(letters) + 3 * 7 < eager


def greedy(candidates: Sequence[str], rule: Rule, savings: Mapping[str, float] | None, count: int) -> list[str]:
    """The eager algorithm in a few lines."""
    chosen: list[str] = []
    while len(chosen) < count:
        current = rule(frozenset(chosen)) if chosen else 0.0

        def score(name: str, current: float = current) -> tuple[float, str]:
            added = rule(frozenset([*chosen, name])) - current
            return (added / savings[f"{name}>{name}'"] if savings else added, f"{name}>{name}'")

        chosen.append(min((n for n in candidates if n not in chosen), key=score))
    return chosen


@given(data=st.data())
def test_lazy_equals_eager_when_drops_make_each_other_worse(data: st.DataObject) -> None:
    letters = "abcdefg"[: data.draw(st.integers(2, 7))]
    # small whole numbers: no rounding decides a tie
    numbers = st.integers(0, 20)
    alone = {n: 1 + data.draw(numbers) for n in letters}
    together = {frozenset(pair): data.draw(numbers) for pair in combinations(letters, 2)}

    def rule(chosen: frozenset[str]) -> float:
        return float(sum(alone[n] for n in chosen) + sum(v for pair, v in together.items() if pair <= chosen))

    savings = {f"{n}>{n}'": 2.0 ** -data.draw(st.integers(0, 3)) for n in letters} if data.draw(st.booleans()) else None
    count = data.draw(st.integers(1, len(letters)))
    choice = choose_drops([region(n) for n in letters], errors=Errors(rule), savings=savings, enough=drop(count))
    assert names(choice) == greedy(letters, rule, savings, count)


def test_a_broken_error_does_not_hang() -> None:
    """NaN compares with nothing; the choice still ends, and the sound candidate is found."""
    errors = Errors(lambda chosen: math.inf if "a" in chosen else 1.0)
    choice = choose_drops([region("a"), region("b")], errors=errors, savings=None, enough=drop(1))
    assert names(choice) == ["b"]
