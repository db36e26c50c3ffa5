"""A mix of rewrites put into effect: blocks dropped, channels removed, layers factorised, all solved once more."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...passes.drop.drop_blocks import drop_blocks, entry_exit
from ...passes.drop.recoverability import QUICK_RESOLVE, RecoverabilitySettings
from ...passes.factorize.factorize import Factors, factorize, factorize_for_timing, within_full
from ...passes.factorize.low_rank import SCHEMES
from ...passes.factorize.select_ranks import Option, RankAnalysis, RankSettings
from ...passes.prune.cuttable import cut_again
from ...passes.prune.prune_channels import Pruned, prune_channels
from ...passes.prune.select_channels import ChannelChoice
from ...passes.prune.submodular import Selection
from ...passes.solve.resolve_network import LayerError, Resolved, ResolveSettings
from ...passes.solve.targets import Kept
from ..analysis.provenance import Provenance, find_units
from ..analysis.unit_groups import UnitGroup, surplus_units
from ..data.calibration_set import CalibrationSet
from ..data.output_error import no_worse, output_error
from ..ir.program import Program
from ..plan.plan import Decision, DropBlock, FactorizeLayer, PruneChannels
from ..plan.proposals import Mix
from ..store.analysis_store import NOTHING_KEPT, AnalysisStore
from ..support.errors import CompilerError, Reject
from ..support.progress import Progress, silent
from .channel_pipeline import ChannelSettings, channel_decision, chosen_channels, removed_units
from .stored_passes import stored_factors, stored_resolve


@dataclass(frozen=True, kw_only=True)
class JointSettings:
    """The settings of each rewrite, of the re-solve, and of the look at which regions recover."""

    resolve: ResolveSettings
    channels: ChannelSettings
    ranks: RankSettings
    recoverability: RecoverabilitySettings


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A mix in effect: the program before and after the last re-solve, its decisions in the order of application, and
    what later stages ask for."""

    rewritten: Program
    program: Program
    decisions: tuple[Decision, ...]
    kept: Mapping[str, Kept] = field(repr=False)
    selections: Mapping[str, Selection] = field(repr=False)
    layers: tuple[LayerError, ...]
    locked: tuple[Reject, ...]
    #: Whether the rewritten network was solved once more.
    solved: bool = True


def solved_at_the_end(settings: JointSettings, rewrites: Collection[str]) -> bool:
    """Whether all that the rewrites touch is solved once more after them, as their settings ask for.

    One solve serves all of them. Raises CompilerError when one setting forbids it and another rewrite needs it.
    """
    channels, ranks = settings.channels, settings.ranks
    forbidding = {
        "ChannelSettings.resolve=False": "prune_channels" in rewrites and not channels.resolve,
        "ChannelSettings.polish=False": "prune_channels" in rewrites and not channels.polish,
        "RankSettings.resolve=False": "factorize" in rewrites and not ranks.resolve,
    }
    forbidden = [name for name, forbids in forbidding.items() if forbids]
    asking = {
        "drop_blocks": True,
        "prune_channels": channels.resolve and channels.polish,
        "factorize": ranks.resolve,
    }
    solving = [name for name in asking if name in rewrites and asking[name]]
    if forbidden and solving:
        raise CompilerError(
            f"{' and '.join(forbidden)} cannot be followed where {' and '.join(solving)} takes part: the mix is solved "
            "as a whole",
            hint="leave the setting at True, or use that rewrite alone",
        )
    return not forbidden


def judged(teacher: Program, applied: Applied, held_out: CalibrationSet) -> tuple[Program, dict[str, float]]:
    """The network with the weights of before or after the last re-solve, whichever loses less on `held_out`, and the
    relative output errors of both."""
    errors = {"rewritten": output_error(teacher, applied.rewritten, held_out)}
    if not applied.solved:
        return applied.program, errors
    errors["re-solved"] = output_error(teacher, applied.program, held_out)
    if no_worse(errors["re-solved"], errors["rewritten"]):
        return applied.program, errors
    return applied.rewritten, {**errors, "re-solved": errors["rewritten"]}


def mix_shape(teacher: Program, mix: Mix, known: Provenance | None = None) -> Program:
    """The network that a mix leads to, with weights that are good for timing only. `known` are the units of the
    original, where they are at hand."""
    return _shape(teacher, *by_kind(mix), known)


