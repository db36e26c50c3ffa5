"""The rewrite that drops blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...compiler.analysis.regions import Region, RegionAnalysis, find_regions, removed_nodes
from ...compiler.ir.program import Program
from ...compiler.plan.decision import Decision
from ...compiler.plan.goal import Goal
from ...compiler.plan.proposals import Claims, Item, Proposal
from ...compiler.rewrite.budget import Budget, changes_of
from ...compiler.rewrite.context import Context
from ...compiler.rewrite.rewrite import Applied, Offer, OwnPlan, Rewrite
from ...compiler.support.errors import GoalError, RewriteError
from ..solve.layers import all_layer_names, matching_layers
from .choose_drops import Choice, Enough, choose_drops
from .decision import Blocks, DropBlock
from .drop_blocks import changes_of_drops, drop_blocks
from .recoverability import Recoverability, RecoverabilitySettings
from .region_latency import region_savings
from .stored import StoredErrors

#: A plan is only measured when what its drops save one by one comes as near to the target as this.
NEAR = 0.03


@dataclass(frozen=True, kw_only=True)
class Drop(RecoverabilitySettings, Rewrite):
    """Drop blocks: bypass whole branches, and solve the layers around them (PRACTISE, arXiv 2202.07861).

    The fields are those of `RecoverabilitySettings`, which say how well the rest recovers. `ignore` are patterns of
    layers (node, module path or weight): a region that holds one of them stays.
    """

    ignore: tuple[str, ...] = ()

    name = "drop_blocks"
    verb = "drop blocks"
    mark = "drops"
    decides = DropBlock
    phase = 10
    solves_before_next = True

    @classmethod
    def configured(cls, settings: Any) -> Drop:
        return cls(**vars(settings.recoverability), ignore=settings.ranks.ignore)

    def serves(self, goal: Goal) -> bool:
        return goal.mixes or isinstance(goal, Blocks)

    def by_default(self, goal: Goal) -> bool:
        return goal.measured or isinstance(goal, Blocks)

    def named(self, program: Program) -> Sequence[str]:
        return all_layer_names(program)

    def offer(self, ctx: Context, budget: Budget) -> Offer:
        analysis = self._regions(ctx)
        regions = analysis.regions
        if not regions:
            return Offer(rejects=tuple(analysis.rejects))
        with ctx.clock.stage("measure savings"):
            savings = self._savings(ctx, budget, regions)
        with ctx.clock.stage("choose"):
            choice = self._chosen(ctx, analysis, savings, _reaching(ctx, budget, savings))
        items, before = [], 0.0
        for region, decision in zip(choice.regions, choice.decisions, strict=True):
            error = decision.error or 0.0
            proposal = Proposal(error=max(error - before, 0.0), saving=savings[region.name], decision=decision)
            items.append(
                Item(kind=self.name, name=region.name, claims=Claims(removes=region.nodes), proposals=(proposal,))
            )
            before = max(before, error)
        return Offer(items=tuple(items), rejects=tuple(analysis.rejects))

    def own_plan(self, ctx: Context) -> OwnPlan:
        assert isinstance(ctx.goal, Blocks)
        with ctx.clock.stage("analyse"):
            analysis = self._regions(ctx)
        _require_regions(analysis, ctx.goal)
        count = ctx.goal.count

        def enough(chosen: Sequence[Region]) -> bool:
            ctx.progress("choose blocks", len(chosen), count)
            return len(chosen) >= count

        with ctx.clock.stage("choose"):
            choice = self._chosen(ctx, analysis, None, enough)
        if not choice.regions:
            raise GoalError(f"nothing can be dropped towards {ctx.goal}")
        return OwnPlan(decisions=choice.decisions, met=choice.met, rejects=tuple(analysis.rejects))

    def shape(self, program: Program, decisions: Sequence[Decision]) -> Program:
        return drop_blocks(program, _drops(decisions))

    def apply(self, program: Program, decisions: Sequence[Decision], ctx: Context) -> Applied:
        del ctx  # the layers around are solved by the driver
        drops = _drops(decisions)
        return Applied(program=drop_blocks(program, drops), decisions=tuple(drops), changes=changes_of_drops(drops))

    def ensures(self, before: Program, after: Program, decisions: Sequence[Decision]) -> None:
        for drop in _drops(decisions):
            left = removed_nodes(before, drop.entry, drop.exit) & set(after.nodes)
            if left:
                raise RewriteError(f"the block is still there: {', '.join(sorted(left))}", node=drop.exit)

    def _regions(self, ctx: Context) -> RegionAnalysis:
        """The regions of the original, without those that hold a layer that is to be left alone."""
        analysis = find_regions(ctx.teacher)
        left = matching_layers(ctx.teacher, self.ignore)
        return replace(analysis, regions=tuple(r for r in analysis.regions if not r.nodes & left))

    def _savings(self, ctx: Context, budget: Budget, regions: Sequence[Region]) -> Mapping[str, float]:
        if budget.latency is not None:
            return region_savings(budget.latency, regions, progress=ctx.progress)
        return budget.savings({r.name: _bypassed(ctx.teacher, r) for r in regions})

    def _chosen(
        self, ctx: Context, analysis: RegionAnalysis, savings: Mapping[str, float] | None, enough: Enough
    ) -> Choice:
        """Blocks first, then, when those do not suffice, whatever else is removable beside them."""
        look = Recoverability(ctx.teacher, ctx.fit, regions=analysis.regions, settings=self)
        errors = StoredErrors(ctx.store, look)
        choice = choose_drops(analysis.blocks, errors=errors, savings=savings, enough=enough)
        if not choice.met and len(analysis.blocks) < len(analysis.regions):
            choice = choose_drops(
                analysis.regions,
                errors=errors,
                savings=savings,
                enough=enough,
                chosen=choice.regions,
                decisions=choice.decisions,
            )
        return choice


def _drops(decisions: Sequence[Decision]) -> list[DropBlock]:
    return [decision for decision in decisions if isinstance(decision, DropBlock)]


def _bypassed(program: Program, region: Region) -> Callable[[], Program]:
    return lambda: drop_blocks(program, [region])


def _reaching(ctx: Context, budget: Budget, savings: Mapping[str, float]) -> Enough:
    """Whether the regions chosen so far suffice: measured only when the sum of what they save one by one comes near.
    The sum is a guide, the measurement decides."""
    target = budget.aim

    def enough(chosen: Sequence[Region]) -> bool:
        predicted = 1 - sum(savings[region.name] for region in chosen)
        ctx.progress("choose blocks", round(100 * min(1.0, (1 - predicted) / (1 - target))), 100)
        if predicted > target + NEAR:
            return False
        drops = [DropBlock(entry=region.entry, exit=region.exit, path=region.path) for region in chosen]
        with ctx.clock.stage("measure plan"):
            return budget.share(changes_of(drops), lambda: drop_blocks(ctx.teacher, drops)) <= target

    return enough


def _require_regions(analysis: RegionAnalysis, goal: Blocks) -> None:
    """Raise GoalError, with the reasons, when nothing can be removed; warn when there is less than asked for."""
    if analysis.regions:
        if goal.count > len(analysis.regions):
            warnings.warn(
                f"the network has {len(analysis.regions)} removable regions, fewer than {goal.count}",
                stacklevel=3,
            )
        return
    looked = (
        "; ".join(str(r) for r in analysis.rejects[:3])
        or "no two points of the graph have one shape with a layer in between"
    )
    raise GoalError(
        f"the network has no removable region: {looked}",
        hint="dropping blocks needs parts whose input and output have one shape",
    )
