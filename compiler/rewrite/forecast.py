"""How long a compile will take: an estimate, from one timed forward pass and what its stages have to do.

What a rewrite's own stages have to do, it says itself (`Rewrite.work`). The figures here and there are those of
ResNet-56 and MobileNetV2 on one core, over the time of their forward passes; a range stands around them (`SPREAD`), and
while a compile runs the estimate is corrected by what its stages took (`Whole`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ...passes.solve.weighing import TRIAL_SAMPLES, solve_passes
from ..ir.cost import program_cost
from ..support.errors import plural
from ..support.progress import WholeProgress
from ..support.whole import Expected, Forecast, When
from .context import Context
from .rewrite import Rewrite
from .work import Work

#: Seconds of a training, from those of a forward pass of one sample.
MimicTime = Callable[[float], float]
#: Samples that the timed pass takes.
TIMED_SAMPLES = 8
#: Plans that are tried for each rewrite, and more where savings are counted: searches then start from several plans.
TRIALS_EACH, TRIALS_COUNTED = 12, 18
#: Plans are looked for at several latency ratios where the error is bounded.
SEARCHES_OF_ERROR = 2
#: A comparison on the way to a plan, and the last one: loads, warm-up, and so many inferences; and the seconds that end
#: each (`fresh_loads`).
COMPARED, MOST_COMPARED_S = Work(seconds=1.0, passes=400), 20.0
MEASURED, MOST_MEASURED_S = Work(seconds=5.0, passes=300), 60.0
#: All exports of a compile: of each node of the graph.
EXPORT_S, EXPORT_NODE_S = 1.0, 0.012


def foresee(ctx: Context, rewrites: Sequence[Rewrite], mimic_s: MimicTime) -> None:
    """Say what a compile has to do and how long that takes about, where somebody watches. `mimic_s` is the time of
    the training, 0 where there is none."""
    if isinstance(ctx.progress, WholeProgress):
        forecast = compile_forecast(ctx, rewrites, mimic_s, timed_pass_s(ctx))
        ctx.progress.foresee(size_words(ctx), forecast)


def foresee_replay(ctx: Context, rewrites: Sequence[Rewrite], mimic_s: MimicTime) -> None:
    """`foresee` for a plan that is solved again."""
    if isinstance(ctx.progress, WholeProgress):
        pass_s = timed_pass_s(ctx)
        stages = {
            "re-solve": _expected(_resolve(ctx, rewrites), pass_s),
            "mimic": Expected(seconds=mimic_s(pass_s), when="last"),
            "test": _expected(_test(ctx), pass_s, "last"),
        }
        ctx.progress.foresee(size_words(ctx), Forecast(_needed(stages)))


def size_words(ctx: Context) -> str:
    """The samples and the network in numbers."""
    sizes, cost = ctx.sets.sizes, program_cost(ctx.teacher)
    samples = f"{plural(sizes['fit'], 'sample')} to fit, {sizes['judge']} to judge, {sizes['test']} to test"
    return f"{samples}; {_short(cost.macs)} MACs a sample, {_short(ctx.teacher.parameter_count())} parameters"


def timed_pass_s(ctx: Context) -> float:
    """Seconds of a forward pass of one sample: the first one warms up, and counts where it takes long."""
    batch = ctx.fit.batch(slice(0, TIMED_SAMPLES))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        ctx.teacher(batch)
        times.append(time.perf_counter() - began)
        if sum(times) > 1.0:
            break
    return min(times) / min(TIMED_SAMPLES, len(ctx.fit))


def compile_forecast(ctx: Context, rewrites: Sequence[Rewrite], mimic_s: MimicTime, pass_s: float) -> Forecast:
    """What the stages of a compile are expected to take. Where rewrites that come last are asked first and may do, as
    little as without the others."""
    goal = ctx.goal
    first = [rewrite for rewrite in rewrites if rewrite.comes_last] if goal.mixes else []
    needed = first or list(rewrites)
    stages = {
        "export": Expected(seconds=EXPORT_S + EXPORT_NODE_S * len(ctx.teacher.nodes), when="any"),
        "measure original": Expected(seconds=0.5),
    }
    for rewrite in sorted(rewrites, key=lambda rewrite: rewrite not in needed):
        for name, work in rewrite.work(ctx).items():
            if name != "re-solve":
                stages[name] = _expected(work, pass_s, least=None if rewrite in needed else 0.0)
    if goal.mixes:
        stages |= _search(ctx, rewrites, needed, pass_s)
    solving: When = "search" if goal.mixes else "once"
    stages["re-solve"] = _expected(_resolve(ctx, rewrites), pass_s, solving)
    stages["mimic"] = Expected(seconds=mimic_s(pass_s), when="last")
    stages["measure"] = _expected(MEASURED, pass_s, "last", most=MOST_MEASURED_S)
    stages["profile"] = Expected(seconds=1.0, when="last")
    stages["test"] = _expected(_test(ctx), pass_s, "last")
    # a report of a mix says what each of its parts does
    reported = _trial(ctx) if goal.mixes and goal.measured else Work()
    stages["report"] = _expected(reported + Work(seconds=0.5), pass_s, "last")
    return Forecast(_needed(stages))


def _search(ctx: Context, rewrites: Sequence[Rewrite], needed: Sequence[Rewrite], pass_s: float) -> dict[str, Expected]:
    """Plans that are tried and, where latency is bounded, measured; within the time that there is for it."""
    goal = ctx.goal
    searches = SEARCHES_OF_ERROR if goal.bounds_error or goal.needs_metric else 1
    most, least = (
        searches * (TRIALS_EACH * len(some) + (0 if goal.measured else TRIALS_COUNTED)) for some in (rewrites, needed)
    )
    each = {"try plans": _trial(ctx).takes_s(pass_s)}
    if goal.measured:
        each["measure plan"] = min(MOST_COMPARED_S, COMPARED.takes_s(pass_s))
    allowed = min(1.0, ctx.time.seconds / (most * sum(each.values())))
    return {
        name: Expected(seconds=allowed * most * seconds, when="search", least_s=allowed * least * seconds)
        for name, seconds in each.items()
    }


def _trial(ctx: Context) -> Work:
    """One plan put into effect and solved on few samples."""
    return Work(passes=solve_passes(ctx.teacher, min(TRIAL_SAMPLES, len(ctx.fit)), quick=True))


def _resolve(ctx: Context, rewrites: Sequence[Rewrite]) -> Work:
    """The network of the plan, solved with all samples, and what rewrites do beside that."""
    own = [rewrite.work(ctx).get("re-solve", Work()) for rewrite in rewrites]
    return sum(own, Work(passes=solve_passes(ctx.teacher, len(ctx.solve))))


def _test(ctx: Context) -> Work:
    """Two networks on the samples that test, twice."""
    return Work(passes=4 * len(ctx.sets.test))


def _expected(
    work: Work, pass_s: float, when: When = "once", *, least: float | None = None, most: float = float("inf")
) -> Expected:
    return Expected(seconds=min(most, work.takes_s(pass_s)), when=when, least_s=least)


def _needed(stages: dict[str, Expected]) -> dict[str, Expected]:
    """Those that have something to do."""
    return {name: stage for name, stage in stages.items() if stage.seconds > 0}


def _short(count: int) -> str:
    """A count in thousands, millions or milliards."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
