"""The choice of ranks for all layers together: an integer programme, and trials of its plans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...compiler.plan.option_milp import choose_options
from .rank_trials import Trials
from .select_ranks import Option, RankAnalysis

Choice = dict[str, Option]

#: Plans that are tried around the best one so far.
MOST_PLANS = 6
#: Layers make up for each other in a plan, but none counts for less than this share of what it does alone.
LEAST_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Menu:
    """The options of each layer with their costs, what the layer costs whole, and what all may cost together."""

    options: Mapping[str, Sequence[Option]]
    costs: Mapping[str, Sequence[float]]
    whole: Mapping[str, float]
    budget: float

    @property
    def schemes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(option.scheme for row in self.options.values() for option in row))

    def only(self, scheme: str) -> Menu:
        """The menu with the options of one scheme; a layer that has none of it keeps its own."""
        places = {
            name: [i for i, option in enumerate(row) if option.scheme == scheme] or list(range(len(row)))
            for name, row in self.options.items()
        }
        return replace(
            self,
            options={name: [self.options[name][i] for i in found] for name, found in places.items()},
            costs={name: [self.costs[name][i] for i in found] for name, found in places.items()},
        )

    def best(self, weights: Mapping[str, float]) -> tuple[Choice, bool]:
        """The options with the least sum of weight times error whose costs stay within the budget, and whether there is
        such a choice; without one, the cheapest of each layer. Layers that are best left whole are not in it."""
        names = list(self.options)
        errors = [[0.0, *(weights[n] * option.error for option in self.options[n])] for n in names]
        prices = [[self.whole[n], *self.costs[n]] for n in names]
        picked = choose_options(errors, prices, self.budget)
        possible = picked is not None
        if picked is None:
            picked = [min(range(len(row)), key=row.__getitem__) for row in prices]
        return {n: self.options[n][i - 1] for n, i in zip(names, picked, strict=True) if i}, possible


@dataclass(frozen=True, kw_only=True)
class Search:
    """What was chosen, the weights that it was chosen under, the error measured for each plan that was tried, and
    whether the budget can be met."""

    choice: Choice
    weights: Mapping[str, float]
    tried: tuple[float, ...]
    possible: bool


def search_plan(menu: Menu, trials: Trials, alone: Mapping[str, float]) -> Search:
    """The plan within the budget whose measured output error is least, of those tried.

    Tried are the best under `alone`, what each layer does by itself, from the whole menu and from each scheme alone
    where that stays within the budget; then, since errors do not add up, the best under what each layer contributes to
    the plan that leads (its error, less that of the plan with the layer whole), again and again while that finds a
    better one. When a new plan is worse, the step between the weights is halved, in their logarithm. Ends after
    `MOST_PLANS` of these, or when a plan returns.
    """
    choice, possible = menu.best(alone)
    if not possible:
        return Search(choice=choice, weights=alone, tried=(), possible=False)
    schemes = menu.schemes
    single = [menu.only(scheme).best(alone) for scheme in schemes if len(schemes) > 1]
    starts = [choice, *(plan for plan, fits in single if fits)]
    starts = [plan for i, plan in enumerate(starts) if plan and plan not in starts[:i]]
    if not starts:
        return Search(choice=choice, weights=alone, tried=(), possible=True)
    tried = [(trials.error(plan), plan) for plan in starts]
    (error, choice), used = min(tried, key=lambda item: item[0]), dict(alone)
    wanted = contributions(choice, error, trials, alone)
    for _ in range(MOST_PLANS):
        plan, _ = menu.best(wanted)
        if not plan or any(plan == earlier for _, earlier in tried):
            break
        tried.append((trials.error(plan), plan))
        if tried[-1][0] < error:
            (error, choice), used = tried[-1], wanted
            wanted = contributions(choice, error, trials, wanted)
        else:
            wanted = {name: math.sqrt(used[name] * weight) for name, weight in wanted.items()}
    return Search(choice=choice, weights=used, tried=tuple(error for error, _ in tried), possible=True)


def contributions(choice: Choice, error: float, trials: Trials, weights: Mapping[str, float]) -> dict[str, float]:
    """What each layer's relative error is to be multiplied by near a plan; layers that are whole in it keep theirs."""
    without = trials.without(choice)
    found = dict(weights)
    for name, option in choice.items():
        if option.error > 0:
            found[name] = max((error - without[name]) / option.error, LEAST_SHARE * weights[name])
    return found


def weights_alone(analysis: RankAnalysis, trials: Trials) -> dict[str, float]:
    """What each layer's relative error is to be multiplied by to predict the network's: from one trial, the layer alone
    factorised to about half of its multiply-accumulates."""
    halves = {name: candidate.trial() for name, candidate in analysis.candidates.items()}
    errors = trials.alone(halves)
    return {n: errors[n] / option.error if option.error > 0 else 0.0 for n, option in halves.items()}


__all__ = ["Choice", "Menu", "Search", "contributions", "search_plan", "weights_alone"]
