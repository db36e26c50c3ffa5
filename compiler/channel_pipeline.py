"""Channel pruning end to end: budgets, selection, the physical cut, the re-solve of what is left."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ..passes.cuttable import cut_again, cuttable_groups
from ..passes.prune_channels import Pruned, prune_channels
from ..passes.resolve_network import Resolved, ResolveSettings
from ..passes.select_channels import ChannelChoice, Variant, choose_channels, select_by_norm, select_layerwise
from ..passes.submodular import Selection
from .allocation import weighing_samples
from .analysis_store import NOTHING_KEPT, AnalysisStore
from .calibration_set import CalibrationSet
from .channel_budget import ChannelLimits, CutModel, allocate, free_groups, uniform_counts
from .cost import counted
from .errors import GoalError, PlanError, Reject
from .latency_probe import LatencyProbe
from .plan import ChannelGoal, Channels, CountedGoal, Parameters, PruneChannels
from .program import Program
from .progress import Progress, StageClock, silent
from .provenance import Provenance, find_units
from .rewritten import Rewritten
from .stored_passes import stored_channels, stored_resolve
from .unit_groups import UnitGroup, surplus_units
from .verify import no_worse, output_error

#: How often a goal is tightened when the smaller program costs more than the allocation predicted.
MOST_CORRECTIONS = 4


@dataclass(frozen=True, kw_only=True)
class ChannelSettings:
    """How channels are chosen.

    `score` is what the next layer can do without, or the L1 or L2 norm of the weights that make a channel; `variant`
    the paper's. With `resolve` the consumers are re-solved, with `stream_target` those that feed a residual addition
    for the stream behind it, not for their own output; with `polish` what is left is solved once more and refined
    together after the cut. `on_lattice` takes the multiple that channel counts go to from the backend, by
    `probe_lattice`, in place of `limits.multiple_of`; the cut then depends on the machine.
    """

    limits: ChannelLimits = field(default_factory=ChannelLimits)
    score: Literal["submodular", "l1", "l2"] = "submodular"
    variant: Variant = "asymmetric"
    resolve: bool = True
    stream_target: bool = True
    polish: bool = True
    on_lattice: bool = False


def on_lattice(settings: ChannelSettings, probe: LatencyProbe, progress: Progress = silent) -> ChannelSettings:
    """The settings with the multiple of the backend's lattice, where they ask for it. Raises BackendError."""
    if not settings.on_lattice:
        return settings
    multiple = probe.lattice(progress=progress).multiple_for(probe.program)
    return replace(settings, limits=replace(settings.limits, multiple_of=multiple))


