"""What plans save of what can be counted, so that a goal is met to the last step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ...runtime.probe.stored_latency import StoredLatency
from ..ir.program import Program
from ..plan.means import Adjust
from ..plan.mix_steps import Added, brought_within
from ..plan.proposals import Item, Mix, Proposal, Scale
from ..rewrite.budget import Savings, Shape, keyed
from ..support.errors import CompilerError

#: How often a plan is put right where it costs something else than its parts say.
MOST_CORRECTIONS = 4


class CountedBudget:
    """Plans towards a share `aim` of a count of `whole`. `unit` names what is `counted`; `shape` makes the network
    that a plan leads to. `models` are how savings add up, by the name of the rewrite whose items they are of."""

    latency: StoredLatency | None = None

    def __init__(self, target: float, unit: str, counted: Callable[[Program], int], whole: int, shape: Shape) -> None:
        self.aim, self.unit, self.whole = target, unit, float(whole)
        self.counted, self._shape = counted, shape
        self.models: dict[str, Savings] = {}
        self._shares: dict[str, float] = {}

    def share(self, changes: Any, program: Callable[[], Program]) -> float:
        """The share that a network leaves, counted."""
        key = repr(changes)
        if key not in self._shares:
            self._shares[key] = self.counted(program()) / self.whole
        return self._shares[key]

    def savings(self, variants: Mapping[str, Callable[[], Program]]) -> dict[str, float]:
        return {name: 1 - self.counted(variant()) / self.whole for name, variant in variants.items()}

    def ratio(self, mix: Mix) -> float:
        """The share that a plan leaves, counted on the network that it leads to."""
        return self.share(keyed(mix), lambda: self._shape(mix))

    def adjuster(self, target: float) -> Adjust:
        """What brings plans within the share `target`."""
        return lambda mix, scales: self._adjusted(mix, target, scales)

    def finest(self, mix: Mix, target: float) -> Mix:
        """The plan with steps given back one by one as far as the share `target` allows."""
        finer = dict(self._finer(item, taken) for item, taken in mix.items())
        found = mix
        if self._known(mix) <= target:
            found = self._adjusted(finer, target, {item: Scale() for item in finer})
        return found if self._known(found) <= target else mix

    def _known(self, mix: Mix) -> float:
        """`ratio`; infinite where the plan cannot be put into effect, which a trial finds out, and says."""
        try:
            return self.ratio(mix)
        except CompilerError:
            return math.inf

    def _adjusted(self, mix: Mix, target: float, scales: Mapping[Item, Scale]) -> Mix:
        """The plan brought within the share `target` and filled up to it; `scales` are those of the items that may be
        changed. What a plan turns out to cost beside the sum of its parts (a product of two activations) is allowed
        for."""
        parts = _Parts(self.models)
        for _ in range(MOST_CORRECTIONS):
            off = self._known(mix) - parts.share(mix)
            if math.isinf(off):
                break
            changed = brought_within(mix, target - off, scales, parts)
            if changed == mix:
                break
            mix = changed
        return mix

    def _finer(self, item: Item, taken: Proposal) -> tuple[Item, Proposal]:
        model = self.models.get(item.kind)
        return (item, taken) if model is None else model.finer(item, taken)


class _Parts:
    """What a plan leaves by what its parts save: as the rewrites say that it adds up, the rest one by one."""

    def __init__(self, models: Mapping[str, Savings]) -> None:
        self._models = models

    def share(self, mix: Mix) -> float:
        left = 1 - sum(taken.saving for item, taken in mix.items() if item.kind not in self._models)
        return left - sum(model.saved(_of(mix, kind)) for kind, model in self._models.items())

    def added(self, mix: Mix) -> Added:
        steps = {kind: model.added(_of(mix, kind)) for kind, model in self._models.items()}

        def added(item: Item, proposal: Proposal | None) -> float:
            if item.kind in steps:
                return steps[item.kind](item, proposal)
            return (mix[item].saving if item in mix else 0.0) - (proposal.saving if proposal else 0.0)

        return added


def _of(mix: Mix, kind: str) -> Mix:
    return {item: taken for item, taken in mix.items() if item.kind == kind}
