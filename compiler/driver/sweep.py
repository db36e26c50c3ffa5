"""Compiling to several goals, and the Pareto front of the results in latency and error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...passes.mimic.settings import MimicSettings
from ...runtime.measure.backend import Backend
from ..data.calibration_set import CalibrationData, CalibrationSet, View
from ..data.shards import read_parts
from ..frontend.capture import Model, capture
from ..frontend.model_inputs import needed_inputs
from ..goals.latency import Latency
from ..ir.edit_folds import fold_parameters
from ..metric.given import check_labelled, check_labels
from ..metric.metric import Evaluate
from ..metric.top1 import Top1
from ..plan.goal import Goal
from ..processes.joining import agree
from ..processes.working import working
from ..rewrite.rewrite import Rewrite
from ..store.analysis_store import versions
from ..store.cache_folder import kept_in
from ..support.atomic_files import write_folder
from ..support.errors import GoalError
from ..support.progress import Progress, WholeProgress
from ..support.setting_checks import refuse
from ..support.strict_json import json_file
from ..synthesis.synthesise import is_asked_for, synthesise
from ..trial.quick_trial import Executor
from .api import Compiled, check_goal
from .api import compile as compile_model
from .builtin import check_rewrites, chosen_rewrites, named
from .ignore_patterns import sorted_ignores
from .pipeline_settings import PipelineSettings, check_options, with_reference_read

#: The goals of a sweep that names none.
GOALS: tuple[Goal, ...] = tuple(map(Latency, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)))
#: What a sweep writes beside the folders of its points.
SWEEP = "sweep.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepPoint:
    """The result for one goal of a sweep.

    Arguments:
        goal: The goal.
        compiled: The result, or the best there is if the goal was missed. None if nothing could be done.
        met: Whether the goal is met.
        reason: Why the goal was missed. Empty if it was met.

    Example:
        >>> point = foldcut.SweepPoint(goal=foldcut.Macs(0.5), compiled=None, met=False, reason="nothing to prune")
        >>> point.name, point.cost
        ('MACs-ratio-0.5', None)
    """

    goal: Goal
    compiled: Compiled | None
    met: bool
    reason: str = ""

    @property
    def name(self) -> str:
        """Name of the folder of this point: ``latency-ratio-0.6``."""
        return _folder_name(self.goal)

    @property
    def cost(self) -> tuple[float, float] | None:
        """(measured latency ratio, relative output error on the test samples). None without a result."""
        if self.compiled is None:
            return None
        return float(self.compiled.report.latency["ratio"]), self.compiled.report.output_error

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        data: dict[str, Any] = {"goal": self.goal.to_dict(), "met": self.met, "folder": self.name}
        if self.compiled is None:
            return {**data, "folder": None, "reason": self.reason}
        report = self.compiled.report
        return {
            **data,
            "latency": {key: report.latency[key] for key in ("ratio", "low", "high", "before_ms", "after_ms")},
            "macs": dict(report.macs),
            "parameters": dict(report.parameters),
            "output_error": report.output_error,
            "test": dict(report.test),
            "decisions": len(report.decisions),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Sweep:
    """The results of a sweep.

    Arguments:
        points: One point per goal, in the order of the goals.

    Example:
        >>> point = foldcut.SweepPoint(goal=foldcut.Macs(0.5), compiled=None, met=False, reason="nothing to prune")
        >>> sweep = foldcut.Sweep(points=(point,))
        >>> sweep.front, sweep.to_dict()["points"][0]["reason"]
        ((), 'nothing to prune')
    """

    points: tuple[SweepPoint, ...]

    @property
    def front(self) -> tuple[SweepPoint, ...]:
        """The Pareto front, fastest first: the points that no other equals or beats in both latency ratio and output
        error.
        """
        found: list[SweepPoint] = []
        for point in sorted((p for p in self.points if p.cost is not None), key=lambda p: p.cost or ()):
            if not found or (point.cost or (0, 0))[1] < (found[-1].cost or (0, 0))[1]:
                found.append(point)
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: the content of ``sweep.json``."""
        front = {point.name for point in self.front}
        return {"version": 1, "points": [{**p.to_dict(), "on_front": p.name in front} for p in self.points]}

    def save(self, folder: str | Path) -> Path:
        """Write the files of each point to a folder of its own, and ``sweep.json`` beside them.

        Arguments:
            folder: The folder that holds them.

        Returns:
            The path of the folder.

        Raises:
            OutputError: If files cannot be written. Each folder appears whole or not at all.
        """
        for point in self.points:
            if point.compiled is not None:
                point.compiled.save(Path(folder) / point.name)
        return self.save_index(folder)

    def save_index(self, folder: str | Path) -> Path:
        """Write ``sweep.json`` alone.

        Arguments:
            folder: The folder that holds the points.

        Returns:
            The path of the folder.

        Raises:
            OutputError: If the file cannot be written.
        """
        write_folder(Path(folder), {SWEEP: json_file(self.to_dict())})
        return Path(folder)


