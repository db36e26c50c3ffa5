"""Errors render what they know."""

import pytest
from foldcut.compiler.support.errors import CalibrationError, CompilerError, GoalError, Reject


def test_an_error_shows_all_that_it_knows() -> None:
    error = CalibrationError(
        "it went wrong", node="conv2d", expected=3, actual=0, excerpt="  a\n> b", hint="turn it round"
    )
    assert str(error).splitlines() == [
        "calibrate: it went wrong",
        "  at node: conv2d",
        "  expected: 3",
        "  actual:   0",
        "  in the graph:",
        "      a",
        "    > b",
        "  what to do: turn it round",
    ]
    assert (error.message, error.node, error.expected, error.actual) == ("it went wrong", "conv2d", 3, 0)


def test_what_is_not_known_is_not_shown() -> None:
    assert str(CompilerError("plainly")) == "compile: plainly"


def test_a_goal_error_keeps_the_best() -> None:
    best = object()
    error = GoalError("too much", best=best, hint="ask for less")
    assert error.best is best
    with pytest.raises(CompilerError, match="ask for less"):
        raise error


def test_a_reject_is_a_value() -> None:
    assert str(Reject(reason="it is shared", node="conv2d")) == "conv2d: it is shared"
    assert Reject(reason="a", node="b") == Reject(reason="a", node="b")
    assert not isinstance(Reject(reason="a", node="b"), Exception)
