"""The rewrites that foldcut brings, and which of all rewrites a goal takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ...passes.drop.rewrite import Drop
from ...passes.factorize.rewrite import Factorize
from ...passes.prune.rewrite import Prune
from ..plan.goal import Goal
from ..plan.plan import Plan as Plan  # here the decisions of all built-in rewrites are known
from ..rewrite.rewrite import Rewrite
from ..support.errors import CompilerError, GoalError
from ..support.setting_checks import refuse
from .pipeline_settings import PipelineSettings

#: What `rewrites=` takes by name. A rewrite that is not here is passed as an instance.
BUILT_IN: tuple[type[Rewrite], ...] = (Drop, Prune, Factorize)
NAMES = tuple(rewrite.name for rewrite in BUILT_IN)


def built_in(settings: PipelineSettings) -> list[Rewrite]:
    """Those that foldcut brings, with the settings of a pipeline."""
    return [
        Drop(**_fields(settings.recoverability), ignore=settings.ranks.ignore),
        Prune(**_fields(settings.channels)),
        Factorize(**_fields(settings.ranks)),
    ]


def _fields(settings: Any) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in fields(settings)}


def chosen_rewrites(goal: Goal, asked: Sequence[str | Rewrite] | None, settings: PipelineSettings) -> list[Rewrite]:
    """The rewrites that a goal will use: those that were asked for, by name or as they are, else those that it uses by
    default. Raises CompilerError for what is no rewrite, GoalError for one that the goal cannot use."""
    own = {rewrite.name: rewrite for rewrite in built_in(settings)}
    if asked is None:
        return [rewrite for rewrite in own.values() if rewrite.by_default(goal)]
    check_rewrites(asked)
    named = [own[item] if isinstance(item, str) else item for item in asked]
    named = list({rewrite.name: rewrite for rewrite in named}.values())
    useless = [rewrite.name for rewrite in named if not rewrite.serves(goal)]
    able = [rewrite.name for rewrite in own.values() if rewrite.serves(goal)]
    if len(useless) == len(named):
        needed = " or ".join(able)
        raise GoalError(
            f"the goal {goal} is reached by {needed}, which rewrites={[_name(item) for item in asked]} leaves out",
            hint=f"add {needed} to rewrites, or leave rewrites out",
        )
    if useless:
        raise GoalError(
            f"{' and '.join(useless)} cannot be used towards {goal}",
            hint=f"leave it out of rewrites: this goal is reached by {' or '.join(able)}",
        )
    order = {name: place for place, name in enumerate(NAMES)}
    return sorted(named, key=lambda rewrite: order.get(rewrite.name, len(order)))


def check_rewrites(asked: object) -> None:
    """Raise CompilerError for what is no list of rewrites."""
    if isinstance(asked, str):
        refuse("rewrites", asked, f"a tuple: rewrites=({asked!r},)", why="is a single string")
    if not isinstance(asked, (list, tuple, set, frozenset)) or not all(isinstance(r, (str, Rewrite)) for r in asked):
        refuse(
            "rewrites", asked, "a tuple of strings: rewrites=('...',), or of foldcut.Rewrite", why="is no such tuple"
        )
    unknown = [item for item in asked if isinstance(item, str) and item not in NAMES]
    if unknown or not asked:
        raise CompilerError(
            f"unknown rewrites {[_name(item) for item in asked]}",
            expected=f"some of {list(NAMES)}, or instances of a Rewrite",
        )


def _name(item: str | Rewrite) -> str:
    return item if isinstance(item, str) else item.name