def sweep(
    model: Model,
    calibration: CalibrationData,
    *,
    goals: Sequence[Goal] = GOALS,
    backend: str | Backend | type[Backend] = "onnxruntime",
    batch: int | None = None,
    rewrites: Sequence[str | Rewrite] | None = None,
    mimic: MimicSettings | bool | None = True,
    views: Sequence[View] | None = None,
    seed: int | None = None,
    progress: bool | Progress = True,
    threads: int | None = None,
    device: str | torch.device | None = None,
    executor: Executor | None = None,
    settings: PipelineSettings | None = None,
    cache: bool | str | Path = True,
    each: Callable[[SweepPoint], None] | None = None,
    evaluate: Evaluate | Top1 | None = None,
) -> Sweep:
    """Compile to several goals. Analyses are shared, so that a further goal mostly costs its own search.

    A goal that is missed becomes a point with `met` False and the best result found.

    Arguments:
        model: As in `compile`.
        calibration: As in `compile`. A generator is read once.
        goals: The goals, each named once. By default latency ratios from 0.9 down to 0.4.
        backend: As in `compile`.
        batch: As in `compile`.
        rewrites: As in `compile`. Each goal uses those of them that can serve it.
        mimic: As in `compile`.
        views: As in `compile`.
        seed: As in `compile`.
        progress: As in `compile`.
        threads: As in `compile`.
        device: As in `compile`.
        executor: As in `compile`.
        settings: As in `compile`.
        cache: As in `compile`, except that False keeps analyses until the sweep ends.
        each: A function that gets every `SweepPoint` as soon as it is made.
        evaluate: As in `compile`; the front is that of latency and output error.

    Returns:
        The `Sweep`.

    Raises:
        GoalError: If `goals` is empty or names a goal twice, or if nothing could be done towards any of them.
        CompilerError: As in `compile`.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> options = {"progress": False, "cache": False, "mimic": False}
        >>> found = foldcut.sweep(net, torch.randn(40, 8), goals=[foldcut.Channels(0.5)], **options)
        >>> [(point.name, point.met) for point in found.points]
        [('0.5-of-the-channels-kept', True)]
    """
    _check_goals(goals, evaluate)
    check_labelled(evaluate, is_asked_for(calibration))
    check_options(mimic, progress, cache, settings)
    settings = (settings or PipelineSettings()).with_executor(executor)
    settings = settings.with_arguments(batch=batch, threads=threads, seed=seed, views=views, device=device)
    if rewrites is not None:
        check_rewrites(rewrites)
    if each is not None and not callable(each):
        refuse("each", each, "a function of a SweepPoint, or None")
    chosen = _chosen(goals, rewrites, settings)
    points, refused = list[SweepPoint](), list[GoalError]()
    settings = with_reference_read(model, settings)
    with working("sweep", progress, settings.memory_bytes, settings.processes) as show, kept_in(cache) as place:
        agree({**versions(), "goals": goals, **settings.told})
        samples = _read(model, calibration, evaluate, seed=settings.seed, progress=show, cache=cache)
        for_goal = _leaving_alone(chosen, model, samples)
        for number, goal in enumerate(goals, 1):
            if isinstance(show, WholeProgress):
                show.next_part(number, len(goals), str(goal))
            options: dict[str, Any] = {
                "goal": goal,
                "backend": backend,
                "rewrites": for_goal[str(goal)],
                "mimic": mimic,
                "progress": show,
                "settings": _for_goal(settings, goal),
                "cache": place,
                "evaluate": evaluate,
            }
            try:
                points.append(SweepPoint(goal=goal, compiled=compile_model(model, samples, **options), met=True))
            except GoalError as unmet:
                points.append(_unmet(goal, unmet))
                refused += [unmet] if points[-1].compiled is None else []
            if each is not None:
                each(points[-1])
    if len(refused) == len(points):
        raise refused[0]
    return Sweep(points=tuple(points))


