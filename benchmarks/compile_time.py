"""What a compile costs: CPU seconds, peak memory and stages of two states of foldcut, in one run.

    python benchmarks/compile_time.py --before v0.1.0 --after . --models ../shared/models --data ../shared/data
        [--rows mv2_blocks r56_latency ...] [--output compile_time.jsonl]

A state is a git revision or the folder of a checkout. Each row is a whole compile on one thread, in a process of its
own that imports foldcut from that state and keeps nothing; the two states take turns, row by row. A row of the output
that was made with the same sources is not made again.

    mv2_blocks    MobileNetV2 at 224 px, 300 images, Blocks(2), no gradient
    mv2_latency   the same, Latency(0.7), all rewrites
    r56_latency   ResNet-56, 500 images, Latency(0.45), all rewrites, no gradient
    r56_far       the same, Latency(0.3): int8 alone does not get there
    r56_blocks    ResNet-56, 500 images, Blocks(8), mimicked
    detector      a fully convolutional detector with random weights, 16 images of 1280 x 960, Macs(0.8), no gradient
    small         a network of 94,000 parameters, 64 images of 32 px, Latency(0.7), no gradient
    swin_t_4, swin_t_200, densenet121_4, densenet121_200, vit_b_16_4, vit_b_16_200
                  torchvision's, with random weights, so many images of 224 px, Channels(0.5), no gradient
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from before_after import SIDES, child_row, digest, import_root
from foreign_ops import declare_torchvision_ops
from rows import Row, append_line, best_compiled, read_lines

#: CPU seconds that a row is to take at most.
LIMITS_S: dict[str, float | None] = {
    "mv2_blocks": 70.0,
    "mv2_latency": 400.0,
    "r56_latency": 150.0,
    "r56_far": None,
    "r56_blocks": 120.0,
    "detector": 150.0,
    "small": 25.0,
}
OUTSIDE = tuple(f"{name}_{count}" for name in ("swin_t", "densenet121", "vit_b_16") for count in (4, 200))


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        json.dump(made_row(arguments.child, arguments), sys.stdout)
        return
    done = {(row["row"], row["sources"]): row for row in read_lines(arguments.output)}
    print("| row | limit | before, CPU s | after, CPU s | ratio | MiB | top-1 | stages after, CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    failed = False
    with tempfile.TemporaryDirectory(prefix="foldcut-compile-time-") as folder:
        roots = {side: import_root(getattr(arguments, side), Path(folder) / side) for side in SIDES}
        sources = {side: digest(root) for side, root in roots.items()}
        for index, name in enumerate(arguments.rows):
            for side in SIDES if index % 2 == 0 else SIDES[::-1]:
                key = name, sources[side]
                if key not in done:
                    done[key] = {"row": name, "sources": sources[side], **run_apart(name, roots[side], arguments)}
                    append_line(arguments.output, done[key])
            before, after = (done[name, sources[side]] for side in SIDES)
            failed = failed or "failure" in after
            print(line(name, before, after), flush=True)
    sys.exit(1 if failed else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [*LIMITS_S, *OUTSIDE]
    parser.add_argument("--before", help="a git revision, or the folder of a checkout")
    parser.add_argument("--after", default=".", help="the same")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(LIMITS_S))
    parser.add_argument("--seconds", type=float, default=3600.0, help="a row that takes longer is given up")
    parser.add_argument("--output", type=Path, default=Path("compile_time.jsonl"))
    parser.add_argument("--child", choices=rows, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.child and not arguments.before:
        parser.error("--before is missing")
    return arguments


def run_apart(name: str, root: Path, arguments: argparse.Namespace) -> Row:
    """One row in a process that imports foldcut from `root`; what went wrong, where it failed."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", name]
    command += ["--models", str(arguments.models), "--data", str(arguments.data)]
    return child_row(command, root, arguments.seconds)


