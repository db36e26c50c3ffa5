"""What is kept of a compile with a user's own classes depends on their source: texts that know it again."""

from __future__ import annotations

import hashlib
import inspect
import sys
import sysconfig
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from ..plan.goal import Goal
from .rewrite import Rewrite

_PACKAGE = __name__.partition(".")[0]
#: Below these folders nothing is a user's: the standard library, what is installed.
_INSTALLED = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
#: Names of classes without a file, one for each class object: a class that is defined again is another.
_tokens: WeakKeyDictionary[type, str] = WeakKeyDictionary()


def own_sources(rewrites: Sequence[Rewrite], goal: Goal | None = None) -> list[str]:
    """Texts that change when a class from outside this package does: a rewrite, its decisions, a goal. What was kept of
    one says nothing about it once it is changed, or has other settings.

    A class is known by the file of its module and by the code that was loaded from it, the modules of the user's that
    it refers to by theirs. One without a file (a notebook's) is known for as long as the class object lives. Settings
    that are no plain data are known by their `repr`.
    """
    asked = [*rewrites, *([] if goal is None else [goal])]
    own = [item for item in asked if not _of_foldcut(type(item).__module__)]
    classes = [type(item) for item in own] + [item.decides for item in own if isinstance(item, Rewrite)]
    parts = {part for cls in classes for part in cls.__mro__ if not _of_foldcut(part.__module__)}
    texts = {text for part in parts - {object} for text in _of_class(part)}
    return [*sorted(texts), *(f"{type(item).__qualname__} {item!r}" for item in own)]


def _of_class(cls: type) -> Iterator[str]:
    module = sys.modules.get(cls.__module__)
    if module is None or _file(module) is None:
        yield f"{cls.__module__} {_tokens.setdefault(cls, uuid.uuid4().hex)}"
        return
    for found in _reached(module):
        file = _file(found)
        assert file is not None
        yield f"{found.__name__} {_digest([file.read_bytes()])} {_digest(_codes(found))}"


def _reached(module: ModuleType) -> list[ModuleType]:
    """A module and the user's modules that it, and those, refer to: as modules, or by what came from them."""
    found, waiting = {module.__name__: module}, [module]
    while waiting:
        for value in list(vars(waiting.pop()).values()):
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            other = sys.modules.get(name) if isinstance(name, str) else None
            if other is not None and other.__name__ not in found and _is_own(other):
                found[other.__name__] = other
                waiting.append(other)
    return list(found.values())


def _is_own(module: ModuleType) -> bool:
    file = _file(module)
    return not _of_foldcut(module.__name__) and file is not None and not str(file).startswith(_INSTALLED)


def _file(module: ModuleType) -> Path | None:
    try:
        file = Path(inspect.getsourcefile(module) or "")
    except TypeError:
        return None
    return file.resolve() if file.is_file() else None


def _of_foldcut(module: str) -> bool:
    return module.partition(".")[0] == _PACKAGE


def _codes(module: ModuleType) -> Iterator[bytes]:
    """The code that is loaded, which is not that of the file where the file was edited since."""
    for name, value in sorted(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        for part in vars(value).values() if isinstance(value, type) else [value]:
            code = getattr(getattr(part, "fget", getattr(part, "__func__", part)), "__code__", None)
            if code is not None:
                yield from (name.encode(), *_of_code(code))


def _of_code(code: CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)
        elif not isinstance(constant, (set, frozenset)):  # whose order is not the same in every process
            yield repr(constant).encode()


def _digest(parts: Iterable[Any]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()
