"""Dropping and pruning ResNet-20 from its ONNX file and from the torch module: same plan, same accuracy?

    python benchmarks/cifar_onnx.py --data ../shared/data --models ../shared/models [--samples 500] [--test N]

For each goal both networks are compiled with the same settings and seed. The ONNX file has its batch norms folded into
the convolutions, so the two calibrations differ by rounding and the re-solved weights by a little more. The result of
the file is compared with the file's interface, and its accuracy is taken from the written `model.onnx` in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import foldcut
import numpy as np
import onnx
import onnxruntime
import torch
from cifar_data import CifarResNet, load_cifar
from foldcut.compiler.onnx.signature import OnnxSignature
from foldcut.passes.drop.decision import DropBlock
from foldcut.passes.prune.decision import PruneChannels

GOALS: dict[str, tuple[foldcut.Blocks | foldcut.Channels | foldcut.Macs, tuple[str, ...]]] = {
    "drop 2 blocks": (foldcut.Blocks(2), ("drop_blocks",)),
    "drop 3 blocks": (foldcut.Blocks(3), ("drop_blocks",)),
    "keep 0.5": (foldcut.Channels(keep=0.5), ("prune_channels",)),
    "MACs 0.6": (foldcut.Macs(0.6), ("prune_channels",)),
}


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    data = load_cifar(arguments.data, arguments.samples, arguments.test)
    file = arguments.models / "resnet20.onnx"
    model = CifarResNet(3).eval()
    model.load_state_dict(torch.load(arguments.models / "resnet20.pt", weights_only=True))
    print(f"dense: torch {accuracy(model, data):.2f} %, file {file_accuracy(file.read_bytes(), data):.2f} %")
    print("| goal | from torch % | from ONNX % | same decisions | interface kept | latency ratio torch / ONNX |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in arguments.goals:
        goal, rewrites = GOALS[name]
        options: dict[str, Any] = {"goal": goal, "rewrites": rewrites, "progress": False, "seed": 0}
        options["views"] = (foldcut.horizontal_flip,)
        options["mimic"] = arguments.mimic
        ours = foldcut.compile(model, data.calibration, **options)
        theirs = foldcut.compile(file, data.calibration, **options)
        print(row(name, ours, theirs, file, data), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--test", type=int, default=None, help="test images (default: all)")
    parser.add_argument("--goals", nargs="*", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--mimic", action="store_true", help="with the gradient stage")
    return parser.parse_args()


def row(name: str, ours: foldcut.Compiled, theirs: foldcut.Compiled, file: Path, data: Any) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        written = (theirs.save(Path(folder) / "out") / "model.onnx").read_bytes()
    before, after = (OnnxSignature.of(m) for m in (onnx.load(file), onnx.load_from_string(written)))
    kept = before == after
    ratios = f"x{ours.report.latency['ratio']:.3f} / x{theirs.report.latency['ratio']:.3f}"
    same = agreement(decisions(ours), decisions(theirs))
    cells = [name, f"{accuracy(ours.module, data):.2f}", f"{file_accuracy(written, data):.2f}", same, kept, ratios]
    return f"| {' | '.join(map(str, cells))} |"


def decisions(compiled: foldcut.Compiled) -> list[Any]:
    """What was cut, in terms that both graphs share: positions of dropped regions, counts of kept channels."""
    teacher = compiled.outcome.ctx.teacher
    convolutions = [n for n in teacher.nodes if n.startswith("conv2d")]
    order = teacher.order
    found: list[Any] = []
    for decision in compiled.plan.decisions:
        if isinstance(decision, DropBlock):
            inside = [i for i, n in enumerate(convolutions) if order[decision.entry] < order[n] < order[decision.exit]]
            found.append(("drop", inside))
        elif isinstance(decision, PruneChannels):
            found.append(("prune", decision.group, len(decision.kept), decision.kept))
    return found


def agreement(ours: list[Any], theirs: list[Any]) -> str:
    """How many decisions are the same, and for pruning how many of the kept channels are."""
    if ours == theirs:
        return "all"
    equal = sum(a == b for a, b in zip(ours, theirs, strict=False))
    text = f"{equal} of {max(len(ours), len(theirs))}"
    pairs = [(set(a[3]), set(b[3])) for a, b in zip(ours, theirs, strict=False) if a[0] == b[0] == "prune"]
    if pairs:
        text += f", {sum(len(a & b) for a, b in pairs)} of {sum(len(a) for a, _ in pairs)} channels"
    return text


def accuracy(model: torch.nn.Module, data: Any) -> float:
    with torch.no_grad():
        hits = [
            (model(x).argmax(1) == y).sum() for x, y in zip(data.test.split(500), data.labels.split(500), strict=True)
        ]
    return 100 * float(sum(hits)) / len(data.labels)  # type: ignore[arg-type]


def file_accuracy(content: bytes, data: Any) -> float:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    logits = np.concatenate([session.run(None, {name: x.numpy()})[0] for x in data.test.split(500)])
    return 100 * float((logits.argmax(1) == data.labels.numpy()).mean())


if __name__ == "__main__":
    main()
