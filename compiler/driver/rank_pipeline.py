"""Low rank end to end: which layers, which scheme and rank for each, the factors, the re-solve of what they feed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from ...passes.factorize.factorize import factorize, factorize_for_timing
from ...passes.factorize.rank_choice import Menu, Search, search_plan, weights_alone
from ...passes.factorize.rank_latency import OptionLatencies, option_latencies, thinned
from ...passes.factorize.rank_trials import RankTrials, Trials
from ...passes.factorize.select_ranks import Option, RankAnalysis, RankSettings
from ...passes.solve.resolve_network import Resolved, ResolveSettings
from ..data.calibration_set import CalibrationSet
from ..data.output_error import no_worse, output_error
from ..ir.program import Program
from ..plan.counting import counted, counted_whole
from ..plan.latency_target import nearest_from_below, reach
from ..plan.option_milp import weighing_samples
from ..plan.plan import CountedGoal, Parameters, RankGoal, Ranks
from ..store.analysis_store import NOTHING_KEPT, AnalysisStore
from ..support.errors import GoalError
from ..support.progress import Progress, StageClock, silent
from .latency_probe import LatencyProbe
from .rewritten import Rewritten
from .stored_latency import StoredLatency
from .stored_passes import StoredTrials, stored_factors, stored_rank_analysis, stored_resolve


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
    store: AnalysisStore = NOTHING_KEPT,
) -> Rewritten:
    """Factorise the layers of `teacher` to a `Macs`, `Parameters`, `Latency` or `Ranks` goal; re-solve what they feed.

    Under a budget the choice is the one of least measured output error of those that `search_plan` tries, each the
    exact optimum of an integer programme. Costs are multiply-accumulates, or under a `Latency` goal, which needs the
    `probe`, measured latencies of every option; a layer that gets no faster stays whole, and the whole network is
    measured before the choice stands. The errors are those of the outputs on
    `held_out`, relative, after the factorisation and after the re-solve. Raises GoalError when no layer gets cheaper.
    """
    with clock.stage("analyse"):
        analysis = stored_rank_analysis(
            store, teacher, calibration, settings=settings, resolve=resolve, progress=progress
        )
        if not analysis.candidates:
            reasons = "; ".join(dict.fromkeys(r.reason for r in analysis.rejects)) or "it has no layer"
            raise GoalError(f"nothing can be factorised: {reasons}", hint="allow lower ranks or other schemes")
    with clock.stage("choose"):
        latency = None if probe is None else StoredLatency(store, probe)
        choice, met = _choose(analysis, calibration, goal, latency, clock, progress, store)
        if not choice:
            warnings.warn(f"nothing was factorised: no layer gets cheaper under {goal}", stacklevel=2)
    errors: dict[str, float] = {}
    with clock.stage("factorise"):
        factors = stored_factors(
            store,
            teacher,
            calibration,
            [analysis.decision(name, option) for name, option in choice.items()],
            lambda: analysis.factors(choice, progress=progress),
            settings=settings,
            resolve=resolve,
        )
        student = factorize(teacher, factors)
        errors["factorised"] = output_error(teacher, student, held_out)
    resolved = Resolved(program=student, layers=(), locked=())
    if choice and settings.resolve:
        with clock.stage("re-solve"):
            resolved = stored_resolve(
                store, teacher, student, calibration, (), replaced=choice, settings=resolve, progress=progress
            )
            errors["re-solved"] = output_error(teacher, resolved.program, held_out)
            if not no_worse(errors["re-solved"], errors["factorised"]):
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
    latency: StoredLatency | None,
    clock: StageClock,
    progress: Progress,
    store: AnalysisStore,
) -> tuple[dict[str, Option], bool]:
    if isinstance(goal, Ranks):
        return analysis.each(goal), True
    trials, alone = rank_trials(analysis, calibration, progress=progress, store=store)
    if isinstance(goal, CountedGoal):
        found = search_plan(counted_menu(analysis, goal), trials, alone)
        return found.choice, found.possible
    assert latency is not None
    with clock.stage("time options"):
        menu, network = latency_menu(analysis, latency, progress=progress)
    saving = (1 - goal.share) * network
    found = search_plan(replace(menu, budget=menu.budget - saving), trials, alone)

    def measured(choice: Mapping[str, Option]) -> float:
        with clock.stage("measure plan"):
            return _measured(analysis, choice, latency)

    return plan_reaching(menu, found, goal.share, network, measured)


def plan_reaching(
    menu: Menu, found: Search, goal: float, network: float, measure: Callable[[Mapping[str, Option]], float]
) -> tuple[dict[str, Option], bool]:
    """The plan whose measured latency ratio comes nearest to the goal from below, from the first one that was `found`
    (see `reach`), and True; where none does, the fastest, and False. `network` is the latency of the original in the
    unit of the menu."""
    first = iter([(found.choice, found.possible)])

    def planned(saving: float) -> tuple[dict[str, Option], bool]:
        given = next(first, None)
        return given or replace(menu, budget=menu.budget - saving * network).best(found.weights)

    def predicted(choice: Mapping[str, Option]) -> float:
        saved = (menu.whole[n] - menu.costs[n][menu.options[n].index(option)] for n, option in choice.items())
        return sum(saved) / network

    seen = reach(goal, planned, predicted, measure)
    ratio, choice = nearest_from_below(seen, goal) if seen else (1.0, {})
    return choice, ratio <= goal


def _measured(analysis: RankAnalysis, choice: Mapping[str, Option], latency: StoredLatency) -> float:
    """The latency ratio of the network that a choice leads to (upper end of its interval)."""
    return latency.ratio("ranks", [choice], lambda: planned_shape(analysis, choice))


def rank_trials(
    analysis: RankAnalysis,
    calibration: CalibrationSet,
    *,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> tuple[Trials, dict[str, float]]:
    """Trials of plans on as many samples as their work allows, and the layers' weights by themselves."""
    few = calibration.take(slice(0, weighing_samples(analysis.program, len(analysis.candidates))))
    trials = StoredTrials(store, RankTrials(analysis, few, progress=progress))
    return trials, weights_alone(analysis, trials)


