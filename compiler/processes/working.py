"""What every call that computes begins with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..support.allocator import memory_at_hand
from ..support.memory import memory_within
from ..support.one_at_a_time import alone
from ..support.progress import Progress, opened_progress
from .joining import joined


@contextmanager
def working(
    title: str, progress: bool | Progress, memory_bytes: int | None = None, processes: bool | None = None
) -> Iterator[Progress]:
    """Inside, the process works for foldcut: one call at a time, under its memory limit, together with the other
    processes, of which the first one shows how far it is.

    Arguments:
        title: What is shown beside the whole.
        progress: As in `compile`.
        memory_bytes: What this process may have in memory.
        processes: As in `joined`.

    Raises:
        ProcessError: As in `joined`.
        CompilerError: As in `memory_within`.
    """
    with (
        alone(),
        joined(processes) as members,
        memory_within(memory_bytes),
        memory_at_hand(),
        opened_progress(progress if members.first else False, title) as show,
    ):
        yield show
