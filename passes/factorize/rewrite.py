"""The rewrite that factorises layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...compiler.ir.program import Program
from ...compiler.plan.decision import Decision
from ...compiler.plan.goal import Goal
from ...compiler.plan.proposals import Claims, Item, Mix, Proposal
from ...compiler.rewrite.budget import Budget
from ...compiler.rewrite.context import Context
from ...compiler.rewrite.rewrite import Applied, Offer, OwnPlan, Rewrite
from ...compiler.rewrite.work import Work
from ...compiler.support.errors import GoalError
from ..solve.changes import Changes
from ..solve.layers import all_layer_names, find_layers
from ..solve.resolve_network import TRIAL_RESOLVE
from ..solve.weighing import solve_passes, weighing_samples
from .decision import FactorizeLayer, Ranks
from .factorize import (
    Factors,
    check_decisions,
    check_factors,
    factorize,
    factorize_for_timing,
    factorize_plain,
    within_full,
)
from .low_rank import SCHEMES
from .rank_choice import Menu, search_plan, weights_alone
from .rank_latency import OptionLatencies, option_latencies, thinned
from .rank_trials import RankTrials
from .select_ranks import Known, Option, RankAnalysis, RankSettings
from .stored import StoredTrials, stored_factors, stored_rank_analysis

#: Options that save less of the latency than this are left out: they are lost in noise.
LEAST_SAVING = 0.0005
#: What decompositions of all layers take, over a solve of the network; and seconds that time the options of a layer.
DECOMPOSED_OF_SOLVE, OPTIONS_S = 0.45, 1.0


@dataclass(frozen=True, kw_only=True)
class Factorize(RankSettings, Rewrite):
    """Rewrite: replace layers by chains of thinner ones, from the inputs that they get on the calibration set.

    With W the weight as a matrix, A the rows of inputs, ``G = A^T A`` their Gram matrix and D the diagonal matrix of
    gains of the outputs behind the layer, a scheme looks for the least

        ||A (W - W')^T D||_F^2 = tr D (W - W') G (W - W')^T D

    over factorisations W' of the given rank. G has a small ridge on its diagonal, and is that of A without its mean
    where a bias can take over the rest. Products are in float32, sums and decompositions in float64. ``channel``
    reaches the least (a truncated eigendecomposition); ``spatial`` and ``tucker`` take the first factor from the
    whitened weight and solve the others given it. At full rank W' equals W up to rounding.

    Arguments:
        schemes: Schemes to choose from. ``channel``: k x k to r channels, then 1 x 1. ``spatial``: k x 1, then 1 x k.
            ``tucker``: 1 x 1, k x k, 1 x 1.
        multiple_of: Ranks are multiples of this.
        least: Least rank, as a share of the full rank.
        metric: ``data`` weighs errors by the inputs of the layer. ``weights`` uses G = I and D = I, and reads no
            data.
        resolve: Whether the factors and the layers behind are re-solved on the whole network.
        rows_per_column: Largest number of rows of A in a Gram matrix, per column. None reads all.
        ignore: Shell-style patterns of layers (node, module path or weight) that stay whole.
        on_lattice: Whether `multiple_of` is taken from the backend.

    Raises:
        GoalError: If a setting is out of range or of the wrong type.

    Example:
        >>> program = foldcut.capture(nn.Sequential(nn.Linear(32, 32)).eval(), torch.randn(2, 32))
        >>> cut = foldcut.FactorizeLayer(layer="linear", scheme="channel", ranks=(8,), full=(32,))
        >>> foldcut.Factorize(multiple_of=8).plain(program, [cut]).parameter_count()
        544
    """

    name = "factorize"
    verb = "factorise layers"
    mark = "ranks"
    decides = FactorizeLayer
    phase = 30

    @classmethod
    def configured(cls, settings: Any) -> Factorize:
        """The rewrite with ``settings.ranks``."""
        return cls(**vars(settings.ranks))

    def serves(self, goal: Goal) -> bool:
        """True for `Ranks`, and for goals that mix rewrites."""
        return goal.mixes or isinstance(goal, Ranks)

    def by_default(self, goal: Goal) -> bool:
        """True for `Ranks`, and for goals in latency."""
        return goal.measured or isinstance(goal, Ranks)

    def prepared(self, ctx: Context) -> Factorize:
        """With `on_lattice`, the rewrite with the multiple that the backend favours."""
        if not self.on_lattice or ctx.latency is None:
            return self
        return replace(self, multiple_of=ctx.latency.probe.lattice(progress=ctx.progress).multiple_for(ctx.teacher))

    def named(self, program: Program) -> Sequence[str]:
        """The layers of `program`: node, module path and weight."""
        return all_layer_names(program)

    def unsolved_by(self) -> tuple[str, ...]:
        """``RankSettings.resolve=False`` where that is set."""
        return () if self.resolve else ("RankSettings.resolve=False",)

    def work(self, ctx: Context) -> Mapping[str, Work]:
        """Moments and decompositions of all layers; under a goal in latency, options that are timed."""
        solve = Work(passes=DECOMPOSED_OF_SOLVE * solve_passes(ctx.teacher, len(ctx.solve)))
        timed = Work(seconds=OPTIONS_S * len(find_layers(ctx.teacher)[0])) if ctx.goal.measured else Work()
        return {"offer ranks" if ctx.goal.mixes else "analyse": solve + timed}

    def offer(self, ctx: Context, budget: Budget) -> Offer:
        """Every layer with its ranks. Where the goal is counted, the plan of least error by layers alone is a start
        of the search.
        """
        with ctx.clock.stage("offer ranks"):
            analysis = self._analysis(ctx)
            rejects = tuple(analysis.rejects)
            if not analysis.candidates:
                return Offer(rejects=rejects)
            few = ctx.solve.take(slice(0, weighing_samples(ctx.teacher, len(analysis.candidates))))
            trials = StoredTrials(ctx.store, RankTrials(analysis, few, progress=ctx.progress))
            menu, whole = _counted(analysis, budget) if budget.latency is None else _timed(analysis, ctx, budget)
            found = search_plan(menu, trials, weights_alone(analysis, trials))
            items = _items(analysis, menu, found.weights, whole)
            start = _start(items, {n: analysis.decision(n, option).change for n, option in found.choice.items()})
            starts = (start,) if budget.latency is None and found.possible and start else ()
            return Offer(items=items, rejects=rejects, starts=starts)

    def own_plan(self, ctx: Context) -> OwnPlan:
        """The plan for a goal in ranks. Raises GoalError when no layer can be factorised."""
        assert isinstance(ctx.goal, Ranks)
        with ctx.clock.stage("analyse"):
            analysis = self._analysis(ctx)
        if not analysis.candidates:
            reasons = "; ".join(dict.fromkeys(r.reason for r in analysis.rejects)) or "it has no layer"
            raise GoalError(f"nothing can be factorised: {reasons}", hint="allow lower ranks or other schemes")
        with ctx.clock.stage("choose"):
            choice = analysis.each(ctx.goal)
        if not choice:
            warnings.warn(f"nothing was factorised: no layer gets cheaper under {ctx.goal}", stacklevel=2)
        decisions = tuple(analysis.decision(name, option) for name, option in choice.items())
        return OwnPlan(decisions=decisions, rejects=tuple(analysis.rejects))

    def still(self, program: Program, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """The decisions with their ranks cut to what an earlier rewrite has left of the layer, without those that no
        longer save MACs.
        """
        return within_full(program, _ranks(decisions))

    def requires(self, program: Program, decisions: Sequence[Decision]) -> None:
        """Raise RewriteError or PlanError where `program` does not have a layer as planned."""
        check_decisions(program, _ranks(decisions))

    def shape(self, program: Program, decisions: Sequence[Decision]) -> Program:
        """The program with factors of the final shapes, for timing and counting."""
        return factorize_for_timing(program, within_full(program, _ranks(decisions)))

    def plain(self, program: Program, decisions: Sequence[Decision]) -> Program:
        """The program with factors of the weights alone."""
        return factorize_plain(program, _ranks(decisions))

    def apply(self, program: Program, decisions: Sequence[Decision], ctx: Context) -> Applied:
        """The program with factors fitted to what the layers now get as inputs."""
        ranks = _ranks(decisions)
        smaller = factorize(program, self._factors(program, ranks, ctx))
        changes = Changes(replaced=tuple(decision.layer for decision in ranks))
        return Applied(program=smaller, decisions=tuple(ranks), changes=changes)

    def ensures(self, before: Program, after: Program, decisions: Sequence[Decision]) -> None:
        """Raise RewriteError where the factors do not have the planned sizes."""
        check_factors(before, after, _ranks(decisions))

    def _analysis(self, ctx: Context) -> RankAnalysis:
        return stored_rank_analysis(ctx, self)

    def _factors(self, program: Program, ranks: Sequence[FactorizeLayer], ctx: Context) -> list[Factors]:
        chosen = {d.layer: Option(scheme=d.scheme, ranks=d.ranks, macs=0, error=d.error or 0.0) for d in ranks}
        # the plan has chosen: what may be chosen does not matter any more
        rows = TRIAL_RESOLVE.rows_per_column if ctx.trial else self.rows_per_column
        free = replace(self, schemes=tuple(SCHEMES), multiple_of=1, least=0.0, ignore=(), rows_per_column=rows)

        def compute() -> list[Factors]:
            known = Known(options={name: (option,) for name, option in chosen.items()}, only=True)
            analysis = RankAnalysis(program, ctx.solve, settings=free, resolve=ctx.resolve, known=known)
            return analysis.factors(chosen, progress=ctx.progress)

        return stored_factors(ctx, program, ranks, free, compute)


def _ranks(decisions: Sequence[Decision]) -> list[FactorizeLayer]:
    return [decision for decision in decisions if isinstance(decision, FactorizeLayer)]


def _items(analysis: RankAnalysis, menu: Menu, weights: Mapping[str, float], whole: float) -> tuple[Item, ...]:
    """The options of a menu with their costs over that of the network in the same unit."""
    items = []
    for name, options in menu.options.items():
        proposals = [
            Proposal(
                error=weights[name] * option.error,
                saving=(menu.whole[name] - cost) / whole,
                decision=analysis.decision(name, option),
            )
            for option, cost in zip(options, menu.costs[name], strict=True)
        ]
        kept = tuple(p for p in proposals if p.saving >= LEAST_SAVING)
        if kept:
            claims = Claims(replaces=frozenset([name]), needs=frozenset([name]))
            items.append(Item(kind=FactorizeLayer.kind, name=name, claims=claims, proposals=kept))
    return tuple(items)


def _start(items: Sequence[Item], changes: Mapping[str, object]) -> Mix:
    """The plan of these changes."""
    found = {i: [p for p in i.proposals if p.decision.change == changes.get(i.name)] for i in items}
    return {item: proposals[0] for item, proposals in found.items() if proposals}


def _counted(analysis: RankAnalysis, budget: Budget) -> tuple[Menu, float]:
    """Every option at its multiply-accumulates or trained values; the budget is what the target leaves to the layers on
    the menu. And what the whole network has of it."""
    candidates = analysis.candidates
    options = {name: candidate.every for name, candidate in candidates.items()}
    whole = {name: float(candidate.whole(budget.unit)) for name, candidate in candidates.items()}
    costs = {name: [float(candidates[name].cost(budget.unit, o)) for o in row] for name, row in options.items()}
    now = budget.share([], lambda: analysis.program) * budget.whole
    others = now - sum(whole.values())
    return Menu(options=options, costs=costs, whole=whole, budget=budget.aim * budget.whole - others), budget.whole


def _timed(analysis: RankAnalysis, ctx: Context, budget: Budget) -> tuple[Menu, float]:
    """Options that were timed and found faster than their layer, at their latencies; the budget is what the target
    leaves to them. And the latency of the network in the same unit."""
    latency = budget.latency
    assert latency is not None
    options = {name: thinned(candidate) for name, candidate in analysis.candidates.items()}
    with ctx.clock.stage("time options"):
        timed = OptionLatencies(
            **latency.kept(
                "options",
                [list(options.items())],
                lambda: asdict(option_latencies(analysis, options, latency.probe, progress=ctx.progress)),
            )
        )
    faster = {n: [i for i, cost in enumerate(timed.options[n]) if cost < timed.whole[n]] for n in options}
    faster = {name: places for name, places in faster.items() if places}
    whole = {name: timed.whole[name] for name in faster}
    menu = Menu(
        options={name: [options[name][i] for i in places] for name, places in faster.items()},
        costs={name: [timed.options[name][i] for i in places] for name, places in faster.items()},
        whole=whole,
        budget=sum(whole.values()) - (1 - budget.aim) * timed.network,
    )
    return menu, timed.network