def made_row(name: str, arguments: argparse.Namespace) -> Row:
    """A compile with the foldcut that this process imports."""
    import foldcut
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, samples, goal, accuracy = case(name, arguments)
    options: dict[str, Any] = {"cache": False, "progress": False}
    options["mimic"] = foldcut.MimicSettings() if name == "r56_blocks" else None
    plain_s = 0.0 if name in LIMITS_S else without_compile_s(model, samples)
    started = time.process_time()
    made = best_compiled(model, samples, goal=goal, **options)
    seconds = time.process_time() - started
    report = made.report.to_dict()
    return {
        "imported": foldcut.__file__,
        "cpu_s": seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "limit_s": LIMITS_S[name] if name in LIMITS_S else 3 * plain_s + 20,
        "stages": {stage: taken["cpu"] for stage, taken in report["seconds"].items()},
        "met": report["met"],
        "latency": report["latency"]["ratio"],
        "output_error": report["output_error"],
        "accuracy": accuracy(made.onnx),
    }


def case(name: str, arguments: argparse.Namespace) -> tuple[Any, Any, Any, Callable[[bytes], float | None]]:
    """(network, samples, goal, what measures top-1 of a file)."""
    import foldcut
    import torch
    from cifar_data import load_cifar, load_resnet, onnx_accuracy

    torch.manual_seed(0)
    if name.startswith("mv2"):
        from imagenet_data import load_imagenet

        data = load_imagenet(arguments.data, 300)
        goal: foldcut.Goal = foldcut.Blocks(2) if name == "mv2_blocks" else foldcut.Latency(0.7)
        return (
            str(arguments.models / "mobilenetv2.onnx"),
            data.calibration,
            goal,
            lambda onnx: onnx_accuracy(onnx, data),
        )
    if name.startswith("r56"):
        data = load_cifar(arguments.data, 500)
        goals = {"r56_latency": foldcut.Latency(0.45), "r56_far": foldcut.Latency(0.3), "r56_blocks": foldcut.Blocks(8)}
        network = load_resnet(arguments.models, "resnet56")
        return network, data.calibration, goals[name], lambda onnx: onnx_accuracy(onnx, data)
    if name == "detector":
        return detector(), torch.randn(16, 3, 960, 1280), foldcut.Macs(0.8), no_accuracy
    if name == "small":
        return small(), torch.randn(64, 3, 32, 32), foldcut.Latency(0.7), no_accuracy
    declare_torchvision_ops()
    import torchvision

    kind, count = name.rsplit("_", 1)
    network = torchvision.models.get_model(kind, weights=None).eval()
    return network, torch.randn(int(count), 3, 224, 224), foldcut.Channels(0.5), no_accuracy


def no_accuracy(onnx: bytes) -> None:
    """Random weights are right about nothing."""
    del onnx


def without_compile_s(model: Any, samples: Any) -> float:
    """CPU seconds of what any compile has to do: capture, export, and two forward passes of the samples."""
    import foldcut
    import torch
    from foldcut.compiler.export.exporter import to_onnx

    started = time.process_time()
    to_onnx(foldcut.capture(model, samples[:2]))
    with torch.no_grad():
        for _ in range(2):
            for batch in samples.split(2):
                model(batch)
    return time.process_time() - started


def small() -> Any:
    """A residual network of 94,000 parameters."""
    from compile_growth import Residual
    from torch import nn

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, stride=2), *(Residual(32) for _ in range(5)), *head).eval()


def detector() -> Any:
    """A fully convolutional network with random weights: five stages of strided and plain convolutions, and a head that
    gives boxes and classes for each place."""
    from torch import nn

    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 32, 64, 128, 256):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, 4 + 20, 1)).eval()


def line(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """A row of the table."""
    limit = next((row["limit_s"] for row in (after, before) if row.get("limit_s")), None)
    cells = [name, "" if limit is None else f"{limit:.0f}", *(_seconds(row) for row in (before, after))]
    whole = "failure" not in before and "failure" not in after
    cells.append(f"{after['cpu_s'] / before['cpu_s']:.2f}" if whole else "")
    cells.append(" / ".join(f"{row['peak_mib']:.0f}" if "peak_mib" in row else "-" for row in (before, after)))
    cells.append(" / ".join(f"{row['accuracy']:.2f}" if row.get("accuracy") else "-" for row in (before, after)))
    stages = sorted(after.get("stages", {}).items(), key=lambda stage: -stage[1])[:6]
    return f"| {' | '.join([*cells, ', '.join(f'{stage} {taken:.0f}' for stage, taken in stages)])} |"


def _seconds(row: Mapping[str, Any]) -> str:
    return str(row["failure"]) if "failure" in row else f"{row['cpu_s']:.0f}"


if __name__ == "__main__":
    main()
