"""The rewrites that foldcut brings, and which of all rewrites a goal takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

from ... import passes
from .. import goals
from ..plan.decision import Decision
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
    return sorted(chosen, key=lambda rewrite: (order.get(rewrite.name, len(order)), rewrite.name))


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
    called = [_name(item) for item in asked]
    twice = sorted({name for name in called if called.count(name) > 1})
    if twice:
        raise CompilerError(
            f"rewrites names {twice[0]!r} twice",
            hint="name it once, or pass one instance with its settings; two classes need names of their own",
        )
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
    decides: Any = rewrite.decides
    if not isinstance(decides, type) or not issubclass(decides, Decision):
        raise CompilerError(f"{of}.decides is no class of decisions", hint="subclass foldcut.Decision")
    if getattr(decides, "kind", None) != rewrite.name:
        raise CompilerError(
            f"{of}.name is {rewrite.name!r}, and its decisions are of the kind {getattr(decides, 'kind', None)!r}",
            hint="give both the same word: a plan finds the rewrite of a decision by it",
        )
    if any(rewrite.name == known.name and not isinstance(rewrite, known) for known in BUILT_IN):
        raise CompilerError(
            f"{of}.name is {rewrite.name!r}, which is that of a rewrite of foldcut",
            hint="give the rewrite and its decisions a name of their own",
        )
    if decides.subject is Decision.subject:
        raise CompilerError(f"{decides.__name__} does not define subject", hint="name what a decision changes")
    left = [what for what, there in _implemented(type(rewrite)).items() if not there]
    if left:
        raise CompilerError(f"{of} does not implement {', '.join(left)}", hint="see foldcut.Rewrite")
    if type(rewrite).named is not Rewrite.named and not _takes_ignore(rewrite):
        raise CompilerError(
            f"{of} names what can be left alone, and has no field for it",
            hint="add the field: ignore: tuple[str, ...] = ()",
        )


def _implemented(cls: type[Rewrite]) -> dict[str, bool]:
    """Whether a class has what every rewrite needs."""
    offers = cls.offer is not Rewrite.offer or cls.own_plan is not Rewrite.own_plan
    return {
        "offer": offers,
        "shape": cls.shape is not Rewrite.shape,
        "apply": cls.apply is not Rewrite.apply,
    }


def _takes_ignore(rewrite: Rewrite) -> bool:
    """Whether `Rewrite.ignoring` works on it."""
    own = type(rewrite).ignoring is not Rewrite.ignoring
    return own or (is_dataclass(rewrite) and any(part.name == "ignore" for part in fields(rewrite)))


def _name(item: str | Rewrite) -> str:
    return item if isinstance(item, str) else item.name
