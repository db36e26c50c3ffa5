"""Settings and arguments that are out of range are refused at once: by name, with what is allowed.

A check passes, or raises the error that it is given. Whole numbers and numbers of numpy's types pass too, True and
False do not pass for numbers; `settled` then makes them Python's own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, fields
from numbers import Integral, Real
from reprlib import Repr
from typing import Any, NoReturn, TypeGuard

from .errors import CompilerError

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def refuse(
    name: str, value: object, allowed: str, *, why: str = "is not allowed", error: type[CompilerError] = CompilerError
) -> NoReturn:
    """Raise the error that says that `name` cannot be `value`, and what it can be: ``a whole number from 1 on``."""
    refused = error(f"{name}={shown(value)} {why}", hint=f"give {allowed}")
    refused.expected, refused.actual = allowed, value
    raise refused


def shown(value: object) -> str:
    """A value on one line, cut short."""
    return " ".join(_SHORT.repr(value).split())


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """Numbers from `least` on, or above `above`, and at most `most`; None too where `none` says so. `words` say that in
    other words."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    none: bool = False
    words: str | None = None

    def said(self, what: str) -> str:
        """``a whole number from 1 on, or None``."""
        if self.words is not None:
            return self.words
        if self.above is not None:
            limits = f"above {self.above}" + ("" if self.most is None else f" and at most {self.most}")
        else:
            limits = f"from {self.least} on" if self.most is None else f"from {self.least} to {self.most}"
        return f"{what} {limits}{_or_none(self.none)}"

    def holds(self, number: float) -> bool:
        """Whether a number is within."""
        low = (self.least is None or number >= self.least) and (self.above is None or number > self.above)
        return low and (self.most is None or number <= self.most)


def check_whole(name: str, value: object, allowed: Allowed, *, error: type[CompilerError] = CompilerError) -> None:
    """A whole number within what is allowed."""
    if allowed.none and value is None:
        return
    words = allowed.said("a whole number")
    if not isinstance(value, Integral) or isinstance(value, bool):
        refuse(name, value, words, why="is not a whole number", error=error)
    if not allowed.holds(int(value)):
        refuse(name, value, words, why="is out of range", error=error)


def check_number(name: str, value: object, allowed: Allowed, *, error: type[CompilerError] = CompilerError) -> None:
    """A finite number within what is allowed."""
    if allowed.none and value is None:
        return
    words = allowed.said("a number")
    if not isinstance(value, Real) or isinstance(value, bool):
        refuse(name, value, words, why="is not a number", error=error)
    number = _float(value)
    if not allowed.holds(number) or not math.isfinite(number):
        refuse(name, value, words, why="is out of range", error=error)


def check_switch(name: str, value: object, *, none: bool = False, error: type[CompilerError] = CompilerError) -> None:
    """True or False: a word such as ``no`` would count as True."""
    if not isinstance(value, bool) and not (none and value is None):
        refuse(name, value, f"True or False{_or_none(none)}", error=error)


def check_word(name: str, value: object, words: Sequence[str], *, error: type[CompilerError] = CompilerError) -> None:
    """One of the words."""
    if not isinstance(value, str) or value not in words:
        refuse(name, value, f"one of {', '.join(words)}", why="is not known", error=error)


def check_texts(name: str, value: object, *, error: type[CompilerError] = CompilerError) -> None:
    """Several strings, or none at all. One alone would be read letter by letter."""
    if isinstance(value, str):
        refuse(name, value, f"a tuple: {name}=({shown(value)},)", why="is a single string", error=error)
    if not _several(value) or not all(isinstance(text, str) for text in value):
        refuse(name, value, f"a tuple of strings: {name}=('...',)", why="is not a tuple of strings", error=error)


def check_functions(name: str, value: object, example: str, *, error: type[CompilerError] = CompilerError) -> None:
    """Several functions, or none at all; `example` is one."""
    if not _several(value) or not all(callable(function) for function in value):
        why = "is not a tuple of functions"
        refuse(name, value, f"a tuple of functions: {name}=({example},)", why=why, error=error)


def check_kind(
    name: str, value: object, kind: type, *, none: bool = False, error: type[CompilerError] = CompilerError
) -> None:
    """Settings of a kind, such as a `ResolveSettings`."""
    if not isinstance(value, kind) and not (none and value is None):
        refuse(name, value, f"{kind.__name__}(...){_or_none(none)}", why=f"is no {kind.__name__}", error=error)


def settled(settings: Any) -> None:
    """Turn numbers of other types (numpy's) in a frozen dataclass into Python's own, which JSON can hold."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Integral) and not isinstance(value, int):
            object.__setattr__(settings, field.name, int(value))
        elif isinstance(value, Real) and not isinstance(value, (int, float)):
            object.__setattr__(settings, field.name, float(value))


def _several(value: object) -> TypeGuard[Collection[object]]:
    """Whether it can be gone through more than once, element by element."""
    return isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes))


def _float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _or_none(none: bool) -> str:
    return ", or None" if none else ""
