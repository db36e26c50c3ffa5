"""What every rewrite works with: made once for a compile and passed whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ...passes.solve.resolve_network import TRIAL_RESOLVE, ResolveSettings
from ...runtime.probe.stored_latency import StoredLatency
from ..data.calibration_set import CalibrationSet
from ..data.data_distance import DataDistance
from ..data.sample_sets import SampleSets
from ..ir.program import Program
from ..metric.metric import Metric
from ..plan.goal import Goal
from ..plan.search_time import SearchTime
from ..store.analysis_store import AnalysisStore
from ..support.progress import Progress, StageClock
from .instruments import Instruments


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """What a rewrite works with: the original, its goal, the samples, and the means of one compile.

    It is made by `compile`, `sweep` and `apply`, and passed to every `Rewrite`.

    Arguments:
        teacher: The original network.
        goal: The goal.
        sets: The samples to fit with, to judge by and to test with.
        latency: Measures on the backend. None where nothing is measured, as when a plan is applied again.
        store: Keeps the results of analyses.
        clock: Measures the stages.
        progress: Gets (stage, done, total).
        time: How long plans may be searched for.
        resolve: Settings of the solve.
        solve_samples: Number of samples that a solve reads at most.
        seed: Seed of all random choices.
        trial: Whether a plan is only compared with others: less is solved, with fewer samples.
        multiples: Says what channel counts are best multiples of, by layer: what the rewrites ask for
            (`Rewrite.multiples`). They are asked when it is first called, since that may take seconds.
        instruments: Called after every pass.
        distance: How far the samples are from the data of the network. None where nothing says.
        metric: Reads the metric passed as ``evaluate``. None where there is none.
        executor: Tries plans elsewhere. None where they are tried in this process.

    Example:
        >>> class Sizes(foldcut.Drop):
        ...     def offer(self, ctx, budget):
        ...         print(type(ctx).__name__, len(ctx.fit), len(ctx.judge), ctx.latency is None)
        ...         return super().offer(ctx, budget)
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> options = {"progress": False, "cache": False, "mimic": False, "rewrites": (Sizes(),)}
        >>> try:
        ...     out = foldcut.compile(net, torch.randn(40, 8), goal=foldcut.Macs(0.5), **options)
        ... except foldcut.GoalError as unmet:
        ...     print(unmet.message)
        Context 32 4 False
        nothing can be done towards MACs ratio 0.5
    """

    teacher: Program
    goal: Goal
    sets: SampleSets
    latency: StoredLatency | None
    store: AnalysisStore
    clock: StageClock
    progress: Progress
    time: SearchTime
    resolve: ResolveSettings
    solve_samples: int
    seed: int = 0
    trial: bool = False
    multiples: Callable[[], Mapping[str, int]] = dict
    instruments: Instruments = field(default_factory=Instruments)
    distance: DataDistance | None = None
    metric: Metric | None = None
    executor: Any = None

    @property
    def fit(self) -> CalibrationSet:
        """All samples to fit with, views included."""
        return self.sets.fit

    @property
    def judge(self) -> CalibrationSet:
        """The samples that networks are compared by."""
        return self.sets.judge

    @cached_property
    def solve(self) -> CalibrationSet:
        """The samples that a solve reads."""
        return self.fit.take(slice(0, self.solve_samples))

    def multiple_of(self, layers: Iterable[str]) -> int:
        """What a channel count that several layers share is best a multiple of."""
        multiples = self.multiples()
        return math.lcm(*(multiples.get(layer, 1) for layer in layers))

    def for_trials(self, samples: int) -> Context:
        """The same for plans that are compared: `samples` to solve with, and a quick solve."""
        return replace(
            self,
            solve_samples=min(samples, self.solve_samples),
            resolve=TRIAL_RESOLVE,
            trial=True,
            instruments=self.instruments.for_trials(),
        )
