"""The search for a plan under a goal that mixes rewrites: what each offers, plans tried and priced, the best made."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ...passes.solve.resolve_network import TRIAL_RESOLVE
from ...passes.solve.weighing import TRIAL_SAMPLES, solve_macs
from ..data.output_error import bounded
from ..data.sampled_error import sampled_error
from ..ir.program import Program
from ..metric.metric import loss_entries
from ..metric.reading import Loss
from ..plan.decision import Decision
from ..plan.joint_search import MixSearch
from ..plan.means import MOST_TRIALS, Means
from ..plan.proposals import Mix
from ..plan.tried import NEGLIGIBLE, Found
from ..processes.team import team
from ..rewrite.budget import PlanBudget, keyed
from ..rewrite.checked_offer import checked_offer
from ..rewrite.context import Context
from ..rewrite.rewrite import Applied, Offer, Rewrite
from ..support.errors import CompilerError, GoalError, Reject
from ..trial.apply_decisions import made, shaped, solved_at_the_end
from ..trial.quick_trial import Lost, lost, quick_error, tried_together

#: A search ends with a plan that reaches the goal and loses at most so much.
ENOUGH = 1e-4
#: What a network loses that is made with care, a trial may say so many times as much of.
MOST_ROUGHLY = 5.0
#: Multiply-accumulates that all trials of a search may take, about, and how many trials there may be all the same.
TRIAL_MACS, LEAST_TRIALS = 4_000_000_000_000, 20
#: With a metric so many plans are made that lose at most so many times what the best of them does, and it picks.
MOST_FINALISTS, ALIKE = 3, 1.5


@dataclass(kw_only=True)
class Search:
    """Plans of one network (`PlanSearch`)."""

    ctx: Context
    rewrites: Sequence[Rewrite]
    #: Trains a network, where that is asked for.
    train: Callable[[Applied], Applied] = lambda made: made
    offers: dict[str, Offer] = field(default_factory=dict)
    #: Counts the trials.
    trials: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    #: What is known of plans by what becomes of the network: ratios and output errors.
    _ratios: dict[str, float] = field(default_factory=dict)
    _errors: dict[str, float] = field(default_factory=dict)
    _networks: dict[str, Applied] = field(default_factory=dict)

    def __post_init__(self) -> None:
        solved_at_the_end(self.rewrites)

    @functools.cached_property
    def budget(self) -> PlanBudget:
        """What the goal bounds."""
        return self.ctx.goal.budget(self.ctx, lambda mix: shaped(self.rewrites, self.ctx.teacher, self._decided(mix)))

    def offer(self, target: float) -> None:
        """Ask each of the rewrites what it can do towards a share of what is bounded: those that come last first, since
        no other's work depends on theirs. Where a plan of theirs alone is good enough, the others are not asked."""
        self.budget.aim = target
        for rewrite in sorted(self.rewrites, key=lambda rewrite: not rewrite.comes_last):
            with self.ctx.time.paused():
                offer = checked_offer(rewrite, rewrite.offer(self.ctx, self.budget))
            self.offers[rewrite.name] = offer
            if offer.savings is not None:
                self.budget.models[rewrite.name] = offer.savings
            left = len(self.offers) < len(self.rewrites)
            if left and rewrite.comes_last and offer.items and self._is_enough(target):
                break
        self.offers = {r.name: self.offers[r.name] for r in self.rewrites if r.name in self.offers}

    def _is_enough(self, target: float) -> bool:
        """Whether a plan of what is offered so far reaches the target and hardly loses anything: in a trial, or, where
        that leaves it open, once it is made with care."""
        found = self.searched(target)
        if not found.met or not found.best.mix or found.best.error > MOST_ROUGHLY * NEGLIGIBLE:
            return False
        return found.best.error <= NEGLIGIBLE or list(self._solved(found.best.mix).errors.values())[-1] <= NEGLIGIBLE

    def searched(self, target: float) -> Found:
        """The best plan that leaves at most a share."""
        search = MixSearch(
            [item for offer in self.offers.values() for item in offer.items],
            target,
            Means(
                measure=self._measure,
                trial=self._trial,
                together=self._tried_together if self.ctx.executor is not None or team().size > 1 else None,
                adjust=self.budget.adjuster(target),
                most_trials=self.most_trials,
                enough=ENOUGH,
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
        done = self._solved(found.best.mix)
        return replace(done, rejects=(*self._rejects(), *done.rejects), tried=found.plans())

    def best_made(self, found: Found, target: float) -> Applied:
        """`made`; with a metric, of the plans that leave at most the share and lose about the least, the network that
        is best by it."""
        if self.ctx.metric is None or not found.met:
            return self.made(found)
        near = [p for p in found.tried if p.mix and p.ratio <= target and p.error <= ALIKE * found.best.error]
        others = {repr(keyed(p.mix)): p for p in sorted(near, key=lambda p: p.error)}
        plans = list({repr(keyed(found.best.mix)): found.best, **others}.values())[:MOST_FINALISTS]
        networks = [self.made(replace(found, best=plan)) for plan in plans]
        best = self.ctx.metric.best([network.program for network in networks])
        for plan, network in zip(plans if len(plans) > 1 else (), networks, strict=False):
            self._note(plan.ratio, network)
        return networks[best]

    def finished(self, found: Found) -> tuple[Applied, Loss | None]:
        """The network of the plan that a search found best, trained as well where that is asked for, and what it loses
        in the user's metric: None where that says nothing."""
        done = replace(self.train(self.made(found)), trained=True)
        return done, self._note(found.best.ratio, done)

    def _note(self, ratio: float, network: Applied) -> Loss | None:
        """What a network loses in the metric, for the report as well."""
        metric = self.ctx.metric
        assert metric is not None
        loss = metric.loss(network.program)
        error = list(network.errors.values())[-1]
        metric.finalists.append({"ratio": ratio, "error": error, **loss_entries(loss)})
        return loss

    def unchanged(self, reason: str) -> Applied:
        """The original as it was, and why."""
        warnings.warn(f"{reason}: the network is as it was", stacklevel=3)
        rejects = (*self._rejects(), Reject(reason=reason, node="the network"))
        return Applied(program=self.ctx.teacher, rejects=rejects, errors={"unchanged": 0.0}, trained=True)

    def _solved(self, mix: Mix) -> Applied:
        """The network of a plan, made once."""
        key = repr(keyed(mix))
        if key not in self._networks:
            with self.ctx.clock.stage("re-solve"):
                self._networks = {key: made(self.ctx, self.rewrites, self._decided(mix))}  # the last one alone
        return self._networks[key]

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
        reason = f"not asked: a plan without it reaches the goal and loses less than {NEGLIGIBLE:g}"
        unasked = [Reject(reason=reason, node=r.name) for r in self.rewrites if r.name not in self.offers]
        return [*(reject for offer in self.offers.values() for reject in offer.rejects), *unasked]

    def _measure(self, mix: Mix) -> float:
        """The share that a plan leaves of what is to be saved, found out once."""
        key = repr(keyed(mix))
        if key not in self._ratios:
            with self.ctx.clock.stage("measure plan"):
                try:
                    self._ratios[key] = self.budget.ratio(mix)
                except CompilerError as cause:
                    _left_out(mix, cause.message)
                    self._ratios[key] = 1.0
        return self._ratios[key]

    def _trial(self, mix: Mix) -> float:
        """The output error of a plan, found out once."""
        key = repr(keyed(mix))
        if key not in self._errors:
            self._errors[key] = self._tried(mix)
        return self._errors[key]

    def _tried(self, mix: Mix) -> float:
        """The output error of a plan after a quick re-solve on few samples; `BROKEN` where there is none."""
        self._count(1)
        with self.ctx.clock.stage("try plans"):
            return self._taken(mix, lost(lambda: self._stored(mix)))

    def _tried_together(self, mixes: Sequence[Mix]) -> None:
        """Find out what several plans lose, that do not depend on each other."""
        new = {key: mix for mix in mixes if (key := repr(keyed(mix))) not in self._errors}
        if len(new) < 2:
            return
        self._count(len(new))
        plans, executor = list(new.values()), self.ctx.executor
        decided = [self._decided(mix) for mix in plans]
        with self.ctx.clock.stage("try plans"):
            found = tried_together(
                self._quick, self.rewrites, decided, lambda number: self._stored(plans[number]), executor
            )
        for (key, mix), said in zip(new.items(), found, strict=True):
            self._errors[key] = self._taken(mix, said)

    def _count(self, more: int) -> None:
        done = max(itertools.islice(self.trials, more))
        self.ctx.progress("try plans", done, max(done, self.most_trials))

    def _stored(self, mix: Mix) -> float:
        """What a trial says, read where it was made before."""
        quick = self._quick
        inputs = [quick.teacher, quick.solve, quick.judge, list(self.rewrites), keyed(mix), quick.seed]
        found: float = self.ctx.store.value(
            "mix trial", inputs, lambda: quick_error(quick, self.rewrites, self._decided(mix))
        )
        return found

    def _taken(self, mix: Mix, found: Lost) -> float:
        """The error of a plan, with a warning where it could not be put into effect."""
        if found.refused is not None:
            _left_out(mix, found.refused)
        return bounded(found.error)

    @functools.cached_property
    def _quick(self) -> Context:
        """The samples and means of a trial."""
        return self.ctx.for_trials(TRIAL_SAMPLES)


def trial_macs(program: Program, samples: int) -> int:
    """About what it takes to put a plan into effect and to re-solve it."""
    return solve_macs(program, samples, TRIAL_RESOLVE.rows_per_column)


def _left_out(mix: Mix, cause: str) -> None:
    """One plan that cannot be put into effect is no reason to give up the others."""
    names = ", ".join(item.name for item in mix)
    warnings.warn(f"a plan is left out, it cannot be put into effect: {cause} ({names})", stacklevel=3)
