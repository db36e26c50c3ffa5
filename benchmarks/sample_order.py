"""Does the order of the calibration set matter, and is the reported error the true one?

    python benchmarks/sample_order.py --models ../shared/models --data ../shared/data [--net resnet20] [--samples 500]
        [--goals blocks channels latency macs low_rank max_error] [--mimic] [--output sample_order.jsonl] [--quick]

The first so many training images, once sorted by class and once shuffled. Each compile gets the same images; accuracy
is on all test images by ONNX Runtime. Beside it the relative output error on the samples that judged plans on the way
(what was reported before samples were set apart for it), on the samples that nothing was chosen by, with its 95 %
interval, and on the test images, the truth as near as it can be had. Rows are appended to the output as they are made;
those that are there with the same sources and settings are not made again.

Two tables: accuracy in both orders (the first three goals), and how optimistic each error was (all goals, shuffled).
Exit code 1 when an order costs more than sampling error explains (--most points).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import foldcut
import numpy as np
import torch
from before_after import PARTS, digest
from cifar_data import Cifar, CifarResNet, load_cifar, load_resnet, onnx_accuracy
from foldcut.compiler.export.exporter import to_onnx
from rows import Row, append_line, best_compiled, read_lines

GOALS: dict[str, dict[str, Any]] = {
    "blocks": {"goal": foldcut.Blocks(3)},
    "channels": {"goal": foldcut.Channels(0.5)},
    "latency": {"goal": foldcut.Latency(0.6)},
    "macs": {"goal": foldcut.Macs(0.5), "rewrites": ("prune_channels",)},
    "low_rank": {"goal": foldcut.Macs(0.5), "rewrites": ("factorize",)},
    "max_error": {"goal": foldcut.MaxError(0.05)},
}
#: Those that are compiled in both orders.
ORDERED = ("blocks", "channels", "latency")
SETTINGS = ("net", "samples", "test_limit", "mimic", "seed", "quick")


def main() -> None:
    arguments = parse_arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = load_cifar(arguments.data, arguments.samples, arguments.test_limit, labelled=True)
    network = load_resnet(arguments.models, arguments.net)
    settings = {name: getattr(arguments, name) for name in SETTINGS} | {"sources": digest(imported_root())}
    done = {(row["goal"], row["order"]): row for row in read_lines(arguments.output) if row["settings"] == settings}
    wanted = [(name, order) for order in ("shuffled", "sorted") for name in arguments.goals]
    wanted = [(name, order) for name, order in wanted if order == "shuffled" or name in ORDERED]
    for name, order in wanted:
        if (name, order) not in done:
            row = {"goal": name, "order": order, "settings": settings} | compiled(network, data, name, order, arguments)
            done[name, order] = row
            append_line(arguments.output, row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    fine = order_table(done, arguments)
    optimism_table([done[name, "shuffled"] for name in arguments.goals])
    sys.exit(0 if fine else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--test-limit", type=int, help="take the first so many test images")
    parser.add_argument("--goals", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--mimic", action="store_true", help="with the gradient stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--most", type=float, default=1.0, help="points between the orders that pass for sampling error"
    )
    parser.add_argument("--quick", action="store_true", help="few images, a short search: does it run?")
    parser.add_argument("--output", type=Path, default=Path("sample_order.jsonl"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.samples, arguments.test_limit = min(arguments.samples, 60), min(arguments.test_limit or 500, 500)
    return arguments


def imported_root() -> Path:
    """The folder that holds the `foldcut` in use, as `digest` reads it."""
    root = Path(foldcut.__file__).parent.parent
    assert all((root / "foldcut" / part).is_dir() for part in PARTS), "foldcut is installed without its parts"
    return root


def ordered(data: Cifar, order: str, seed: int) -> torch.Tensor:
    """The calibration images class by class, or shuffled."""
    assert data.calibration_labels is not None
    if order == "sorted":
        return data.calibration[data.calibration_labels.argsort(stable=True)]
    return data.calibration[torch.randperm(len(data.calibration), generator=torch.Generator().manual_seed(seed))]


def compiled(network: CifarResNet, data: Cifar, name: str, order: str, arguments: argparse.Namespace) -> Row:
    """One compile, its accuracy, and its output error by three sets of samples."""
    images = ordered(data, order, arguments.seed)
    started = time.process_time()
    made = best_compiled(
        network,
        images,
        mimic=True if arguments.mimic else None,
        cache=False,
        seed=arguments.seed,
        progress=False,
        settings=foldcut.PipelineSettings(search_seconds=20 if arguments.quick else None),
        **GOALS[name],
    )
    seconds = time.process_time() - started
    report = made.report.to_dict()
    tested = report.get("test") or {}
    original = to_onnx(foldcut.capture(network, images[:2]))
    return {
        "accuracy": onnx_accuracy(made.onnx, data),
        "met": report["met"],
        "decisions": [str(d) for d in made.plan.decisions],
        "judged": list(report["output_errors"].values())[-1],
        "tested": tested.get("error", report["output_error"]),
        "low": tested.get("low"),
        "high": tested.get("high"),
        "true": true_error(original, made.onnx, data.test),
        "latency": report["latency"],
        "calibration": report["calibration"],
        "cpu_s": seconds,
    }


def true_error(original: bytes, delivered: bytes, images: torch.Tensor, batch: int = 100) -> float:
    """sum ||S - T||^2 / sum ||T||^2 over the outputs on all test images, by ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [
        onnxruntime.InferenceSession(m, options, providers=["CPUExecutionProvider"]) for m in (original, delivered)
    ]
    error = energy = 0.0
    for start in range(0, len(images), batch):
        wanted, found = (
            s.run(None, {s.get_inputs()[0].name: images[start : start + batch].numpy()})[0].astype(np.float64)
            for s in sessions
        )
        error, energy = error + float(np.square(found - wanted).sum()), energy + float(np.square(wanted).sum())
    return error / energy


