"""`MaxLoss` on CIFAR-10: what labelled samples promise, and what is lost on test images that no compile has seen.

    python benchmarks/max_loss.py --data ../shared/data --models ../shared/models [--network resnet20] [--labelled 5000]
        [--loss 1.0] [--seeds 0 1 2 3 4] [--rewrites drop_blocks ...] [--mimic] [--output max_loss.jsonl]

Every row is one compile. Seed s takes training images of its own, s x labelled to (s + 1) x labelled, with their
labels, as `foldcut.Top1`: two fifths of them are what the metric is read on. The network was trained on these images,
so its top-1 on them is higher than on new ones; --held-out takes them from the test images instead, a random choice of
the last 5,000, and tests on the first 5,000. A row has the latency ratio as the compile measured it (ONNX Runtime,
batch 1, one thread), what the metric said (points lost, and the most at 95 %), and top-1 of original and result on the
test images. A goal is held when the points lost there are at most those asked for. Exit code 1 when one is not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import foldcut
import torch
from cifar_data import Cifar, accuracy, load_cifar, load_resnet

#: Test images that --held-out leaves for testing.
LEFT = 5000


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    net = load_resnet(arguments.models, arguments.network)
    needed = arguments.labelled * (max(arguments.seeds) + 1)
    data = load_cifar(arguments.data, 1 if arguments.held_out else needed, labelled=True)
    test = Cifar(data.calibration, data.test[:LEFT], data.labels[:LEFT]) if arguments.held_out else data
    before = accuracy(net, test)
    print(f"{arguments.network}: {before:.2f} % on {len(test.labels)} test images", flush=True)
    rows = []
    for seed in arguments.seeds:
        images, labels = labelled(data, seed, arguments)
        rows.append(run(net, images, labels, test, before, seed, arguments))
        print(json.dumps(rows[-1]), flush=True)
        if arguments.output:
            arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = sum(row["held"] for row in rows)
    print(f"held in {held} of {len(rows)}")
    sys.exit(held < len(rows))


def labelled(data: Cifar, seed: int, arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples of a seed and their labels."""
    if arguments.held_out:
        order = torch.randperm(len(data.labels) - LEFT, generator=torch.Generator().manual_seed(seed)) + LEFT
        return data.test[order[: arguments.labelled]], data.labels[order[: arguments.labelled]]
    part = slice(seed * arguments.labelled, (seed + 1) * arguments.labelled)
    assert data.calibration_labels is not None
    return data.calibration[part], data.calibration_labels[part]


def run(
    net: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, test: Cifar, before: float, *rest: Any
) -> dict[str, Any]:
    """One compile, and its result on the test images."""
    seed, arguments = rest
    began = time.perf_counter(), time.process_time()
    out = foldcut.compile(
        net,
        images,
        goal=foldcut.MaxLoss(arguments.loss),
        evaluate=foldcut.Top1(labels),
        rewrites=arguments.rewrites or None,
        mimic=arguments.mimic,
        seed=seed,
        cache=False,
        progress=False,
    )
    after = accuracy(out.module, test)
    metric, latency = out.report.metric, out.report.latency
    return {
        "seed": seed,
        "ratio": round(latency["ratio"], 3),
        "low": round(latency["low"], 3),
        "high": round(latency["high"], 3),
        "decisions": len(out.plan.decisions),
        "read_on": metric["samples"],
        "read_lost": round(metric["loss"], 3),
        "read_most": round(metric["most"], 3),
        "calls": metric["calls"],
        "evaluate_s": metric["seconds"],
        "finalists": [[round(f[key], 4) for key in ("ratio", "error", "loss", "most")] for f in metric["finalists"]],
        "test_before": before,
        "test_after": after,
        "test_lost": round(before - after, 2),
        "held": before - after <= arguments.loss,
        "wall_s": round(time.perf_counter() - began[0]),
        "cpu_s": round(time.process_time() - began[1]),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--network", choices=("resnet20", "resnet56"), default="resnet20")
    parser.add_argument("--labelled", type=int, default=5000)
    parser.add_argument("--loss", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rewrites", nargs="*", default=[])
    parser.add_argument("--mimic", action="store_true")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
