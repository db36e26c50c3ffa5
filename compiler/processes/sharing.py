"""Work divided among the processes of a compile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch

from .exchange import sendable
from .team import Team, team, working_as

T = TypeVar("T")

#: What takes fewer multiply-accumulates is done by every process: handing it round takes longer.
LEAST_MACS = 4e6
#: Samples come in so many batches at least, where there are as many.
BATCHES = 8
#: Tasks that wait for each process before they are spread.
FEW = 2


def in_batches(samples: int, most: int) -> int:
    """Samples per batch, such that several processes find something to do whatever their number: batches, and with them
    the last bits of sums, are those of one process.

    Arguments:
        samples: How many there are.
        most: How many a batch may have.

    Example:
        >>> from foldcut.compiler.processes.sharing import in_batches
        >>> in_batches(256, 64), in_batches(5, 64)
        (32, 1)
    """
    return max(1, min(most, -(-samples // BATCHES)))


def own(items: Iterable[T]) -> Iterator[tuple[int, T]]:
    """The items of this process, each with its place among all: every so many-th.

    Arguments:
        items: The same on all processes. Making one should cost nothing: all are made.

    Returns:
        Pairs of place and item; those of one process by itself are all.

    Example:
        >>> from foldcut.compiler.processes.sharing import own
        >>> list(own("ab"))
        [(0, 'a'), (1, 'b')]
    """
    members = team()
    return ((place, item) for place, item in enumerate(items) if place % members.size == members.rank)


def in_place(found: Sequence[T]) -> list[T]:
    """What all processes made of their `own` items, in the order of the items.

    Arguments:
        found: What this process made of its items, in their order.

    Example:
        >>> from foldcut.compiler.processes.sharing import in_place
        >>> in_place(["a", "b"])
        ['a', 'b']
    """
    parts = team().objects(list(found))
    return [part[turn] for turn in range(max(map(len, parts))) for part in parts if turn < len(part)]


def largest(values: dict[str, torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The largest of each value over all processes, entry by entry.

    Arguments:
        values: Those of this process: some or all of the names.
        names: The names, the same on all processes.
    """
    found = team().maxima([values.get(name) for name in names])
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


def by_first(make: Callable[[], T]) -> T:
    """What the first process makes, for all of them: what is measured, read from disk or asked of a clock.

    Arguments:
        make: Called by the first process alone. What it returns goes to the others, and what it raises.

    Example:
        >>> from foldcut.compiler.processes.sharing import by_first
        >>> by_first(lambda: 3)
        3
    """
    return team().one(0, lambda: by_itself(make))


def measured_by_first(make: Callable[[], T]) -> T:
    """`by_first` once all the others wait: nothing computes beside a measurement."""
    team().end()
    return by_first(make)


def in_turn(macs: float, make: Callable[[], T]) -> T:
    """What one process makes, for all of them: that which was given the fewest multiply-accumulates so far. All make it
    where that is little.

    Arguments:
        macs: About how many it takes, the same number on all processes.
        make: Depends on what all processes have.
    """
    members = team()
    if members.size == 1 or macs < LEAST_MACS:
        return make()
    owner = members.given.index(min(members.given))
    members.given[owner] += macs
    return members.one(owner, lambda: by_itself(make))


def by_itself(make: Callable[[], T]) -> T:
    """What this process makes on its own, all that is divided otherwise included."""
    with working_as(Team()):
        return make()


@dataclass(frozen=True)
class _Failed:
    cause: BaseException


def spread(tasks: Sequence[tuple[float, Callable[[], T]]]) -> list[T]:
    """Results of tasks that do not depend on each other, each made by one process on its own, for all of them.

    Tasks go out by their cost, the largest first, each to the process that has least (longest processing time first:
    Graham 1969, at most 4/3 of the shortest time). What a task raises, all raise: the first of those that failed.

    Arguments:
        tasks: Pairs of cost, in any unit, and task; the same on all processes.

    Returns:
        The results, in the order of the tasks.

    Example:
        >>> from foldcut.compiler.processes.sharing import spread
        >>> spread([(1.0, lambda: "a"), (2.0, lambda: "b")])
        ['a', 'b']
    """
    members = team()
    if members.size == 1:
        return [make() for _, make in tasks]
    load = [0.0] * members.size
    owners = [0] * len(tasks)
    for place in sorted(range(len(tasks)), key=lambda place: -tasks[place][0]):
        owners[place] = load.index(min(load))
        load[owners[place]] += tasks[place][0]
    mine: dict[int, Any] = {}
    for place, (_, make) in enumerate(tasks):
        if owners[place] == members.rank:
            try:
                mine[place] = by_itself(make)
            except Exception as cause:
                mine[place] = _Failed(sendable(cause))
    made = {place: result for part in members.objects(mine) for place, result in part.items()}
    for place in range(len(tasks)):
        if isinstance(made[place], _Failed):
            raise made[place].cause
    return [made[place] for place in range(len(tasks))]


def spread_along(tasks: Iterable[tuple[float, Callable[[], T]]]) -> Iterator[T]:
    """`spread` of tasks that come one after another, a few for each process at a time.

    Arguments:
        tasks: Pairs of cost and task; what is done to get the next one is done by all processes together.
    """
    members = team()
    if members.size == 1:
        yield from (make() for _, make in tasks)
        return
    coming = iter(tasks)
    while few := list(islice(coming, FEW * members.size)):
        yield from spread(few)
