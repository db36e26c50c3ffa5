"""What plans save of the multiply-accumulates or of the parameters: counted, so that a goal is met to the last step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...passes.factorize.rank_choice import search_plan
from ...passes.prune.channel_budget import ChannelLimits, CutModel, allocate, free_groups, lattice_counts
from ...passes.prune.channel_latency import touched_layers
from ...passes.prune.cuttable import cuttable_groups
from ..analysis.provenance import Provenance, find_units
from ..analysis.unit_groups import UnitGroup
from ..plan.counting import counted, counted_whole
from ..plan.joint_search import Adjust
from ..plan.mix_steps import Added, brought_within
from ..plan.plan import CountedGoal, Parameters
from ..plan.proposals import Item, Mix, Proposal, Scale
from ..support.errors import GoalError, Reject
from .channel_pipeline import error_curves, group_rejects
from .joint_proposals import Offered, offered_ranks
from .joint_rewrite import mix_shape
from .latency_budget import MixContext
from .rank_pipeline import counted_menu, rank_trials

#: Multiples that channel counts go to in the plans that a search starts from, where the user names none.
MULTIPLES = (8, 4, 2, 1)
#: Counts of a group that a search looks at; the plan that stands is then put right unit by unit.
MOST_COUNTS = 16
#: How often a plan is put right where it costs something else than its parts say.
MOST_CORRECTIONS = 4


class CountedBudget:
    """Plans towards a share of the multiply-accumulates or of the parameters."""

    def __init__(self, context: MixContext, goal: CountedGoal) -> None:
        self._context, self._goal = context, goal
        self._whole = max(1, counted_whole(context.teacher, goal))
        self._cuts = Cuts()
        self._ratios: dict[frozenset[Any], float] = {}
        #: Plans that a search tries before its own.
        self.starts: list[Mix] = []

    def offered(self, rewrites: Sequence[str], ratio: float) -> list[Offered]:
        """What each of the rewrites can do towards a share."""
        context, goal, found = self._context, replace(self._goal, ratio=ratio), []
        if "drop_blocks" in rewrites:
            found.append(context.drops(goal, None))
        if "prune_channels" in rewrites:
            with context.clock.stage("offer channels"):
                found.append(self._channels(goal))
        if "factorize" in rewrites:
            with context.clock.stage("offer ranks"):
                found.append(self._ranks(goal))
        return found

    def ratio(self, mix: Mix) -> float:
        """The share that a plan leaves, counted on the network that it leads to."""
        key = frozenset((item.kind, item.name, taken.change) for item, taken in mix.items())
        if key not in self._ratios:
            smaller = mix_shape(self._context.teacher, mix, self._cuts.provenance)
            self._ratios[key] = counted(smaller, self._goal) / self._whole
        return self._ratios[key]

    def adjusted(self, mix: Mix, ratio: float, scales: Mapping[Item, Scale]) -> Mix:
        """The plan brought within the share `ratio` and filled up to it; `scales` are those of the items that may be
        changed. What a plan turns out to cost beside the sum of its parts (a product of two activations) is allowed
        for."""
        for _ in range(MOST_CORRECTIONS):
            off = self.ratio(mix) - self._cuts.share(mix)
            changed = brought_within(mix, ratio - off, scales, self._cuts)
            if changed == mix:
                break
            mix = changed
        return mix

    def adjuster(self, ratio: float) -> Adjust:
        """What brings plans within the share `ratio`."""
        return lambda mix, scales: self.adjusted(mix, ratio, scales)

    def finest(self, mix: Mix, ratio: float) -> Mix:
        """The plan with units given back one by one as far as the share `ratio` allows."""
        finer = dict(self._cuts.finer(item, taken) for item, taken in mix.items())
        found = self.adjusted(finer, ratio, {item: Scale() for item in finer}) if self.ratio(mix) <= ratio else mix
        return found if self.ratio(found) <= ratio else mix

    def _channels(self, goal: CountedGoal) -> Offered:
        """Every unit group at some of its counts. Plans to start from cut all groups, or only those that a single layer
        reads (what runs along a residual stream hangs on every layer of it), to coarse counts and to fine ones."""
        context, limits = self._context, self._context.settings.channels.limits
        provenance = find_units(context.teacher)
        try:
            groups, stuck = cuttable_groups(provenance, free_groups(provenance, limits))
        except GoalError as cause:
            return Offered(items=(), rejects=(Reject(reason=cause.message, node=""),), provenance=provenance)
        rejects = (*group_rejects(provenance), *(Reject(reason=str(cause.message), node=g.name) for g, cause in stuck))
        groups = [group for group in groups if lattice_counts(group, limits, limits.multiple_of or 1)]
        if not groups:
            return Offered(items=(), rejects=rejects, provenance=provenance)
        curves = error_curves(provenance, context.calibration, groups, progress=context.progress, store=context.store)
        self._cuts = Cuts.of(provenance, groups, goal, limits, curves)
        items = [item for item in map(self._cuts.item, groups) if item.proposals]
        shapes = [groups, [group for group in groups if len(group.consumers) == 1]]
        for multiple in MULTIPLES if limits.multiple_of is None else (limits.multiple_of,):
            for shape in shapes:
                start = self._cuts.allocated(items, shape, goal.ratio, replace(limits, multiple_of=multiple))
                if start and start not in self.starts:
                    self.starts.append(start)
        return Offered(items=tuple(items), rejects=rejects, provenance=provenance)

    def _ranks(self, goal: CountedGoal) -> Offered:
        """Every layer at its options. Ranks alone reach the goal by the plan that `search_plan` finds."""
        context = self._context
        analysis = context.rank_analysis()
        if not analysis.candidates:
            return Offered(items=(), rejects=tuple(analysis.rejects))
        trials, alone = rank_trials(analysis, context.calibration, progress=context.progress, store=context.store)
        menu = counted_menu(analysis, goal)
        found = search_plan(menu, trials, alone)
        offered = offered_ranks(analysis, menu, found.weights, self._whole)
        if found.possible:
            chosen = {name: analysis.decision(name, option) for name, option in found.choice.items()}
            taken = {i: [p for p in i.proposals if p.change == chosen.get(i.name)] for i in offered.items}
            start = {item: proposals[0] for item, proposals in taken.items() if proposals}
            self.starts += [start] if start else []
        return offered


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """The unit groups of a network with what they cost and lose; without any, what other changes cost."""

    model: CutModel | None = None
    provenance: Provenance | None = None
    goal: CountedGoal | None = None
    limits: ChannelLimits = field(default_factory=ChannelLimits)
    curves: Mapping[str, torch.Tensor] = field(default_factory=dict)
    whole: float = 1.0

    @classmethod
    def of(
        cls,
        provenance: Provenance,
        groups: Sequence[UnitGroup],
        goal: CountedGoal,
        limits: ChannelLimits,
        curves: Mapping[str, torch.Tensor],
    ) -> Cuts:
        """The groups that may be cut towards a goal, and their error curves."""
        model = _cut_model(provenance, groups, goal)
        whole = float(max(1, counted_whole(provenance.program, goal)))
        return cls(model=model, provenance=provenance, goal=goal, limits=limits, curves=curves, whole=whole)

    @property
    def places(self) -> dict[str, int]:
        return {} if self.model is None else {group.name: i for i, group in enumerate(self.model.groups)}

    def share(self, mix: Mix) -> float:
        """The share that a plan leaves: channels as their groups shrink layers together, the rest one by one."""
        left = 1 - sum(proposal.saving for item, proposal in mix.items() if item.kind != "prune_channels")
        if self.model is None:
            return left
        uncut = self.model([len(group) for group in self.model.groups])
        return left - (uncut - self.model(self._counts(mix))) / self.whole

    def added(self, mix: Mix) -> Added:
        """What single changes of a plan add to the share."""
        places = self.places
        slopes = [] if self.model is None else (self.model.slopes(self._counts(mix)) / self.whole).tolist()

        def added(item: Item, proposal: Proposal | None) -> float:
            if item.kind != "prune_channels" or self.model is None:
                return (mix[item].saving if item in mix else 0.0) - (proposal.saving if proposal else 0.0)
            place = places[item.name]
            whole = len(self.model.groups[place])
            before = mix[item].change if item in mix else whole
            slope: float = slopes[place]
            return slope * ((proposal.change if proposal else whole) - before)

        return added

    def item(self, group: UnitGroup, counts: Sequence[int] | None = None) -> Item:
        """A group at so many units, by default about `MOST_COUNTS` of those that it may keep."""
        assert self.model is not None and self.provenance is not None
        if counts is None:
            counts = _spread(lattice_counts(group, self.limits, self.limits.multiple_of or 1))
        sizes = [len(g) for g in self.model.groups]
        place, whole = self.places[group.name], self.model(sizes)
        savings = [whole - self.model([*sizes[:place], count, *sizes[place + 1 :]]) for count in counts]
        proposals = tuple(
            Proposal(error=float(self.curves[group.name][count]), saving=saving / self.whole, change=count)
            for count, saving in zip(counts, savings, strict=True)
            if saving > 0
        )
        nodes, producers = (frozenset(touched_layers(self.provenance, group, *roles)) for roles in ((), ("out",)))
        return Item(kind="prune_channels", name=group.name, nodes=nodes, proposals=proposals, producers=producers)

    def finer(self, item: Item, taken: Proposal) -> tuple[Item, Proposal]:
        """The item with every count from the one taken on."""
        if item.kind != "prune_channels" or self.model is None:
            return item, taken
        group = self.model.groups[self.places[item.name]]
        counts = lattice_counts(group, self.limits, self.limits.multiple_of or 1)
        finer = self.item(group, [count for count in counts if count >= taken.change])
        return finer, next(p for p in finer.proposals if p.change == taken.change)

    def allocated(self, items: Sequence[Item], groups: Sequence[UnitGroup], ratio: float, limits: ChannelLimits) -> Mix:
        """The plan that cuts only these groups, where what it saves costs the least; empty where they do not
        suffice."""
        assert self.provenance is not None and self.goal is not None
        if not groups:
            return {}
        counts, met = allocate(_cut_model(self.provenance, groups, self.goal), self.curves, ratio * self.whole, limits)
        if not met:
            return {}
        by_name = {item.name: item for item in items}
        cut = [g for g in groups if counts[g.name] < len(g) and g.name in by_name]
        return {by_name[g.name]: _nearest(by_name[g.name], counts[g.name]) for g in cut}

    def _counts(self, mix: Mix) -> list[int]:
        assert self.model is not None
        left = {item.name: taken.change for item, taken in mix.items() if item.kind == "prune_channels"}
        return [left.get(group.name, len(group)) for group in self.model.groups]


def _nearest(item: Item, count: int) -> Proposal:
    """The proposal of a group that leaves about so many units."""
    return min(item.proposals, key=lambda proposal: abs(proposal.change - count))


def _cut_model(provenance: Provenance, groups: Sequence[UnitGroup], goal: CountedGoal) -> CutModel:
    of_what = CutModel.of_parameters if isinstance(goal, Parameters) else CutModel.of_macs
    return of_what(provenance, groups)


def _spread(counts: list[int]) -> list[int]:
    """About `MOST_COUNTS` of the counts, evenly, the first and the last among them."""
    if len(counts) <= MOST_COUNTS:
        return counts
    return [counts[round(place * (len(counts) - 1) / (MOST_COUNTS - 1))] for place in range(MOST_COUNTS)]