def decided_shape(teacher: Program, decisions: Sequence[Decision]) -> Program:
    """The network that a plan's decisions lead to, with weights that are good for counting only."""
    drops = [d for d in decisions if isinstance(d, DropBlock)]
    counts = {d.group: len(d.kept) for d in decisions if isinstance(d, PruneChannels)}
    return _shape(teacher, drops, counts, [d for d in decisions if isinstance(d, FactorizeLayer)])


def _shape(
    teacher: Program,
    drops: Sequence[DropBlock],
    counts: Mapping[str, int],
    ranks: Sequence[FactorizeLayer],
    known: Provenance | None = None,
) -> Program:
    program = drop_blocks(teacher, drops)
    if counts:
        provenance = known if known is not None and known.program is program else find_units(program)
        groups = _groups(provenance, counts)
        if groups:
            program, _, _ = cut_again(
                provenance, groups, lambda left: _without_surplus(provenance, program, left, counts)
            )
    return factorize_for_timing(program, within_full(program, ranks))


def _without_surplus(
    provenance: Provenance, program: Program, groups: Sequence[UnitGroup], counts: Mapping[str, int]
) -> Program:
    return prune_channels(provenance, surplus_units(groups, counts)).program if groups else program


def apply_mix(
    teacher: Program,
    mix: Mix,
    calibration: CalibrationSet,
    settings: JointSettings,
    *,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> Applied:
    """`apply_changes` with what a mix takes."""
    drops, counts, ranks = by_kind(mix)
    return apply_changes(
        teacher, calibration, settings, drops=drops, counts=counts, ranks=ranks, progress=progress, store=store
    )


def replay(
    teacher: Program,
    decisions: Sequence[Decision],
    calibration: CalibrationSet,
    settings: JointSettings,
    *,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> Applied:
    """`apply_changes` with the decisions of a plan: the units that it keeps are taken as they are. Raises PlanError
    when a group is not the one planned for."""
    cuts = [d for d in decisions if isinstance(d, PruneChannels)]
    return apply_changes(
        teacher,
        calibration,
        settings,
        drops=[d for d in decisions if isinstance(d, DropBlock)],
        counts={cut.group: len(cut.kept) for cut in cuts},
        given=cuts,
        ranks=[d for d in decisions if isinstance(d, FactorizeLayer)],
        progress=progress,
        store=store,
    )


def apply_changes(
    teacher: Program,
    calibration: CalibrationSet,
    settings: JointSettings,
    *,
    drops: Sequence[DropBlock] = (),
    counts: Mapping[str, int] | None = None,
    given: Sequence[PruneChannels] = (),
    ranks: Sequence[FactorizeLayer] = (),
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> Applied:
    """Drop, re-solve what stands for the dropped blocks, select (unless `given`) and remove channels of what is left,
    factorise, and solve all of it once more toward the original network.

    Each step looks at the activations that the steps before it leave. Layers that a step has solved keep their weights
    where the last re-solve finds nothing better; the output error on the first samples never grows by that re-solve.
    Without a change the program comes back as it is. Raises CompilerError when the settings of two rewrites contradict
    each other.
    """
    pairs = entry_exit(drops)
    program = drop_blocks(teacher, drops)
    decisions: list[Decision] = [*drops]
    pruned = _Pruned(program=program)
    if drops and (counts or ranks):
        program = stored_resolve(
            store, teacher, program, calibration, pairs, settings=QUICK_RESOLVE, progress=progress
        ).program
    if counts:
        pruned = _pruned(program, counts, given, calibration, settings, progress, store)
        program, decisions = pruned.program, [*decisions, *pruned.decisions]
    if ranks:
        ranks = within_full(program, ranks)
        program = _factorised(program, ranks, calibration, settings, progress, store)
        decisions += ranks
    changed = (("drop_blocks", drops), ("prune_channels", counts), ("factorize", ranks))
    solving = solved_at_the_end(settings, [kind for kind, some in changed if some])
    resolved = Resolved(program=program, layers=pruned.layers, locked=())
    if solving:
        resolved = stored_resolve(
            store,
            teacher,
            program,
            calibration,
            pairs,
            kept=pruned.kept,
            replaced=[decision.layer for decision in ranks],
            settings=settings.resolve,
            progress=progress,
        )
    return Applied(
        rewritten=program,
        program=resolved.program,
        decisions=tuple(decisions),
        kept=pruned.kept,
        selections=pruned.selections,
        layers=resolved.layers,
        locked=(*pruned.refused, *resolved.locked),
        solved=solving,
    )


@dataclass(frozen=True, kw_only=True)
class _Pruned:
    """A program without some of its channels, and how it came about."""

    program: Program
    kept: Mapping[str, Kept] = field(default_factory=dict)
    selections: Mapping[str, Selection] = field(default_factory=dict)
    decisions: tuple[PruneChannels, ...] = ()
    layers: tuple[LayerError, ...] = ()
    #: The groups that stay whole after all, and why.
    refused: tuple[Reject, ...] = ()


def _pruned(
    program: Program,
    counts: Mapping[str, int],
    given: Sequence[PruneChannels],
    calibration: CalibrationSet,
    settings: JointSettings,
    progress: Progress,
    store: AnalysisStore,
) -> _Pruned:
    """The program with so many units of each group: those given, else those that the next layers need most."""
    provenance = find_units(program)
    groups = _groups(provenance, counts)
    if given:
        removed_units(provenance, given)  # says which group is not the one planned for
    if not groups:
        return _Pruned(program=program)

    def attempt(groups: list[UnitGroup]) -> tuple[ChannelChoice, Pruned]:
        names = {g.name for g in groups}
        choice = chosen_channels(
            provenance,
            calibration,
            {name: count for name, count in counts.items() if name in names},
            given={cut.group: _as_given(cut) for cut in given if cut.group in names} or None,
            settings=settings.channels,
            resolve=settings.resolve,
            progress=progress,
            store=store,
        )
        return choice, prune_channels(provenance, choice.removed, choice.tensors)

    refused: list[Reject] = []
    if given:  # a plan is carried out as it stands, or not at all
        choice, pruned = attempt(groups)
        decisions = tuple(given)
    else:
        (choice, pruned), groups, refused = cut_again(provenance, groups, attempt)
        decisions = tuple(channel_decision(g, choice.selections[g.name]) for g in groups)
    return _Pruned(
        program=pruned.program,
        kept=pruned.kept,
        selections=choice.selections,
        decisions=decisions,
        layers=choice.layers,
        refused=tuple(refused),
    )


def _as_given(cut: PruneChannels) -> Selection:
    """The units of a plan. Of their errors a plan knows the last one only."""
    errors = torch.full((len(cut.kept) + 1,), float("nan") if cut.error is None else cut.error, dtype=torch.float64)
    return Selection(order=torch.tensor(cut.kept, dtype=torch.long), errors=errors)


def _factorised(
    program: Program,
    ranks: Sequence[FactorizeLayer],
    calibration: CalibrationSet,
    settings: JointSettings,
    progress: Progress,
    store: AnalysisStore,
) -> Program:
    """Factors cut out of what the layers now see."""
    chosen = {d.layer: Option(scheme=d.scheme, ranks=d.ranks, macs=0, error=d.error or 0.0) for d in ranks}
    # the plan has chosen: what may be chosen does not matter any more
    free = replace(settings.ranks, schemes=tuple(SCHEMES), multiple_of=1, least=0.0, ignore=())

    def compute() -> list[Factors]:
        # options are not looked for: they are given
        given = {name: (option,) for name, option in chosen.items()}
        analysis = RankAnalysis(program, calibration, settings=free, resolve=settings.resolve, only=chosen, given=given)
        return analysis.factors(chosen, progress=progress)

    factors = stored_factors(store, program, calibration, ranks, compute, settings=free, resolve=settings.resolve)
    return factorize(program, factors)


def changes(mix: Mix) -> list[Any]:
    """What becomes of the network, to be known again by: not what that was predicted to lose and to save."""
    drops, counts, ranks = by_kind(mix)
    return [entry_exit(drops), counts, [[d.layer, d.scheme, d.ranks] for d in ranks]]


def by_kind(mix: Mix) -> tuple[list[DropBlock], dict[str, int], list[FactorizeLayer]]:
    """What a mix drops, in the order offered; the units that it leaves of each group; what it factorises."""
    drops, error = [], 0.0
    for item, proposal in mix.items():
        if item.kind == "drop_blocks":
            error += proposal.error
            drops.append(replace(proposal.change, error=error))
    counts = {item.name: proposal.change for item, proposal in mix.items() if item.kind == "prune_channels"}
    return drops, counts, [proposal.change for item, proposal in mix.items() if item.kind == "factorize"]


def _groups(provenance: Provenance, counts: Mapping[str, int]) -> list[UnitGroup]:
    """The groups to be cut: those that dropping has left as they were."""
    return [g for g in provenance.prunable if counts.get(g.name, len(g)) < len(g)]
