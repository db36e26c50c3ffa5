"""The dear passes with their results kept: each is looked up by what goes into it, and computed where it is not found.

A pass that changes weights is kept as the tensors that it changed. They are put back into the very program that it
started from, so names, graph and history come out as if it had run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ...passes.drop.recoverability import Recoverability
from ...passes.factorize.factorize import Factors
from ...passes.factorize.rank_trials import RankTrials
from ...passes.factorize.select_ranks import Option, RankAnalysis, RankSettings
from ...passes.mimic.settings import MimicSettings
from ...passes.mimic.training_stage import mimic
from ...passes.prune.select_channels import ChannelChoice, Variant, choose_channels
from ...passes.prune.submodular import Selection
from ...passes.solve.resolve_network import LayerError, Resolved, ResolveSettings, resolve_network
from ...passes.solve.targets import Kept
from ..analysis.provenance import Provenance
from ..analysis.regions import Region
from ..data.calibration_set import CalibrationSet
from ..data.output_error import bounded
from ..ir.edit import set_tensors
from ..ir.program import Program
from ..plan.plan import FactorizeLayer
from ..store.analysis_store import AnalysisStore, Tensors
from ..support.errors import MimicError, Reject
from ..support.progress import Progress, silent


def stored_resolve(
    store: AnalysisStore,
    teacher: Program,
    student: Program,
    calibration: CalibrationSet,
    dropped: Iterable[tuple[str, str]],
    *,
    kept: Mapping[str, Kept] | None = None,
    replaced: Iterable[str] = (),
    settings: ResolveSettings,
    progress: Progress = silent,
) -> Resolved:
    """`resolve_network`, or what it came to before."""
    pairs, names = list(dropped), list(replaced)

    def compute() -> tuple[dict[str, Any], Tensors]:
        found = resolve_network(
            teacher, student, calibration, pairs, kept=kept, replaced=names, settings=settings, progress=progress
        )
        data = {"layers": [asdict(e) for e in found.layers], "locked": [asdict(r) for r in found.locked]}
        return _with_changes(data, student, found.program)

    inputs = [teacher, student, calibration, pairs, kept or {}, names, settings]
    data, tensors = store.result("re-solve", inputs, compute)
    return Resolved(
        program=_changed(student, data, tensors),
        layers=tuple(LayerError(**e) for e in data["layers"]),
        locked=tuple(Reject(**r) for r in data["locked"]),
    )


def mimicked(
    store: AnalysisStore,
    teacher: Program,
    student: Program,
    calibration: CalibrationSet,
    held_out: CalibrationSet,
    *,
    kept: Mapping[str, Kept],
    settings: MimicSettings,
    seed: int,
    progress: Progress = silent,
) -> Program:
    """The student after `mimic`, or what it came to before; as it was, with a warning, when it cannot be trained (an
    operator without a gradient). A training that was cut off goes on from the last state that was kept."""

    inputs = [teacher, student, calibration, held_out, kept, settings, seed]

    def compute() -> tuple[dict[str, Any], Tensors]:
        found = mimic(
            teacher,
            student,
            calibration,
            held_out,
            kept=kept,
            settings=settings,
            seed=seed,
            progress=progress,
            checkpoint=store.checkpoint("mimic", inputs),
        )
        return _with_changes({}, student, found.program)

    try:
        return _changed(student, *store.result("mimic", inputs, compute))
    except MimicError as cause:
        warnings.warn(f"mimicking failed, the re-solved network is kept: {cause.message}", stacklevel=2)
        return student


def stored_channels(
    store: AnalysisStore,
    provenance: Provenance,
    calibration: CalibrationSet,
    counts: Mapping[str, int],
    *,
    variant: Variant = "asymmetric",
    stream_target: bool = True,
    given: Mapping[str, Selection] | None = None,
    settings: ResolveSettings | None = None,
    progress: Progress = silent,
) -> ChannelChoice:
    """`choose_channels`, or what it came to before."""

    def compute() -> tuple[dict[str, Any], Tensors]:
        found = choose_channels(
            provenance,
            calibration,
            counts,
            variant=variant,
            stream_target=stream_target,
            given=given,
            settings=settings,
            progress=progress,
        )
        tensors = {f"tensor {name}": value for name, value in found.tensors.items()} | {"removed": found.removed}
        for name, selection in found.selections.items():
            tensors |= {f"order {name}": selection.order, f"errors {name}": selection.errors}
        bounds = [[name, selection.ratio_bound] for name, selection in found.selections.items()]
        return {"layers": [asdict(e) for e in found.layers], "bounds": bounds}, tensors

    inputs = [provenance.program, calibration, counts, variant, stream_target, given or {}, settings]
    data, tensors = store.result("choose channels", inputs, compute)
    return ChannelChoice(
        removed=tensors["removed"],
        tensors={name.removeprefix("tensor "): v for name, v in tensors.items() if name.startswith("tensor ")},
        selections={
            name: Selection(order=tensors[f"order {name}"], errors=tensors[f"errors {name}"], ratio_bound=bound)
            for name, bound in data["bounds"]
        },
        layers=tuple(LayerError(**e) for e in data["layers"]),
    )


def stored_rank_analysis(
    store: AnalysisStore,
    program: Program,
    calibration: CalibrationSet,
    *,
    settings: RankSettings,
    resolve: ResolveSettings,
    progress: Progress = silent,
) -> RankAnalysis:
    """A `RankAnalysis` whose options are those found before, where they were; its moments are then collected only when
    factors are asked for."""
    fresh: list[RankAnalysis] = []

    def compute() -> dict[str, list[list[Any]]]:
        fresh.append(RankAnalysis(program, calibration, settings=settings, resolve=resolve, progress=progress))
        return {
            name: [[o.scheme, list(o.ranks), o.macs, o.error] for o in candidate.every]
            for name, candidate in fresh[0].candidates.items()
        }

    rows = store.value("ranks", [program, calibration, settings, resolve], compute)
    if fresh:
        return fresh[0]
    options = {name: tuple(_option(*row) for row in found) for name, found in rows.items()}
    return RankAnalysis(program, calibration, settings=settings, resolve=resolve, given=options)


def stored_factors(
    store: AnalysisStore,
    program: Program,
    calibration: CalibrationSet,
    decisions: Sequence[FactorizeLayer],
    compute: Callable[[], Sequence[Factors]],
    *,
    settings: RankSettings,
    resolve: ResolveSettings,
) -> list[Factors]:
    """The factors of a plan's layers, in its order."""

    def computed() -> tuple[list[list[Any]], Tensors]:
        found = compute()
        tensors: Tensors = {}
        for item in found:
            tensors |= {f"{item.layer} {i}": matrix for i, matrix in enumerate(item.matrices)}
            tensors[f"{item.layer} dense"] = item.dense
            if item.shift is not None:
                tensors[f"{item.layer} shift"] = item.shift
        return [[item.layer, len(item.matrices)] for item in found], tensors

    rows, tensors = store.result("factors", [program, calibration, settings, resolve, decisions], computed)
    return [
        Factors(
            layer=name,
            matrices=tuple(tensors[f"{name} {i}"] for i in range(count)),
            dense=tensors[f"{name} dense"],
            shift=tensors.get(f"{name} shift"),
        )
        for name, count in rows
    ]


