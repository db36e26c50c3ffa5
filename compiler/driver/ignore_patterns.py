"""What the user wants left alone: each name goes to the rewrites that it says something to."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from ..ir.program import Program
from ..rewrite.rewrite import Rewrite
from ..support.errors import GoalError


def sorted_ignores(program: Program, rewrites: Sequence[Rewrite], others: Sequence[Rewrite] = ()) -> list[Rewrite]:
    """The rewrites with every `ignore` pattern of any of them given to those that have something of that name. Raises
    GoalError when one matches nothing. Those of `others`, rewrites that take no part, may match nothing."""
    asked = dict.fromkeys(pattern for rewrite in rewrites for pattern in rewrite.ignore)
    patterns = tuple({**asked, **dict.fromkeys(pattern for rewrite in others for pattern in rewrite.ignore)})
    if not patterns:
        return list(rewrites)
    names = {rewrite.name: rewrite.named(program) for rewrite in rewrites}
    for pattern in asked:
        if not any(_matches(pattern, known) for known in names.values()):
            what = ", ".join(dict.fromkeys(rewrite.ignores for rewrite in rewrites))
            raise GoalError(
                f"ignore: no {what} matches {pattern!r}",
                hint="`foldcut inspect` lists them; patterns are those of a shell: head*",
            )
    mine = {name: tuple(p for p in patterns if _matches(p, known)) for name, known in names.items()}
    return [r if r.ignore == mine[r.name] else r.ignoring(mine[r.name]) for r in rewrites]


def _matches(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)
