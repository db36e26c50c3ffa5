"""How each stage of a compile works, and which rewrites reach which goal."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..passes.mimic_settings import MimicSettings
from ..passes.recoverability import RecoverabilitySettings
from ..passes.resolve_network import ResolveSettings
from ..passes.select_ranks import RankSettings
from .calibration_set import CalibrationSet, View
from .channel_pipeline import ChannelSettings
from .joint_rewrite import JointSettings
from .plan import Blocks, CountedGoal, Goal, Latency, MaxError, Ranks
from .program import Program
from .sample_sets import SampleSets, divided, warn_of_shared


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """How each stage works. `mimic` None leaves gradient mimicking out; `held_out` is the share of samples that judge,
    and of those that test (`divided`); `views` add changed copies of the fitting samples that the task does not care
    about (a mirrored image); `solve_samples` caps what the re-solve reads, originals first; `search_seconds` what the
    search for a better mix takes (it is not repeatable then), None as long as it finds better plans."""

    resolve: ResolveSettings = field(default_factory=ResolveSettings)
    channels: ChannelSettings = field(default_factory=ChannelSettings)
    ranks: RankSettings = field(default_factory=RankSettings)
    recoverability: RecoverabilitySettings = field(default_factory=RecoverabilitySettings)
    mimic: MimicSettings | None = field(default_factory=MimicSettings)
    held_out: float = 0.1
    views: tuple[View, ...] = ()
    solve_samples: int = 512
    batch: int = 1
    threads: int = 1
    seed: int = 0
    opset: int | None = None
    search_seconds: float | None = None

    def with_mimic(self, mimic: MimicSettings | bool | None) -> PipelineSettings:
        """With gradient mimicking as an argument of the API asks for it: True leaves it as it is, False and None leave
        it out."""
        if mimic is True:
            return self
        return replace(self, mimic=mimic or None)

    def split(self, samples: CalibrationSet, program: Program) -> SampleSets:
        """The samples to fit with, views of them included, those to judge by, and those for the error that is reported.
        Warns when they are too few for that. Raises CalibrationError when the samples do not suit the program."""
        samples = samples.aligned(program)
        samples.check(program)
        sets = divided(samples, self.seed, self.held_out)
        warn_of_shared(sets, len(samples))
        return sets.with_views(self.views)


def joint_settings(settings: PipelineSettings) -> JointSettings:
    """The settings of the rewrites."""
    return JointSettings(
        resolve=settings.resolve,
        channels=settings.channels,
        ranks=settings.ranks,
        recoverability=settings.recoverability,
    )


def rewrites_for(goal: Goal) -> tuple[str, ...]:
    """The rewrites that reach a goal. Where there are several, they are mixed."""
    if isinstance(goal, (Latency, MaxError, CountedGoal)):
        return ("drop_blocks", "prune_channels", "factorize")
    if isinstance(goal, Ranks):
        return ("factorize",)
    return ("drop_blocks",) if isinstance(goal, Blocks) else ("prune_channels",)


def default_rewrites(goal: Goal) -> tuple[str, ...]:
    """The rewrites that are used for a goal when none are named."""
    return ("prune_channels",) if isinstance(goal, CountedGoal) else rewrites_for(goal)
