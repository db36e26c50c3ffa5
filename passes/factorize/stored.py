"""Ranks, trials of ranks and factors with their results kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...compiler.ir.program import Program
from ...compiler.rewrite.context import Context
from ...compiler.store.analysis_store import AnalysisStore, Tensors
from .decision import FactorizeLayer
from .factorize import Factors
from .rank_trials import RankTrials
from .select_ranks import Known, Option, RankAnalysis, RankSettings


def stored_rank_analysis(ctx: Context, settings: RankSettings) -> RankAnalysis:
    """A `RankAnalysis` of the original whose options are those found before, where they were; its moments are then
    collected only when factors are asked for."""
    fresh: list[RankAnalysis] = []

    def compute() -> dict[str, list[list[Any]]]:
        fresh.append(
            RankAnalysis(ctx.teacher, ctx.solve, settings=settings, resolve=ctx.resolve, progress=ctx.progress)
        )
        return {
            name: [[o.scheme, list(o.ranks), o.macs, o.error] for o in candidate.every]
            for name, candidate in fresh[0].candidates.items()
        }

    rows = ctx.store.value("ranks", [ctx.teacher, ctx.solve, settings, ctx.resolve], compute)
    if fresh:
        return fresh[0]
    known = Known(options={name: tuple(_option(*row) for row in found) for name, found in rows.items()})
    return RankAnalysis(ctx.teacher, ctx.solve, settings=settings, resolve=ctx.resolve, known=known)


def stored_factors(
    ctx: Context,
    program: Program,
    decisions: Sequence[FactorizeLayer],
    settings: RankSettings,
    compute: Callable[[], Sequence[Factors]],
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

    rows, tensors = ctx.store.result("factors", [program, ctx.solve, settings, ctx.resolve, decisions], computed)
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


def _option(scheme: str, ranks: Sequence[int], macs: int, error: float) -> Option:
    return Option(scheme=scheme, ranks=tuple(ranks), macs=macs, error=error)
