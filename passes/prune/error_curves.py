"""What each group loses at each of its counts, as predicted: the curve's shape from the layers that read it, its height
from one trial."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from ...compiler.analysis.provenance import Provenance
from ...compiler.analysis.unit_groups import UnitGroup
from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.data.output_error import BROKEN, bounded, output_error
from ...compiler.store.analysis_store import NOTHING_KEPT, AnalysisStore
from ...compiler.support.progress import Progress, silent
from ..cut.prune_channels import prune_channels
from ..solve.weighing import weighing_samples
from .select_channels import choose_channels, select_layerwise
from .submodular import Selection

#: Errors below this share of those without any unit are rounding.
NO_ERROR = 1e-6


def error_curves(
    provenance: Provenance,
    calibration: CalibrationSet,
    groups: Sequence[UnitGroup],
    *,
    selections: Mapping[str, Selection] | None = None,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> dict[str, torch.Tensor]:
    """For each group the error at the network's outputs, as predicted, with 0, 1, 2 ... units kept.

    The shape of a curve is that of the group's consumers (relative error after the greedy choice and re-solve); its
    height comes from one trial: the group alone pruned to half, in the order of that choice, and re-solved on a few
    samples (`weighing_samples`), and the output error measured on as many others. `selections` are those of
    `greedy_orders`, where they are known.
    """
    program = provenance.program
    selections = selections or greedy_orders(provenance, calibration, groups, progress=progress, store=store)
    curves = {name: selection.errors for name, selection in selections.items()}
    samples, others = _trial_samples(calibration, weighing_samples(program, len(groups)))
    for index, group in enumerate(groups):
        half = _trial_count(curves[group.name])
        kept = selections[group.name].first(half)
        height = store.value(
            "height of an order",
            [program, samples, others, group.name, kept.order],
            functools.partial(_height, provenance, samples, others, group, kept),
        )
        curves[group.name] = _scaled(curves[group.name], half, bounded(height))
        progress("weigh groups", index + 1, len(groups))
    return curves


def greedy_orders(
    provenance: Provenance,
    calibration: CalibrationSet,
    groups: Sequence[UnitGroup],
    *,
    progress: Progress = silent,
    store: AnalysisStore = NOTHING_KEPT,
) -> dict[str, Selection]:
    """All units of each group in the order in which they are chosen on the original network, and what is lost with so
    many of them."""
    counts = {g.name: len(g) for g in groups}

    def compute() -> tuple[None, dict[str, torch.Tensor]]:
        found = list(select_layerwise(provenance, calibration, groups, counts, progress=progress))
        tensors = {f"order {group.name}": selection.order for group, selection in found}
        return None, tensors | {f"errors {group.name}": selection.errors for group, selection in found}

    _, tensors = store.result("unit orders", [provenance.program, calibration, counts], compute)
    return {name: Selection(order=tensors[f"order {name}"], errors=tensors[f"errors {name}"]) for name in counts}


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
    provenance: Provenance, samples: CalibrationSet, others: CalibrationSet, group: UnitGroup, kept: Selection
) -> float:
    """The output error on the other samples with one group alone pruned to the units that are `kept`, and re-solved."""
    trial = choose_channels(provenance, samples, {group.name: kept})
    smaller = prune_channels(provenance, trial.removed, trial.tensors).program
    return output_error(provenance.program, smaller, others)
