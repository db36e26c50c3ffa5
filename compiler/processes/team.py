"""The processes that work on one compile, and what they say to each other.

Every process runs the same program on the same data. What takes time is divided (batches of samples, solves, trials),
and what comes of it is added up or handed round, so that all of them go on with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

#: A tensor of one process, or None where it has nothing to add.
Term = torch.Tensor | None


class Team:
    """One process by itself: nothing is exchanged. `Joined` is one of several.

    Arguments:
        rank: The number of this process, from 0 on.
        size: How many there are.

    Example:
        >>> from foldcut.compiler.processes.team import Team
        >>> Team().objects("mine"), Team().one(0, lambda: 3)
        (['mine'], 3)
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        #: How many of them are on this machine, and how many of those may run on the CPUs of this one, itself included.
        self.neighbours = self.beside = 1
        #: Multiply-accumulates that each process was given by `in_turn`: the next go to who has least.
        self.given = [0.0] * size
        #: Bytes that this process has sent in the call under way, and exchanges that it took part in.
        self.sent_bytes = self.said = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that measures, writes and speaks."""
        return self.rank == 0

    def sums(self, terms: Sequence[Term]) -> list[Term]:
        """The sum of each term over all processes, in float64.

        Arguments:
            terms: As many for each process, of the same shapes.

        Returns:
            The same on all of them, bit for bit; None where no process has a term.
        """
        return list(terms)

    def maxima(self, values: Sequence[Term]) -> list[Term]:
        """The largest of each value over all processes, entry by entry; NaN where it is NaN anywhere."""
        return list(values)

    def objects(self, value: T) -> list[T]:
        """What every process has, in their order."""
        return [value]

    def one(self, owner: int, make: Callable[[], T]) -> T:
        """What one process makes, for all of them. What it raises is raised by all."""
        del owner
        return make()

    def fail(self, cause: BaseException) -> None:
        """Tell the others that this process cannot go on: they raise at their next exchange."""

    def end(self) -> None:
        """Wait until all are here."""


_teams: list[Team] = [Team()]


def team() -> Team:
    """The processes that work together now: those of the compile that is under way, else this one by itself."""
    return _teams[-1]


@contextmanager
def working_as(members: Team) -> Iterator[Team]:
    """Inside, these processes work together."""
    _teams.append(members)
    try:
        yield members
    finally:
        _teams.pop()
