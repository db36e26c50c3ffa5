"""The parts of a report that explain a result: the graph, latency per block, plans tried, errors by class of change;
and the words that say which network it is of and what made it.

A compile never fails over its report: a part that cannot be made is left out, with the reason in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ...passes.solve.resolve_network import TRIAL_RESOLVE
from ...passes.solve.weighing import TRIAL_SAMPLES, forward_macs, least_solve_macs
from ...runtime.measure.fresh_loads import REGIMES
from ..data.calibration_set import CalibrationSet
from ..data.output_error import output_error
from ..frontend.capture import Model
from ..plan.decision import Decision
from ..processes.team import team
from ..report.block_latency import block_latency
from ..report.graph import describe_graph
from ..rewrite.rewrite import Rewrite
from ..support.errors import first_line
from ..support.strict_json import json_text, read_json
from ..support.tally import Tally
from ..support.version import __version__
from ..trial.apply_decisions import applied_plain, by_phase, shaped
from ..trial.quick_trial import quick_error
from .pipeline import Outcome

Part = dict[str, Any]

#: Fields of a report that a rewrite may fill, and those that several may.
OPEN = ("groups", "multiple_of")
SHARED = ("figures",)


def report_origin(outcome: Outcome, model: Model) -> dict[str, Any]:
    """`model`, `fingerprint`, `made`, `versions`, `rewrites`, `kinds`, `words` and `mimicked` of a report."""
    return {
        "model": model_name(model),
        "fingerprint": outcome.plan.fingerprint,
        "made": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "versions": {"foldcut": __version__, "torch": str(torch.__version__)},
        "rewrites": [rewrite.name for rewrite in outcome.rewrites],
        "kinds": {rewrite.name: _kind(rewrite) for rewrite in outcome.rewrites},
        "words": [{"what": decision.what, "how": decision.how} for decision in outcome.plan.decisions],
        "mimicked": "mimicked" in outcome.output_errors,
    }


def _kind(rewrite: Rewrite) -> Part:
    """What a rewrite is called, and how it is drawn."""
    one, many = rewrite.decides.nouns
    return {"verb": rewrite.verb, "one": one, "many": many, "mark": rewrite.mark}


def model_name(model: Model) -> str:
    """The name of a model's file, or of its class."""
    if not isinstance(model, (str, Path)):
        return type(model).__name__
    # a file's name may hold bytes that are no text, which nobody could write into a page
    return Path(model).name.encode(errors="replace").decode()


def report_parts(outcome: Outcome) -> dict[str, Any]:
    """`graph`, `block_latency`, `tried`, `aims`, `changes`, `regimes` and `unmimicked` of a report, and what the
    rewrites add."""
    return {
        "graph": _or_reason(lambda: describe_graph(outcome.ctx.teacher, outcome.program, outcome.plan.decisions)),
        "block_latency": _or_reason(lambda: _block_latency(outcome)),
        "tried": [asdict(plan) for plan in outcome.applied.tried],
        "aims": list(outcome.aims),
        "unmimicked": outcome.applied.unmimicked,
        "changes": _changes(outcome),
        "regimes": _regimes(outcome),
        **_of_rewrites(outcome),
    }


def _of_rewrites(outcome: Outcome) -> dict[str, Any]:
    """What the rewrites say beside their decisions: fields of the report that the rest of it leaves open, all else in
    `details` under the name of the rewrite."""
    found: dict[str, Any] = {"details": {}, **{name: [] for name in SHARED}}
    for rewrite in outcome.rewrites:
        said = _or_reason(functools.partial(_said, rewrite, outcome))
        for name in SHARED:
            found[name] += said.pop(name, [])
        own = {name: value for name, value in said.items() if name not in OPEN}
        found |= {name: value for name, value in said.items() if name in OPEN}
        if own:
            found["details"][rewrite.name] = own
    return found


def _said(rewrite: Rewrite, outcome: Outcome) -> Part:
    """What one says, as it will be read. Raises TypeError and ValueError for what JSON cannot hold."""
    found: Part = read_json(json_text(dict(rewrite.report(outcome.ctx, outcome.applied))))
    return found


def _or_reason(make: Callable[[], Part]) -> Part:
    try:
        return make()
    except Exception as cause:  # a picture is not worth a compile, whatever is wrong with it
        return {"missing": first_line(cause)}


def _regimes(outcome: Outcome) -> Part:
    """The latency by regime, the goal's first."""
    found: Part = {}
    for name, measured in outcome.regimes.items():
        found[name] = measured.to_dict(samples=False)
        del found[name]["environment"]
    missing = {"missing": "the backend does not empty its device's caches"}
    return found | {name: missing for name in REGIMES if name not in found}


