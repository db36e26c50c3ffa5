"""The calibration set in three parts: samples to fit with, to judge by, and to look at once, at the end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .calibration_set import CalibrationSet, View

#: The judging samples are read for every plan that is tried, the test samples once: no more of each than these.
MOST_JUDGE, MOST_TEST = 64, 256


@dataclass(frozen=True, kw_only=True)
class SampleSets:
    """Three parts of one calibration set, none of which has a sample of another.

    `fit` is solved and trained with, views behind the originals; its order is random, so that the first so many are a
    fair sample too. `judge` compares plans, stages and states of a training. `test` chooses nothing: it is read once,
    for the error that is reported. With one or two samples there is nothing to divide: `shared` says that parts are
    the same samples.
    """

    fit: CalibrationSet
    judge: CalibrationSet
    test: CalibrationSet
    shared: bool = False

    def with_views(self, views: Sequence[View]) -> SampleSets:
        """Views are for fitting only: what judges is what the network will see."""
        return replace(self, fit=self.fit.with_views(views)) if views else self

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of samples of each part, views included, and whether parts are shared: what a report says."""
        return {"fit": len(self.fit), "judge": len(self.judge), "test": len(self.test), "shared": self.shared}


def part_sizes(count: int, share: float) -> tuple[int, int]:
    """(judge, test): `share` of the samples each, at least one and at most `MOST_JUDGE` and `MOST_TEST`; at least one
    sample is left to fit with."""
    each = max(1, round(count * share))
    each = min(each, (count - 1) // 2)
    return min(each, MOST_JUDGE), min(each, MOST_TEST)


def divided(samples: CalibrationSet, seed: int, share: float = 0.1) -> SampleSets:
    """The samples in three parts, by one seeded permutation of all of them: each part and each beginning of a part is a
    fair sample.

    What is permuted is the samples in the order of their content, so the order in which they came makes no difference
    at all: the same samples class by class or shuffled give the same parts.

    Two samples: one to fit with, one that judges and tests. One sample does everything.
    """
    count = len(samples)
    if count == 1:
        return SampleSets(fit=samples, judge=samples, test=samples, shared=True)
    order = samples.content_order[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    if count == 2:
        fit, other = samples.take(order[1:]), samples.take(order[:1])
        return SampleSets(fit=fit, judge=other, test=other, shared=True)
    judge, test = part_sizes(count, share)
    return SampleSets(
        fit=samples.take(order[judge + test :]),
        judge=samples.take(order[:judge]),
        test=samples.take(order[judge : judge + test]),
    )


def warn_of_shared(sets: SampleSets, count: int) -> None:
    """Warn where there are too few samples for three parts."""
    if sets.shared:
        whole = "the network was also solved with it" if count == 1 else "plans were compared by it too"
        warnings.warn(
            f"{count} calibration sample{'s' * (count > 1)} cannot be divided into samples to fit, to judge and to "
            f"test with: the reported error is of a single sample, and {whole}",
            stacklevel=3,
        )
