"""Which units to keep over a whole network, and the re-solved weights of the layers that consume them.

One streamed sweep in topological order. At each layer that consumes units, its moments are collected, the units of its
group are chosen, and the layer is solved without the others; what follows sees the layer as it then is. Removed units
are left out of their consumers' weights (zero columns), so the graph keeps its shape until `prune_channels` cuts it.
Three variants, as in El Halabi et al. (section 4): ``layerwise`` (the original network's activations),
``sequential`` (those of the network pruned so far, its own output as the target) and ``asymmetric`` (those of the
network pruned so far, the original's output as the target), the best there and here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ...compiler.analysis.label_trace import Slot
from ...compiler.analysis.provenance import Provenance
from ...compiler.analysis.unit_groups import UnitGroup
from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.ir.execute import descendants
from ...compiler.ir.program import Program
from ...compiler.processes.sharing import in_turn, spread
from ...compiler.support.memory import at_most
from ...compiler.support.progress import Progress, silent
from ..solve.closed_form import solve_without, solving_macs
from ..solve.layers import Layer, find_layers
from ..solve.lockstep import Lockstep, Step, plan_steps
from ..solve.moments import SplitMoments, check_finite, collect_split_moments, gram_bytes, split_batch_size
from ..solve.resolve_network import LayerError, ResolveSettings, batch_size_for, split_step_moments, write_correction
from ..solve.targets import Target, output_gain, trace_target
from .condensed import SharedColumns
from .settings import ChannelSettings
from .submodular import LOOKED_AT, Objective, Selection, select_units

#: The guarantee takes an eigendecomposition; beyond so many columns that would cost more than the selection, which then
#: does not look at all candidates in each step either.
BOUND_COLUMNS = LOOKED_AT
#: Gram matrices that are held at a time, in bytes, where there is plenty of memory.
MEMORY_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ChannelChoice:
    """`removed` units, the new weights of their consumers (old shapes, zero columns), what each group's selection
    reports, and the consumers' errors per row before (plain slicing) and after their solve."""

    removed: torch.Tensor
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    selections: Mapping[str, Selection] = field(repr=False)
    layers: tuple[LayerError, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A re-solvable layer and the units that its input channels carry, one label per channel of a group."""

    layer: Layer
    labels: torch.Tensor
    kernel: int

    def columns(self, units: torch.Tensor) -> torch.Tensor:
        """(units, columns a unit): the columns of A that each unit takes, -1 where it has fewer than the widest."""
        match = self.labels.unsqueeze(0) == units.unsqueeze(1)
        counts = match.sum(1)
        channels = match.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(counts.max()))]
        missing = torch.arange(channels.shape[1]) >= counts.unsqueeze(1)
        columns = channels.unsqueeze(2) * self.kernel + torch.arange(self.kernel)
        return columns.masked_fill(missing.unsqueeze(2), -1).flatten(1)

    def gone(self, removed: torch.Tensor) -> torch.Tensor:
        """A mask over columns: those of removed units."""
        return removed[self.labels].repeat_interleave(self.kernel)


def find_consumers(provenance: Provenance) -> dict[str, Consumer]:
    """The re-solvable layers that consume units, by node, in topological order."""
    program = provenance.program
    layers, _ = find_layers(program)
    found = {}
    for slot in provenance.slots:
        layer = layers.get(slot.node)
        if slot.role == "in" and layer is not None and layer.weight == slot.parameter:
            kernel = program.module.get_parameter(layer.weight)[0, 0].numel()
            found[slot.node] = Consumer(layer=layer, labels=slot.labels, kernel=kernel)
    return dict(sorted(found.items(), key=lambda item: program.order[item[0]]))


def _readers(consumers: Mapping[str, Consumer], group: UnitGroup) -> list[str]:
    """The nodes that consume units of a group."""
    return [n for n, c in consumers.items() if bool(torch.isin(c.labels, group.units).any())]


def choose_channels(
    provenance: Provenance,
    calibration: CalibrationSet,
    wanted: Mapping[str, int | Selection],
    *,
    how: ChannelSettings | None = None,
    resolve: ResolveSettings | None = None,
    progress: Progress = silent,
) -> ChannelChoice:
    """Choose the units to keep, so many of each group that is `wanted` by name, and re-solve the layers that consume
    them. A selection in the place of a number is taken as it is, and only re-solved.

    A group whose units several layers consume is chosen from the original network's moments of all of them, their
    relative objectives summed. Groups that one layer consumes alone (a concatenation) are chosen one after the other
    there, each with what the ones before have left. `how` says by which variant of the paper; with its `stream_target`
    a layer that feeds a residual addition is solved toward the teacher's stream minus the student's shortcut; without,
    toward its own output. A group that no re-solvable layer consumes is chosen by the norm of its producers' weights.
    Raises CalibrationError when activations are not finite.
    """
    how, settings, calibration = how or ChannelSettings(), resolve or ResolveSettings(), calibration.views_together()
    counts = {name: count if isinstance(count, int) else len(count.order) for name, count in wanted.items()}
    given = {name: found for name, found in wanted.items() if isinstance(found, Selection)}
    groups = [g for g in provenance.prunable if counts.get(g.name, len(g)) < len(g)]
    consumers = find_consumers(provenance)
    readers = {g.name: _readers(consumers, g) for g in groups}
    removed = torch.zeros(provenance.size, dtype=torch.bool)
    selections = {g.name: given[g.name] for g in groups if g.name in given}
    for group in groups:
        if group.name in selections:
            removed[group.without(selections[group.name].order)] = True
    early = [
        g for g in groups if g.name not in selections and (how.variant == "layerwise" or len(readers[g.name]) != 1)
    ]
    for group, selection in select_layerwise(
        provenance, calibration, early, counts, settings=settings, progress=progress
    ):
        selections[group.name] = selection
        removed[group.without(selection.order)] = True
    waiting: dict[str, list[UnitGroup]] = {}
    for group in groups:
        if group.name not in selections:
            waiting.setdefault(readers[group.name][0], []).append(group)
    nodes = [n for n in consumers if any(n in names for names in readers.values())]
    sweep = _Sweep(provenance.program, consumers, waiting, counts, how, settings)
    errors = sweep.run(calibration, nodes, removed, selections, progress)
    return ChannelChoice(
        removed=removed.nonzero().reshape(-1), tensors=sweep.tensors, selections=selections, layers=tuple(errors)
    )


def select_layerwise(
    provenance: Provenance,
    calibration: CalibrationSet,
    groups: Sequence[UnitGroup],
    counts: Mapping[str, int],
    *,
    settings: ResolveSettings | None = None,
    progress: Progress = silent,
) -> list[tuple[UnitGroup, Selection]]:
    """Selections from the original network's moments; consumers share passes over the data as memory allows.
    `settings` are those of the solves to come; without any, all rows are read, and nothing is said to be guaranteed."""
    program, consumers, calibration = provenance.program, find_consumers(provenance), calibration.views_together()
    guaranteed, settings = settings is not None, settings or ResolveSettings(rows_per_column=None)
    ridge, rows_per_column = settings.ridge_for(len(calibration)), settings.rows_per_column
    readers = {g.name: _readers(consumers, g) for g in groups}
    found = []
    for index, (batch, nodes) in enumerate(_batches(program, consumers, readers, groups, at_most(MEMORY_BYTES))):
        layers = {n: consumers[n].layer for n in nodes}
        size = split_batch_size(calibration, batch_size_for(program, layers.values()))
        moments = collect_split_moments(program, layers, calibration, batch_size=size, rows_per_column=rows_per_column)
        several = {n for n in nodes if sum(n in readers[g.name] for g in batch) > 1}
        parts = _Objectives(program, consumers, moments, several, ridge)

        def chosen(group: UnitGroup, parts: _Objectives = parts) -> Selection:
            objectives = [parts.of(n, group) for n in readers[group.name]]
            if not objectives:
                return select_by_norm(provenance, group, counts[group.name], read=True)
            return select_units(objectives, counts[group.name], bound=guaranteed and all(map(_cheap, objectives)))

        costs = [sum(_choosing_macs(moments[n]) for n in readers[group.name]) for group in batch]
        tasks = [(cost, partial(chosen, group)) for cost, group in zip(costs, batch, strict=True)]
        found += list(zip(batch, spread(tasks), strict=True))
        progress("channel moments", index + 1, index + 1)
    return found


def _batches(
    program: Program,
    consumers: Mapping[str, Consumer],
    readers: Mapping[str, Sequence[str]],
    groups: Sequence[UnitGroup],
    memory_bytes: int,
) -> Iterable[tuple[list[UnitGroup], list[str]]]:
    """Groups together with the consumers that they need, as many at a time as the Gram matrices leave room for."""
    shares = Counter(node for needs in readers.values() for node in needs)
    batch: list[UnitGroup] = []
    nodes: list[str] = []
    held = 0

    def taken_bytes(needs: Iterable[str]) -> int:
        # moments of all rows and of those held out, and an inverse of each where several groups share it
        return sum((4 if shares[n] > 1 else 2) * gram_bytes(program, consumers[n].layer) for n in needs)

    for group in groups:
        needs = readers[group.name]
        cost = taken_bytes(n for n in needs if n not in nodes)
        if batch and held + cost > memory_bytes:
            yield batch, nodes
            batch, nodes, held = [], [], 0
            cost = taken_bytes(needs)
        batch.append(group)
        nodes += [n for n in needs if n not in nodes]
        held += cost
    if batch:
        yield batch, nodes


def _choosing_macs(moments: SplitMoments) -> float:
    """About what a greedy choice among all columns of a layer takes: a step for each, which updates all others."""
    groups, size, outputs = moments.whole.cross.shape
    return float(groups * size**2 * (size + outputs))


def _cheap(objective: Objective) -> bool:
    return objective.gram.shape[1] <= BOUND_COLUMNS


class _Objectives:
    """The objectives of groups at the layers that read them, on the original network. A layer that `several` of the
    groups read is factorised once for them all."""

    def __init__(
        self,
        program: Program,
        consumers: Mapping[str, Consumer],
        moments: Mapping[str, SplitMoments],
        several: Collection[str],
        ridge: float,
    ) -> None:
        self.program, self.consumers, self.moments, self.several = program, consumers, moments, several
        self.ridge, self._shared = ridge, dict[str, SharedColumns]()

    def of(self, node: str, group: UnitGroup) -> Objective:
        """The objective of a group's units at a layer."""
        columns = self.consumers[node].columns(group.units)
        if node not in self.several:
            return self._made(node, columns)
        if node not in self._shared:
            self._shared[node] = SharedColumns(self._made(node, columns[:0]))
        return self._shared[node].objective(columns) or self._made(node, columns)

    def _made(self, node: str, columns: torch.Tensor) -> Objective:
        consumer = self.consumers[node]
        bias = trace_target(self.program, consumer.layer, {}).shift is not None
        return _objective(self.program, consumer, columns, self.moments[node], bias=bias, ridge=self.ridge)


def _objective(
    program: Program, consumer: Consumer, units: torch.Tensor, moments: SplitMoments, *, bias: bool, ridge: float
) -> Objective:
    """The consumer's objective for units with such columns, its outputs weighed by what follows them (`output_gain`),
    and that on the rows held out."""
    weight = consumer.layer.matrix(program.module.get_parameter(consumer.layer.weight).detach())
    gain = output_gain(program, trace_target(program, consumer.layer, {}))
    whole = Objective.of(moments.whole, weight, units, bias=bias, gain=gain, ridge=ridge)
    if moments.held is None:
        return whole
    return replace(whole, held=Objective.of(moments.held, weight, units, bias=bias, gain=gain))


def _without_columns(objective: Objective, gone: torch.Tensor) -> Objective:
    """The objective without the columns that are `gone` already, of the groups chosen before."""
    lost = torch.cat([gone, gone.new_zeros(objective.gram.shape[1] - len(gone))])
    return replace(objective, always=objective.always[~lost[objective.always]])


def select_by_norm(
    provenance: Provenance, group: UnitGroup, count: int, power: int = 2, *, read: bool = False
) -> Selection:
    """The `count` units whose making weights have the largest norm (L1 with `power` 1, L2 with 2). With `read`, times
    the norm of the weights that read them, so that what nobody reads goes first: what is left where no layer that
    could be re-solved consumes them."""
    made = _energies(provenance, "out", power, lambda slot: (slot.parameter, slot.dim) in group.producers)
    scores = made[group.units]
    if read:
        reading = _energies(provenance, "in", power, lambda slot: bool(torch.isin(slot.labels, group.units).any()))
        scores = scores * reading[group.units] if bool(reading[group.units].any()) else scores
    order = scores.argsort(descending=True, stable=True)
    left = 1 - torch.cat([scores.new_zeros(1), scores[order].cumsum(0)]) / scores.sum().clamp(min=1e-300)
    return Selection(order=order[:count], errors=left[: count + 1].clamp(min=0))


def _energies(provenance: Provenance, role: str, power: int, wanted: Callable[[Slot], bool]) -> torch.Tensor:
    """For each unit the sum of its weights' magnitudes to a power, over the slots of a role."""
    energies = torch.zeros(provenance.size, dtype=torch.float64)
    for slot in provenance.slots:
        if slot.role == role and wanted(slot):
            weight = provenance.program.tensor(slot.parameter).detach().cpu().double()
            energy = weight.movedim(slot.dim, 0).flatten(1).abs().pow(power).sum(1) if weight.dim() > 1 else weight * 0
            energies.scatter_add_(0, slot.labels, energy)
    return energies


class _Sweep:
    """The sequential part: consumers in topological order, each with the network as it stands before it."""

    def __init__(
        self,
        program: Program,
        consumers: Mapping[str, Consumer],
        waiting: Mapping[str, Sequence[UnitGroup]],
        counts: Mapping[str, int],
        how: ChannelSettings,
        settings: ResolveSettings,
    ) -> None:
        self.program, self.consumers, self.waiting, self.counts = program, consumers, waiting, counts
        self.how, self.settings = how, settings
        self.tensors: dict[str, torch.Tensor] = {}

    def run(
        self,
        calibration: CalibrationSet,
        nodes: Sequence[str],
        removed: torch.Tensor,
        selections: dict[str, Selection],
        progress: Progress,
    ) -> list[LayerError]:
        if not nodes:
            return []
        targets = [self._target(self.consumers[n].layer) for n in nodes]
        changed = descendants(self.program, nodes) | set(nodes)
        steps = plan_steps(self.program, self.program, [[t] for t in targets], changed)
        size = self.settings.batch_size or batch_size_for(self.program, [self.consumers[n].layer for n in nodes])
        size = split_batch_size(calibration, size)
        errors = []
        with Lockstep(
            self.program, self.program, calibration, batch_size=size, ram_bytes=self.settings.ram_bytes
        ) as lockstep:
            for index, (node, step) in enumerate(zip(nodes, steps, strict=True)):
                lockstep.advance(step, self.tensors)
                errors.append(self._step(lockstep, node, step, removed, selections, len(calibration)))
                lockstep.finish(step)
                progress("choose channels", index + 1, len(nodes))
        return errors

    def _target(self, layer: Layer) -> Target:
        target = trace_target(self.program, layer, {})
        if self.how.stream_target:
            return target
        own = target.shift if target.shift_scale is None else None
        return Target(
            layer=layer, anchor=layer.node, counterparts=(layer.node,), steps=(), shift=own, shift_scale=None, zone=None
        )

    def _step(
        self,
        lockstep: Lockstep,
        node: str,
        step: Step,
        removed: torch.Tensor,
        selections: dict[str, Selection],
        samples: int,
    ) -> LayerError:
        consumer, target = self.consumers[node], step.targets[0]
        moments = split_step_moments(lockstep, step, target, self.tensors, self.settings)
        check_finite(moments.whole, self.program, node)
        if self.how.variant == "sequential":
            moments = moments.without_residual()
        ridge = self.settings.ridge_for(samples)
        bias = target.shift is not None
        for group in self.waiting.get(node, ()):
            columns = consumer.columns(group.units)
            objective = _objective(self.program, consumer, columns, moments, bias=bias, ridge=ridge)
            # what other groups have lost by now explains nothing any more
            objective = _without_columns(objective, consumer.gone(removed))
            choose = partial(select_units, [objective], self.counts[group.name], bound=_cheap(objective))
            selections[group.name] = in_turn(_choosing_macs(moments), choose)
            removed[group.without(selections[group.name].order)] = True
        weight = consumer.layer.matrix(self.program.module.get_parameter(consumer.layer.weight).detach())
        solve = partial(solve_without, moments.whole, weight, consumer.gone(removed), ridge=ridge, bias=bias)
        correction = in_turn(solving_macs(moments.whole), solve)
        return write_correction(self.program, target, correction, moments.whole.rows, self.tensors)
