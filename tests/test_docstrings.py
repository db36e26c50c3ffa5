"""The docstrings of the public names: their examples run, and each argument is described."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from types import FunctionType
from typing import Any

import foldcut
import pytest
import torch
from torch import nn

pytestmark = pytest.mark.usefixtures("quick_measurement", "own_kinds")

#: Names that stand for another public name.
ALIASES = {"Replayed": "Compiled", "Saved": "Compiled"}
NAMES = [name for name in foldcut.__all__ if name not in ALIASES]
FUNCTIONS = [name for name in NAMES if isinstance(getattr(foldcut, name), FunctionType)]
CLASSES = [name for name in NAMES if inspect.isclass(getattr(foldcut, name))]
DATACLASSES = [name for name in CLASSES if dataclasses.is_dataclass(getattr(foldcut, name))]
SECTIONS = ("Arguments", "Returns", "Raises", "Example")
OPTIONS = doctest.NORMALIZE_WHITESPACE


@pytest.fixture
def own_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decisions and goals that examples define are known during the example only."""
    for base in (foldcut.Decision, foldcut.Goal):
        monkeypatch.setattr(base, "_known", dict(base._known))


def each(names: list[str]) -> list[Any]:
    """A parameter for each name."""
    return list(names)


def examples(name: str) -> list[doctest.DocTest]:
    """The examples of a public name and of its methods. As in torch's own documentation, imports are understood."""
    names = {"__name__": "__main__", "foldcut": foldcut, "torch": torch, "nn": nn}
    return [
        found for found in doctest.DocTestFinder().find(getattr(foldcut, name), name, globs=names) if found.examples
    ]


def sections(text: str) -> dict[str, str]:
    """The sections of a docstring by heading."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):$", inspect.cleandoc(text), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def undescribed(text: str, names: list[str]) -> list[str]:
    """The arguments among `names` that a docstring has no entry for."""
    entries = re.findall(r"^    (\w+): \S", sections(text).get("Arguments", ""), flags=re.MULTILINE)
    return [name for name in names if name not in entries]


def parameters(function: Any) -> list[str]:
    """The parameters of a function or a method, itself or its class not counted."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def returns(function: Any) -> bool:
    return inspect.signature(function).return_annotation not in ("None", None)


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class defines itself, and how it is called or indexed."""
    for name, value in vars(cls).items():
        inner = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        is_member = isinstance(inner, (FunctionType, property, cached_property))
        if is_member and (not name.startswith("_") or name in ("__call__", "__getitem__")):
            yield name, inner


def test_nothing_public_is_left_out() -> None:
    assert sorted([*FUNCTIONS, *CLASSES, *ALIASES]) == sorted(foldcut.__all__)
    assert all(getattr(foldcut, name) is getattr(foldcut, other) for name, other in ALIASES.items())
    assert {"compile", "sweep", "load"} <= set(FUNCTIONS) and {"Latency", "Compiled"} <= set(DATACLASSES)


@pytest.mark.parametrize("name", [name for name in NAMES if examples(name)])
def test_examples_run(name: str) -> None:
    torch.manual_seed(0)
    report: list[str] = []
    for example in examples(name):
        doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=report.append)
    assert report == [], "".join(report)


def test_an_example_that_is_wrong_is_found() -> None:
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3", {}, "wrong", None, 0)
    assert doctest.DocTestRunner().run(wrong, out=lambda _: None).failed == 1


@pytest.mark.parametrize("name", each([*FUNCTIONS, *DATACLASSES]))
def test_there_is_an_example(name: str) -> None:
    assert any(found.name == name for found in examples(name))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_and_results_of_functions_are_described(name: str) -> None:
    function = getattr(foldcut, name)
    assert undescribed(function.__doc__, parameters(function)) == []
    assert not returns(function) or sections(function.__doc__).get("Returns", "").strip()


@pytest.mark.parametrize("name", each(DATACLASSES))
def test_fields_are_described(name: str) -> None:
    cls = getattr(foldcut, name)
    assert undescribed(cls.__doc__, [field.name for field in dataclasses.fields(cls) if field.init]) == []
    assert not hasattr(cls, "__post_init__") or "Raises" in sections(cls.__doc__)


@pytest.mark.parametrize("name", each(CLASSES))
def test_classes_and_their_methods_say_what_they_are(name: str) -> None:
    cls = getattr(foldcut, name)
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")  # dataclass writes the signature
    assert [member for member, value in members(cls) if not value.__doc__] == []


@pytest.mark.parametrize("name", each(NAMES))
def test_the_first_line_is_a_summary(name: str) -> None:
    first, *rest = inspect.cleandoc(getattr(foldcut, name).__doc__).splitlines()
    assert first.endswith(".") and (not rest or not rest[0]), first


def test_arguments_without_an_entry_are_found() -> None:
    text = "Add.\n\n    Arguments:\n        a: One.\n            b: not an entry.\n\n    Returns:\n        c: The sum."
    assert undescribed(text, ["a", "b", "c"]) == ["b", "c"]
    assert undescribed("Add a and b.", ["a"]) == ["a"]