class StoredTrials:
    """`RankTrials` whose results are kept."""

    def __init__(self, store: AnalysisStore, trials: RankTrials) -> None:
        self._store, self._trials = store, trials
        analysis = trials.analysis
        self._inputs = [analysis.program, analysis.calibration, trials.samples, analysis.settings, analysis.ridge]

    def alone(self, choice: Mapping[str, Option]) -> dict[str, float]:
        return self._kept("alone", choice, self._trials.alone)

    def error(self, choice: Mapping[str, Option]) -> float:
        return self._kept("error", choice, self._trials.error)

    def without(self, choice: Mapping[str, Option]) -> dict[str, float]:
        return self._kept("without", choice, self._trials.without)

    def _kept(self, name: str, choice: Mapping[str, Option], measure: Callable[[Mapping[str, Option]], Any]) -> Any:
        return self._store.value(f"rank trial {name}", [*self._inputs, choice], lambda: measure(choice))


class StoredErrors:
    """`Recoverability` whose errors are kept; its calibration is that of the candidates of the first call."""

    def __init__(self, store: AnalysisStore, recoverability: Recoverability) -> None:
        self._store, self._recoverability = store, recoverability
        r = recoverability
        self._inputs = [r.teacher, r.samples, r.features, r.settings]
        self._first: Sequence[Region] | None = None

    def __call__(self, chosen: Sequence[Region], candidates: Sequence[Region]) -> Mapping[str, float]:
        if self._first is None:
            self._first = list(candidates)
        inputs = [*self._inputs, *(_names(regions) for regions in (self._first, chosen, candidates))]
        found = self._store.value("drop errors", inputs, lambda: self._errors(chosen, candidates))
        return {name: bounded(error) for name, error in found.items()}

    def _errors(self, chosen: Sequence[Region], candidates: Sequence[Region]) -> dict[str, float]:
        first, recoverability = self._first or (), self._recoverability
        if recoverability.settings.mode == "calibrated" and not recoverability.recovery:
            inputs = [*self._inputs, _names(first)]
            recoverability.recovery = self._store.value(
                "recovery", inputs, lambda: recoverability.calibration_of(first)
            )
        return dict(recoverability(chosen, candidates))


def _names(regions: Sequence[Region]) -> list[str]:
    return [region.name for region in regions]


def _option(scheme: str, ranks: Sequence[int], macs: int, error: float) -> Option:
    return Option(scheme=scheme, ranks=tuple(ranks), macs=macs, error=error)


def _with_changes(data: Mapping[str, Any], before: Program, after: Program) -> tuple[dict[str, Any], Tensors]:
    """`data` with what the program's history grew by, and the tensors that are others than before."""
    old = before.module.state_dict()
    new = {n: t for n, t in after.module.state_dict().items() if t.numel() and t.data_ptr() != old[n].data_ptr()}
    return {**data, "notes": list(after.history[len(before.history) :])}, new


def _changed(program: Program, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Program:
    """The program with the tensors put in, under the notes of the pass that made them."""
    for note in data["notes"]:
        program = set_tensors(program, tensors, note=note)
    return program
