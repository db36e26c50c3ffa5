"""Decisions put into effect: rewrite by rewrite, then all solved once more, and the better of both kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...passes.solve.resolve_network import TRIAL_RESOLVE, ResolveSettings, rows_are_few
from ..data.kept import first_of
from ..data.output_error import no_worse, output_error
from ..export.edit_device import kept_in_a_file
from ..ir.edit import check_interface
from ..ir.program import Program
from ..plan.decision import Decision, known_decision
from ..rewrite.context import Context
from ..rewrite.rewrite import Applied, Rewrite
from ..rewrite.stored_resolve import stored_resolve
from ..support.errors import CompilerError, PlanError, RewriteError

#: A network fits the samples that it was solved with too closely where others lose so many times what those do.
OVERFITTED = 1.5
#: Weights that a rewrite solved itself are no start for the last solve where others of the samples lose so many times
#: what those do that it was solved with: it then starts from the original ones.
MEMORISED = 10.0


def by_phase(rewrites: Sequence[Rewrite]) -> list[Rewrite]:
    """In the order of application, which no caller's list has a part in: those that come last at the end, else by
    phase, then by name."""
    return sorted(rewrites, key=lambda rewrite: (rewrite.comes_last, rewrite.phase, rewrite.name))


def each_applied(
    rewrites: Sequence[Rewrite],
    program: Program,
    decisions: Sequence[Decision],
    change: Callable[[Rewrite, Program, list[Decision]], Program],
) -> Program:
    """A program with decisions in effect as one of the methods of their rewrites does it. Raises PlanError when one is
    of a rewrite that is not there."""
    decisions = of_rewrites(rewrites, decisions)
    for rewrite in by_phase(rewrites):
        mine = [decision for decision in decisions if decision.kind == rewrite.name]
        if mine:
            program = change(rewrite, program, mine)
    return program


def shaped(rewrites: Sequence[Rewrite], program: Program, decisions: Sequence[Decision]) -> Program:
    """The network that decisions lead to, with weights that are good for timing and counting only."""
    return each_applied(rewrites, program, decisions, lambda rewrite, now, mine: rewrite.shape(now, mine))


def applied_plain(rewrites: Sequence[Rewrite], program: Program, decisions: Sequence[Decision]) -> Program:
    """The decisions in effect without data."""
    return each_applied(rewrites, program, decisions, lambda rewrite, now, mine: rewrite.plain(now, mine))


def of_rewrites(rewrites: Sequence[Rewrite], decisions: Sequence[Decision]) -> list[Decision]:
    """The decisions as their rewrites read them: one that nobody knew when its plan was read is read again. Raises
    PlanError when one is of a rewrite that is not among these, or is none of its decisions."""
    names = {rewrite.name for rewrite in rewrites}
    missing = dict.fromkeys(decision.kind for decision in decisions if decision.kind not in names)
    if missing:
        raise PlanError(
            f"the plan has decisions of {', '.join(missing)}, which is not there",
            hint="pass that rewrite to foldcut.apply: rewrites=[...]; one of a newer foldcut needs that version",
        )
    classes = {rewrite.name: rewrite.decides for rewrite in rewrites}
    return [known_decision(decision, classes[decision.kind]) for decision in decisions]


def solved_at_the_end(rewrites: Sequence[Rewrite]) -> bool:
    """Whether all that the rewrites touch is solved once more after them, as their settings ask for.

    One solve serves all of them. Raises CompilerError when a setting of one forbids it and another needs it.
    """
    forbidden = [name for rewrite in rewrites for name in rewrite.unsolved_by()]
    solving = [rewrite.name for rewrite in rewrites if not rewrite.unsolved_by()]
    if forbidden and solving:
        raise CompilerError(
            f"{' and '.join(forbidden)} cannot be followed where {' and '.join(solving)} takes part: the mix is solved "
            "as a whole",
            hint="leave the setting at True, or use that rewrite alone",
        )
    return not forbidden


def applied(
    ctx: Context, rewrites: Sequence[Rewrite], decisions: Sequence[Decision], *, exactly: bool = False
) -> Applied:
    """The decisions in effect, each rewrite's on what those before it leave; where a rewrite asks for it, what it
    leaves is solved quickly before the next looks at it. Nothing is solved at the end.

    Decisions of a search that no longer save anything then are left out; with `exactly`, those of a plan, all are
    carried out, else RewriteError is raised. Each rewrite's `requires` and `ensures` are checked around its step.
    Rewrites that come last are left to `finished`."""
    decisions = of_rewrites(rewrites, decisions)
    first = [rewrite for rewrite in rewrites if not rewrite.comes_last]
    return _stepped(ctx, first, Applied(program=ctx.teacher), decisions, exactly=exactly)


def finished(
    ctx: Context, rewrites: Sequence[Rewrite], done: Applied, decisions: Sequence[Decision], *, exactly: bool = False
) -> Applied:
    """The network behind the rewrites that come last, where the decisions have some of theirs: those of a network that
    is solved, and trained where it is. `before_last` then is that network."""
    last = [rewrite for rewrite in rewrites if rewrite.comes_last]
    decisions = of_rewrites(rewrites, decisions)
    if not any(decision.kind == rewrite.name for rewrite in last for decision in decisions):
        return done
    found = _stepped(ctx, last, done, decisions, exactly=exactly)
    if ctx.trial:  # it is about to be judged
        return replace(found, before_last=done)
    error = output_error(ctx.teacher, found.program, ctx.judge)
    return replace(found, before_last=done, errors={**done.errors, last[-1].name: error})


def _stepped(
    ctx: Context, rewrites: Sequence[Rewrite], done: Applied, decisions: Sequence[Decision], *, exactly: bool
) -> Applied:
    """The decisions of some rewrites in effect on what is there already."""
    using = [(r, [d for d in decisions if d.kind == r.name]) for r in by_phase(rewrites)]
    using = [(rewrite, mine) for rewrite, mine in using if mine]
    unsolved = False
    for rewrite, mine in using:
        if unsolved and not ctx.trial:  # a trial is solved once, behind the last rewrite
            done = replace(done, program=_solved(ctx, done, TRIAL_RESOLVE).program)
        mine = mine if exactly else list(rewrite.still(done.program, mine))
        rewrite.requires(done.program, mine)
        step = rewrite.apply(done.program, mine, ctx)
        step = replace(step, program=kept_in_a_file(step.program, ctx.teacher, done.program))
        check_interface(done.program, step.program)
        rewrite.ensures(done.program, step.program, step.decisions)
        if exactly:
            _require_all(rewrite, mine, step)
        ctx.instruments.after(rewrite.name, step.program, done.program)
        done = _joined(done, step)
        unsolved = rewrite.solves_before_next
    return done


def _require_all(rewrite: Rewrite, asked: Sequence[Decision], step: Applied) -> None:
    """Raise RewriteError unless each of the decisions that were asked for took effect."""
    done = {decision.subject for decision in step.decisions}
    left = [decision.subject for decision in asked if decision.subject not in done]
    if left:
        reasons = "; ".join(str(reject) for reject in step.rejects[:3])
        raise RewriteError(
            f"{rewrite.name} left out {len(left)} of {len(asked)} decisions of the plan: {', '.join(left[:3])}",
            hint=reasons or None,
        )


def _joined(done: Applied, step: Applied) -> Applied:
    """One rewrite's step behind the others. Before any weight was solved there was another network only where a single
    rewrite changed it."""
    return Applied(
        program=step.program,
        decisions=(*done.decisions, *step.decisions),
        plain=step.plain if not done.decisions else None,
        changes=done.changes.then(step.changes),
        layers=(*done.layers, *step.layers),
        rejects=(*done.rejects, *step.rejects),
        report={**done.report, **step.report},
        errors=done.errors,
    )


def solved(ctx: Context, rewrites: Sequence[Rewrite], done: Applied) -> Applied:
    """The network solved as a whole toward the original, where the rewrites that were used allow it."""
    kinds = {decision.kind for decision in done.decisions}
    if not done.decisions or not solved_at_the_end([rewrite for rewrite in rewrites if rewrite.name in kinds]):
        return done
    return _solved(ctx, done, ctx.resolve)


def _solved(ctx: Context, done: Applied, settings: ResolveSettings) -> Applied:
    found = stored_resolve(ctx, done.program, done.changes, settings)
    program = kept_in_a_file(found.program, ctx.teacher, done.program)
    ctx.instruments.after("re-solve", program, done.program)
    return replace(done, program=program, layers=found.layers, rejects=(*done.rejects, *found.locked))


def made(ctx: Context, rewrites: Sequence[Rewrite], decisions: Sequence[Decision], *, exactly: bool = False) -> Applied:
    """The network of a plan: rewritten, then solved from the better of what a rewrite solved itself and what it did
    not; from the latter where the former only knows its samples by heart. After each stage the better of before and
    after stands, judged on samples that nothing was solved with; the rewrites that come last change what stands then.
    `errors` say what it loses after each stage."""
    done = applied(ctx, rewrites, decisions, exactly=exactly)
    stages = _Stages(ctx)
    if done.plain is not None:
        stages.take("unsolved", done.plain)
    done = replace(done, program=stages.take("rewritten", done.program))
    start = done
    if done.plain is not None and stages.errors["rewritten"] > MEMORISED * _seen_error(ctx, done.program):
        start = replace(done, program=done.plain)
    found = _solved_with_care(ctx, rewrites, start)
    program = done.program if found is start else stages.take("re-solved", found.program)
    return finished(ctx, rewrites, replace(found, program=program, errors=stages.errors), decisions, exactly=exactly)


def _solved_with_care(ctx: Context, rewrites: Sequence[Rewrite], done: Applied) -> Applied:
    """`solved`, with each layer held back by what rows held out say of it (careful) or by hardly anything. Which comes
    first is a guess from the rows that there are; the other is tried where the first turns out to fit the samples at
    hand far better than others and is not careful, or the other way round. The one that loses less on the samples that
    judge."""
    quiet = replace(ctx, instruments=ctx.instruments.for_trials())
    careful = replace(quiet, resolve=replace(ctx.resolve, margin=0.0))
    ways = [careful, quiet] if rows_are_few(done.program, len(ctx.solve)) else [quiet, careful]
    found = solved(ways[0], rewrites, done)
    if found is done:
        return found
    if ctx.resolve.margin:
        error = output_error(ctx.teacher, found.program, ctx.judge)
        overfitted = error > OVERFITTED * _seen_error(ctx, found.program)
        if overfitted == (ways[1] is careful):
            other = solved(ways[1], rewrites, done)
            found = other if output_error(ctx.teacher, other.program, ctx.judge) < error else found
    ctx.instruments.after("re-solve", found.program, done.program)
    return found


def _seen_error(ctx: Context, program: Program) -> float:
    """The output error on samples that were solved with, as many as judge."""
    return output_error(ctx.teacher, program, first_of(ctx.solve, len(ctx.judge)))


class _Stages:
    """Networks in the order in which they are made: the last that is no worse than the one that stood before it
    stands. `errors` are the relative output errors of what stands after each stage, on the judging samples."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._best: Program | None = None
        self._error = float("inf")
        self.errors: dict[str, float] = {}

    def take(self, name: str, program: Program) -> Program:
        """What stands once this network is there."""
        error = output_error(self._ctx.teacher, program, self._ctx.judge)
        if self._best is None or no_worse(error, self._error):
            self._best, self._error = program, error
        self.errors[name] = self._error
        return self._best
