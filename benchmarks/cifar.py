"""Accuracy, latency and CPU time on CIFAR-10: what README and docs quote.

    python benchmarks/cifar.py --models ../shared/models --data ../shared/data --method drop_blocks
    python benchmarks/cifar.py --models ../shared/models --data ../shared/data --method submodular --samples 500
    python benchmarks/cifar.py --models ../shared/models --data ../shared/data --all --samples 500

For each number of calibration images and each goal: the blocks chosen, the accuracy on the test images after
dropping, after the re-solve and after mimicking, the measured ONNX Runtime latency ratio, the CPU seconds of each
stage, and beside it, from the same blocks in the same run, PRACTISE's final finetune. One torch thread; CPU seconds
are process CPU time.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import foldcut
import torch
from cifar_data import Cifar, accuracy, load_cifar, load_resnet, onnx_accuracy
from cifar_joint import METHODS, RATIOS
from cifar_joint import run as run_joint
from cifar_submodular import KEEPS
from cifar_submodular import run as run_submodular
from foldcut.compiler.data.calibration_set import CalibrationSet, View
from foldcut.compiler.driver.pipeline import mimicking, planned_network
from foldcut.compiler.driver.pipeline_settings import PipelineSettings
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.onnx.bypass import onnx_without
from foldcut.compiler.plan.goal import Goal
from foldcut.compiler.store.analysis_store import NOTHING_KEPT
from foldcut.compiler.support.progress import StageClock, silent
from foldcut.passes.drop.decision import DropBlock
from foldcut.passes.drop.drop_blocks import changes_of_drops, drop_blocks
from foldcut.runtime.measure.backend import resolve_backend
from foldcut.runtime.measure.conditions import Conditions
from foldcut.runtime.probe.latency_probe import LatencyProbe
from foldcut.runtime.probe.stored_latency import StoredLatency
from practise import finetune

STAGES = ("choose", "re-solve", "mimic")


def main() -> None:
    arguments = parse()
    if arguments.all:
        run_joint(arguments)
        return
    if arguments.method == "submodular":
        run_submodular(arguments)
        return
    torch.set_num_threads(1)
    teacher = load_resnet(arguments.models, arguments.net)
    data = load_cifar(arguments.data, max(arguments.samples), arguments.test_limit)
    program = capture(teacher, data.calibration[:2])
    probe = LatencyProbe(
        program,
        to_onnx(program),
        resolve_backend("onnxruntime"),
        CalibrationSet.of(data.calibration[:1]),
        Conditions(seed=arguments.seed),
    )
    dense = onnx_accuracy(probe.model, data)
    print(f"{arguments.net}: {dense:.2f} % on {len(data.labels)} test images", flush=True)
    goals: list[Goal] = [foldcut.Blocks(k) for k in arguments.blocks] + [foldcut.Latency(r) for r in arguments.latency]
    rows = []
    for samples in arguments.samples:
        for goal in goals:
            row = run_point(teacher, program, data, probe, goal, samples, arguments)
            rows.append(row)
            print(json.dumps(row), flush=True)
    table(rows)
    if arguments.output:
        arguments.output.write_text(json.dumps({"dense": dense, "rows": rows}, indent=1) + "\n")


def run_point(
    teacher: Any,
    program: Any,
    data: Cifar,
    probe: LatencyProbe,
    goal: Goal,
    samples: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One goal with one number of images, stage by stage, and the reference from the same blocks."""
    images = data.calibration[:samples]
    calibration = CalibrationSet.of(images)
    views = views_for(samples) if arguments.views else ()
    iterations = dict(zip(arguments.samples, arguments.iterations, strict=True))[samples]
    brief = foldcut.MimicSettings(iterations=iterations)
    settings = PipelineSettings(seed=arguments.seed, views=views, mimic=brief)
    clock = StageClock()
    ctx = settings.context(program, calibration, goal, NOTHING_KEPT, clock, silent)
    ctx = replace(ctx, latency=StoredLatency(NOTHING_KEPT, probe))
    done, _ = planned_network(ctx, [foldcut.Drop()])
    drops = [decision for decision in done.decisions if isinstance(decision, DropBlock)]
    student = drop_blocks(program, drops)
    row: dict[str, Any] = {"samples": samples, "goal": str(goal), "blocks": [drop.path for drop in drops]}
    dropped = onnx_without(probe.model, changes_of_drops(drops).dropped) or to_onnx(student)
    row["dropped"] = onnx_accuracy(dropped, data)
    row["re-solved"] = onnx_accuracy(to_onnx(done.program), data)
    model = to_onnx(mimicking(ctx, [foldcut.Drop()], done, settings).program)
    row["mimicked"] = onnx_accuracy(model, data)
    row["cpu_s"] = {name: round(seconds, 1) for name, seconds in clock.cpu_s.items()}
    row["total_cpu_s"] = round(sum(clock.cpu_s.values()), 1)
    measured = probe.final(model)
    row["latency"] = {"ratio": measured.ratio, "low": measured.low, "high": measured.high}
    for iterations in reference_iterations(goal, samples, arguments):
        started = time.process_time()
        reference = finetune(teacher, row["blocks"], images, iterations=iterations, seed=arguments.seed)
        seconds = time.process_time() - started
        row[f"reference_{iterations}"] = {"accuracy": accuracy(reference, data), "cpu_s": round(seconds, 1)}
    return row


