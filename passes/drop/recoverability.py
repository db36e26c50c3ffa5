"""How well the rest of a network recovers from losing a region: the error left in the features before the head.

Five ways to ask, from cheap to expensive:
- ``plain``: bypass the region and run on. No recovery at all.
- ``local``: bypass it, re-solve the layer in front of it in closed form (its target becomes the mean of the teacher's
  stream before and after the
  region), run on. Nearly as cheap.
- ``calibrated``: the local error times the share of it that a full re-solve leaves, measured once for each region on
  its own: on few samples for all, then on more for the few that come out best. The default: local errors alone
  overrate early blocks, since more layers behind them help to recover, and few samples cannot tell which of the best
  is the best.
- ``exact``: bypass it and re-solve every layer behind it.
- ``adaptors``: bypass it and train the paper's 1x1 adaptors (`adaptors`): expensive, for comparison.
The errors are those of the student as it stands, with the regions chosen so far dropped and re-solved, so that the
choice is joint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, get_args

import torch

from ...compiler.analysis.regions import Region
from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.data.live_bytes import live_bytes
from ...compiler.data.output_error import relative_to
from ...compiler.devices.precision import WideSums, added, wide_sum
from ...compiler.ir.cost import weight_bytes
from ...compiler.ir.edit import bypass
from ...compiler.ir.execute import bind, descendants, required, run_until
from ...compiler.ir.program import Program
from ...compiler.processes.sharing import in_batches, own, spread
from ...compiler.store.analysis_store import Tensors
from ...compiler.store.changed_tensors import changed, with_changes
from ...compiler.support.memory import at_most, samples_at_once
from ...compiler.support.setting_checks import Allowed, check_kind, check_whole, check_word, settled
from ..solve.closed_form import solve, solving_macs
from ..solve.features import compared_outputs, head_features
from ..solve.layer_moments import MEMORY_BYTES
from ..solve.layers import add_delta, find_layers
from ..solve.moments import Moments, MomentSum, gram_bytes
from ..solve.resolve_network import QUICK_RESOLVE, ResolveSettings, batch_moments, batch_size_for, resolve_network
from ..solve.targets import Target, counterparts, trace_target
from ..solve.weighing import solve_macs
from .adaptors import AdaptorSettings, Around, train_adaptors
from .drop_blocks import changes_of_drops, drop_blocks, standing_for

#: The weights of networks that are looked at together, in bytes.
TRIALS_BYTES = 2 << 30
#: Multiply-accumulates that it may take to solve all that lies behind one region after another, about, and for how many
#: that is done all the same.
LOOK_MACS, LEAST_LOOKED = 4_000_000_000_000, 4

Mode = Literal["plain", "local", "calibrated", "exact", "adaptors"]


@dataclass(frozen=True, kw_only=True)
class RecoverabilitySettings:
    """`samples` of the calibration set are used, half to solve and half to judge; `mode` see the module. In the
    calibrated mode the best `finalists` are solved again, on `final_samples` and more rows of each; 0 leaves that
    out."""

    mode: Mode = "calibrated"
    samples: int = 64
    adaptors: AdaptorSettings = field(default_factory=AdaptorSettings)
    resolve: ResolveSettings = QUICK_RESOLVE
    finalists: int = 3
    final_samples: int = 128

    def __post_init__(self) -> None:
        check_word("mode", self.mode, get_args(Mode))
        check_whole("samples", self.samples, Allowed(least=1))
        check_whole("finalists", self.finalists, Allowed(least=0))
        check_whole("final_samples", self.final_samples, Allowed(least=1))
        check_kind("adaptors", self.adaptors, AdaptorSettings)
        check_kind("resolve", self.resolve, ResolveSettings)
        settled(self)


class Recoverability:
    """Predicted relative feature error for a set of chosen regions and one more. Call it with (chosen, candidates).

    Error = sum ||F_S - F_T||^2 / sum ||F_T||^2 over the judging samples, F the features before the head (the outputs,
    where one of
    `regions` lies behind the features or contains them: they would not show its loss). Only a part of
    the calibration set is read. The student of the regions chosen so far is re-solved once and kept until the choice
    changes.
    """

    def __init__(
        self,
        teacher: Program,
        calibration: CalibrationSet,
        *,
        regions: Sequence[Region] = (),
        settings: RecoverabilitySettings | None = None,
    ) -> None:
        self.settings = settings or RecoverabilitySettings()
        self.teacher = teacher
        self.features = judged_values(teacher, regions)
        self._regions = regions
        few = calibration.take(slice(0, self.settings.samples))
        half = max(1, len(few) // 2)
        self.fit, self.judge = (
            few.take(slice(0, half)),
            few.take(slice(half, None)) if len(few) > half else few,
        )
        size = in_batches(len(self.fit), batch_size_for(teacher, find_layers(teacher)[0].values()))
        # of either network the values in front of and behind each region stand while all are compared
        self.batch_size = samples_at_once(2 * live_bytes(teacher).whole, size)
        #: The samples that are read for every region, and those for finalists, where they are more.
        self.samples = few
        more = self.settings.final_samples if self.settings.mode == "calibrated" and self.settings.finalists else 0
        self.final_samples = calibration.take(slice(0, more))
        #: Of each region the share of its local error that is left when the layers behind it are re-solved too.
        self.recovery: dict[str, float] = {}
        self._state: tuple[tuple[str, ...], Program] = ((), teacher)
        #: The local error of each region by itself, once they were looked at.
        self._alone: dict[str, float] = {}

    def __call__(self, chosen: Sequence[Region], candidates: Sequence[Region]) -> Mapping[str, float]:
        """Region name -> error with that region dropped as well. The candidates share two passes over the samples."""
        if self.settings.mode != "calibrated":
            return self._errors(chosen, candidates, self.settings.mode)
        if not self.recovery:
            self.recovery = self.calibration_of(candidates)
        base = self._base(chosen)
        # what was found out on the way is not found out again
        known = {} if chosen else {r.name: self._alone[r.name] for r in candidates if r.name in self._alone}
        local = known if len(known) == len(candidates) else self._errors(chosen, candidates, "local")
        usual = sorted(self.recovery.values())[len(self.recovery) // 2]
        return {name: base + self.recovery.get(name, usual) * (error - base) for name, error in local.items()}

    def _errors(self, chosen: Sequence[Region], candidates: Sequence[Region], mode: Mode) -> dict[str, float]:
        student = self._student(chosen)
        if mode in {"exact", "adaptors"}:
            # each has weights of its own
            count = max(1, at_most(TRIALS_BYTES) // max(1, weight_bytes(student)))
            found: dict[str, float] = {}
            for start in range(0, len(candidates), count):
                few = candidates[start : start + count]
                errors = self._judge(student, self._rewritten(student, chosen, few, mode))
                found |= {region.name: error for region, error in zip(few, errors, strict=True)}
            return found
        trials = [self._trial(student, chosen, region, mode) for region in candidates]
        if mode == "local":
            self._solve_local(student, trials)
        errors = self._judge(student, trials)
        return {region.name: error for region, error in zip(candidates, errors, strict=True)}

    def calibration_of(self, candidates: Sequence[Region]) -> dict[str, float]:
        """How much of each region's local error is left when the layers behind it are re-solved too, with nothing else
        dropped. Of regions that are no finalists few samples say it, times what more of them changed for the
        finalists. Where networks are so large that it would take `LOOK_MACS`, it is said of those of least local error
        only."""
        left, exact = self._left(candidates)
        ranked = sorted((r for r in candidates if r.name in left), key=lambda r: (exact[r.name], r.name))
        finalists = [region for region in ranked[: self.settings.finalists] if left[region.name] > 0]
        if len(candidates) < 2 or not finalists or len(self.final_samples) <= len(self.samples):
            return left
        resolve = replace(self.settings.resolve, rows_per_column=ResolveSettings().rows_per_column)
        settings = replace(self.settings, samples=len(self.final_samples), resolve=resolve)
        again = Recoverability(self.teacher, self.final_samples, regions=self._regions, settings=settings)
        better, _ = again._left(finalists)
        changed = sorted(share / left[name] for name, share in better.items())[len(better) // 2]
        return {name: better.get(name, min(1.0, share * changed)) for name, share in left.items()}

    def _left(self, candidates: Sequence[Region]) -> tuple[dict[str, float], dict[str, float]]:
        """Of each region the share of its local error that solving all behind it leaves, and what it leaves."""
        local = self._alone = self._errors((), candidates, "local")
        looked = sorted(candidates, key=lambda r: (local[r.name], r.name))[: self._affordable]
        exact = self._errors((), [r for r in candidates if r in looked], "exact")
        left = {name: min(1.0, error / local[name]) if local[name] > 0 else 1.0 for name, error in exact.items()}
        return left, exact

    @cached_property
    def _affordable(self) -> int:
        """For how many regions all that lies behind them may be solved: half of the network, on the average."""
        macs = solve_macs(self.teacher, len(self.fit), self.settings.resolve.rows_per_column) / 2
        return max(LEAST_LOOKED, int(LOOK_MACS // macs))

    def _base(self, chosen: Sequence[Region]) -> float:
        """Error of the network as it stands."""
        student = self._student(chosen)
        features = tuple(standing_for(name, chosen) for name in self.features)
        calls = {n.name for n in student.graph.nodes if n.op == "call_function"}
        return self._judge(student, [_Trial(program=student, features=features, changed=calls)])[0] if chosen else 0.0

    def _student(self, chosen: Sequence[Region]) -> Program:
        """The network as it stands: `chosen` dropped and, but for the plain mode, re-solved on the few samples."""
        key = tuple(r.name for r in chosen)
        if key != self._state[0]:
            student = drop_blocks(self.teacher, chosen)
            if self.settings.mode != "plain":
                changes = changes_of_drops(chosen)
                student = resolve_network(
                    self.teacher, student, self.samples, changes, settings=self.settings.resolve
                ).program
            self._state = (key, student)
        return self._state[1]

    def _trial(self, student: Program, chosen: Sequence[Region], region: Region, mode: Mode) -> _Trial:
        """Local and plain trials run on the student's own graph with the exit's value replaced: nothing is rewritten
        to look."""
        entry = standing_for(region.entry, chosen)
        features = tuple(standing_for(name, chosen) for name in self.features)
        target = self._layer_in_front(student, [*chosen, region], entry) if mode == "local" else None
        moved = {target.layer.node, *descendants(student, [target.layer.node])} if target else set()
        changed = moved | descendants(student, [region.exit]) | {region.exit}
        return _Trial(program=student, features=features, changed=changed, bypass=(entry, region.exit), target=target)

    def _rewritten(
        self, student: Program, chosen: Sequence[Region], candidates: Sequence[Region], mode: Mode
    ) -> list[_Trial]:
        """Each candidate bypassed, and what lies behind it solved or adaptors trained. Each process takes some of them,
        the longest way behind the region first."""
        entries = [standing_for(region.entry, chosen) for region in candidates]
        if mode == "adaptors":
            rows = zip(entries, candidates, strict=True)
            programs = [self._adapted(student, entry, [*chosen, region]) for entry, region in rows]
        else:
            bare = [bypass(student, e, region.exit) for e, region in zip(entries, candidates, strict=True)]
            behind = [float(len(descendants(student, [region.exit]))) for region in candidates]
            work = [partial(self._solved, p, [*chosen, region]) for p, region in zip(bare, candidates, strict=True)]
            solved = spread(list(zip(behind, work, strict=True)))
            programs = [changed(program, *found) for program, found in zip(bare, solved, strict=True)]
        trials = []
        for program, region in zip(programs, candidates, strict=True):
            features = tuple(standing_for(name, [*chosen, region]) for name in self.features)
            calls = {n.name for n in program.graph.nodes if n.op == "call_function"}
            trials.append(_Trial(program=program, features=features, changed=calls))
        return trials

    def _solved(self, program: Program, regions: Sequence[Region]) -> tuple[dict[str, Any], Tensors]:
        """What solving all that lies behind dropped regions changes."""
        changes, settings = changes_of_drops(regions), self.settings.resolve
        found = resolve_network(self.teacher, program, self.fit, changes, settings=settings).program
        return with_changes({}, program, found)

    def _adapted(self, student: Program, entry: str, regions: Sequence[Region]) -> Program:
        around, bare = Around(entry=entry, drops=tuple(regions)), bypass(student, entry, regions[-1].exit)
        return train_adaptors(self.teacher, bare, self.fit, around, settings=self.settings.adaptors)

    def _layer_in_front(self, student: Program, regions: Sequence[Region], entry: str) -> Target | None:
        """The last layer whose anchor is the value that would play the dropped region's exit."""
        roles = counterparts(student, self.teacher, changes_of_drops(regions).dropped)
        layers, _ = find_layers(student)
        anchors = {entry, *(n.name for n in student.nodes[entry].all_input_nodes)} & roles.keys()
        for name in sorted(layers, key=student.order.__getitem__, reverse=True):
            if student.order[name] <= student.order[entry]:
                target = trace_target(student, layers[name], roles)
                if target.anchor in anchors:
                    return target
        return None

    def _solve_local(self, student: Program, trials: Sequence[_Trial]) -> None:
        """One pass over the fitting samples for all trials whose moments fit into memory together."""
        together: list[_Trial] = []
        for trial in trials:
            if trial.target is None:
                continue
            needed = sum(gram_bytes(student, t.target.layer) for t in [*together, trial] if t.target is not None)
            if together and needed > at_most(MEMORY_BYTES):
                self._solve_together(student, together)
                together = []
            together.append(trial)
        self._solve_together(student, together)

    def _solve_together(self, student: Program, trials: Sequence[_Trial]) -> None:
        targets = [t.target for t in trials if t.target is not None]
        ours = {name for t in targets for name in (t.layer.input, t.anchor)}
        theirs = {name for t in targets for name in t.counterparts}
        batches, thin = -(-len(self.fit) // self.batch_size), self.settings.resolve.rows_per_column
        for _, batch in own(self.fit.batches(self.batch_size)):
            with torch.no_grad():
                left = run_until(student, ours, bind(student, batch))
                right = run_until(self.teacher, theirs, bind(self.teacher, batch))
            for trial in trials:
                if trial.target is not None:
                    part = batch_moments(student, trial.target, left, right, batches, thin)
                    trial.sums.add(part)
        solved = [(trial, trial.target) for trial in trials if trial.target is not None]
        tasks = []
        for trial, target in solved:
            moments, trial.sums = trial.sums.moments(), MomentSum()
            tasks.append((solving_macs(moments), partial(self._weights, student, target, moments)))
        for (trial, _), tensors in zip(solved, spread(tasks), strict=True):
            trial.tensors = tensors

    def _weights(self, student: Program, target: Target, moments: Moments) -> dict[str, torch.Tensor]:
        correction = solve(moments, ridge=self.settings.resolve.ridge_for(len(self.fit)), bias=False)
        weight = student.module.get_parameter(target.layer.weight).detach()
        return {target.layer.weight: add_delta(weight, correction.weight)}

    def _judge(self, student: Program, trials: Sequence[_Trial]) -> list[float]:
        """Feature errors on the judging samples. What a trial does not change is run once for all of them."""
        shared = {name for t in trials for name in t.boundary()}
        sums = WideSums()
        for _, batch in own(self.judge.batches(self.batch_size)):
            with torch.no_grad():
                wanted = run_until(self.teacher, self.features, bind(self.teacher, batch))
                start = bind(student, batch)
                known = {**start, **run_until(student, shared, start)}
                sums.add("energy", added(wide_sum(v.square()) for v in wanted.values()))
                for index, trial in enumerate(trials):
                    values = trial.run(known)
                    sums.add(f"error {index}", _squared_distance(wanted, self.features, values, trial.features))
        found = sums.floats()
        return [relative_to(found, f"error {index}", "energy") for index in range(len(trials))]


def judged_values(program: Program, regions: Sequence[Region]) -> tuple[str, ...]:
    """The features before the head when every region's loss reaches them, else the outputs."""
    features = head_features(program)
    for region in regions:
        reached = descendants(program, [region.exit]) | {region.exit}
        if not reached.issuperset(features):
            return tuple(node.name for node in compared_outputs(program))
    return features


@dataclass(kw_only=True)
class _Trial:
    """One candidate: the program to run, the nodes whose values differ from the student's, and the locally solved
    weights.

    With `bypass` (entry, exit), the exit takes the entry's value.
    """

    program: Program
    features: tuple[str, ...]
    changed: set[str]
    bypass: tuple[str, str] | None = None
    target: Target | None = None
    sums: MomentSum = field(default_factory=MomentSum)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def boundary(self) -> set[str]:
        """Unchanged values that the changed part (or the features) read."""
        unchanged = self.program.nodes.keys() - self.changed
        wanted = [*self.features]
        start = unchanged
        if self.bypass is not None:
            wanted.append(self.bypass[0])
            start = unchanged | {self.bypass[1]}
        nodes = [self.program.nodes[n] for n in required(self.program, wanted, start)]
        operands = {o.name for n in nodes for o in n.all_input_nodes if o.op == "call_function"}
        return (operands | set(wanted)) - self.changed

    def run(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """The features' values."""
        usable = {n: value for n, value in known.items() if n in self.program.nodes and n not in self.changed}
        if self.bypass is not None:
            entry, exit_ = self.bypass
            usable[exit_] = run_until(self.program, [entry], usable, self.tensors)[entry]
        return run_until(self.program, self.features, usable, self.tensors)


def _squared_distance(
    theirs: Mapping[str, Any], names: Sequence[str], ours: Mapping[str, Any], own_names: Sequence[str]
) -> torch.Tensor:
    pairs = zip(names, own_names, strict=True)
    return added(wide_sum((ours[b] - theirs[a]).square()) for a, b in pairs)
