"""What dropping regions saves on a backend, region by region."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ...compiler.analysis.regions import Region
from ...compiler.export.exporter import to_onnx
from ...compiler.ir.program import Program
from ...compiler.onnx.bypass import onnx_without
from ...compiler.onnx.model_file import OnnxModel
from ...compiler.support.progress import Progress, silent
from ...runtime.probe.latency_probe import LatencyProbe
from ...runtime.probe.stored_latency import StoredLatency
from .drop_blocks import drop_blocks


def region_savings(
    latency: StoredLatency, regions: Sequence[Region], *, progress: Progress = silent
) -> dict[str, float]:
    """Share of the original's latency that each region saves.

    Regions of equal operations and shapes save the same, so a class is measured once, with all its members that do not
    overlap bypassed together: the noise is divided by their number. Variants alternate with the original in one run.
    """
    names = [region.name for region in regions]
    return dict(latency.kept("savings", [names], lambda: _measured(latency.probe, regions, progress)))


def _measured(probe: LatencyProbe, regions: Sequence[Region], progress: Progress) -> dict[str, float]:
    classes: dict[str, list[Region]] = {}
    for region in regions:
        classes.setdefault(_kind(probe.program, region), []).append(region)
    dropped = {key: _disjoint(members) for key, members in classes.items()}
    measured = probe.savings((_without(probe, members) for members in dropped.values()), progress=progress)
    share = {key: saved / len(members) for (key, members), saved in zip(dropped.items(), measured, strict=True)}
    return {region.name: share[key] for key, members in classes.items() for region in members}


def _without(probe: LatencyProbe, regions: Sequence[Region]) -> OnnxModel:
    """The exported original with regions bypassed: weights do not change latency, so nothing has to be solved, and the
    file is cut by the names of its values where it has them."""
    model = onnx_without(probe.model, [(r.entry, r.exit) for r in regions])
    return to_onnx(drop_blocks(probe.program, regions), opset=probe.conditions.opset) if model is None else model


def _kind(program: Program, region: Region) -> str:
    """Equal for regions of equal operations, shapes and settings."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(region.nodes, key=program.order.__getitem__):
        node = program.nodes[name]
        shapes = [
            tuple(o.meta["val"].shape) if hasattr(o.meta.get("val"), "shape") else () for o in node.all_input_nodes
        ]
        settings = [a for a in node.args if not hasattr(a, "op")]
        digest.update(f"{node.target}{shapes}{settings}".encode())
    return digest.hexdigest()


def _disjoint(regions: Sequence[Region]) -> list[Region]:
    chosen: list[Region] = []
    for region in regions:
        if not any(region.overlaps(other) for other in chosen):
            chosen.append(region)
    return chosen
