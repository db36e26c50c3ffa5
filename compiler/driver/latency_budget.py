"""What plans save of the latency: measured on the backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...passes.factorize.rank_choice import search_plan
from ...passes.factorize.select_ranks import RankAnalysis
from ..analysis.regions import find_regions
from ..data.calibration_set import CalibrationSet
from ..ir.program import Program
from ..plan.plan import CountedGoal, Latency
from ..plan.proposals import Mix
from ..store.analysis_store import AnalysisStore
from ..support.progress import Progress, StageClock
from .drop_pipeline import choose
from .ignore_patterns import ignored_layers
from .joint_proposals import Offered, offered_cuts, offered_drops, offered_ranks
from .joint_rewrite import JointSettings, changes, mix_shape
from .rank_pipeline import latency_menu, rank_trials
from .stored_latency import StoredLatency
from .stored_passes import stored_rank_analysis


@dataclass(frozen=True, kw_only=True)
class MixContext:
    """What plans are made of and with: the network, the samples to solve with, how each rewrite works."""

    teacher: Program
    calibration: CalibrationSet
    settings: JointSettings
    clock: StageClock
    progress: Progress
    store: AnalysisStore

    def drops(self, goal: Latency | CountedGoal, latency: StoredLatency | None) -> Offered:
        """The regions that would be dropped for a goal, without those that hold a layer that is to be left alone."""
        regions = find_regions(self.teacher)
        left = ignored_layers(self.teacher, self.settings.ranks.ignore)
        regions = replace(regions, regions=tuple(r for r in regions.regions if not r.nodes & left))
        choice = choose(
            self.teacher,
            regions,
            self.calibration,
            goal,
            latency,
            settings=self.settings.recoverability,
            clock=self.clock,
            progress=self.progress,
            store=self.store,
        )
        return replace(offered_drops(choice), rejects=regions.rejects)

    def rank_analysis(self) -> RankAnalysis:
        """The layers that low rank can make cheaper, and their options."""
        return stored_rank_analysis(
            self.store,
            self.teacher,
            self.calibration,
            settings=self.settings.ranks,
            resolve=self.settings.resolve,
            progress=self.progress,
        )


class LatencyBudget:
    """Plans towards a latency ratio."""

    starts: Sequence[Mix] = ()

    def __init__(self, context: MixContext, latency: StoredLatency) -> None:
        self._context, self._latency = context, latency

    def offered(self, rewrites: Sequence[str], ratio: float) -> list[Offered]:
        """What each of the rewrites can do towards a latency ratio."""
        context, goal, found = self._context, Latency(ratio), []
        if "drop_blocks" in rewrites:
            found.append(context.drops(goal, self._latency))
        if "prune_channels" in rewrites:
            limits, clock = context.settings.channels.limits, context.clock
            with clock.stage("offer channels"):
                found.append(
                    offered_cuts(
                        self._latency, context.calibration, limits, progress=context.progress, store=context.store
                    )
                )
        if "factorize" in rewrites:
            with context.clock.stage("offer ranks"):
                found.append(self._ranks(goal))
        return found

    def ratio(self, mix: Mix) -> float:
        """The latency ratio of a plan, the upper end of its interval."""
        return self._latency.ratio("mix", changes(mix), lambda: mix_shape(self._context.teacher, mix))

    def adjuster(self, _ratio: float) -> None:
        """Plans stay as they are: what a single step saves of the latency is not known well enough."""

    def finest(self, mix: Mix, _ratio: float) -> Mix:
        """The plan as it is."""
        return mix

    def _ranks(self, goal: Latency) -> Offered:
        context = self._context
        analysis = context.rank_analysis()
        if not analysis.candidates:
            return Offered(items=(), rejects=tuple(analysis.rejects))
        trials, alone = rank_trials(analysis, context.calibration, progress=context.progress, store=context.store)
        menu, network = latency_menu(analysis, self._latency, progress=context.progress)
        wanted = replace(menu, budget=menu.budget - (1 - goal.share) * network)
        return offered_ranks(analysis, menu, search_plan(wanted, trials, alone).weights, network)
