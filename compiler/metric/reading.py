"""What a metric says of one network, and what another network loses against it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

#: A loss is held with this many standard errors to spare: 95 %, one side.
SPARE = 1.645
#: No number of a metric is larger: squares are taken of their differences, and added.
LARGEST = 1e140

Floats = npt.NDArray[np.float64]


class NoNumberError(ValueError):
    """A metric gave something else than a finite number, or finite numbers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """The value of a metric, and the `scores` of the single samples where it gave those."""

    value: float
    scores: Floats | None = None

    @classmethod
    def of(cls, found: Any, *, sampled: bool = False) -> Reading:
        """From what a metric returned: a number, or one for each sample, whose mean is the value. One number in a list
        or an array is that number, unless it is `sampled`: known to be the score of a sample. Raises NoNumberError for
        anything else, and for what is not finite, or so large that its square would not be."""
        try:
            values = np.asarray(_on_host(found) if isinstance(found, torch.Tensor) else found)
        except (ValueError, TypeError):  # rows of other lengths, and types that numpy has none of
            values = np.empty(0)
        if values.dtype.kind not in "iuf" or values.ndim > 1 or not values.size:
            raise NoNumberError(f"gave {type(found).__name__} {_shown(found)}, and not a number")
        scores = values.astype(np.float64)
        if not np.isfinite(scores).all():
            raise NoNumberError(f"gave {_shown(found)}, which is not finite")
        if np.abs(scores).max() > LARGEST:
            raise NoNumberError(f"gave {_shown(found)}, which is larger than {LARGEST:g}")
        return cls(value=float(scores.mean()), scores=scores if scores.ndim and (sampled or scores.size > 1) else None)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """How much less the metric says of a network than of the original. `error` is the standard error of that over the
    samples, None where the metric gave no number for each of them."""

    value: float
    error: float | None = None
    samples: int | None = None

    @property
    def most(self) -> float:
        """The upper end of the one-sided 95 % interval; the loss itself where there is none."""
        return self.value + SPARE * (self.error or 0.0)

    @classmethod
    def between(cls, before: Reading, after: Reading) -> Loss:
        """What is lost from one reading to the next."""
        value = before.value - after.value
        one, other = before.scores, after.scores
        if one is None or other is None or len(one) != len(other):
            return cls(value=value)
        return cls(value=value, error=_paired_error(one, other), samples=len(one))


def _paired_error(before: Floats, after: Floats) -> float:
    """The standard error of the mean difference of scores of the same samples.

    Two samples are added in thought, one that gets better and one that gets worse by as much as a score may: for right
    and wrong that is Bonett and Price's adjusted interval for paired proportions (2012). Without them a few samples
    none of which changed would prove that none ever does.
    """
    difference = before - after
    largest = float(max(np.abs(before).max(), np.abs(after).max()))
    squares = float(((difference - difference.mean()) ** 2).sum()) + 2 * largest**2
    return math.sqrt(squares) / (len(difference) + 2)


def _on_host(found: torch.Tensor) -> torch.Tensor:
    """A tensor as numpy reads it, which has no bfloat16."""
    found = found.detach().cpu()
    return found.double() if found.is_floating_point() else found


def _shown(found: Any) -> str:
    text = " ".join(repr(found).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
