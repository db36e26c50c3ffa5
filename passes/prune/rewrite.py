"""The rewrite that removes channels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...compiler.analysis.provenance import Provenance
from ...compiler.analysis.unit_groups import UnitGroup, surplus_units
from ...compiler.goals.counted import CountedGoal
from ...compiler.ir.program import Program
from ...compiler.plan.decision import Decision
from ...compiler.plan.goal import Goal
from ...compiler.rewrite.budget import Budget
from ...compiler.rewrite.context import Context
from ...compiler.rewrite.rewrite import Applied, Offer, OwnPlan, Rewrite
from ...compiler.rewrite.work import Work
from ...compiler.support.errors import GoalError, Reject, RewriteError
from ..cut.cuttable import cut_again, cuttable_groups
from ..cut.prune_channels import Pruned, prune_channels
from ..solve.changes import Changes
from ..solve.layers import find_layers
from ..solve.weighing import solve_passes
from .channel_budget import free_groups, uniform_counts
from .decision import Channels, PruneChannels, UnitCount
from .offers import counted_offer, measured_offer
from .select_channels import ChannelChoice, select_by_norm
from .settings import ChannelSettings
from .stored import known_units, stored_channels
from .submodular import Selection
from .units import channel_decision, group_rejects, groups_report, removed_units, units_of

#: What the error curves of all groups take, over a solve of the network; and seconds that time the cuts of a layer.
CURVES_OF_SOLVE, CUTS_S = 1.2, 0.5


@dataclass(frozen=True, kw_only=True)
class Prune(ChannelSettings, Rewrite):
    """Rewrite: remove channels, and re-solve the layers that consume them (El Halabi et al., arXiv 2203.04940).

    With A the rows of inputs of a consumer, T its target, S the kept units and W0 the old weights, the score of S is

        F(S) = J({}) - J(S),     J(S) = min_W ||A_S W - T||_F^2 + ridge * ||W - W0_S||_F^2.

    Units are added greedily, with products in float32 and sums in float64. Without ridge, greedy selection reaches
    ``(1 - exp(-gamma)) F(best)``, with gamma the submodularity ratio of F. Groups are chosen in topological order,
    each on the network as pruned so far (``asymmetric``, ``sequential``). A group with several consumers is chosen on
    the original network, by the sum of their relative objectives. Exact where the removed units carry nothing that is
    read.

    Arguments:
        limits: What may be removed.
        score: ``submodular``: F. ``l1`` or ``l2``: the norm of the weights that make a channel.
        variant: ``asymmetric``: inputs of the pruned network, targets of the original. ``sequential``: inputs and
            targets of the pruned network. ``layerwise``: inputs and targets of the original.
        resolve: Whether the consumers are re-solved.
        stream_target: Whether a layer that feeds a residual addition is solved toward the stream behind it.
        polish: Whether all layers affected are re-solved once more after the cut.
        on_lattice: Whether the multiple of channel counts is taken from the backend.

    Raises:
        CompilerError: If a setting is out of range or of the wrong type.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        >>> program = foldcut.capture(net, torch.randn(2, 8))
        >>> cut = foldcut.PruneChannels(group="0", kept=tuple(range(8)), total=16)
        >>> program.parameter_count(), foldcut.Prune().plain(program, [cut]).parameter_count()
        (212, 108)
    """

    name = "prune_channels"
    verb = "prune channels"
    mark = "channels"
    decides = PruneChannels
    phase = 20
    ignores = "unit group or output"

    @property
    def ignore(self) -> tuple[str, ...]:  # type: ignore[override]
        """The patterns of `limits`."""
        return self.limits.ignore

    @classmethod
    def configured(cls, settings: Any) -> Prune:
        """The rewrite with ``settings.channels``."""
        return cls(**vars(settings.channels))

    def serves(self, goal: Goal) -> bool:
        """True for `Channels`, and for goals that mix rewrites."""
        return goal.mixes or isinstance(goal, Channels)

    def prepared(self, ctx: Context) -> Prune:
        """With `on_lattice`, the rewrite with the multiple that the backend favours."""
        if not self.on_lattice or ctx.latency is None:
            return self
        multiple = ctx.latency.probe.lattice(progress=ctx.progress).multiple_for(ctx.teacher)
        return replace(self, limits=replace(self.limits, multiple_of=multiple))

    def named(self, program: Program) -> Sequence[str]:
        """The unit groups and the outputs of `program`."""
        return [*(group.name for group in units_of(program).groups), *(spec.name for spec in program.outputs)]

    def ignoring(self, patterns: tuple[str, ...]) -> Prune:
        """The same rewrite with `patterns` in its limits."""
        return replace(self, limits=replace(self.limits, ignore=patterns))

    def unsolved_by(self) -> tuple[str, ...]:
        """``ChannelSettings.resolve=False`` and ``ChannelSettings.polish=False`` where they are set."""
        return tuple(f"ChannelSettings.{name}=False" for name in ("resolve", "polish") if not getattr(self, name))

    def work(self, ctx: Context) -> Mapping[str, Work]:
        """Moments and selections of all groups, about a solve of the network; under a goal in latency, cuts that are
        timed."""
        solve = Work(passes=CURVES_OF_SOLVE * solve_passes(ctx.teacher, len(ctx.solve)))
        timed = Work(seconds=CUTS_S * len(find_layers(ctx.teacher)[0])) if ctx.goal.measured else Work()
        return {"offer channels" if ctx.goal.mixes else "re-solve": solve + timed}

    def offer(self, ctx: Context, budget: Budget) -> Offer:
        """The unit groups that can be cut, each with the counts that it may keep."""
        with ctx.clock.stage("offer channels"):
            units = units_of(ctx.teacher)
            try:
                groups, rejects = self._groups(units)
            except GoalError as cause:
                return Offer(rejects=(Reject(reason=cause.message, node=""),))
            made = counted_offer if budget.latency is None else measured_offer
            return replace(made(ctx, budget, units, groups, self.limits), rejects=rejects)

    def own_plan(self, ctx: Context) -> OwnPlan:
        """The plan for a goal in channels. Raises GoalError when no group can be pruned."""
        assert isinstance(ctx.goal, Channels)
        with ctx.clock.stage("analyse"):
            units = units_of(ctx.teacher)
            groups, rejects = self._groups(units)
        if not groups:
            raise GoalError(f"nothing can be pruned: {rejects[-1].reason}", hint="`foldcut inspect` lists the groups")
        counts = uniform_counts(groups, ctx.goal.keep, self.limits)
        cut = [g for g in groups if counts[g.name] < len(g)]
        if not cut and ctx.goal != Channels(1.0):
            warnings.warn(
                f"nothing was cut: no group can keep fewer units for {ctx.goal} in steps of "
                f"{self.limits.multiple} channels with its minimum",
                stacklevel=2,
            )
        decisions = tuple(UnitCount(group=g.name, count=counts[g.name], total=len(g)) for g in cut)
        return OwnPlan(decisions=decisions, rejects=rejects)

    def requires(self, program: Program, decisions: Sequence[Decision]) -> None:
        """Raise PlanError or RewriteError where `program` does not have a group as planned."""
        removed_units(units_of(program), _given(decisions))  # says which group is not the one planned for

    def shape(self, program: Program, decisions: Sequence[Decision]) -> Program:
        """The program with the planned number of units in each group, whichever they are."""
        counts = _counts(decisions)
        units = units_of(program)
        groups = _cut_groups(units, counts)
        if not groups:
            return program
        smaller, _, _ = cut_again(units, groups, lambda left: _without_surplus(units, left, counts))
        return smaller

    def plain(self, program: Program, decisions: Sequence[Decision]) -> Program:
        """The program with the planned units removed, and no weight re-solved."""
        units = units_of(program)
        return prune_channels(units, removed_units(units, _given(decisions))).program

    def apply(self, program: Program, decisions: Sequence[Decision], ctx: Context) -> Applied:
        """Choose the units to remove unless the decisions name them, remove them, and re-solve their consumers.

        A group whose cut is refused stays whole, and the choice is made again. Decisions that name units are all
        carried out, or none. `ChannelSettings` says how the units are chosen.

        Arguments:
            program: The network before this rewrite.
            decisions: The decisions to apply.
            ctx: The context of the compile.

        Returns:
            The `Applied` program.
        """
        units, given = units_of(program), _given(decisions)
        counts = _counts(decisions)
        groups = _cut_groups(units, counts)
        if not groups:
            return Applied(program=program, decisions=tuple(given))

        def attempt(groups: list[UnitGroup]) -> tuple[ChannelChoice, Pruned]:
            choice = self._chosen(units, {g.name: counts[g.name] for g in groups}, given, ctx)
            return choice, prune_channels(units, choice.removed, choice.tensors)

        refused: list[Reject] = []
        if given:
            choice, pruned = attempt(groups)
        else:
            (choice, pruned), groups, refused = cut_again(units, groups, attempt)
        made = given or [channel_decision(group, choice.selections[group.name]) for group in groups]
        return Applied(
            program=pruned.program,
            decisions=tuple(made),
            plain=prune_channels(units, choice.removed).program if choice.tensors and not ctx.trial else None,
            changes=Changes(kept=pruned.kept),
            layers=choice.layers,
            rejects=tuple(refused),
            report={"selections": choice.selections},
        )

    def ensures(self, before: Program, after: Program, decisions: Sequence[Decision]) -> None:
        """Raise RewriteError where a parameter that makes a pruned group has not become smaller."""
        groups = {group.name: group for group in units_of(before).groups}
        for cut in (cut for cut in _given(decisions) if cut.takes_away):
            for name, dim in groups[cut.group].producers:
                widths = [_width(program, name, dim) for program in (before, after)]
                if None not in widths and widths[1] >= widths[0]:  # type: ignore[operator]
                    raise RewriteError(f"{name} has as many channels as before the cut", node=cut.group)

    def report(self, ctx: Context, applied: Applied) -> Mapping[str, Any]:
        # goals that are counted go unit by unit where no multiple is given
        """The unit groups with the units kept, and the multiple of channel counts."""
        by_unit = isinstance(ctx.goal, CountedGoal) and self.limits.multiple_of is None
        return groups_report(units_of(ctx.teacher), applied, 1 if by_unit else self.limits.multiple)

    def _groups(self, units: Provenance) -> tuple[list[UnitGroup], tuple[Reject, ...]]:
        """The groups that may and can be cut, and why others stay whole. Raises GoalError where none may."""
        groups, stuck = cuttable_groups(units, free_groups(units, self.limits))
        found = (Reject(reason=str(cause.message), node=group.name) for group, cause in stuck)
        return groups, (*group_rejects(units), *found)

    def _chosen(
        self, units: Provenance, counts: Mapping[str, int], given: Sequence[PruneChannels], ctx: Context
    ) -> ChannelChoice:
        """The units to remove, those of a plan or the ones that the score asks for, and, where consumers are re-solved,
        their weights."""
        solves = self.resolve
        selections = {cut.group: _selection(cut) for cut in given if cut.group in counts} or self._by_norm(
            units, counts
        )
        if ctx.trial and not self.unsolved_by():  # all is solved behind the last rewrite
            selections = selections or known_units(ctx, units, counts)
            solves = selections is None
        if selections is not None and not solves:
            gone = [g.without(selections[g.name].order) for g in units.prunable if g.name in selections]
            removed = torch.cat(gone) if gone else torch.zeros(0, dtype=torch.long)
            return ChannelChoice(removed=removed, tensors={}, selections=selections)
        choice = stored_channels(ctx, units, {**counts, **(selections or {})}, self)
        return choice if self.resolve else replace(choice, tensors={}, layers=())

    def _by_norm(self, units: Provenance, counts: Mapping[str, int]) -> dict[str, Selection] | None:
        """Selections by the norm of the filters; None where the score looks at data."""
        if self.score == "submodular":
            return None
        power = {"l1": 1, "l2": 2}[self.score]
        return {g.name: select_by_norm(units, g, counts[g.name], power) for g in _cut_groups(units, counts)}


def _width(program: Program, parameter: str, dim: int) -> int | None:
    """The size of a parameter along a dimension; None where the program does not have it any more."""
    found = program.module.state_dict().get(parameter)
    return None if found is None else found.shape[dim]


def _given(decisions: Sequence[Decision]) -> list[PruneChannels]:
    return [decision for decision in decisions if isinstance(decision, PruneChannels)]


def _counts(decisions: Sequence[Decision]) -> dict[str, int]:
    """How many units of each group stay."""
    return {d.group: d.count for d in decisions if isinstance(d, (PruneChannels, UnitCount))}


def _selection(cut: PruneChannels) -> Selection:
    """The units of a plan. Of their errors a plan knows the last one only."""
    errors = torch.full((len(cut.kept) + 1,), float("nan") if cut.error is None else cut.error, dtype=torch.float64)
    return Selection(order=torch.tensor(cut.kept, dtype=torch.long), errors=errors)


def _cut_groups(units: Provenance, counts: Mapping[str, int]) -> list[UnitGroup]:
    """The groups to be cut: those that earlier rewrites have left as they were."""
    return [g for g in units.prunable if counts.get(g.name, len(g)) < len(g)]


def _without_surplus(units: Provenance, groups: Sequence[UnitGroup], counts: Mapping[str, int]) -> Program:
    return prune_channels(units, surplus_units(groups, counts)).program if groups else units.program