def counted_menu(analysis: RankAnalysis, goal: CountedGoal) -> Menu:
    """Every option at its multiply-accumulates or trained values; the budget is what the goal leaves to the layers on
    the menu."""
    options = {name: candidate.every for name, candidate in analysis.candidates.items()}
    if isinstance(goal, Parameters):
        module = analysis.program.module
        whole = {n: float(module.get_parameter(c.layer.weight).numel()) for n, c in analysis.candidates.items()}
        costs = {n: [float(c.parameters(o)) for o in options[n]] for n, c in analysis.candidates.items()}
    else:
        whole = {name: float(candidate.size.macs) for name, candidate in analysis.candidates.items()}
        costs = {name: [float(option.macs) for option in row] for name, row in options.items()}
    wanted = goal.ratio * counted_whole(analysis.program, goal)
    others = counted(analysis.program, goal) - sum(whole.values())
    return Menu(options=options, costs=costs, whole=whole, budget=wanted - others)


def latency_menu(analysis: RankAnalysis, latency: StoredLatency, *, progress: Progress = silent) -> tuple[Menu, float]:
    """Options that were timed and found faster than their layer, at their latencies, the budget being what the layers
    cost whole; and the latency of the network in the same unit."""
    options = {name: thinned(candidate) for name, candidate in analysis.candidates.items()}
    timed = OptionLatencies(
        **latency.kept(
            "options",
            [list(options.items())],
            lambda: asdict(option_latencies(analysis, options, latency.probe, progress=progress)),
        )
    )
    faster = {n: [i for i, cost in enumerate(timed.options[n]) if cost < timed.whole[n]] for n in options}
    faster = {name: places for name, places in faster.items() if places}
    whole = {name: timed.whole[name] for name in faster}
    menu = Menu(
        options={name: [options[name][i] for i in places] for name, places in faster.items()},
        costs={name: [timed.options[name][i] for i in places] for name, places in faster.items()},
        whole=whole,
        budget=sum(whole.values()),
    )
    return menu, timed.network


def planned_shape(analysis: RankAnalysis, choice: Mapping[str, Option]) -> Program:
    """The network that a choice leads to, with made-up weights: its latency is that of the real one."""
    return factorize_for_timing(analysis.program, [analysis.decision(n, option) for n, option in choice.items()])