def work_by_stage(outcome: Outcome) -> list[Part]:
    """Each stage with its seconds, the multiply-accumulates that it did, by what they were for, and those that it could
    not do without: None where that is not a matter of networks and layers (exports, measurements). Several processes
    add up, but for the time that passed."""
    clock, least = outcome.ctx.clock, least_macs(outcome)
    every = team().objects((clock.cpu_s, clock.macs))
    return [
        {
            "stage": name,
            "wall_s": round(wall_s, 3),
            "cpu_s": round(sum(cpu_s.get(name, 0.0) for cpu_s, _ in every), 3),
            "macs": dict(sum((macs.get(name, Tally()) for _, macs in every), Tally())),
            "least_macs": least.get(name),
        }
        for name, wall_s in clock.wall_s.items()
    ]


def work_by_process(done: Tally, cpu_s: float) -> dict[str, list[float]]:
    """What each of several processes did; nothing of one."""
    members = team()
    if members.size == 1:
        return {}
    every = members.objects((sum(done.values()), round(cpu_s, 3), members.sent_bytes, members.said))
    names = ("macs", "cpu_s", "sent_bytes", "exchanges")
    return dict(zip(names, map(list, zip(*every, strict=True)), strict=True))


def least_macs(outcome: Outcome) -> dict[str, int]:
    """What stages cannot do without, by name: every sample that they read once through the networks that they compare,
    and every Gram matrix and solve once. Stages that look at the whole network see it once in any case."""
    ctx, made, original = outcome.ctx, outcome.program, outcome.ctx.teacher
    solve, rows = len(ctx.solve), ctx.resolve.rows_per_column
    seen = forward_macs(original, solve) + least_solve_macs(original, solve, rows)
    trial = forward_macs(made, len(ctx.judge)) + least_solve_macs(
        made, min(TRIAL_SAMPLES, solve), TRIAL_RESOLVE.rows_per_column
    )
    samples = len(ctx.sets.test)
    return {
        **dict.fromkeys(("choose", "offer channels", "offer ranks", "weigh integers"), seen),
        "try plans": len(outcome.applied.tried) * trial,
        "re-solve": forward_macs(original, solve) + forward_macs(made, solve) + least_solve_macs(made, solve, rows),
        "test": forward_macs(original, samples) + forward_macs(made, samples),
    }


def _block_latency(outcome: Outcome) -> Part:
    measured, profiles = outcome.measurement, outcome.profiles
    if profiles is None:
        return {"missing": "the backend does not time single nodes"}
    found = block_latency(
        outcome.ctx.teacher,
        outcome.program,
        (profiles.model, outcome.onnx),
        (profiles.before, profiles.after),
        (measured.before_ms, measured.after_ms),
    )
    return found or {"missing": "too few of the backend's nodes are known by name"}


def _changes(outcome: Outcome) -> list[Part]:
    """Each kind of decision by itself and, where there are several, in turn."""
    alone = errors_by_class(outcome, outcome.ctx.judge)
    if len(alone) < 2:
        return alone
    turns = _or_reason(lambda: in_turn(outcome))
    return [{**part, **turns.get(part["kind"], {})} for part in alone]


def in_turn(outcome: Outcome) -> Part:
    """What each rewrite's decisions add to those that are applied before them: output error after a quick re-solve, and
    under a goal in latency the share of it that they save, predicted by the times of segments."""
    ctx, rewrites = outcome.ctx, outcome.rewrites
    found: Part = {}
    table = ctx.latency.probe.table() if ctx.latency is not None and ctx.goal.measured else None
    whole = table.predict(ctx.teacher).units if table is not None else 1.0
    taken: list[Decision] = []
    last_time, last_error = whole, 0.0
    for rewrite in by_phase(rewrites):
        mine = [decision for decision in outcome.plan.decisions if decision.kind == rewrite.name]
        if not mine:
            continue
        taken += mine
        error = quick_error(ctx.for_trials(TRIAL_SAMPLES), rewrites, taken)
        found[rewrite.name] = {"error_added": error - last_error}
        last_error = error
        if table is not None:
            time = table.predict(shaped(rewrites, ctx.teacher, taken)).units
            found[rewrite.name]["saving"] = (last_time - time) / whole
            last_time = time
    return found


def errors_by_class(outcome: Outcome, held_out: CalibrationSet) -> list[Part]:
    """For each kind of decision their number, and the relative output error that they make by themselves, on held-out
    samples, before anything is solved again. It says what there was to recover, and does not add up."""
    found = []
    for kind in dict.fromkeys(decision.kind for decision in outcome.plan.decisions):
        decisions = [d for d in outcome.plan.decisions if d.kind == kind]
        part: Part = {"kind": kind, "count": len(decisions)}
        try:
            part["error_alone"] = output_error(
                outcome.ctx.teacher, applied_plain(outcome.rewrites, outcome.ctx.teacher, decisions), held_out
            )
        except Exception as cause:  # decisions of one kind may only fit what those before them have left
            part["missing"] = first_line(cause)
        found.append(part)
    return found
