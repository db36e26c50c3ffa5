"""Which attacks there are: `attacks.py` runs what the modules beside it register here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: Gets a folder of its own, which is also the working folder, and a seed. Says what held it off, raises a
#: CompilerError, which holds it off as well, or raises Succeeded.
Run = Callable[[Path, int], str]


@dataclass(frozen=True)
class Attack:
    """What is attacked, how, and the function that does it."""

    target: str
    name: str
    run: Run


class Succeeded(Exception):  # noqa: N818 - what happened, not what failed
    """The attack got what it was after."""


ATTACKS: list[Attack] = []


def attack(target: str, name: str) -> Callable[[Run], Run]:
    """Register a function as an attack."""

    def register(run: Run) -> Run:
        ATTACKS.append(Attack(target, name, run))
        return run

    return register


def needs(held: bool, otherwise: str) -> None:
    """Raise Succeeded with this reason unless `held`."""
    if not held:
        raise Succeeded(otherwise)
