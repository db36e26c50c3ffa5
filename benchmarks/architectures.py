"""Architectures that nobody hard-coded: regions found, two blocks dropped, exported, compared, measured.

    pip install --no-deps torchvision timm && pip install huggingface_hub pyyaml
    python benchmarks/architectures.py [NAME ...]

Random weights and inputs: the question is structure, not accuracy. The two costliest blocks go.
A name is a torchvision classifier, else a timm model.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import foldcut
import numpy as np
import torch
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.cost import program_cost
from foldcut.passes.drop.drop_blocks import drop_blocks
from foldcut.runtime.measure.backend import resolve_backend
from foldcut.runtime.measure.conditions import Conditions
from foldcut.runtime.probe.latency_probe import LatencyProbe
from foreign_ops import declare_torchvision_ops

NAMES = [
    "resnet50",
    "mobilenet_v2",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_16",
    "densenet121",
    "vgg11_bn",
    "mixer_b16_224",
    "poolformer_s12",
    "coatnet_nano_rw_224",
]
TOLERANCE = 1e-4


def make(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    import torchvision

    torch.manual_seed(0)
    if name in torchvision.models.list_models():
        net, size = torchvision.models.get_model(name, weights=None), (3, 224, 224)
    else:
        import timm

        net = timm.create_model(name, pretrained=False)
        size = timm.data.resolve_model_data_config(net)["input_size"]
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02)  # a head that starts at zero would hide every difference
    return net.eval(), torch.randn(4, *size, generator=torch.Generator().manual_seed(0))


def run(name: str) -> dict[str, Any]:
    net, images = make(name)
    started = time.perf_counter()
    program = foldcut.capture(net, images)
    analysis = foldcut.find_regions(program)
    dropped = costliest(analysis.blocks, 2)
    student = drop_blocks(program, dropped)
    model, samples = to_onnx(student), foldcut.CalibrationSet.of(images)
    backend = resolve_backend("onnxruntime")
    probe = LatencyProbe(program, to_onnx(program), backend, samples, Conditions(batch=1))
    measured = probe.final(model)
    probe.close()
    return {
        "name": name,
        "regions": dict(Counter(r.kind for r in analysis.regions)),
        "blocks": len(analysis.blocks),
        "dropped": [r.path or r.name for r in dropped],
        "macs_ratio": program_cost(student).macs / program_cost(program).macs,
        "latency": {
            "ratio": measured.ratio,
            "low": measured.low,
            "high": measured.high,
            "before_ms": measured.before_ms,
        },
        "difference": worst_difference(student, model, images),
        "seconds": round(time.perf_counter() - started, 1),
    }


def costliest(blocks: Sequence[foldcut.Region], count: int) -> list[foldcut.Region]:
    """The blocks with the most MACs that do not overlap."""
    chosen: list[foldcut.Region] = []
    for block in sorted(blocks, key=lambda r: -r.cost.macs):
        if len(chosen) < count and not any(block.overlaps(other) for other in chosen):
            chosen.append(block)
    return chosen


def worst_difference(student: foldcut.Program, model: bytes, images: torch.Tensor) -> float:
    """ONNX Runtime against torch at batch 1 and 3, relative to the largest output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (1, 3):
        expected = student(images[:batch]).numpy()
        actual = session.run(None, {session.get_inputs()[0].name: images[:batch].numpy()})[0]
        if not np.abs(expected).max() > 0:
            raise RuntimeError("the network returns nothing but zeros: nothing would be compared")
        worst = max(worst, float(np.abs(actual - expected).max() / np.abs(expected).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    declare_torchvision_ops()
    rows = []
    print("| network | regions | blocks | dropped | MACs | latency ratio (95 %) | ONNX Runtime vs torch | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.names:
        row = run(name)
        rows.append(row)
        latency = row["latency"]
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(row["regions"].items()))
        spread = f"{latency['ratio']:.3f} ({latency['low']:.3f} to {latency['high']:.3f})"
        print(
            f"| {name} | {kinds} | {row['blocks']} | {', '.join(row['dropped'])} | x{row['macs_ratio']:.3f} "
            f"| {spread} | {row['difference']:.1e} | {row['seconds']:.0f} |",
            flush=True,
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    slower = [row["name"] for row in rows if row["latency"]["high"] >= 1]
    wrong = [row["name"] for row in rows if not row["difference"] <= TOLERANCE]
    print(f"not measurably faster: {slower or 'none'}; outside {TOLERANCE:g}: {wrong or 'none'}")


if __name__ == "__main__":
    main()