def _read(
    model: Model,
    calibration: CalibrationData,
    evaluate: Evaluate | Top1 | None,
    *,
    seed: int,
    progress: bool | Progress,
    cache: bool | str | Path,
) -> CalibrationSet:
    """The samples of all goals, made where there are none; a generator is read once. Raises CalibrationError for labels
    that do not fit."""
    if is_asked_for(calibration):
        return synthesise(model, calibration, seed=seed, progress=progress, cache=cache)
    samples = read_parts(calibration, needed_inputs(model))
    check_labels(evaluate, samples)
    return samples


def _folder_name(goal: Goal) -> str:
    return "-".join(str(goal).replace("%", "").split())


def _for_goal(settings: PipelineSettings, goal: Goal) -> PipelineSettings:
    """The settings of one goal's compile: what it saves between passes goes to a folder of its own."""
    if settings.save_temps is None:
        return settings
    return replace(settings, save_temps=Path(settings.save_temps) / _folder_name(goal))


def _chosen(
    goals: Sequence[Goal], rewrites: Sequence[str | Rewrite] | None, settings: PipelineSettings
) -> dict[str, list[Rewrite]]:
    """The rewrites of each goal. Raises GoalError where none of those that were asked for reaches it."""
    return {str(goal): chosen_rewrites(goal, _allowed(goal, goals, rewrites), settings) for goal in goals}


def _leaving_alone(
    chosen: dict[str, list[Rewrite]], model: Model, samples: CalibrationSet
) -> Mapping[str, Sequence[Rewrite]]:
    """The rewrites of each goal with what they are to leave alone.

    Where goals take different rewrites, the name of a layer says nothing to one that prunes, nor that of a group to one
    that factorises: each pattern goes to the rewrites that it says something to, whichever goal uses them. Where all
    take the same, `compile` sorts the patterns. Raises GoalError for a pattern that matches nothing.
    """
    used = {rewrite.name: rewrite for rewrites in chosen.values() for rewrite in rewrites}
    alike = len({frozenset(rewrite.name for rewrite in rewrites) for rewrites in chosen.values()}) == 1
    if alike or not any(rewrite.ignore for rewrite in used.values()):
        return chosen
    program = fold_parameters(capture(model, samples.batch(slice(0, 2))))
    by_name = {rewrite.name: rewrite for rewrite in sorted_ignores(program, list(used.values()))}
    return {goal: [by_name[rewrite.name] for rewrite in rewrites] for goal, rewrites in chosen.items()}


def _allowed(
    goal: Goal, goals: Sequence[Goal], rewrites: Sequence[str | Rewrite] | None
) -> Sequence[str | Rewrite] | None:
    """The rewrites that serve a goal. One that serves no goal of the sweep stays in the list, and so do all where
    none serves this goal: `compile` then refuses it.
    """
    if rewrites is None:
        return None
    found = named(rewrites, PipelineSettings())
    here = [r for r, rewrite in zip(rewrites, found, strict=True) if rewrite.serves(goal)]
    nowhere = [r for r, rewrite in zip(rewrites, found, strict=True) if not any(map(rewrite.serves, goals))]
    return [*here, *nowhere] or rewrites


def _unmet(goal: Goal, unmet: GoalError) -> SweepPoint:
    best = unmet.best if isinstance(unmet.best, Compiled) else None
    reason = f"{unmet.message} ({unmet.hint})" if unmet.hint and best is None else unmet.message
    return SweepPoint(goal=goal, compiled=best, met=False, reason=reason)


def _check_goals(goals: Sequence[Goal], evaluate: Evaluate | Top1 | None) -> None:
    if isinstance(goals, str) or not isinstance(goals, Collection):  # what can be gone through once only is too little
        refuse("goals", goals, "a list: goals=[foldcut.Latency(0.8), foldcut.Latency(0.6)]", error=GoalError)
    if not goals:
        raise GoalError("a sweep needs a goal", hint="goals=[foldcut.Latency(0.8), foldcut.Latency(0.6)]")
    names = [str(goal) for goal in goals]
    if len(set(names)) < len(names):
        raise GoalError(f"a goal is there twice: {', '.join(names)}", hint="name each goal once")
    for goal in goals:
        check_goal(goal, evaluate)
