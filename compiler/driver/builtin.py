"""The rewrites that foldcut brings, and which of all rewrites a goal takes."""

from __future__ import annotations

import hashlib
import inspect
import sys
import uuid
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

from ... import passes
from .. import goals
from ..plan.goal import Goal
from ..plan.plan import Plan as Plan  # here the decisions of all built-in rewrites are known
from ..rewrite.rewrite import Rewrite
from ..support.errors import CompilerError, GoalError
from ..support.setting_checks import refuse
from .pipeline_settings import PipelineSettings


def _of_folders() -> tuple[type[Rewrite], ...]:
    """The rewrites below ``passes/``: those of files there, and of every folder that has a ``rewrite.py``, in the order
    of application."""
    names = [
        f"{passes.__name__}.{found.name}{'.rewrite' if found.ispkg else ''}" for found in iter_modules(passes.__path__)
    ]
    homes = [import_module(name) for name in names if find_spec(name)]
    classes = [value for home in homes for value in vars(home).values() if _is_of(value, home.__name__)]
    return tuple(sorted(classes, key=lambda rewrite: rewrite.phase))


def _is_of(value: object, home: str) -> bool:
    return isinstance(value, type) and issubclass(value, Rewrite) and value.__module__ == home


_PROCESS = uuid.uuid4().hex
#: What `rewrites=` takes by name. A rewrite that is not here is passed as an instance.
BUILT_IN = _of_folders()
for _found in iter_modules(goals.__path__):  # every goal's kind is known where plans are read
    import_module(f"{goals.__name__}.{_found.name}")


def built_in(settings: PipelineSettings) -> list[Rewrite]:
    """Those that foldcut brings, with the settings of a pipeline."""
    return [rewrite.configured(settings) for rewrite in BUILT_IN]


def named(asked: Sequence[str | Rewrite], settings: PipelineSettings) -> list[Rewrite]:
    """The rewrites that were asked for, by name or as they are."""
    own = {rewrite.name: rewrite for rewrite in built_in(settings)}
    return [own[item] if isinstance(item, str) else item for item in asked]


def chosen_rewrites(goal: Goal, asked: Sequence[str | Rewrite] | None, settings: PipelineSettings) -> list[Rewrite]:
    """The rewrites that a goal will use: those that were asked for, by name or as they are, else those that it uses by
    default. Raises CompilerError for what is no rewrite, GoalError for one that the goal cannot use."""
    own = built_in(settings)
    if asked is None:
        usual = [rewrite for rewrite in own if rewrite.by_default(goal)]
        if not usual:
            raise GoalError(f"no built-in rewrite is for {goal}", hint="pass one that is: rewrites=[...]")
        return usual
    check_rewrites(asked)
    chosen = list({rewrite.name: rewrite for rewrite in named(asked, settings)}.values())
    useless = [rewrite.name for rewrite in chosen if not rewrite.serves(goal)]
    able = list({rewrite.name: None for rewrite in (*own, *chosen) if rewrite.serves(goal)})
    if len(useless) == len(chosen):
        needed = " or ".join(able) or "no built-in rewrite"
        raise GoalError(
            f"the goal {goal} is reached by {needed}, which rewrites={[_name(item) for item in asked]} leaves out",
            hint=f"add {needed} to rewrites, or leave rewrites out",
        )
    if useless:
        raise GoalError(
            f"{' and '.join(useless)} cannot be used towards {goal}",
            hint=f"leave it out of rewrites: this goal is reached by {' or '.join(able)}",
        )
    order = {rewrite.name: place for place, rewrite in enumerate(own)}
    return sorted(chosen, key=lambda rewrite: order.get(rewrite.name, len(order)))


def own_sources(rewrites: Sequence[Rewrite]) -> list[str]:
    """Hashes of the files that rewrites from outside this package are defined in: what was kept of a rewrite says
    nothing about it once it is changed. A rewrite without a file is known for the time of the process only."""
    modules = {
        part.__module__ for rewrite in rewrites for of in (type(rewrite), rewrite.decides) for part in of.__mro__
    }
    package = f"{passes.__name__.partition('.')[0]}."
    return [_source(name) for name in sorted(modules - {"builtins", "abc"}) if not name.startswith(package)]


def _source(module: str) -> str:
    try:
        content = Path(inspect.getsourcefile(sys.modules[module]) or "").read_bytes()
    except (KeyError, TypeError, OSError):
        return f"{module} {_PROCESS}"
    return f"{module} {hashlib.blake2b(content, digest_size=16).hexdigest()}"


def check_rewrites(asked: object) -> None:
    """Raise CompilerError for what is no list of rewrites."""
    if isinstance(asked, str):
        refuse("rewrites", asked, f"a tuple: rewrites=({asked!r},)", why="is a single string")
    if not isinstance(asked, (list, tuple, set, frozenset)) or not all(isinstance(r, (str, Rewrite)) for r in asked):
        refuse(
            "rewrites", asked, "a tuple of strings: rewrites=('...',), or of foldcut.Rewrite", why="is no such tuple"
        )
    names = [rewrite.name for rewrite in BUILT_IN]
    for item in asked:
        if isinstance(item, Rewrite):
            _check_declared(item)
    instances = [item.name for item in asked if isinstance(item, Rewrite)]
    twice = sorted({name for name in instances if instances.count(name) > 1})
    if twice:
        raise CompilerError(f"two rewrites are called {twice[0]!r}", hint="give each class a name of its own")
    unknown = [item for item in asked if isinstance(item, str) and item not in names]
    if unknown or not asked:
        raise CompilerError(
            f"unknown rewrites {[_name(item) for item in asked]}",
            expected=f"some of {names}, or instances of a Rewrite",
        )


def _check_declared(rewrite: Rewrite) -> None:
    """Raise CompilerError for one that lacks what all have, or whose decisions are called otherwise than it is."""
    of = type(rewrite).__name__
    missing = [name for name in ("name", "verb", "decides") if not hasattr(rewrite, name)]
    if missing:
        raise CompilerError(
            f"{of} does not set {', '.join(missing)}", hint="set them in the class: see foldcut.Rewrite"
        )
    if rewrite.decides.kind != rewrite.name:
        raise CompilerError(
            f"{of}.name is {rewrite.name!r}, and its decisions are of the kind {rewrite.decides.kind!r}",
            hint="give both the same word: a plan finds the rewrite of a decision by it",
        )


def _name(item: str | Rewrite) -> str:
    return item if isinstance(item, str) else item.name
