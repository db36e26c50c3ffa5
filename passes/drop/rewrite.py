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
from ...compiler.rewrite.work import Work
from ...compiler.support.errors import GoalError, RewriteError
from ..solve.layers import all_layer_names, matching_layers
from ..solve.weighing import solve_passes
from .choose_drops import Choice, Enough, choose_drops
from .decision import Blocks, DropBlock
from .drop_blocks import changes_of_drops, drop_blocks
from .recoverability import Recoverability, RecoverabilitySettings
from .region_latency import region_savings
from .stored import StoredErrors

#: Quick solves for each block that a choice takes about, of a given number of blocks and towards a goal that mixes
#: rewrites; and inferences that time what a region saves, in forward passes.
SOLVES_OF_BLOCKS, SOLVES_OF_MIX, SAVING_PASSES = 2.0, 3.5, 30
#: A plan is only measured when what its drops save one by one comes as near to the target as this.
NEAR = 0.03


@dataclass(frozen=True, kw_only=True)
class Drop(RecoverabilitySettings, Rewrite):
    """Rewrite: drop blocks, so that whole branches are bypassed (PRACTISE, arXiv 2202.07861).

    A block is scored by the error left in the features before the head when it is dropped, ``sum ||F_S - F_T||^2 /
    sum ||F_T||^2``, with sums in float64 and the blocks chosen before it dropped too. Under a goal that bounds a
    cost, the score is that added error per saved cost. The layers around are re-solved afterwards.

    Arguments:
        mode: How the error is predicted. ``plain``: bypass and run. ``local``: re-solve the layer in front too.
            ``calibrated``: the local error, times the share of it that a full re-solve of that block leaves.
            ``exact``: re-solve all layers behind. ``adaptors``: train the 1x1 adaptors of PRACTISE.
        samples: Number of samples that are read, half to solve and half to judge.
        adaptors: How adaptors are trained.
        resolve: How layers are re-solved for the prediction.
        finalists: How many blocks, those with the least error, have the share of ``calibrated`` measured again on more
            samples. 0 leaves that out.
        final_samples: Number of samples for these.
        ignore: Shell-style patterns of layers (node, module path or weight). A region with such a layer stays.

    Raises:
        CompilerError: If a setting is out of range or of the wrong type.

    Example:
        >>> program = foldcut.capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval(), torch.randn(2, 4))
        >>> drop = foldcut.DropBlock(entry="input_1", exit="linear")
        >>> foldcut.Drop(samples=32).shape(program, [drop]).parameter_count()
        10
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
        """The rewrite with ``settings.recoverability``, and what ``settings.ranks`` ignores."""
        return cls(**vars(settings.recoverability), ignore=settings.ranks.ignore)

    def serves(self, goal: Goal) -> bool:
        """True for `Blocks`, and for goals that mix rewrites."""
        return goal.mixes or isinstance(goal, Blocks)

    def by_default(self, goal: Goal) -> bool:
        """True for `Blocks`, and for goals in latency."""
        return goal.measured or isinstance(goal, Blocks)

    def named(self, program: Program) -> Sequence[str]:
        """The layers of `program`: node, module path and weight."""
        return all_layer_names(program)

    def work(self, ctx: Context) -> Mapping[str, Work]:
        """What is saved by each region, timed, and the choice: a few quick solves for each block."""
        regions = self._regions(ctx)
        each, more = (
            solve_passes(ctx.teacher, max(1, min(count, len(ctx.fit)) // 2), quick=True)
            for count in (self.samples, self.final_samples)
        )
        solves = SOLVES_OF_MIX if ctx.goal.mixes else SOLVES_OF_BLOCKS
        timed = Work(passes=SAVING_PASSES * len(regions.regions)) if ctx.goal.measured else Work()
        return {
            "measure savings": timed,
            "choose": Work(passes=solves * len(regions.blocks) * each + self.finalists * more),
        }

    def offer(self, ctx: Context, budget: Budget) -> Offer:
        """The regions whose drops reach the aim of `budget`, one after the other, each with the error that it adds."""
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
        """The plan for a goal in blocks. Raises GoalError when nothing can be dropped."""
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
        """The program with the regions bypassed. Exact where the branch of a region is zero."""
        return drop_blocks(program, _drops(decisions))

    def apply(self, program: Program, decisions: Sequence[Decision], ctx: Context) -> Applied:
        """The program with the regions bypassed. The layers around are re-solved by the driver."""
        del ctx  # the layers around are solved by the driver
        drops = _drops(decisions)
        return Applied(program=drop_blocks(program, drops), decisions=tuple(drops), changes=changes_of_drops(drops))

    def ensures(self, before: Program, after: Program, decisions: Sequence[Decision]) -> None:
        """Raise RewriteError where nodes of a dropped region are still in the program."""
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
    """Raise GoalError, with the reasons, when nothing can be removed; warn when it is less than the goal."""
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
