"""Channel pruning end to end: budgets, selection, the physical cut, the re-solve of what is left."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch

from ...passes.prune.channel_budget import ChannelLimits, free_groups, uniform_counts
from ...passes.prune.cuttable import cut_again, cuttable_groups
from ...passes.prune.prune_channels import Pruned, prune_channels
from ...passes.prune.select_channels import ChannelChoice, Variant, choose_channels, select_by_norm, select_layerwise
from ...passes.prune.submodular import Selection
from ...passes.solve.resolve_network import Resolved, ResolveSettings
from ..analysis.provenance import Provenance, find_units
from ..analysis.unit_groups import UnitGroup
from ..data.calibration_set import CalibrationSet
from ..data.output_error import BROKEN, bounded, no_worse, output_error
from ..ir.program import Program
from ..plan.option_milp import weighing_samples
from ..plan.plan import Channels, PruneChannels
from ..store.analysis_store import NOTHING_KEPT, AnalysisStore
from ..support.errors import GoalError, PlanError, Reject
from ..support.progress import Progress, StageClock, silent
from ..support.setting_checks import check_kind, check_switch, check_word
from .latency_probe import LatencyProbe
from .rewritten import Rewritten
from .stored_passes import stored_channels, stored_resolve

#: Errors below this share of those without any unit are rounding.
NO_ERROR = 1e-6

Score = Literal["submodular", "l1", "l2"]


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
    score: Score = "submodular"
    variant: Variant = "asymmetric"
    resolve: bool = True
    stream_target: bool = True
    polish: bool = True
    on_lattice: bool = False

    def __post_init__(self) -> None:
        check_kind("limits", self.limits, ChannelLimits)
        check_word("score", self.score, get_args(Score))
        check_word("variant", self.variant, get_args(Variant))
        for name in ("resolve", "stream_target", "polish", "on_lattice"):
            check_switch(name, getattr(self, name))


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
    goal: Channels,
    *,
    settings: ChannelSettings,
    resolve: ResolveSettings,
    clock: StageClock,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> Rewritten:
    """Prune `teacher` to a `Channels` goal and re-solve what consumes the lost channels.

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
            counts = uniform_counts(groups, goal.keep, settings.limits)
            choice = chosen_channels(
                provenance, calibration, counts, settings=settings, resolve=resolve, progress=progress, store=store
            )
        with clock.stage("prune"):
            pruned, errors = _removed(provenance, held_out, choice, settings)
        return _Cut(choice=choice, counts=counts, pruned=pruned, errors=errors)

    cut, groups, refused = cut_again(provenance, groups, attempt)
    choice, counts, pruned, errors = cut.choice, cut.counts, cut.pruned, cut.errors
    if not len(choice.removed) and goal != Channels(1.0):
        warnings.warn(
            f"nothing was cut: no group can keep fewer units for {goal} in steps of "
            f"{settings.limits.multiple} channels with its minimum",
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
        met=all(len(choice.selections[g.name].order) == counts[g.name] for g in groups if counts[g.name] < len(g)),
        rejects=(*group_rejects(provenance), *stuck_rejects, *refused, *resolved.locked),
        errors=errors,
        layers=resolved.layers,
        kept=pruned.kept,
        provenance=provenance,
        selections=choice.selections,
    )


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """One choice, cut: how many units each group was to keep, the smaller program, the output errors on the way."""

    choice: ChannelChoice
    counts: Mapping[str, int]
    pruned: Pruned
    errors: dict[str, float]


def chosen_channels(
    provenance: Provenance,
    calibration: CalibrationSet,
    counts: Mapping[str, int],
    *,
    given: Mapping[str, Selection] | None = None,
    settings: ChannelSettings,
    resolve: ResolveSettings,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> ChannelChoice:
    """The units to remove, those `given` or the ones that the score asks for, and, where consumers are re-solved, their
    weights."""
    given = given or _by_norm(provenance, counts, settings)
    if given is not None and not settings.resolve:
        gone = [g.without(given[g.name].order) for g in provenance.prunable if g.name in given]
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
    provenance: Provenance, counts: Mapping[str, int], settings: ChannelSettings
) -> dict[str, Selection] | None:
    """Selections by the norm of the filters; None where the score looks at data."""
    if settings.score == "submodular":
        return None
    power = {"l1": 1, "l2": 2}[settings.score]
    cut = [g for g in provenance.prunable if counts.get(g.name, len(g)) < len(g)]
    return {g.name: select_by_norm(provenance, g, counts[g.name], power) for g in cut}


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
    height comes from one trial: the group alone pruned to half and re-solved on a few samples (`weighing_samples`), and
    the output error measured on as many others.
    """
    program, counts = provenance.program, {g.name: len(g) for g in groups}

    def shapes() -> tuple[None, dict[str, torch.Tensor]]:
        found = select_layerwise(provenance, calibration, groups, counts, progress=progress)
        return None, {group.name: selection.errors for group, selection in found}

    _, curves = store.result("error curves", [program, calibration, counts], shapes)
    samples, others = _trial_samples(calibration, weighing_samples(program, len(groups)))
    for index, group in enumerate(groups):
        half = _trial_count(curves[group.name])
        height = store.value(
            "height",
            [program, samples, others, group.name, half],
            functools.partial(_height, provenance, samples, others, group, half),
        )
        curves[group.name] = _scaled(curves[group.name], half, bounded(height))
        progress("weigh groups", index + 1, len(groups))
    return curves


def _scaled(curve: torch.Tensor, count: int, height: float) -> torch.Tensor:
    """The curve with `height` at `count`. What is not finite counts as `BROKEN`, so that such a group is cut last, not
    first; with all units kept nothing is lost."""
    shape = float(curve[count])
    scaled = curve * (height / shape if shape > NO_ERROR * float(curve[0]) else 1.0)
    whole = scaled[-1:].nan_to_num(nan=0.0, posinf=0.0)
    return torch.cat([scaled[:-1].nan_to_num(nan=BROKEN, posinf=BROKEN), whole]).clamp(max=BROKEN)


def _trial_count(curve: torch.Tensor) -> int:
    """Half of the units; fewer where a group could lose more than half (dead channels) before there is an error that
    says anything."""
    half = max(1, (len(curve) - 1) // 2)
    telling = (curve[1 : half + 1] > NO_ERROR * curve[0]).nonzero()
    return int(telling[-1]) + 1 if len(telling) else half


def _trial_samples(calibration: CalibrationSet, most: int) -> tuple[CalibrationSet, CalibrationSet]:
    """(samples that trials are solved on, others that they are judged on): the same number of both where there are
    enough, else a quarter of all to judge. One sample alone is both."""
    calibration = calibration.views_together()
    count = max(1, min(most, len(calibration) * 3 // 4))
    return calibration.take(slice(0, count)), calibration.take(slice(count if len(calibration) > 1 else 0, 2 * count))


def _height(
    provenance: Provenance, samples: CalibrationSet, others: CalibrationSet, group: UnitGroup, count: int
) -> float:
    """The output error on the other samples with one group alone pruned to `count` units and re-solved."""
    trial = choose_channels(provenance, samples, {group.name: count})
    smaller = prune_channels(provenance, trial.removed, trial.tensors).program
    return output_error(provenance.program, smaller, others)


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
