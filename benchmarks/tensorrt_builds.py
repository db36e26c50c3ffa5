"""TensorRT engines of torchvision networks, before and after half of every prunable group of channels is gone.

    pip install --no-deps torchvision && pip install tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings
    python benchmarks/tensorrt_builds.py [NAME ...] [--batch N] [--half] [--output FILE.json [--resume]]

TensorRT-RTX builds on a machine without a GPU. Random weights and inputs: the question is what builds, how long that
takes and how large the plan is. It says nothing of latency. With --half each network is also converted to half
precision, guided by random images, and built again. Each network has its own process with one torch thread.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from coverage import captured, prune_half
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.program import Program
from foldcut.runtime.measure.backend import Array
from foldcut.runtime.tensorrt.backend import TensorRTBackend, TensorRTEngine
from rows import Record, Row, make_rows

NAMES = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "densenet121"),
    *("convnext_tiny", "regnet_y_400mf", "shufflenet_v2_x1_0", "googlenet", "vit_b_16", "mnasnet1_0"),
)
#: Random images that half precision is checked on, beside the one that an engine is built for.
CHECKED_IMAGES = 3
#: Random weights amplify rounding: what foldcut predicts for shufflenet_v2_x1_0, torch's own float16 shows as well.
HALF_TOLERANCE = 0.05
MIB = 2**20


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        source, name, path = arguments.child
        build_both(source, name, Record(Path(path)), arguments)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # takes the running child along
    print("| network | MACs left | export s | build s | plan MiB | layers |", end="")
    print(" fp16: plan MiB | operators kept in fp32 | error | |" if arguments.half else " |")
    print(f"|{'---|' * (10 if arguments.half else 7)}", flush=True)
    names = [("torchvision", name) for name in arguments.names or NAMES]
    failed = summarise(make_rows(arguments, names, ("seed", "batch", "half"), table_row))
    sys.exit(1 if failed else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"torchvision classifiers; default: {', '.join(NAMES)}"
    )
    parser.add_argument("--batch", type=int, default=1, help="the batch that the engines are built for")
    parser.add_argument("--half", action="store_true", help="build in fp16 as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=1800.0, help="wall seconds for one network")
    parser.add_argument("--output", type=Path, help="JSON file, written after each network")
    parser.add_argument("--resume", action="store_true", help="skip the networks that --output already holds")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resume and not arguments.output:
        parser.error("--resume needs --output")
    return arguments


def build_both(source: str, name: str, record: Record, arguments: argparse.Namespace) -> None:
    """The network as it is and pruned, exported and built; everything is noted in `record`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with record.to_the_end():
        program, images = captured(source, name, record, arguments.seed)
        smaller = prune_half(program, record)
        for side, network in (("before", program), ("after", smaller)):
            build_one(side, network, images, record, arguments)


def build_one(side: str, network: Program, images: torch.Tensor, record: Record, arguments: argparse.Namespace) -> None:
    """Export and build one of the two, in fp32 and, when asked for, in fp16."""
    record.note(stage=f"export {side}")
    started = time.perf_counter()
    model = to_onnx(network)
    exported = time.perf_counter()
    record.note(stage=f"build {side}", **{f"export_seconds_{side}": round(exported - started, 2)})
    name = network.inputs[0].name
    inputs: dict[str, Array] = {name: images[:1].repeat(arguments.batch, 1, 1, 1).numpy()}
    record.note(**described(side, *timed_build(TensorRTBackend(), model, inputs)))
    if arguments.half:
        record.note(stage=f"build {side} in fp16")
        samples = {name: images[:CHECKED_IMAGES].numpy()}
        backend = TensorRTBackend(precision="fp16", samples=samples, half_tolerance=HALF_TOLERANCE)
        engine, seconds = timed_build(backend, model, inputs)
        record.note(
            **described(f"{side}_half", engine, seconds),
            **{f"kept_{side}": engine.info.float32_operators, f"half_error_{side}": engine.info.half_error},
        )


def timed_build(backend: TensorRTBackend, model: bytes, inputs: dict[str, Array]) -> tuple[TensorRTEngine, float]:
    started = time.perf_counter()
    engine = backend.build(model, inputs)
    return engine, time.perf_counter() - started


def described(side: str, engine: TensorRTEngine, seconds: float) -> Row:
    return {
        f"build_seconds_{side}": round(seconds, 2),
        f"plan_mib_{side}": len(engine.plan) / MIB,
        f"layers_{side}": engine.info.network_layers,
        "library": f"{engine.info.flavour} {engine.info.version}",
    }


def table_row(row: Row) -> str:
    cells = [
        f"x{row['macs_left']:.3f}" if "macs_left" in row else "",
        both(row, "export_seconds_{}", ".1f"),
        both(row, "build_seconds_{}", ".1f"),
        both(row, "plan_mib_{}", ".1f"),
        both(row, "layers_{}", "d"),
    ]
    if "plan_mib_before_half" in row:
        cells += [both(row, "plan_mib_{}_half", ".1f"), both(row, "kept_{}", "d"), both(row, "half_error_{}", ".1e")]
    failure = " ".join(str(row.get("failure") or "").splitlines()[:2]).replace("|", "/")
    return " | ".join([f"| {row['name']}", *cells, failure]) + " |"


def both(row: Row, key: str, form: str) -> str:
    """``before -> after`` of what is there."""
    values = [row.get(key.format(side)) for side in ("before", "after")]
    return " -> ".join("?" if value is None else format(value, form) for value in values)


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Print what the table comes to; returns the rows that failed."""
    failed = [row for row in rows if row.get("failure")]
    libraries = ", ".join(sorted({row["library"] for row in rows if "library" in row})) or "no engine"
    print(f"\nbuilt before and after pruning: {len(rows) - len(failed)} of {len(rows)} ({libraries})")
    for row in failed:
        print(f"- FAILED: {row['name']}: {' '.join(str(row['failure']).splitlines()[:4])}")
    sys.stdout.flush()
    return failed


if __name__ == "__main__":
    main()
