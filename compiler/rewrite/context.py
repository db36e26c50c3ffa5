"""What every rewrite works with: made once for a compile and passed whole."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from ...passes.solve.resolve_network import QUICK_RESOLVE, ResolveSettings
from ...runtime.probe.stored_latency import StoredLatency
from ..data.calibration_set import CalibrationSet
from ..data.sample_sets import SampleSets
from ..ir.program import Program
from ..plan.goal import Goal
from ..plan.search_time import SearchTime
from ..store.analysis_store import AnalysisStore
from ..support.progress import Progress, StageClock
from .instruments import Instruments


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """A compile: the original, its goal, the samples, and the means.

    `sets` are the samples to fit with, to judge by and to test with; `solve_samples` caps what a solve reads. `latency`
    measures on the backend, None where nothing is measured (a plan that is carried out again). `store` keeps what
    analyses find out. `trial` says that a plan is only compared with others: less is solved, on fewer samples.
    `instruments` are called after every pass.
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
    instruments: Instruments = field(default_factory=Instruments)

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

    def for_trials(self, samples: int) -> Context:
        """The same for plans that are compared: `samples` to solve with, and a quick solve."""
        return replace(
            self,
            solve_samples=min(samples, self.solve_samples),
            resolve=QUICK_RESOLVE,
            trial=True,
            instruments=self.instruments.for_trials(),
        )
