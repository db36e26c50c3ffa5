"""How long the search for a better plan may take."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..processes.sharing import by_first
from ..support.errors import GoalError


class SearchTime:
    """Seconds for all searches of a compile together, counted from the first time that it is asked for; None is as long
    as it takes. Raises GoalError for a number that is none."""

    def __init__(self, seconds: float | None = None) -> None:
        if seconds is not None and not seconds >= 0:
            raise GoalError(f"a search cannot take {seconds} seconds", hint="give a number from 0 on")
        self.seconds = math.inf if seconds is None else seconds
        #: Whether a search would have gone on.
        self.ran_out = False
        self._end: float | None = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no search."""
        began = time.monotonic()
        try:
            yield
        finally:
            if self._end is not None:
                self._end += time.monotonic() - began

    def left(self) -> bool:
        """Whether a search may go on."""
        now = time.monotonic()
        if self._end is None:
            self._end = now + self.seconds
        end = self._end
        left = math.isinf(end) or by_first(lambda: now < end)
        self.ran_out = self.ran_out or not left
        return left
