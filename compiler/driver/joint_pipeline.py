"""All rewrites under one goal: proposals of every kind, and the search for a mix."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ...passes.drop.recoverability import QUICK_RESOLVE
from ...passes.solve.layers import find_layers
from ..data.calibration_set import CalibrationSet
from ..data.output_error import BROKEN, bounded, output_error
from ..data.sampled_error import sampled_error
from ..ir.cost import program_cost
from ..ir.program import Program
from ..plan.joint_search import MOST_TRIALS, Found, MixSearch, Tried
from ..plan.plan import CountedGoal, Latency, MaxError
from ..plan.proposals import Mix
from ..store.analysis_store import NOTHING_KEPT, AnalysisStore
from ..support.errors import CompilerError, GoalError, Reject
from ..support.progress import Progress, StageClock, silent
from ..support.search_time import SearchTime
from .counted_budget import CountedBudget
from .ignore_patterns import sorted_ignores
from .joint_proposals import Offered
from .joint_rewrite import JointSettings, apply_mix, changes, judged, solved_at_the_end
from .latency_budget import LatencyBudget, MixContext
from .latency_probe import LatencyProbe
from .rewritten import Rewritten, TriedPlan
from .stored_latency import StoredLatency

#: Samples that a plan is put into effect with while plans are compared.
TRIAL_SAMPLES = 128
#: Multiply-accumulates that all trials of a search may take, about, and how many trials there may be all the same.
TRIAL_MACS, LEAST_TRIALS = 4_000_000_000_000, 20
#: No plan is looked for below this latency ratio when only the error is bounded, nor nearer than this to one that is
#: known, nor at more ratios than this.
LEAST_RATIO, NARROW, MOST_RATIOS = 0.25, 0.04, 5
#: A network whose error is this share below its bound has room left.
ROOM = 0.15


def cut_jointly(
    teacher: Program,
    calibration: CalibrationSet,
    held_out: CalibrationSet,
    goal: Latency | MaxError | CountedGoal,
    probe: LatencyProbe | None,
    rewrites: Sequence[str],
    *,
    settings: JointSettings,
    clock: StageClock,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
    time: SearchTime | None = None,
) -> Rewritten:
    """Reach a latency goal, the least latency within an error, or a share of the multiply-accumulates or parameters, by
    the best mix of `rewrites`: dropped regions, removed channels, factorised layers.

    Every kind offers what it can save and what that is predicted to cost; the mix is an integer programme's, corrected
    by what plans turned out to lose after a quick re-solve and to save on the backend (`MixSearch`). Latency is
    measured by the `probe`; multiply-accumulates and parameters are counted, and units and ranks given back until one
    step more would miss the goal. The errors
    are those of the outputs on `held_out`, relative: after the rewrites, each with its own closed form, and after the
    re-solve of the whole. When the `time` for the search has run out, the best plan so far stands. Raises GoalError
    when nothing can be changed towards the goal, CompilerError when the settings of two rewrites contradict each other.
    """
    solved_at_the_end(settings, rewrites)
    settings = sorted_ignores(teacher, settings, rewrites)
    context = MixContext(
        teacher=teacher, calibration=calibration, settings=settings, clock=clock, progress=progress, store=store
    )
    mixing = Mixing(
        teacher=teacher,
        calibration=calibration,
        held_out=held_out,
        budget=_budget(context, goal, probe),
        rewrites=tuple(rewrites),
        settings=settings,
        clock=clock,
        progress=progress,
        store=store,
        time=time or SearchTime(),
    )
    if not isinstance(goal, MaxError):
        ratio = goal.share if isinstance(goal, Latency) else goal.ratio
        mixing.offer(ratio)
        return mixing.made(mixing.searched(ratio), goal)
    mixing.offer(LEAST_RATIO)
    return fastest_within(mixing, goal)


def _budget(
    context: MixContext, goal: Latency | MaxError | CountedGoal, probe: LatencyProbe | None
) -> LatencyBudget | CountedBudget:
    if isinstance(goal, CountedGoal):
        return CountedBudget(context, goal)
    assert probe is not None
    return LatencyBudget(context, StoredLatency(context.store, probe))


def fastest_within(mixing: Mixing, goal: MaxError) -> Rewritten:
    """The fastest network whose output error stays within a bound.

    The latency is bisected: each search gives the plan of least error at a latency, and all that it tried counts. Plans
    are compared after a quick re-solve on few samples; the whole re-solve mostly leaves less: when the first network
    has room left, or is above the bound, the bound on what plans may lose is moved by as much, once, and a second time
    when no network has come out within. A network counts with the upper end of its error's interval: the verdict is
    that of samples which nothing here has seen, and those may come out higher.
    """
    bound, best = goal.error, None
    for attempt in range(3):
        if attempt == 2 and best is not None and best[1].met:
            break
        found = _bisected(mixing, bound)
        if not found.best.mix:
            break
        made = mixing.made(found, goal)
        error = mixing.most_error(made)
        within = error <= goal.error
        standing = (not within, found.best.ratio if within else error)
        if best is None or standing < best[0]:
            best = standing, replace(made, met=within)
        if not error > 0 or (1 - ROOM) * goal.error <= error <= goal.error:
            break
        bound = goal.error * found.best.error / error
    if best is None:
        raise GoalError(f"nothing can be done within {goal}", hint=mixing.reasons())
    return best[1]


def _bisected(mixing: Mixing, bound: float) -> Found:
    """The fastest plan that was tried and loses at most `bound`; where none does, the one that loses least."""
    low, high = LEAST_RATIO, 1.0
    tried: list[Tried] = []
    found: Found | None = None
    for _ in range(MOST_RATIOS):
        if high - low < NARROW:
            break
        ratio = (low + high) / 2
        found = mixing.searched(ratio)
        tried += found.tried
        within = [plan.ratio for plan in tried if plan.error <= bound]
        high = min([high, *within])
        if not found.met or found.best.error > bound:
            low = max(low, min(ratio, high))
    assert found is not None
    good = [plan for plan in tried if plan.error <= bound]
    best = min(good, key=lambda p: p.ratio) if good else min(tried, key=lambda p: p.error, default=found.best)
    return replace(found, best=best, met=bool(good), tried=tuple(tried))


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Plans of one network: what is offered for them, what they turn out to save and to lose, the network of one."""

    teacher: Program
    calibration: CalibrationSet
    held_out: CalibrationSet
    budget: LatencyBudget | CountedBudget
    rewrites: tuple[str, ...]
    settings: JointSettings
    clock: StageClock
    progress: Progress
    store: AnalysisStore
    time: SearchTime
    offered: list[Offered] = field(default_factory=list)
    #: Counts the trials.
    trials: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def offer(self, ratio: float) -> None:
        """Ask each of the rewrites what it can do towards a ratio of what is to be saved."""
        self.offered.extend(self.budget.offered(self.rewrites, ratio))

    def searched(self, ratio: float) -> Found:
        """The best plan that reaches a ratio of what is to be saved."""
        items = [item for offer in self.offered for item in offer.items]
        search = MixSearch(
            items,
            ratio,
            measure=self._measure,
            trial=self._trial,
            most_trials=self.most_trials,
            time=self.time,
            starts=self.budget.starts,
            adjust=self.budget.adjuster(ratio),
        )
        found = search.run()
        return self._finest(found, ratio)

    def _finest(self, found: Found, ratio: float) -> Found:
        """The search's result with its best plan as near to the goal as the budget can bring it."""
        mix = self.budget.finest(found.best.mix, ratio)
        if mix is found.best.mix:
            return found
        best = replace(found.best, mix=mix, ratio=self._measure(mix))
        return replace(found, best=best, tried=tuple(best if p is found.best else p for p in found.tried))

    @functools.cached_property
    def most_trials(self) -> int:
        """As many plans as `TRIAL_MACS` allow, a few at least. It goes by the work, not by the clock, so that a search
        is the same each time."""
        work = trial_macs(self.teacher, len(self._few))
        return max(LEAST_TRIALS, min(MOST_TRIALS, TRIAL_MACS // work))

    def made(self, found: Found, goal: Latency | MaxError | CountedGoal) -> Rewritten:
        """The network of the plan that a search found best, solved with all samples. Raises GoalError when that plan
        changes nothing."""
        if not found.best.mix:
            raise GoalError(f"nothing can be done towards {goal}", hint=self.reasons())
        with self.clock.stage("re-solve"):
            applied = apply_mix(
                self.teacher,
                found.best.mix,
                self.calibration,
                self.settings,
                progress=self.progress,
                store=self.store,
            )
        program, errors = judged(self.teacher, applied, self.held_out)
        return Rewritten(
            program=program,
            decisions=applied.decisions,
            met=found.met,
            rejects=(*self._rejects(), *applied.locked),
            errors=errors,
            layers=applied.layers,
            kept=applied.kept,
            provenance=next((offer.provenance for offer in self.offered if offer.provenance is not None), None),
            selections=applied.selections,
            tried=tried_plans(found),
        )

    def most_error(self, made: Rewritten) -> float:
        """The upper end of the interval of a network's output error."""
        return sampled_error(self.teacher, made.program, self.held_out).most

    def reasons(self) -> str:
        """Why nothing can be done."""
        reasons = dict.fromkeys(reject.reason for reject in self._rejects())
        return "; ".join(reasons) or "no rewrite saves anything towards it"

    def _rejects(self) -> list[Reject]:
        return [reject for offer in self.offered for reject in offer.rejects]

    def _measure(self, mix: Mix) -> float:
        """The ratio that a plan leaves of what is to be saved."""
        with self.clock.stage("measure plan"):
            try:
                return self.budget.ratio(mix)
            except CompilerError as cause:
                _left_out(mix, cause)
                return 1.0

    def _trial(self, mix: Mix) -> float:
        """The output error of a plan after a quick re-solve on few samples; `BROKEN` where there is none."""
        done = next(self.trials)
        self.progress("try plans", done, max(done, self.most_trials))
        few, quick = self._few, self._quick
        with self.clock.stage("try plans"):
            try:
                error = self.store.value(
                    "mix trial",
                    [self.teacher, few, self.held_out, quick, *changes(mix)],
                    lambda: output_error(self.teacher, apply_mix(self.teacher, mix, few, quick).program, self.held_out),
                )
            except CompilerError as cause:
                _left_out(mix, cause)
                return BROKEN
        return bounded(error)

    @functools.cached_property
    def _few(self) -> CalibrationSet:
        """The samples of a trial, whose fingerprint is made once."""
        return self.calibration.take(slice(0, TRIAL_SAMPLES))

    @functools.cached_property
    def _quick(self) -> JointSettings:
        """The settings of a trial."""
        ranks = replace(self.settings.ranks, rows_per_column=QUICK_RESOLVE.rows_per_column)
        return replace(self.settings, resolve=QUICK_RESOLVE, ranks=ranks)


def trial_macs(program: Program, samples: int) -> int:
    """About what it takes to put a plan into effect and to re-solve it: two networks are run, and each layer's Gram
    matrix is made from so many rows per column, as far as there are as many, factorised and solved with."""
    cost = program_cost(program).macs * samples * 2
    for layer in find_layers(program)[0].values():
        outputs, columns = program.module.get_parameter(layer.weight).flatten(1).shape
        rows = samples * math.prod(program.shape(program.nodes[layer.node])) // outputs
        cost += columns**2 * (min(rows, (QUICK_RESOLVE.rows_per_column or 1) * columns) + columns // 3 + outputs)
    return max(1, cost)


def tried_plans(found: Found) -> tuple[TriedPlan, ...]:
    """What a search has tried, as plain figures."""
    return tuple(
        TriedPlan(
            ratio=plan.ratio,
            error=plan.error,
            counts=dict(Counter(item.kind for item in plan.mix)),
            rounds=plan.rounds,
            chosen=plan is found.best,
        )
        for plan in found.tried
    )


def _left_out(mix: Mix, cause: CompilerError) -> None:
    """One plan that cannot be put into effect is no reason to give up the others."""
    names = ", ".join(item.name for item in mix)
    warnings.warn(f"a plan is left out, it cannot be put into effect: {cause.message} ({names})", stacklevel=3)