def views_for(samples: int) -> tuple[View, ...]:
    """Mirrored images; where there are few, shifted ones as well."""
    crops = tuple(foldcut.random_crop(3, seed) for seed in range(max(0, 400 // samples - 2)))
    return (foldcut.horizontal_flip, *crops)


def reference_iterations(goal: Goal, samples: int, arguments: argparse.Namespace) -> list[int]:
    if not isinstance(goal, foldcut.Blocks) or goal.count not in arguments.reference:
        return []
    if samples < 500:
        return [300] if goal == foldcut.Blocks(8) else []
    return [500, 2000] if arguments.long and goal == foldcut.Blocks(12) else [500]


def table(rows: list[dict[str, Any]]) -> None:
    columns = f"images | goal | dropped | re-solved | mimicked | latency ratio | CPU s (of it {' + '.join(STAGES)})"
    print(f"\n| {columns} | finetune from the same blocks |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        references = [
            f"{value['accuracy']:.2f} ({key.split('_')[1]} iterations, {value['cpu_s']:.0f} s)"
            for key, value in row.items()
            if key.startswith("reference_")
        ]
        cpu, latency = row["cpu_s"], row["latency"]
        stages = " + ".join(f"{cpu[name]:.0f}" for name in STAGES)
        seconds = f"{row['total_cpu_s']:.0f} ({stages})"
        spread = f"{latency['ratio']:.3f} ({latency['low']:.3f} to {latency['high']:.3f})"
        print(
            f"| {row['samples']} | {row['goal']} | {row['dropped']:.2f} | {row['re-solved']:.2f} "
            f"| {row['mimicked']:.2f} | {spread} | {seconds} | {'; '.join(references) or '-'} |"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", choices=["drop_blocks", "submodular"], default="drop_blocks")
    parser.add_argument("--all", action="store_true", help="every way to reach a latency: see cifar_joint.py")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="goals of --all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="rows of --all")
    parser.add_argument("--mimic", action="store_true", help="--all with mimicking")
    parser.add_argument("--cache", type=Path, help="folder that keeps the analyses of --all")
    parser.add_argument("--resume", action="store_true", help="--all: keep the rows that the output file has")
    parser.add_argument("--net", default="resnet56")
    parser.add_argument("--samples", type=int, nargs="+", default=[500, 50])
    parser.add_argument("--iterations", type=int, nargs="+", default=[800, 400], help="of mimicking, per --samples")
    parser.add_argument("--blocks", type=int, nargs="*", default=[4, 8, 12])
    parser.add_argument("--latency", type=float, nargs="*", default=[0.8, 0.65, 0.5])
    parser.add_argument("--test-limit", type=int, help="fewer test images, for a quick look")
    parser.add_argument(
        "--no-views", dest="views", action="store_false", help="no mirrored or shifted calibration images"
    )
    parser.add_argument(
        "--reference", type=int, nargs="*", default=[4, 8, 12], help="--blocks with PRACTISE's finetune"
    )
    parser.add_argument("--keep", type=float, nargs="*", default=list(KEEPS), help="of --method submodular")
    parser.add_argument("--refine", type=int, default=2, help="refinement rounds of --method submodular")
    parser.add_argument("--no-peers", action="store_true", help="--method submodular without the peers' rows")
    parser.add_argument("--long", action="store_true", help="also its 2,000 iterations at 12 blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