def cut_channels(
    teacher: Program,
    calibration: CalibrationSet,
    held_out: CalibrationSet,
    goal: ChannelGoal,
    *,
    settings: ChannelSettings,
    resolve: ResolveSettings,
    clock: StageClock,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> Rewritten:
    """Prune `teacher` to a `Channels`, `Macs` or `Parameters` goal and re-solve what consumes the lost channels.

    The errors are those of the outputs on `held_out`, relative, after plain removal, after the re-solve of the
    consumers, and after the polish. Raises GoalError when nothing can be pruned.
    """
    with clock.stage("analyse"):
        provenance = find_units(teacher)
        groups, stuck = cuttable_groups(provenance, free_groups(provenance, settings.limits))
        if not groups:
            raise GoalError(f"nothing can be pruned: {stuck[0][1].message}", hint="`foldcut inspect` lists the groups")

    def attempt(groups: list[UnitGroup]) -> _Cut:
        if not groups:
            raise GoalError("nothing can be pruned: each cut was refused", hint="`foldcut inspect` lists the groups")
        with clock.stage("choose"):
            counts, met = _counts(provenance, calibration, goal, groups, settings.limits, progress, store)
            choice = _choice(provenance, calibration, groups, counts, settings, resolve, progress, store)
        with clock.stage("prune"):
            pruned, errors = _removed(provenance, held_out, choice, settings)
        return _Cut(choice=choice, met=met, pruned=pruned, errors=errors)

    cut, groups, refused = cut_again(provenance, groups, attempt)
    choice, met, pruned, errors = cut.choice, cut.met, cut.pruned, cut.errors
    if not len(choice.removed) and goal != Channels(1.0):
        warnings.warn(
            f"nothing was cut: no group can keep fewer units for {goal} in steps of "
            f"{settings.limits.multiple_of} channels with its minimum",
            stacklevel=2,
        )
    resolved = Resolved(program=pruned.program, layers=choice.layers, locked=())
    if settings.resolve and settings.polish and pruned.kept:
        with clock.stage("re-solve"):
            resolved = stored_resolve(
                store, teacher, pruned.program, calibration, (), kept=pruned.kept, settings=resolve, progress=progress
            )
            errors["polished"] = output_error(teacher, resolved.program, held_out)
            if not no_worse(errors["polished"], errors["re-solved"]):
                resolved, errors["polished"] = replace(resolved, program=pruned.program), errors["re-solved"]
    stuck_rejects = (Reject(reason=str(cause.message), node=group.name) for group, cause in stuck)
    return Rewritten(
        program=resolved.program,
        decisions=tuple(channel_decision(g, choice.selections[g.name]) for g in groups if g.name in choice.selections),
        met=met,
        rejects=(*group_rejects(provenance), *stuck_rejects, *refused, *resolved.locked),
        errors=errors,
        layers=resolved.layers,
        kept=pruned.kept,
        provenance=provenance,
        selections=choice.selections,
    )


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """One choice, cut: the goal met or not, the smaller program, the output errors on the way."""

    choice: ChannelChoice
    met: bool
    pruned: Pruned
    errors: dict[str, float]


def _choice(
    provenance: Provenance,
    calibration: CalibrationSet,
    groups: Sequence[UnitGroup],
    counts: Mapping[str, int],
    settings: ChannelSettings,
    resolve: ResolveSettings,
    progress: Progress,
    store: AnalysisStore,
) -> ChannelChoice:
    """The units to remove and, where consumers are re-solved, their weights."""
    given = _by_norm(provenance, groups, counts, settings)
    if given is not None and not settings.resolve:
        gone = [g.without(given[g.name].order) for g in groups if g.name in given]
        removed = torch.cat(gone) if gone else torch.zeros(0, dtype=torch.long)
        return ChannelChoice(removed=removed, tensors={}, selections=given)
    choice = stored_channels(
        store,
        provenance,
        calibration,
        counts,
        variant=settings.variant,
        stream_target=settings.stream_target,
        given=given,
        settings=resolve,
        progress=progress,
    )
    return choice if settings.resolve else replace(choice, tensors={}, layers=())


def _removed(
    provenance: Provenance, held_out: CalibrationSet, choice: ChannelChoice, settings: ChannelSettings
) -> tuple[Pruned, dict[str, float]]:
    """The smaller program, with the better of the old and the re-solved weights, and its output errors."""
    plain = prune_channels(provenance, choice.removed)
    errors = {"pruned": output_error(provenance.program, plain.program, held_out)}
    if not settings.resolve:
        return plain, errors
    pruned = prune_channels(provenance, choice.removed, choice.tensors)
    errors["re-solved"] = output_error(provenance.program, pruned.program, held_out)
    if not no_worse(errors["re-solved"], errors["pruned"]):
        pruned, errors["re-solved"] = plain, errors["pruned"]
    return pruned, errors


def _by_norm(
    provenance: Provenance, groups: Sequence[UnitGroup], counts: Mapping[str, int], settings: ChannelSettings
) -> dict[str, Selection] | None:
    """Selections by the norm of the filters; None where the score looks at data."""
    if settings.score == "submodular":
        return None
    power = {"l1": 1, "l2": 2}[settings.score]
    return {g.name: select_by_norm(provenance, g, counts[g.name], power) for g in groups if counts[g.name] < len(g)}


def _counts(
    provenance: Provenance,
    calibration: CalibrationSet,
    goal: ChannelGoal,
    groups: Sequence[UnitGroup],
    limits: ChannelLimits,
    progress: Progress,
    store: AnalysisStore,
) -> tuple[dict[str, int], bool]:
    if isinstance(goal, Channels):
        return uniform_counts(groups, goal.keep, limits), True
    curves = error_curves(provenance, calibration, groups, progress=progress, store=store)
    of_what = CutModel.of_parameters if isinstance(goal, Parameters) else CutModel.of_macs
    model = of_what(provenance, groups)
    whole = counted(provenance.program, goal)
    target = goal.ratio * whole
    for _ in range(MOST_CORRECTIONS):
        counts, met = allocate(model, curves, target, limits)
        left = _left(provenance, groups, counts, goal)
        if not met or left <= goal.ratio * whole:
            return counts, met
        # what the model does not see (a product of two activations) takes its share too
        target -= left - goal.ratio * whole
    return counts, False


def error_curves(
    provenance: Provenance,
    calibration: CalibrationSet,
    groups: Sequence[UnitGroup],
    *,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> dict[str, torch.Tensor]:
    """For each group the error at the network's outputs, as predicted, with 0, 1, 2 ... units kept.

    The shape of a curve is that of the group's consumers (relative error after the greedy choice and re-solve); its
    height comes from one trial: the group alone pruned to half and re-solved, and the output error measured on
    a few samples (`weighing_samples`).
    """
    program, counts = provenance.program, {g.name: len(g) for g in groups}

    def shapes() -> tuple[None, dict[str, torch.Tensor]]:
        found = select_layerwise(provenance, calibration, groups, counts, progress=progress)
        return None, {group.name: selection.errors for group, selection in found}

    _, curves = store.result("error curves", [program, calibration, counts], shapes)
    samples = calibration.take(slice(0, weighing_samples(program, len(groups))))
    for index, group in enumerate(groups):
        half = max(1, len(group) // 2)
        height = store.value(
            "height", [program, samples, group.name, half], functools.partial(_height, provenance, samples, group, half)
        )
        shape = float(curves[group.name][half])
        curves[group.name] = curves[group.name] * (height / shape if shape > 0 else 1.0)
        progress("weigh groups", index + 1, len(groups))
    return curves


def _height(provenance: Provenance, samples: CalibrationSet, group: UnitGroup, count: int) -> float:
    """The output error with one group alone pruned to `count` units and re-solved."""
    trial = choose_channels(provenance, samples, {group.name: count})
    smaller = prune_channels(provenance, trial.removed, trial.tensors).program
    return output_error(provenance.program, smaller, samples)


def _left(provenance: Provenance, groups: Sequence[UnitGroup], counts: Mapping[str, int], goal: CountedGoal) -> int:
    return counted(prune_channels(provenance, surplus_units(groups, counts)).program, goal)


def channel_decision(group: UnitGroup, selection: Selection) -> PruneChannels:
    """A selection as a plan's decision."""
    kept = tuple(sorted(int(i) for i in selection.order))
    return PruneChannels(group=group.name, kept=kept, total=len(group), error=float(selection.errors[-1]))


def removed_units(provenance: Provenance, decisions: Sequence[PruneChannels]) -> torch.Tensor:
    """The units that the decisions of a plan remove. Raises PlanError when a group is not the one planned for."""
    groups = {g.name: g for g in provenance.prunable}
    removed = []
    for decision in decisions:
        group = groups.get(decision.group)
        if group is None or len(group) != decision.total or max(decision.kept, default=-1) >= len(group):
            raise PlanError(
                f"no prunable unit group {decision.group!r} with {decision.total} units",
                hint="apply the plan to the network that it was made for",
            )
        removed.append(group.without(decision.kept))
    return torch.cat(removed) if removed else torch.zeros(0, dtype=torch.long)


def group_rejects(provenance: Provenance) -> tuple[Reject, ...]:
    """The locked groups with their reasons, and the operators that were not understood."""
    locked = [Reject(reason=g.reason, node=g.name) for g in provenance.groups if g.reason]
    unknown = [
        Reject(reason=f"{target} is not understood ({len(nodes)} times)", node=nodes[0])
        for target, nodes in provenance.unknown.items()
    ]
    return (*locked, *unknown)


__all__ = ["ChannelSettings", "channel_decision", "cut_channels", "error_curves", "group_rejects", "removed_units"]
