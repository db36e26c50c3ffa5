"""Multiply-accumulates that are done, by what they are for: what a stage costs, whatever the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

#: What multiply-accumulates are for: values of a network, gradients of its weights, moments of inputs (Gram matrices),
#: and dense algebra on these (solves, choices, factors, rounding).
FORWARD, GRADIENT, MOMENTS, ALGEBRA = "forward", "gradient", "moments", "algebra"

Tally = Counter[str]

#: The counts that are open, the outermost first. One compile runs at a time.
_OPEN: list[Tally] = []


def count(kind: str, macs: float) -> None:
    """So many multiply-accumulates have been done."""
    for tally in _OPEN:
        tally[kind] += int(macs)


@contextmanager
def counted_into(tally: Tally) -> Iterator[Tally]:
    """All that is done inside is added to `tally`."""
    _OPEN.append(tally)
    try:
        yield tally
    finally:
        # by identity: two counts may hold the same numbers
        _OPEN[:] = [other for other in _OPEN if other is not tally]
