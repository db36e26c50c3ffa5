"""Trials of plans: what a plan loses after a quick re-solve, here, in other processes, or wherever an executor says."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from ..data.calibration_set import CalibrationSet
from ..data.kept import kept_for
from ..data.output_error import BROKEN, output_error
from ..data.sample_sets import SampleSets
from ..export.exporter import to_exported, to_pt2
from ..frontend.capture import capture
from ..ir.program import Program
from ..plan.decision import Decision
from ..plan.goal import Goal
from ..plan.search_time import SearchTime
from ..processes.sharing import spread
from ..processes.team import team
from ..rewrite.context import Context
from ..rewrite.rewrite import Rewrite
from ..store.analysis_store import NOTHING_KEPT
from ..support.atomic_files import StoredFile
from ..support.errors import CompilerError, first_line
from ..support.one_at_a_time import alone
from ..support.progress import StageClock, silent
from .apply_decisions import applied, finished, solved


class Executor(Protocol):
    """What calls functions somewhere: `concurrent.futures.Executor`, or what has its `submit`."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        """Something whose `result()` is what the function returns, or raises what it raises."""


@dataclass(frozen=True)
class Lost:
    """What a plan loses: its output error, and why it was left out where it could not be put into effect."""

    error: float
    refused: str | None = None


def quick_error(quick: Context, rewrites: Sequence[Rewrite], decisions: Sequence[Decision]) -> float:
    """The output error of a plan after a quick re-solve, in the context of a trial."""
    network = solved(quick, rewrites, applied(quick, rewrites, decisions))
    network = finished(quick, rewrites, network, decisions)
    return output_error(quick.teacher, network.program, quick.judge)


def lost(work: Callable[[], float]) -> Lost:
    """What a trial says; one plan that cannot be put into effect is no reason to give up the others."""
    try:
        return Lost(work())
    except CompilerError as cause:
        return Lost(BROKEN, cause.message)


def tried_together(
    quick: Context,
    rewrites: Sequence[Rewrite],
    plans: Sequence[Sequence[Decision]],
    here: Callable[[int], float],
    executor: Executor | None,
) -> list[Lost]:
    """What some plans lose that do not depend on each other.

    Each of several processes tries some of them; an executor is handed all of them, by the first process. `here` gives
    the error of a plan by its number. What an executor raises, but for errors of foldcut's, is raised as CompilerError.
    """
    if executor is None:
        return spread([(1.0, partial(lost, partial(here, number))) for number in range(len(plans))])
    return team().one(0, lambda: _handed_out(quick, rewrites, plans, executor))


def _handed_out(
    quick: Context, rewrites: Sequence[Rewrite], plans: Sequence[Sequence[Decision]], executor: Executor
) -> list[Lost]:
    try:
        packed = _packed(quick, rewrites)
        waiting = [executor.submit(tried, packed, pickle.dumps(list(plan))) for plan in plans]
        return [Lost(*task.result()) for task in waiting]
    except CompilerError:
        raise
    except Exception as cause:  # whatever an executor and its transport raise
        raise CompilerError(
            f"the executor failed: {type(cause).__name__}: {first_line(cause)}",
            hint="its workers need this foldcut and torch, the source of your own rewrites, and room for the network; "
            "leave executor out to try plans in this process",
        ) from cause


@dataclass(frozen=True)
class _Packed:
    """A context of trials as plain data: the network as ``.pt2``, the samples, what rewrites were told, and what was
    found out about the network on the samples (`kept`), which trials go by."""

    network: bytes
    fingerprint: str
    origin: Any
    copied_parameters: int
    fit: CalibrationSet
    kept: dict[Any, Any]
    judge: CalibrationSet
    goal: Goal
    rewrites: tuple[Rewrite, ...]
    settings: Any
    solve_samples: int
    seed: int
    multiples: dict[str, int]


def _packed(quick: Context, rewrites: Sequence[Rewrite]) -> bytes:
    teacher = quick.teacher
    network = to_pt2(to_exported(teacher))
    if isinstance(network, StoredFile):
        raise CompilerError(
            f"an executor is not handed a network of {network.size_bytes / 1e9:.1f} GB",
            hint="leave executor out, or start several processes with torchrun: each reads the network itself",
        )
    return pickle.dumps(
        _Packed(
            network=network,
            fingerprint=teacher.fingerprint,
            origin=teacher.origin,
            copied_parameters=teacher.copied_parameters,
            fit=quick.solve,
            kept=dict(kept_for(teacher, quick.fit)),
            judge=quick.judge,
            goal=quick.goal,
            rewrites=tuple(rewrites),
            settings=quick.resolve,
            solve_samples=quick.solve_samples,
            seed=quick.seed,
            multiples=dict(quick.multiples()),
        )
    )


#: The last context that a worker has opened: one search asks for many trials of it.
_opened: dict[str, tuple[Context, tuple[Rewrite, ...]]] = {}


def tried(packed: bytes, plan: bytes) -> tuple[float, str | None]:
    """One trial, in whatever process an executor has.

    Arguments:
        packed: A context of trials, as this module packs it.
        plan: The decisions of a plan, pickled.

    Returns:
        The output error, and why the plan was left out where it was.

    Raises:
        CompilerError: If the network is not the one that was packed: versions differ.
    """
    key = hashlib.blake2b(packed, digest_size=16).hexdigest()
    with alone():
        if key not in _opened:
            _opened.clear()
            _opened[key] = _unpacked(pickle.loads(packed))
        quick, rewrites = _opened[key]
        decisions = pickle.loads(plan)
        found = lost(lambda: quick_error(quick, rewrites, decisions))
    return found.error, found.refused


def _unpacked(packed: _Packed) -> tuple[Context, tuple[Rewrite, ...]]:
    program = capture(torch.export.load(io.BytesIO(packed.network)))
    program = replace(program, origin=packed.origin, copied_parameters=packed.copied_parameters)
    _check(program, packed.fingerprint)
    kept_for(program, packed.fit).update(packed.kept)
    quick = Context(
        teacher=program,
        goal=packed.goal,
        sets=SampleSets(fit=packed.fit, judge=packed.judge, test=packed.judge),
        latency=None,
        store=NOTHING_KEPT,
        clock=StageClock(),
        progress=silent,
        time=SearchTime(),
        resolve=packed.settings,
        solve_samples=packed.solve_samples,
        seed=packed.seed,
        trial=True,
        multiples=lambda: packed.multiples,
    )
    return quick, packed.rewrites


def _check(program: Program, fingerprint: str) -> None:
    if program.fingerprint != fingerprint:
        raise CompilerError(
            "a worker of the executor reads another network than it was sent",
            expected=fingerprint,
            actual=program.fingerprint,
            hint="run the same versions of foldcut and torch in every worker",
        )
