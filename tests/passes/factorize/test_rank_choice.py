"""The choice of ranks under a budget: exact for errors that add up, and better than that where they do not."""

from collections.abc import Mapping
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from foldcut.passes.factorize.rank_choice import Menu, contributions, search_plan
from foldcut.passes.factorize.select_ranks import Option
from hypothesis import given
from hypothesis import strategies as st


def option(scheme: str, macs: int, error: float) -> Option:
    return Option(scheme=scheme, ranks=(macs,), macs=macs, error=error)


def menu(rows: Mapping[str, list[Option]], budget: float, whole: float = 10) -> Menu:
    costs = {name: [float(o.macs) for o in row] for name, row in rows.items()}
    return Menu(options=rows, costs=costs, whole=dict.fromkeys(rows, whole), budget=budget)


TWO = {
    "a": [option("x", 2, 0.4), option("y", 3, 0.1)],
    "b": [option("x", 2, 0.3), option("y", 4, 0.2)],
    "c": [option("channel", 5, 0.2)],
}


def rows() -> st.SearchStrategy[list[Option]]:
    single = st.tuples(st.sampled_from("xy"), st.integers(1, 9), st.floats(0.01, 1))
    return st.lists(single.map(lambda found: option(*found)), min_size=1, max_size=3)


@given(st.lists(rows(), min_size=1, max_size=4), st.integers(0, 40))
def test_the_best_is_that_of_every_choice(found: list[list[Option]], budget: int) -> None:
    offered = menu({str(i): row for i, row in enumerate(found)}, budget)
    weights = {name: 1.0 + int(name) for name in offered.options}
    choice, possible = offered.best(weights)
    every = list(product(*([None, *row] for row in found)))
    costs = [sum(o.macs if o else 10 for o in picked) for picked in every]
    errors = [sum((1 + i) * o.error for i, o in enumerate(picked) if o) for picked in every]
    allowed = [error for error, cost in zip(errors, costs, strict=True) if cost <= budget]
    assert possible == bool(allowed)
    if possible:
        assert sum(weights[n] * o.error for n, o in choice.items()) == pytest.approx(min(allowed), rel=1e-3)
    else:
        assert sum(o.macs for o in choice.values()) == min(costs)


def test_one_scheme_alone() -> None:
    only = menu(TWO, 12).only("x")
    assert {name: [o.scheme for o in row] for name, row in only.options.items()} == {
        "a": ["x"], "b": ["x"], "c": ["channel"],
    }  # fmt: skip
    assert only.costs == {"a": [2.0], "b": [2.0], "c": [5.0]}


class Made:
    """Trials of a network whose output error is a function of the choice."""

    def __init__(self, error: Any) -> None:
        self.error = error
        self.looked_at = 0

    def without(self, choice: Mapping[str, Option]) -> dict[str, float]:
        self.looked_at += 1
        return {name: self.error({n: o for n, o in choice.items() if n != name}) for name in choice}


def added(choice: Mapping[str, Option]) -> float:
    return sum(option.error for option in choice.values())


def test_errors_that_add_up_leave_nothing_to_search() -> None:
    found = search_plan(menu(TWO, 17), Made(added), dict.fromkeys(TWO, 1.0))  # type: ignore[arg-type]
    assert found.possible
    assert found.choice == menu(TWO, 17).best(dict.fromkeys(TWO, 1.0))[0]
    assert min(found.tried) == pytest.approx(added(found.choice))


def test_layers_that_make_each_other_worse_are_found_out() -> None:
    """Alone, `a` and `b` lose little; together they lose a lot, and `c` is the better choice beside `a`."""
    rows = {name: [option("x", 4, error)] for name, error in (("a", 0.1), ("b", 0.1), ("c", 0.15))}

    def together(choice: Mapping[str, Option]) -> float:
        return added(choice) + (2.0 if {"a", "b"} <= set(choice) else 0.0)

    found = search_plan(menu(rows, 18), Made(together), dict.fromkeys(rows, 1.0))  # type: ignore[arg-type]
    assert found.tried[0] == pytest.approx(2.2)
    assert len(found.choice) == 2
    assert "c" in found.choice
    assert together(found.choice) == min(found.tried) == pytest.approx(0.25)


def test_the_better_of_two_schemes_is_found_out() -> None:
    """Predicted errors favour `x`, measured ones `y`."""
    rows = {name: [option("x", 4, 0.1), option("y", 4, 0.12)] for name in "abc"}

    def measured(choice: Mapping[str, Option]) -> float:
        return sum((3 if o.scheme == "x" else 1) * o.error for o in choice.values())

    found = search_plan(menu(rows, 24), Made(measured), dict.fromkeys(rows, 1.0))  # type: ignore[arg-type]
    assert {o.scheme for o in found.choice.values()} == {"y"}


def test_a_scheme_that_does_not_reach_the_budget_alone_does_not_stand() -> None:
    """Its plan would lose the least: it costs too much."""
    rows = {name: [option("x", 6, 0.01), option("y", 2, 0.5)] for name in "abc"}
    found = search_plan(menu(rows, 12), Made(added), dict.fromkeys(rows, 1.0))  # type: ignore[arg-type]
    assert found.possible
    assert sum(o.macs for o in found.choice.values()) <= 12


def test_a_budget_out_of_reach_gives_the_cheapest_without_a_trial() -> None:
    made = Made(added)
    found = search_plan(menu(TWO, 3), made, dict.fromkeys(TWO, 1.0))  # type: ignore[arg-type]
    assert not found.possible
    assert {name: o.macs for name, o in found.choice.items()} == {"a": 2, "b": 2, "c": 5}
    assert made.looked_at == 0


def test_a_budget_that_all_fits_into_cuts_nothing() -> None:
    found = search_plan(menu(TWO, 30), Made(added), dict.fromkeys(TWO, 1.0))  # type: ignore[arg-type]
    assert found.choice == {}
    assert found.possible


def test_no_layer_becomes_free_by_making_up_for_another() -> None:
    choice = {"a": option("x", 2, 0.5), "b": option("x", 2, 0.5), "c": option("x", 1, 0.0)}
    trials = SimpleNamespace(without=lambda _choice: {"a": 0.9, "b": 0.2, "c": 0.0})
    found = contributions(choice, 0.7, trials, {"a": 1.0, "b": 1.0, "c": 2.0, "d": 3.0})  # type: ignore[arg-type]
    assert found == pytest.approx({"a": 0.1, "b": 1.0, "c": 2.0, "d": 3.0})
