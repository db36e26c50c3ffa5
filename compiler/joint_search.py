"""The search for the best mix of rewrites: plans from an integer programme, tried, and its figures corrected by them.

Errors do not add up over rewrites, and those of two kinds are predicted in different ways. So every kind first makes a
plan of its own that reaches the goal; what that plan turns out to lose and to save scales the kind's predictions. Then
plans of all kinds together are made, tried and the scales taken from what each kind contributes there. The plan with
the least error of all those tried that reach the goal stands, so it is never worse than the best of a single kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from .proposals import Item, Mix, Scale, choose_mix, kinds_of, most_saving, predicted_error, predicted_saving

#: How often a plan is made again when its measured latency misses the goal.
MOST_MEASURED = 4
#: A plan that saves this much more of the latency than the goal asks for is made again: it may lose less.
NEAR = 0.02
#: How many plans of all kinds together are tried.
MOST_MIXES = 4
#: Kinds make up for each other in a plan, but none counts for less than this share of what it does alone.
LEAST_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A plan with its output error after a quick re-solve and its measured latency ratio (upper end of the
    interval)."""

    mix: Mix
    error: float
    ratio: float

    @property
    def kinds(self) -> tuple[str, ...]:
        return kinds_of(self.mix)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best plan, whether it reaches the goal, everything that was tried, and the scales at the end."""

    best: Tried
    met: bool
    tried: tuple[Tried, ...]
    scales: Mapping[str, Scale]


class MixSearch:
    """`measure` gives a plan's latency ratio, `trial` its relative output error: both are dear."""

    def __init__(
        self,
        items: Sequence[Item],
        ratio: float,
        *,
        measure: Callable[[Mix], float],
        trial: Callable[[Mix], float],
    ) -> None:
        self.items, self.ratio = items, ratio
        self.kinds = tuple(dict.fromkeys(item.kind for item in items))
        self.scales = dict.fromkeys(self.kinds, Scale())
        self.tried: list[Tried] = []
        self._measure, self._trial = measure, trial
        self._errors: dict[frozenset[tuple[str, str, int]], float] = {}
        self._ratios: dict[frozenset[tuple[str, str, int]], float] = {}

    def run(self) -> Found:
        """Search. Nothing can be changed at all: the empty plan comes back, with error 0 and ratio 1."""
        for kind in self.kinds:
            self._single(kind)
        if len(self.kinds) > 1:
            self._mixes()
        met = [plan for plan in self.tried if plan.ratio <= self.ratio]
        nothing = Tried(mix={}, error=0.0, ratio=1.0)
        best = min(met, key=lambda plan: plan.error) if met else min(self.tried, key=lambda p: p.ratio, default=nothing)
        return Found(best=best, met=bool(met), tried=tuple(self.tried), scales=self.scales)

    def _single(self, kind: str) -> None:
        """The plan of one kind, and what it says about the kind's predictions."""
        items = [item for item in self.items if item.kind == kind]
        mix, ratio = self._reaching(items, one_kind=True)
        if mix:
            plan = self._try(mix, ratio)
            predicted = predicted_error(mix, self.scales)
            if predicted > 0 and plan.error > 0:
                self.scales[kind] = replace(self.scales[kind], error=plan.error / predicted)

    def _mixes(self) -> None:
        """Plans of all kinds. One that leads gives each kind its scale; after a worse one the step is halved."""
        alone = {kind: scale.error for kind, scale in self.scales.items()}
        lead, used = float("inf"), dict(self.scales)
        for _ in range(MOST_MIXES):
            mix, ratio = self._reaching(self.items, one_kind=False)
            if not mix or _key(mix) in {_key(plan.mix) for plan in self.tried}:
                return
            plan = self._try(mix, ratio)
            if plan.error < lead:
                lead, used = plan.error, dict(self.scales)
                if len(plan.kinds) > 1:
                    for kind in plan.kinds:
                        self._contribution(plan, kind, alone[kind])
            else:
                for kind, scale in self.scales.items():
                    self.scales[kind] = replace(scale, error=math.sqrt(scale.error * used[kind].error))

    def _contribution(self, plan: Tried, kind: str, alone: float) -> None:
        """Scale a kind's errors to what the plan gains when that kind is left out of it."""
        rest = {item: p for item, p in plan.mix.items() if item.kind != kind}
        part = {item: p for item, p in plan.mix.items() if item.kind == kind}
        predicted = predicted_error(part, dict.fromkeys(self.kinds, Scale()))
        if predicted > 0:
            added = (plan.error - self._error(rest)) / predicted
            self.scales[kind] = replace(self.scales[kind], error=max(added, LEAST_SHARE * alone))

    def _reaching(self, items: Sequence[Item], *, one_kind: bool) -> tuple[Mix, float]:
        """The plan of least predicted error whose measured ratio comes nearest to the goal from below; where none does,
        the fastest. What was predicted to be saved is corrected by what was, up and down."""
        seen: list[tuple[float, Mix]] = []
        saving = 1 - self.ratio
        for _ in range(MOST_MEASURED):
            planned = choose_mix(items, saving, self.scales)
            mix = most_saving(items, self.scales) if planned is None else planned
            if not mix or any(mix == earlier for _, earlier in seen):
                break
            ratio = self._ratio(mix)
            seen.append((ratio, mix))
            if self.ratio - NEAR <= ratio <= self.ratio or (planned is None and ratio > self.ratio):
                break
            expected = predicted_saving(mix, self.scales)
            reached = max(1 - ratio, LEAST_SHARE * (1 - self.ratio))
            if one_kind:
                scale = self.scales[items[0].kind]
                self.scales[items[0].kind] = replace(scale, saving=scale.saving * reached / expected)
            else:
                saving = expected * (1 - self.ratio) / reached
        met = [pair for pair in seen if pair[0] <= self.ratio]
        ratio, mix = max(met, key=_first) if met else min(seen, key=_first, default=(1.0, {}))
        return mix, ratio

    def _try(self, mix: Mix, ratio: float) -> Tried:
        plan = Tried(mix=mix, error=self._error(mix), ratio=ratio)
        self.tried.append(plan)
        return plan

    def _error(self, mix: Mix) -> float:
        """The error of a plan, tried once."""
        if not mix:
            return 0.0
        key = _key(mix)
        if key not in self._errors:
            self._errors[key] = self._trial(mix)
        return self._errors[key]

    def _ratio(self, mix: Mix) -> float:
        """The latency ratio of a plan, measured once."""
        key = _key(mix)
        if key not in self._ratios:
            self._ratios[key] = self._measure(mix)
        return self._ratios[key]


def _key(mix: Mix) -> frozenset[tuple[str, str, int]]:
    return frozenset((item.kind, item.name, item.proposals.index(taken)) for item, taken in mix.items())


def _first(pair: tuple[float, Mix]) -> float:
    return pair[0]


__all__ = ["Found", "MixSearch", "Tried"]
