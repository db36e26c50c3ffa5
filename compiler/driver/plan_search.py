"""The search for a plan under a goal that mixes rewrites: what each offers, plans tried and priced, the best made."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ...passes.solve.layers import find_layers
from ...passes.solve.resolve_network import TRIAL_RESOLVE
from ..data.output_error import BROKEN, bounded, output_error
from ..data.sampled_error import sampled_error
from ..ir.cost import program_cost
from ..ir.program import Program
from ..plan.decision import Decision
from ..plan.joint_search import MOST_TRIALS, Means, MixSearch
from ..plan.proposals import Mix
from ..plan.tried import Found
from ..rewrite.budget import PlanBudget, keyed
from ..rewrite.checked_offer import checked_offer
from ..rewrite.context import Context
from ..rewrite.rewrite import Applied, Offer, Rewrite
from ..support.errors import CompilerError, GoalError, Reject
from .apply_decisions import applied, finished, made, shaped, solved, solved_at_the_end

#: Samples that a plan is put into effect with while plans are compared.
TRIAL_SAMPLES = 128
#: Multiply-accumulates that all trials of a search may take, about, and how many trials there may be all the same.
TRIAL_MACS, LEAST_TRIALS = 4_000_000_000_000, 20


@dataclass(kw_only=True)
class Search:
    """Plans of one network (`PlanSearch`)."""

    ctx: Context
    rewrites: Sequence[Rewrite]
    offers: dict[str, Offer] = field(default_factory=dict)
    #: Counts the trials.
    trials: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        solved_at_the_end(self.rewrites)

    @functools.cached_property
    def budget(self) -> PlanBudget:
        """What the goal bounds."""
        return self.ctx.goal.budget(self.ctx, lambda mix: shaped(self.rewrites, self.ctx.teacher, self._decided(mix)))

    def offer(self, target: float) -> None:
        """Ask each of the rewrites what it can do towards a share of what is bounded."""
        self.budget.aim = target
        for rewrite in self.rewrites:
            offer = checked_offer(rewrite, rewrite.offer(self.ctx, self.budget))
            self.offers[rewrite.name] = offer
            if offer.savings is not None:
                self.budget.models[rewrite.name] = offer.savings

    def searched(self, target: float) -> Found:
        """The best plan that leaves at most a share."""
        search = MixSearch(
            [item for offer in self.offers.values() for item in offer.items],
            target,
            Means(
                measure=self._measure,
                trial=self._trial,
                adjust=self.budget.adjuster(target),
                most_trials=self.most_trials,
                time=self.ctx.time,
            ),
            starts=[start for offer in self.offers.values() for start in offer.starts],
        )
        return self._finest(search.run(), target)

    def _finest(self, found: Found, target: float) -> Found:
        """The search's result with its best plan as near to the goal as the budget can bring it."""
        mix = self.budget.finest(found.best.mix, target)
        if mix is found.best.mix:
            return found
        best = replace(found.best, mix=mix, ratio=self._measure(mix))
        return replace(found, best=best, tried=tuple(best if p is found.best else p for p in found.tried))

    @functools.cached_property
    def most_trials(self) -> int:
        """As many plans as `TRIAL_MACS` allow, a few at least. It goes by the work, not by the clock, so that a search
        is the same each time."""
        work = trial_macs(self.ctx.teacher, len(self._quick.solve))
        return max(LEAST_TRIALS, min(MOST_TRIALS, TRIAL_MACS // work))

    def made(self, found: Found) -> Applied:
        """The network of the plan that a search found best, solved with all samples. Raises GoalError when that plan
        changes nothing."""
        if not found.best.mix:
            raise GoalError(f"nothing can be done towards {self.ctx.goal}", hint=self.reasons())
        with self.ctx.clock.stage("re-solve"):
            done = made(self.ctx, self.rewrites, self._decided(found.best.mix))
        return replace(done, rejects=(*self._rejects(), *done.rejects), tried=found.plans())

    def most_error(self, made: Applied) -> float:
        """The upper end of the interval of a network's output error."""
        return sampled_error(self.ctx.teacher, made.program, self.ctx.judge).most

    def reasons(self) -> str:
        """Why nothing can be done."""
        reasons = dict.fromkeys(reject.reason for reject in self._rejects())
        return "; ".join(reasons) or "no rewrite saves anything towards it"

    def _decided(self, mix: Mix) -> list[Decision]:
        """What a plan decides, in the order offered, however the search came to it."""
        offered = [(item.kind, item.name) for offer in self.offers.values() for item in offer.items]
        place = {item: number for number, item in enumerate(offered)}
        return [mix[item].decision for item in sorted(mix, key=lambda item: place[item.kind, item.name])]

    def _rejects(self) -> list[Reject]:
        return [reject for offer in self.offers.values() for reject in offer.rejects]

    def _measure(self, mix: Mix) -> float:
        """The share that a plan leaves of what is to be saved."""
        with self.ctx.clock.stage("measure plan"):
            try:
                return self.budget.ratio(mix)
            except CompilerError as cause:
                _left_out(mix, cause)
                return 1.0

    def _trial(self, mix: Mix) -> float:
        """The output error of a plan after a quick re-solve on few samples; `BROKEN` where there is none."""
        done = next(self.trials)
        self.ctx.progress("try plans", done, max(done, self.most_trials))
        quick = self._quick

        def tried() -> float:
            return quick_error(quick, self.rewrites, self._decided(mix))

        with self.ctx.clock.stage("try plans"):
            try:
                inputs = [quick.teacher, quick.solve, quick.judge, list(self.rewrites), keyed(mix), quick.seed]
                error = self.ctx.store.value("mix trial", inputs, tried)
            except CompilerError as cause:
                _left_out(mix, cause)
                return BROKEN
        return bounded(error)

    @functools.cached_property
    def _quick(self) -> Context:
        """The samples and means of a trial."""
        return self.ctx.for_trials(TRIAL_SAMPLES)


def quick_error(quick: Context, rewrites: Sequence[Rewrite], decisions: Sequence[Decision]) -> float:
    """The output error of a plan after a quick re-solve, in the context of a trial."""
    network = solved(quick, rewrites, applied(quick, rewrites, decisions))
    network = finished(quick, rewrites, network, decisions)
    return output_error(quick.teacher, network.program, quick.judge)


def trial_macs(program: Program, samples: int) -> int:
    """About what it takes to put a plan into effect and to re-solve it: two networks are run, and each layer's Gram
    matrix is made from so many rows per column, as far as there are as many, factorised and solved with."""
    cost = program_cost(program).macs * samples * 2
    for layer in find_layers(program)[0].values():
        outputs, columns = program.module.get_parameter(layer.weight).flatten(1).shape
        rows = samples * math.prod(program.shape(program.nodes[layer.node])) // outputs
        cost += columns**2 * (min(rows, (TRIAL_RESOLVE.rows_per_column or 1) * columns) + columns // 3 + outputs)
    return max(1, cost)


def _left_out(mix: Mix, cause: CompilerError) -> None:
    """One plan that cannot be put into effect is no reason to give up the others."""
    names = ", ".join(item.name for item in mix)
    warnings.warn(f"a plan is left out, it cannot be put into effect: {cause.message} ({names})", stacklevel=3)
