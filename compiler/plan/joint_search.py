"""The search for the best mix of rewrites: plans from an integer programme, tried, and its figures corrected by them.

Errors do not add up over rewrites, and those of two kinds are predicted in different ways. So every kind first makes a
plan of its own that reaches the goal; what that plan turns out to lose and to save scales the kind's predictions. Where
the kind that loses least does not get there, a mix is made by that, and the others make one more plan each, toward what
is left to them beside it; the one of these that loses least makes a mix with it. Then plans of all kinds together are
made, tried and the scales taken from what each kind contributes there. Last, single items are put right around the plan
that leads (`item_figures`), and plans follow that may be better by those figures. The plan with the least error of all
those tried that reach the goal stands, so it is never worse than the best of a single kind.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .item_regression import LEAST_SHARE, error_fit, saving_fit
from .latency_target import is_near, nearest_from_below, reach, saved_share
from .means import Means
from .proposals import (
    Item,
    Mix,
    Scale,
    choose_corrected,
    choose_mix,
    kinds_of,
    most_saving,
    predicted_error,
    predicted_saving,
    savings_in,
    with_least_errors,
)
from .tried import Found, Tried

#: How many plans of all kinds together are tried.
MOST_MIXES = 4
#: What a kind's changes lose beside those that they overlap with is at most so many times as much as predicted.
MOST_OVERLAP = 3.0
#: How many changes, those that save the most, are tried by themselves.
MOST_ALONE = 4
#: No plan is made from single items' figures when so many of those made from them were no better in a row: twice as
#: many beside a plan that saves more than it has to, which leaves something to be gained.
MOST_MISSES = 4
#: So many items of a plan are left out of it, one at a time, when a plan made from their figures differs from its
#: prediction by this share of the error.
MOST_LEFT_OUT, SURPRISE = 8, 0.1
#: An item that is not in the plan that leads may lose so many standard deviations less than it seems to.
DOUBT = 0.7
#: So many of the plans that were tried, and lose less than the one that stands, are measured in the end, where so many
#: standard deviations more than predicted are enough of a saving.
MOST_CAUGHT_UP, DOUBTED_SAVING = 4, 2.0
#: A plan is tried when it may lose this share less than the one that leads.
LEAST_GAIN = 0.01

#: What tells a plan from others: kind, name and the place of the proposal of each item.
Key = frozenset[tuple[str, str, int]]


class MixSearch:
    """The search for the plan of `items` that leaves at most a `ratio` and loses the least; `starts` are plans of these
    items that are tried first."""

    def __init__(
        self,
        items: Sequence[Item],
        ratio: float,
        means: Means,
        starts: Sequence[Mix] = (),
    ) -> None:
        self.items, self.ratio, self.most_trials = with_least_errors(items), ratio, means.most_trials
        self.kinds = tuple(dict.fromkeys(item.kind for item in items))
        self.scales = dict.fromkeys(self.kinds, Scale())
        self.tried: list[Tried] = []
        self._measure, self._trial, self._together = means.measure, means.trial, means.together
        self._time, self._enough = means.time, means.enough
        self._errors: dict[Key, float] = {}
        self._ratios: dict[Key, float] = {}
        self._plans: dict[Key, Mix] = {}
        self._adjust = means.adjust
        own, keys = {(item.kind, item.name): item for item in self.items}, map(_key, starts)
        self._starts = [{own[kind, name]: own[kind, name].proposals[i] for kind, name, i in key} for key in keys]

    def run(self) -> Found:
        """Search. Nothing can be changed at all: the empty plan comes back, with error 0 and ratio 1."""
        self._time.left()  # starts it
        for start in self._starts:
            self._start(start)
        if not self._is_enough():
            self._search()
        lead = self._lead()
        nothing = Tried(mix={}, error=0.0, ratio=1.0)
        best = lead or min(self.tried, key=lambda plan: plan.ratio, default=nothing)
        return Found(best=best, met=lead is not None, tried=tuple(self.tried), scales=self.scales)

    def _is_enough(self) -> bool:
        lead = self._lead()
        return lead is not None and lead.error <= self._enough

    def _search(self) -> None:
        """Each kind by itself, all together, and single items around the plan that leads."""
        own: dict[str, Mix] = {}
        for kind in self.kinds:
            own[kind] = self._single(kind, self.ratio)
            if self._is_enough():
                return
        for kind, mix in own.items():
            self._overlap(kind, mix)
        least = self._cheapest()
        if len(self.kinds) > 1 and least is not None and least.ratio > self.ratio:
            # neither way of judging the kinds is the better one for all networks: a mix by each
            if self._time.left():
                self._mix()
            milder = self._milder(least)
            for kind, mix in milder.items():
                self._overlap(kind, mix)
            self._pair(least, milder)
        self._alone()
        if len(self.kinds) > 1:
            self._mixes()
        self._refine()
        if self._catch_up():
            self._refine()

    def _lead(self) -> Tried | None:
        """The plan of least error among those that reach the goal."""
        met = [plan for plan in self.tried if plan.ratio <= self.ratio]
        return min(met, key=lambda plan: plan.error, default=None)

    def _start(self, start: Mix) -> None:
        """A plan from elsewhere, of which single steps may still be changed."""
        mix = self._adjusted(start, [item for item in self.items if item.kind in kinds_of(start)])
        if mix and _key(mix) not in {_key(plan.mix) for plan in self.tried}:
            self._try(mix, 1)

    def _adjusted(self, mix: Mix, items: Sequence[Item], scales: Mapping[Item, Scale] | None = None) -> Mix:
        """The plan nearer to the goal by changes of these items, where such steps are known."""
        if self._adjust is None or not mix:
            return mix
        return self._adjust(mix, scales or {item: self.scales[item.kind] for item in items})

    def _single(self, kind: str, ratio: float) -> Mix:
        """The plan of one kind that leaves a share, and what it says about the kind's predictions."""
        items = [item for item in self.items if item.kind == kind]
        mix, rounds = self._reaching(items, ratio, one_kind=True)
        if mix:
            plan = self._try(mix, rounds)
            predicted = predicted_error(mix, self.scales)
            if predicted > 0 and plan.error > 0:
                scale = self.scales[kind]
                self.scales[kind] = replace(scale, error=scale.error * plan.error / predicted)
        return mix

    def _cheapest(self) -> Tried | None:
        """The plan of a single kind that loses least for what it saves."""
        saving = [plan for plan in self.tried if len(plan.kinds) == 1 and plan.ratio < 1]
        return min(saving, key=lambda plan: plan.error / (1 - plan.ratio), default=None)

    def _milder(self, least: Tried) -> dict[str, Mix]:
        """The plans of the other kinds toward what the cheapest leaves to them. Errors grow faster than savings, so a
        plan that has to reach the goal by itself makes each of its changes look worse than it is in a mix. They are
        made whatever the time: a mix of MobileNetV2 toward x0.33 without them was right for 1 % of the images."""
        others = [kind for kind in self.kinds if kind not in least.kinds]
        return {kind: mix for kind in others if (mix := self._single(kind, self.ratio / least.ratio))}

    def _pair(self, least: Tried, milder: Mapping[str, Mix]) -> None:
        """The cheapest kind with the one that loses least toward what that leaves: a plan of all kinds takes up changes
        of the others that look better than they are."""
        errors = {kind: self._error(mix) for kind, mix in milder.items()}
        kinds = {*least.kinds, *sorted(errors, key=errors.__getitem__)[:1]}
        if len(kinds) == len(self.kinds) or not self._time.left():
            return
        mix, rounds = self._reaching([item for item in self.items if item.kind in kinds], self.ratio, one_kind=False)
        if mix and _key(mix) not in {_key(plan.mix) for plan in self.tried}:
            self._try(mix, rounds)

    def _overlap(self, kind: str, mix: Mix) -> None:
        """How much less a kind's plan saves beside all that overlaps with it, measured: a layer in two parts may be no
        faster at all in int8."""
        others = [item for item in self.items if item.proposals[0].overlap and item.kind != kind]
        others = [item for item in others if not any(item.claims.clashes(mine.claims) for mine in mix)]
        rest = most_saving(others, self.scales)
        both = {**mix, **rest}
        apart = predicted_saving(mix, self.scales) + predicted_saving(rest, self.scales)
        less = apart - predicted_saving(both, self.scales)
        if less > 0:
            found = self.scales[kind].overlap * (apart - 1 + self._ratio(both)) / less
            self.scales[kind] = replace(self.scales[kind], overlap=min(max(found, 0.0), MOST_OVERLAP))

    def _mix(self) -> Tried | None:
        """The plan of all kinds by what is known of them now, tried once; None where there is none."""
        mix, rounds = self._reaching(self.items, self.ratio, one_kind=False)
        before = next((plan for plan in self.tried if _key(plan.mix) == _key(mix)), None)
        return before or (self._try(mix, rounds) if mix else None)

    def _mixes(self) -> None:
        """Plans of all kinds. One that leads gives each kind its scale; after a worse one the step is halved."""
        alone = {kind: scale.error for kind, scale in self.scales.items()}
        lead, used = (True, math.inf), dict(self.scales)
        for turn in range(MOST_MIXES):
            # whatever the time: a single kind may reach the goal, and leave nothing of the network
            if turn and self._lead() is not None and not self._time.left():
                return
            tried = len(self.tried)
            plan = self._mix()
            if plan is None or (turn and len(self.tried) == tried):
                return
            standing = (plan.ratio > self.ratio, plan.error)  # one that reaches the goal comes before any that does not
            if standing < lead:
                lead, used = standing, dict(self.scales)
                if len(plan.kinds) > 1 and self._time.left():
                    for kind in plan.kinds:
                        self._contribution(plan, kind, alone[kind])
            else:
                for kind, scale in self.scales.items():
                    self.scales[kind] = replace(scale, error=math.sqrt(scale.error * used[kind].error))

    def _alone(self) -> None:
        """Try the changes that save the most by themselves: what a kind's plan loses does not say which of them loses
        it."""
        taken = [pair for plan in self.tried for pair in plan.mix.items()]
        by_saving = sorted(taken, key=lambda pair: -self.scales[pair[0].kind].saving * pair[1].saving)
        alone = [{item: proposal} for item, proposal in by_saving[:MOST_ALONE]]
        self._foresee(alone)
        for mix in alone:
            if not self._time.left():
                return
            self._error(mix)

    def _refine(self) -> None:
        """Plans around the one that leads, from what single items turned out to lose and to save there.

        A trial is cheaper than a measurement: only plans that lose less than the lead are measured. One that is then
        too slow is short of the goal by so much, and so are its like: the next is asked for that much more, where there
        is such a plan.
        """
        lead, misses, rounds, doubted, short = self._lead(), 0, 1, False, 0.0
        while lead is not None and misses < self._most_misses(lead) and self._may_try():
            mix, expected = self._promising(lead, short)
            if not mix and short:
                short = 0.0
                continue
            if not mix:
                return
            error = self._error(mix)
            if error < lead.error:
                plan = self._try(mix, rounds)
                if plan.ratio <= self.ratio:
                    lead, misses, rounds, doubted, short = plan, 0, 1, False, 0.0
                    continue
                rounds, short = rounds + 1, max(short, plan.ratio - self.ratio)
            misses += 1
            if not doubted and abs(error - expected) > SURPRISE * lead.error:
                doubted = True
                self._leave_out(lead)

    def _most_misses(self, lead: Tried) -> int:
        return MOST_MISSES if is_near(lead.ratio, self.ratio) else 2 * MOST_MISSES

    def _catch_up(self) -> bool:
        """Measure plans that were tried for what they say about others, and lose less than the one that leads: where
        one saves more than predicted, nothing else brings that to light. The least error first; whether another leads.
        """
        before = self._lead()
        for _ in range(MOST_CAUGHT_UP):
            lead = self._lead()
            mix = None if lead is None or not self._time.left() else self._overlooked(lead)
            if mix is None:
                break
            self._try(mix, 1)
        return self._lead() is not before

    def _overlooked(self, lead: Tried) -> Mix | None:
        """The plan of least error of those that were tried and not measured, lose less than `lead`, and may reach the
        goal."""
        savings = saving_fit(self.items, self.scales, lead.mix, lead.ratio, self._known(self._ratios))
        factors, spreads = (dict(zip(self.items, s, strict=True)) for s in (savings.factors, savings.spread))

        def most(mix: Mix) -> float:
            """What a plan may save."""
            predicted = savings_in(mix, {i: self.scales[i.kind] for i in mix})
            spread = math.hypot(*(spreads[i] * saving for i, saving in predicted.items()))
            return sum(factors[i] * saving for i, saving in predicted.items()) + DOUBTED_SAVING * spread

        found = [(error, key) for key, error in self._errors.items() if key not in self._ratios and error < lead.error]
        reaching = [(error, key) for error, key in found if most(self._plans[key]) >= 1 - self.ratio]
        return self._plans[min(reaching, key=operator.itemgetter(0))[1]] if reaching else None

    def _may_try(self) -> bool:
        return len(self._errors) < self.most_trials and self._time.left() and not self._is_enough()

    def _leave_out(self, plan: Tried) -> None:
        """Try a plan without each of the items that are predicted to lose the most in it."""
        by_error = sorted(plan.mix, key=lambda item: -self.scales[item.kind].error * plan.mix[item].error)
        fewer = [{i: p for i, p in plan.mix.items() if i is not left} for left in by_error[:MOST_LEFT_OUT]]
        self._foresee(fewer[: max(0, self.most_trials - len(self._errors))])
        for mix in fewer:
            if self._may_try():
                self._error(mix)

    def _foresee(self, mixes: Sequence[Mix]) -> None:
        """Have plans tried that will be asked for one after the other, where they can be tried at once."""
        new = [mix for mix in mixes if mix and _key(mix) not in self._errors]
        if self._together is not None and self._time.left():
            self._together(new)

    def _promising(self, lead: Tried, more: float) -> tuple[Mix, float]:
        """The best plan that may lose less than `lead` and saves so much `more` than the goal asks for, and what it is
        expected to lose; else an empty one. It is not one that is known to lose more or to be too slow; one that was
        tried, and only not measured yet, it may be.

        Items that are not in the lead count with the least that they may lose: a plan that takes them up in vain puts
        their figure right.
        """
        errors = error_fit(self.items, self.scales, lead.mix, lead.error, self._known(self._errors))
        savings = saving_fit(self.items, self.scales, lead.mix, lead.ratio, self._known(self._ratios))
        scales, expected = {}, {}
        for item, factor, spread, saved in zip(self.items, errors.factors, errors.spread, savings.factors, strict=True):
            kind = self.scales[item.kind]
            expected[item] = replace(kind, error=kind.error * float(factor), saving=kind.saving * float(saved))
            least = factor if item in lead.mix else max(factor - DOUBT * spread, LEAST_SHARE)
            scales[item] = replace(expected[item], error=kind.error * float(least))
        saving = lead.ratio - self.ratio + more + _saving(lead.mix, scales)
        known = [mix for mix, error in self._known(self._errors) if error >= lead.error]
        known += [mix for mix, ratio in self._known(self._ratios) if ratio > self.ratio and mix not in known]
        mix = choose_corrected(self.items, saving, list(scales.values()), known)
        mix = None if mix is None else self._adjusted(mix, self.items, scales)
        if mix is None or mix in known or _loss(lead.mix, scales) - _loss(mix, scales) <= LEAST_GAIN * lead.error:
            return {}, lead.error
        return mix, lead.error + _loss(mix, expected) - _loss(lead.mix, expected)

    def _known(self, figures: Mapping[Key, float]) -> list[tuple[Mix, float]]:
        """Every plan that a figure is known of."""
        return [(self._plans[key], figure) for key, figure in figures.items()]

    def _contribution(self, plan: Tried, kind: str, alone: float) -> None:
        """Scale a kind's errors to what the plan gains when that kind is left out of it."""
        rest = {item: p for item, p in plan.mix.items() if item.kind != kind}
        part = {item: p for item, p in plan.mix.items() if item.kind == kind}
        predicted = predicted_error(part, dict.fromkeys(self.kinds, Scale()))
        if predicted > 0:
            added = (plan.error - self._error(rest)) / predicted
            self.scales[kind] = replace(self.scales[kind], error=max(added, LEAST_SHARE * alone))

    def _reaching(self, items: Sequence[Item], goal: float, *, one_kind: bool) -> tuple[Mix, int]:
        """The plan of least predicted error whose measured ratio comes nearest to a goal from below, and how many
        were measured (see `reach`); where none does, the fastest. Of one kind it says how far off that kind's
        savings are."""

        def planned(saving: float) -> tuple[Mix, bool]:
            mix = choose_mix(items, saving, self.scales)
            return (most_saving(items, self.scales), False) if mix is None else (mix, True)

        seen = reach(goal, planned, lambda mix: predicted_saving(mix, self.scales), self._ratio)
        if not seen:
            return {}, 0
        ratio, mix = nearest_from_below(seen, goal)
        if self._adjust is not None:
            mix = self._adjusted(mix, items)
            ratio = self._ratio(mix)
        if one_kind:
            scale, off = self.scales[items[0].kind], saved_share(ratio, goal) / predicted_saving(mix, self.scales)
            self.scales[items[0].kind] = replace(scale, saving=scale.saving * off)
        return mix, len(seen)

    def _try(self, mix: Mix, rounds: int) -> Tried:
        plan = Tried(mix=mix, error=self._error(mix), ratio=self._ratio(mix), rounds=rounds)
        self.tried.append(plan)
        return plan

    def _error(self, mix: Mix) -> float:
        """The error of a plan, tried once."""
        if not mix:
            return 0.0
        key = _key(mix)
        if key not in self._errors:
            self._errors[key] = self._trial(mix)
            self._plans[key] = mix
        return self._errors[key]

    def _ratio(self, mix: Mix) -> float:
        """The latency ratio of a plan, measured once."""
        key = _key(mix)
        if key not in self._ratios:
            self._ratios[key] = self._measure(mix)
            self._plans[key] = mix
        return self._ratios[key]


def _key(mix: Mix) -> Key:
    return frozenset((item.kind, item.name, item.proposals.index(taken)) for item, taken in mix.items())


def _loss(mix: Mix, scales: Mapping[Item, Scale]) -> float:
    return sum(scales[item].error * proposal.error for item, proposal in mix.items())


def _saving(mix: Mix, scales: Mapping[Item, Scale]) -> float:
    return sum(savings_in(mix, scales).values())
