"""Low rank end to end: which layers, which scheme and rank for each, the factors, the re-solve of what they feed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..passes.factorize import factorize, factorize_for_timing
from ..passes.resolve_network import Resolved, ResolveSettings, resolve_network
from ..passes.select_ranks import Option, RankAnalysis, RankSettings, output_errors
from .allocation import choose_options, weighing_samples
from .calibration_set import CalibrationSet
from .cost import program_cost
from .errors import GoalError
from .latency_probe import LatencyProbe
from .plan import Macs, RankGoal, Ranks
from .program import Program
from .progress import Progress, StageClock, silent
from .rank_latency import option_latencies, thinned
from .rewritten import Rewritten
from .verify import output_error

#: How often a latency goal is planned again when the measurement contradicts the plan.
MOST_ROUNDS = 4


def ranks_on_lattice(settings: RankSettings, probe: LatencyProbe, progress: Progress = silent) -> RankSettings:
    """The settings with ranks in multiples of the backend's channel lattice, where they ask for it. Raises
    BackendError."""
    if not settings.on_lattice:
        return settings
    return replace(settings, multiple_of=probe.lattice(progress=progress).multiple_for(probe.program))


def cut_ranks(
    teacher: Program,
    calibration: CalibrationSet,
    held_out: CalibrationSet,
    goal: RankGoal,
    probe: LatencyProbe | None = None,
    *,
    settings: RankSettings,
    resolve: ResolveSettings,
    clock: StageClock,
    progress: Progress = silent,
) -> Rewritten:
    """Factorise the layers of `teacher` to a `Macs`, `Latency` or `Ranks` goal, and re-solve what they feed.

    Under a budget the choice has the least sum of the layers' predicted output errors: a layer's error at a rank, times
    what the network's output loses when the layer alone is factorised to half. Costs are multiply-accumulates, or under
    a `Latency` goal, which needs the `probe`, measured latencies of every option; a layer that gets no faster stays
    whole, and the whole network is measured before the choice stands. The errors are those of the outputs on
    `held_out`, relative, after the factorisation and after the re-solve. Raises GoalError when no layer gets cheaper.
    """
    with clock.stage("analyse"):
        analysis = RankAnalysis(teacher, calibration, settings=settings, resolve=resolve, progress=progress)
        if not analysis.candidates:
            reasons = "; ".join(dict.fromkeys(r.reason for r in analysis.rejects)) or "it has no layer"
            raise GoalError(f"nothing can be factorised: {reasons}", hint="allow lower ranks or other schemes")
    with clock.stage("choose"):
        choice, met = _choose(analysis, calibration, goal, probe, clock, progress)
        if not choice:
            warnings.warn(f"nothing was factorised: no layer gets cheaper under {goal}", stacklevel=2)
    errors: dict[str, float] = {}
    with clock.stage("factorise"):
        student = factorize(teacher, analysis.factors(choice, progress=progress))
        errors["factorised"] = output_error(teacher, student, held_out)
    resolved = Resolved(program=student, layers=(), locked=())
    if choice and settings.resolve:
        with clock.stage("re-solve"):
            resolved = resolve_network(
                teacher, student, calibration, (), replaced=choice, settings=resolve, progress=progress
            )
            errors["re-solved"] = output_error(teacher, resolved.program, held_out)
            if errors["re-solved"] > errors["factorised"]:
                resolved, errors["re-solved"] = replace(resolved, program=student), errors["factorised"]
    return Rewritten(
        program=resolved.program,
        decisions=tuple(analysis.decision(name, option) for name, option in choice.items()),
        met=met,
        rejects=tuple(analysis.rejects),
        errors=errors,
        layers=resolved.layers,
    )


def _choose(
    analysis: RankAnalysis,
    calibration: CalibrationSet,
    goal: RankGoal,
    probe: LatencyProbe | None,
    clock: StageClock,
    progress: Progress,
) -> tuple[dict[str, Option], bool]:
    if isinstance(goal, Ranks):
        return analysis.each(goal), True
    weights = error_weights(analysis, calibration, progress=progress)
    if isinstance(goal, Macs):
        every = {name: candidate.options for name, candidate in analysis.candidates.items()}
        whole = {name: float(candidate.size.macs) for name, candidate in analysis.candidates.items()}
        costs = {name: [float(o.macs) for o in found] for name, found in every.items()}
        macs = program_cost(analysis.program).macs
        return _within(every, costs, whole, weights, goal.ratio * macs - (macs - sum(whole.values())))
    assert probe is not None
    options = {name: thinned(candidate) for name, candidate in analysis.candidates.items()}
    with clock.stage("time options"):
        timed = option_latencies(analysis, options, probe, progress=progress)
    faster = {n: [i for i, cost in enumerate(timed.options[n]) if cost < timed.whole[n]] for n in options}
    options = {n: [options[n][i] for i in places] for n, places in faster.items() if places}
    costs = {n: [timed.options[n][i] for i in faster[n]] for n in options}
    whole = {n: timed.whole[n] for n in options}
    saving = (1 - goal.ratio) * timed.network
    for _ in range(MOST_ROUNDS):
        choice, possible = _within(options, costs, whole, weights, sum(whole.values()) - saving)
        with clock.stage("measure plan"):
            measured = probe.against(planned_shape(analysis, choice))
        if measured.high <= goal.ratio or not possible:
            return choice, measured.high <= goal.ratio
        # what was predicted to be saved, against what was: the next plan asks for so much more
        reached = max(0.05, 1 - measured.high)
        saving *= max(1.02, (1 - goal.ratio) / reached)
    return choice, False


def planned_shape(analysis: RankAnalysis, choice: Mapping[str, Option]) -> Program:
    """The network that a choice leads to, with made-up weights: its latency is that of the real one."""
    return factorize_for_timing(analysis.program, [analysis.decision(n, option) for n, option in choice.items()])


def error_weights(
    analysis: RankAnalysis, calibration: CalibrationSet, *, progress: Progress = silent
) -> dict[str, float]:
    """For each layer what its relative error is to be multiplied by to predict the network's: from one trial, the layer
    alone factorised to about half of its multiply-accumulates, on a few samples."""
    trials = {name: candidate.trial() for name, candidate in analysis.candidates.items()}
    samples = calibration.take(slice(0, weighing_samples(analysis.program, len(trials))))
    found = output_errors(analysis, analysis.factors(trials), samples, progress=progress)
    return {name: found[name] / trial.error if trial.error > 0 else 0.0 for name, trial in trials.items()}


def _within(
    options: Mapping[str, Sequence[Option]],
    costs: Mapping[str, Sequence[float]],
    whole: Mapping[str, float],
    weights: Mapping[str, float],
    budget: float,
) -> tuple[dict[str, Option], bool]:
    """The options of least predicted error whose costs stay within the budget, and whether there is such a choice;
    without one, the cheapest of each layer. Layers that are best left whole are not in it."""
    names = list(options)
    errors = [[0.0, *(weights[n] * o.error for o in options[n])] for n in names]
    prices = [[whole[n], *costs[n]] for n in names]
    picked = choose_options(errors, prices, budget)
    if picked is None:
        cheapest = [min(range(len(row)), key=row.__getitem__) for row in prices]
        return {n: options[n][i - 1] for n, i in zip(names, cheapest, strict=True) if i}, False
    return {n: options[n][i - 1] for n, i in zip(names, picked, strict=True) if i}, True
