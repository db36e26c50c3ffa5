"""What processes say to each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest, found_by: Callable[[int, str], list[Any]]) -> list[dict[str, Any]]:
    return found_by(request.param, "exchanges")


def same(found: list[dict[str, Any]], name: str) -> Any:
    """What all have, which is the same."""
    assert all(str(each[name]) == str(found[0][name]) for each in found), [each[name] for each in found]
    return found[0][name]


def test_sums_are_in_float64_and_nobody_needs_to_have_all(found: list[dict[str, Any]]) -> None:
    whole = float(sum(10**rank for rank in range(len(found))))
    first, second, third = same(found, "sums")
    assert first.dtype == torch.float64 and bool((first == whole).all()) and first.shape == (2, 3)
    assert second is None and bool((third == whole - 1).all())
    assert str(same(found, "after all")) == str(same(found, "sums")), "after all that went wrong they work together"


def test_of_symmetric_matrices_one_triangle_is_sent(found: list[dict[str, Any]]) -> None:
    sent, equal = found[0]["symmetric"]
    assert all(each["symmetric"][1] for each in found) and equal
    assert sent < 8 * 2 * 41 * 41 * 0.75, "half of it, and a few words"


def test_the_largest_is_nan_where_one_is(found: list[dict[str, Any]]) -> None:
    largest = same(found, "maxima")
    assert float(largest["a"][0]) == len(found) - 1 and bool(largest["a"][1].isnan())
    assert float(largest["b"][0, 0]) == 10.0 ** (len(found) - 1) and "c" not in largest


def test_work_is_divided_and_handed_round(found: list[dict[str, Any]]) -> None:
    size = len(found)
    assert same(found, "objects") == [{"rank": rank} for rank in range(size)]
    assert same(found, "own") == list("abcdefg") and same(found, "few") == ["a"]
    assert same(found, "first") == 0
    assert sorted(same(found, "turn")) == sorted([*range(size)] * 2), "each has its turn"
    assert sorted(same(found, "spread")) == sorted([(rank, 1) for rank in range(size)] * 2), "each works by itself"


def test_what_one_raises_all_raise(found: list[dict[str, Any]]) -> None:
    assert same(found, "fails").startswith("ZeroDivisionError")
    assert same(found, "one fails").startswith("ZeroDivisionError")
    own, others = found[-1]["alone fails"], [each["alone fails"] for each in found[:-1]]
    assert own == "CompilerError: only here"
    assert all(f"process {len(found) - 1} of {len(found)} failed: CompilerError" in other for other in others)


def test_unequal_processes_are_told_in_what(found: list[dict[str, Any]]) -> None:
    assert same(found, "agree") is None
    assert same(found, "disagree") == "ProcessError: the processes were started with different seeds"
    assert same(found, "missing") == "ProcessError: the processes were started with different seeds"
    assert "different shapes" in same(found, "others' shapes")
    assert "went different ways" in same(found, "other ways")
