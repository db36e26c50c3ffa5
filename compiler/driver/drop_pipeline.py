"""Block dropping end to end: the regions to drop, the bypass, the re-solve of the layers around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ...passes.drop.choose_drops import Choice, choose_drops
from ...passes.drop.drop_blocks import drop_blocks, entry_exit
from ...passes.drop.recoverability import Recoverability, RecoverabilitySettings
from ...passes.solve.resolve_network import ResolveSettings
from ..analysis.regions import Region, RegionAnalysis
from ..data.calibration_set import CalibrationSet
from ..data.output_error import no_worse, output_error
from ..ir.program import Program
from ..plan.counting import counted, counted_whole
from ..plan.plan import Blocks, CountedGoal, DropGoal, Latency, Parameters
from ..store.analysis_store import NOTHING_KEPT, AnalysisStore
from ..support.errors import GoalError
from ..support.progress import Progress, StageClock, silent
from .latency_probe import LatencyProbe
from .rewritten import Rewritten
from .stored_latency import StoredLatency
from .stored_passes import StoredErrors, stored_resolve


def cut_blocks(
    teacher: Program,
    analysis: RegionAnalysis,
    calibration: CalibrationSet,
    held_out: CalibrationSet,
    goal: DropGoal,
    probe: LatencyProbe,
    *,
    recoverability: RecoverabilitySettings,
    resolve: ResolveSettings,
    solve_samples: int,
    clock: StageClock,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> Rewritten:
    """Drop regions of `teacher` to a `Latency` or `Blocks` goal and re-solve the layers around them on the first
    `solve_samples` samples.

    The errors are those of the outputs on `held_out`, relative, after the drop and after the re-solve. Raises GoalError
    when nothing can be dropped.
    """
    choice = choose(
        teacher,
        analysis,
        calibration,
        goal,
        StoredLatency(store, probe) if isinstance(goal, Latency) else None,
        settings=recoverability,
        clock=clock,
        progress=progress,
        store=store,
    )
    if not choice.regions:
        raise GoalError(
            f"nothing can be dropped towards {goal}",
            hint="the removable regions save no latency on this backend",
        )
    errors: dict[str, float] = {}
    with clock.stage("drop"):
        student = drop_blocks(teacher, choice.regions)
        errors["dropped"] = output_error(teacher, student, held_out)
    with clock.stage("re-solve"):
        resolved = stored_resolve(
            store,
            teacher,
            student,
            calibration.take(slice(0, solve_samples)),
            entry_exit(choice.regions),
            settings=resolve,
            progress=progress,
        )
        errors["re-solved"] = output_error(teacher, resolved.program, held_out)
        if not no_worse(errors["re-solved"], errors["dropped"]):
            resolved, errors["re-solved"] = replace(resolved, program=student), errors["dropped"]
    return Rewritten(
        program=resolved.program,
        decisions=choice.decisions,
        met=choice.met,
        rejects=(*analysis.rejects, *resolved.locked),
        errors=errors,
        layers=resolved.layers,
    )


def choose(
    teacher: Program,
    analysis: RegionAnalysis,
    fit: CalibrationSet,
    goal: Blocks | Latency | CountedGoal,
    latency: StoredLatency | None = None,
    *,
    settings: RecoverabilitySettings,
    clock: StageClock,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> Choice:
    """The regions to drop: blocks first, then, when those do not suffice, whatever else is removable beside them. Only
    a `Latency` goal needs the `latency`."""
    errors = StoredErrors(store, Recoverability(teacher, fit, regions=analysis.regions, settings=settings))
    savings: dict[str, float] | None = None
    if isinstance(goal, Latency):
        assert latency is not None
        with clock.stage("measure savings"):
            savings = latency.savings(analysis.regions, progress=progress)
        enough = _fast_enough(goal, latency, savings, clock, progress)
    elif isinstance(goal, CountedGoal):
        whole = max(1, counted_whole(teacher, goal))
        parts = {r.name: r.cost.parameters if isinstance(goal, Parameters) else r.cost.macs for r in analysis.regions}
        savings = {name: part / whole for name, part in parts.items()}
        enough = _small_enough(teacher, goal, progress)
    else:
        enough = _dropped_enough(goal, progress)
    with clock.stage("choose"):
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


def _dropped_enough(goal: Blocks, progress: Progress) -> Callable[[Sequence[Region]], bool]:
    def dropped_enough(chosen: Sequence[Region]) -> bool:
        progress("choose blocks", len(chosen), goal.count)
        return len(chosen) >= goal.count

    return dropped_enough


def _small_enough(teacher: Program, goal: CountedGoal, progress: Progress) -> Callable[[Sequence[Region]], bool]:
    whole = max(1, counted_whole(teacher, goal))

    def small_enough(chosen: Sequence[Region]) -> bool:
        ratio = counted(drop_blocks(teacher, chosen), goal) / whole
        progress("choose blocks", round(100 * min(1.0, (1 - ratio) / (1 - goal.ratio))), 100)
        return ratio <= goal.ratio

    return small_enough


def _fast_enough(
    goal: Latency, latency: StoredLatency, savings: Mapping[str, float], clock: StageClock, progress: Progress
) -> Callable[[Sequence[Region]], bool]:
    target = goal.share

    def fast_enough(chosen: Sequence[Region]) -> bool:
        """Measured only when the sum of single savings comes near: the sum is a guide, the measurement decides."""
        predicted = 1 - sum(savings[r.name] for r in chosen)
        progress("choose blocks", round(100 * min(1.0, (1 - predicted) / (1 - target))), 100)
        if predicted > target + 0.03:
            return False
        with clock.stage("measure plan"):
            names = [region.name for region in chosen]
            ratio: float = latency.kept("drops", [names], lambda: latency.probe.ratio(chosen).high)
            return ratio <= target

    return fast_enough
