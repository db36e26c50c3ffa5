"""Low rank without labels: accuracy and latency of each scheme at equal multiply-accumulates, on trained networks.

    python benchmarks/low_rank.py --data ../shared/data --models ../shared/models [--network resnet20 resnet56]
        [--macs 0.75 0.5 0.35] [--samples 500] [--method ...] [--output low_rank.json] [--resume]

Every row is a whole compile from the unlabelled calibration images: ranks of all layers chosen together for the MACs
goal, then measured on ONNX Runtime, one thread, batch 1, in pairs with the original; accuracy on all test images.
Methods: `default` (all schemes, chosen layer by layer, on data, re-solved), each scheme alone on data and re-solved,
each scheme from the weights alone with nothing solved again (`plain_*`), and the default with mimicking behind it.
Exit code 1 when the default at half of ResNet-20's MACs is more than 5 points below the original.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import foldcut
import torch
from cifar_data import Cifar, CifarResNet, load_cifar, load_resnet, onnx_accuracy
from foldcut.compiler.export.exporter import to_onnx
from rows import Row, best_compiled, write_json

METHODS = (
    "default",
    "spatial",
    "channel",
    "tucker",
    "plain_spatial",
    "plain_channel",
    "plain_tucker",
    "default+mimic",
)
MOST_BELOW = 5.0


def main() -> None:
    arguments = parse_arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    data = load_cifar(arguments.data, arguments.samples, arguments.test_limit)
    rows = earlier_rows(arguments)
    done = {(row["network"], row["method"], row.get("goal")) for row in rows}
    print("| network | method | MACs | layers | accuracy | output error | latency ratio (95 %) | CPU s |")
    print(f"|{'---|' * 8}")
    for name in arguments.network:
        network = load_resnet(arguments.models, name)
        wanted = [("dense", None), *((method, ratio) for ratio in arguments.macs for method in arguments.method)]
        for method, ratio in wanted:
            if (name, method, ratio) in done:
                continue
            if ratio is None:
                rows.append(dense_row(name, network, data))
            else:
                rows.append(compiled_row(name, network, data, method, ratio, arguments))
            print(table_row(rows[-1]), flush=True)
            if arguments.output:
                write_json(arguments.output, {"samples": arguments.samples, "rows": rows})
    sys.exit(0 if near_dense(rows) else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--network", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--macs", nargs="+", type=float, default=[0.75, 0.5, 0.35])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--multiple-of", type=int, default=foldcut.RankSettings().multiple_of)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--test-limit", type=int, help="take the first so many test images")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file, written after each row")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the output file has")
    return parser.parse_args()


def earlier_rows(arguments: argparse.Namespace) -> list[Row]:
    """The rows of an earlier run with the same number of samples, shown again."""
    if not (arguments.resume and arguments.output and arguments.output.exists()):
        return []
    found = json.loads(arguments.output.read_text())
    if found["samples"] != arguments.samples:
        sys.exit(f"{arguments.output} was made with {found['samples']} samples: give another --output")
    return list(found["rows"])


def settings_of(method: str, multiple_of: int) -> foldcut.PipelineSettings:
    """The pipeline of a method. A plain one takes the weights' own decomposition and solves nothing again."""
    ranks = foldcut.RankSettings(multiple_of=multiple_of)
    name = method.removeprefix("plain_").partition("+")[0]
    if name != "default":
        ranks = replace(ranks, schemes=(name, "channel") if name != "channel" else ("channel",))
    if method.startswith("plain_"):
        return foldcut.PipelineSettings(ranks=replace(ranks, metric="weights", resolve=False))
    return foldcut.PipelineSettings(ranks=ranks)


def compiled_row(
    name: str, network: CifarResNet, data: Cifar, method: str, ratio: float, arguments: argparse.Namespace
) -> Row:
    started = time.process_time()
    made = best_compiled(
        network,
        data.calibration,
        goal=foldcut.Macs(ratio),
        rewrites=("factorize",),
        mimic=method.endswith("+mimic"),
        settings=settings_of(method, arguments.multiple_of),
        seed=arguments.seed,
        progress=False,
    )
    report = made.report
    return {
        "network": name,
        "method": method,
        "goal": ratio,
        "met": report.met,
        "macs": report.macs["after"] / report.macs["before"],
        "layers": len(report.decisions),
        "accuracy": onnx_accuracy(made.onnx, data),
        "output_errors": dict(report.output_errors),
        "latency": dict(report.latency),
        "schemes": [d["scheme"] for d in report.decisions],
        "seconds": report.seconds,
        "cpu_s": time.process_time() - started,
    }


def dense_row(name: str, network: CifarResNet, data: Cifar) -> Row:
    program = foldcut.capture(network, data.calibration[:2])
    model = to_onnx(program)
    return {"network": name, "method": "dense", "macs": 1.0, "accuracy": onnx_accuracy(model, data)}


def table_row(row: Row) -> str:
    if row["method"] == "dense":
        return f"| {row['network']} | dense | 1 | | {row['accuracy']:.2f} | 0 | 1 | |"
    latency = row["latency"]
    spread = f"{latency['ratio']:.3f} ({latency['low']:.3f} to {latency['high']:.3f})"
    error = list(row["output_errors"].values())[-1]
    unmet = "" if row["met"] else " (goal not met)"
    return (
        f"| {row['network']} | {row['method']} | {row['macs']:.3f}{unmet} | {row['layers']} | {row['accuracy']:.2f} "
        f"| {error:.4f} | {spread} | {row['cpu_s']:.0f} |"
    )


def near_dense(rows: list[Row]) -> bool:
    """Whether the default at half the MACs of ResNet-20 is within 5 points of dense, where that was run."""
    found = {(row["network"], row["method"], row.get("goal")): row["accuracy"] for row in rows}
    half, dense = found.get(("resnet20", "default", 0.5)), found.get(("resnet20", "dense", None))
    if half is None or dense is None:
        return True
    print(f"\nResNet-20 at half its MACs: {half - dense:+.2f} points, at most {-MOST_BELOW:g}")
    return bool(half >= dense - MOST_BELOW)


if __name__ == "__main__":
    main()
