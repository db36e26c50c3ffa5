"""The calibration set in three parts: samples to fit with, to judge by, and to look at once, at the end."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..support.errors import plural
from .calibration_set import CalibrationSet, View

#: The judging samples are read for every plan that is tried, the test samples once: no more of each than these.
MOST_JUDGE, MOST_TEST = 64, 256


@dataclass(frozen=True, kw_only=True)
class SampleSets:
    """Three parts of one calibration set, none of which has a sample of another.

    `fit` is solved and trained with, views behind the originals; its order is random, so that the first so many are a
    fair sample too. `judge` compares plans, stages and states of a training. `test` chooses nothing: it is read once,
    for the error that is reported. With one or two samples, or as few that differ, there is nothing to divide: `shared`
    says that parts are the same samples.
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


def part_sizes(count: int, share: float, tested: float | None = None) -> tuple[int, int]:
    """(judge, test): `share` of the samples each, at least one and at most `MOST_JUDGE` and `MOST_TEST`, or the share
    `tested` of them to test; at least one sample is left to fit with."""
    each = max(1, round(count * share))
    each = min(each, (count - 1) // 2)
    judge = min(each, MOST_JUDGE)
    if tested is None:
        return judge, min(each, MOST_TEST)
    return judge, min(max(1, round(count * tested)), count - 1 - judge)


def divided(samples: CalibrationSet, seed: int, share: float = 0.1, tested: float | None = None) -> SampleSets:
    """The samples in three parts, by one seeded permutation of all of them: each part and each beginning of a part is a
    fair sample. Equal samples go into one part: what is solved with a sample says nothing about another that is equal.

    What is permuted is the contents in their own order, so the order in which the samples came makes no difference at
    all: the same samples class by class or shuffled give the same parts.

    Two contents: one to fit with, one sample of the other that judges and tests. One content does everything.
    """
    if len(samples) == 1:
        return SampleSets(fit=samples, judge=samples, test=samples, shared=True)
    contents = _contents(samples)
    generator = torch.Generator().manual_seed(seed)
    left = [contents[i] for i in torch.randperm(len(contents), generator=generator, device="cpu").tolist()]
    if len(left) < 3:
        other = min(left, key=len)
        most = samples if len(left) == 1 else samples.take(_places(left[1 - left.index(other)]))
        one = samples.take(_places(other[:1]))
        return SampleSets(fit=most, judge=one, test=one, shared=True)
    sizes = zip(part_sizes(len(left), share, tested), part_sizes(len(samples), share, tested), strict=True)
    judge, test = (_filled(left, *size) for size in sizes)
    parts = [_places(list(itertools.chain(*part))) for part in (left, judge, test)]
    if len(contents) < len(samples):  # equal samples lie side by side
        parts = [part[torch.randperm(len(part), generator=generator, device="cpu")] for part in parts]
    fit, judged, looked_at = map(samples.take, parts)
    return SampleSets(fit=fit, judge=judged, test=looked_at)


def _places(positions: Sequence[int]) -> torch.Tensor:
    """On the CPU, whatever the caller's default device is."""
    return torch.tensor(positions, dtype=torch.long, device="cpu")


def _contents(samples: CalibrationSet) -> list[list[int]]:
    """The positions of the samples of each content, in the order of their content."""
    order: list[int] = samples.content_order.tolist()
    return [list(equal) for _, equal in itertools.groupby(order, key=samples.digests.__getitem__)]


def _filled(left: list[list[int]], contents: int, samples: int) -> list[list[int]]:
    """The next so many contents, taken from `left`, as far as their samples are no more than so many; of those that
    are all more, the smallest."""
    taken: list[list[int]] = []
    for content in list(left):
        if len(taken) < contents and len(content) <= samples:
            taken.append(content)
            left.remove(content)
            samples -= len(content)
    if not taken:
        taken.append(min(left, key=len))
        left.remove(taken[0])
    return taken


def warn_of_shared(sets: SampleSets, count: int) -> None:
    """Warn where there are too few samples for three parts, or too few that differ."""
    if sets.shared:
        alone = set(sets.judge.digests) <= set(sets.fit.digests)
        what = plural(count, "calibration sample")
        if count > 2 or (alone and count > 1):
            what += " that are all equal" if alone else " with only two contents"
        whole = "the network was also solved with it" if alone else "plans were compared by it too"
        warnings.warn(
            f"{what} cannot be divided into samples to fit, to judge and to test with: the reported error is of a "
            f"single sample, and {whole}",
            stacklevel=3,
        )