def order_table(done: Mapping[tuple[str, str], Row], arguments: argparse.Namespace) -> bool:
    """Print accuracy in both orders; whether they agree."""
    names = [name for name in ORDERED if name in arguments.goals]
    images = arguments.test_limit or 10_000
    print(f"\n| goal | shuffled | sorted by class | points | {images} test images' standard error | same plan |")
    print(f"|{'---|' * 6}")
    fine = True
    for name in names:
        shuffled, by_class = done[name, "shuffled"], done[name, "sorted"]
        points = by_class["accuracy"] - shuffled["accuracy"]
        share = shuffled["accuracy"] / 100
        sampling = 100 * math.sqrt(share * (1 - share) / images)
        fine = fine and points >= -max(arguments.most, 2 * sampling)
        same = "yes" if shuffled["decisions"] == by_class["decisions"] else "no"
        print(
            f"| {GOALS[name]['goal']} | {shuffled['accuracy']:.2f} | {by_class['accuracy']:.2f} | {points:+.2f} "
            f"| {sampling:.2f} | {same} |"
        )
    return fine


def optimism_table(rows: Sequence[Row]) -> None:
    """Print what each set of samples says of the error, and by how much it falls short of the test images'."""
    print("\n| goal | judged | test samples (95 %) | test images | judged / true | tested / true | within |")
    print(f"|{'---|' * 7}")
    for row in rows:
        known = row["low"] is not None
        spread = f" ({row['low']:.4f} to {row['high']:.4f})" if known else ""
        within = ("yes" if row["low"] <= row["true"] <= row["high"] else "no") if known else "no interval"
        print(
            f"| {GOALS[row['goal']]['goal']} | {row['judged']:.4f} | {row['tested']:.4f}{spread} | {row['true']:.4f} "
            f"| x{row['judged'] / row['true']:.2f} | x{row['tested'] / row['true']:.2f} | {within} |"
        )


if __name__ == "__main__":
    main()
