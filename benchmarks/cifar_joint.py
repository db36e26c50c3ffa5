"""One latency goal, every way to reach it: foldcut's mix, each of its rewrites alone, Torch-Pruning.

    python benchmarks/cifar.py --all --models ../shared/models --data ../shared/data [--net resnet56] [--samples 500]
        [--ratios 0.78 0.6 0.45 0.3] [--methods joint drop_blocks ...] [--mimic] [--output joint.json] [--resume]

Every foldcut row is a whole compile from unlabelled images to a `Latency` goal, measured on ONNX Runtime, batch 1, one
thread, in pairs with the original; accuracy on all test images, by ONNX Runtime. Analyses are shared among the rows, so
a row's seconds do not hold what an earlier one found out. Torch-Pruning is given shares of channels to keep, and each
goal gets the largest that reaches it: of the first convolutions of all blocks (where a residual network bears it
best) and of the whole network.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import foldcut
import torch
from cifar_data import Cifar, CifarResNet, load_cifar, load_resnet, onnx_accuracy
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.runtime.measure.backend import resolve_backend
from foldcut.runtime.measure.conditions import Conditions
from foldcut.runtime.probe.latency_probe import LatencyProbe
from rows import Row, write_json
from torch_pruning_peer import prune_whole_with_torch_pruning, prune_with_torch_pruning

RATIOS = (0.78, 0.6, 0.45, 0.3)
ALL = ("drop_blocks", "prune_channels", "factorize")
METHODS = (*ALL, "joint", "torch_pruning")
KEEPS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0625)


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    samples = arguments.samples[0]
    network, data = load_resnet(arguments.models, arguments.net), load_cifar(arguments.data, samples)
    rows = _earlier(arguments)
    done = {(row["method"], row["goal"]) for row in rows}
    print("| method | goal | latency ratio (95 %) | accuracy | output error | drops, groups, layers | CPU s |")
    print(f"|{'---|' * 7}")
    for row in rows:
        print(_line(row))
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or Path(folder)
        for ratio in arguments.ratios:
            for method in [m for m in arguments.methods if m != "torch_pruning" and (m, ratio) not in done]:
                rows.append(_compiled(network, data, method, ratio, cache, arguments))
                _show(rows, arguments)
    if "torch_pruning" in arguments.methods:
        wanted = [ratio for ratio in arguments.ratios if ("torch_pruning", ratio) not in done]
        for row in _torch_pruning(network, data, wanted) if wanted else []:
            rows.append(row)
            _show(rows, arguments)
    sys.exit(0 if _joint_is_best(rows) else 1)


def _compiled(
    network: CifarResNet, data: Cifar, method: str, ratio: float, cache: Path, arguments: argparse.Namespace
) -> Row:
    started = time.process_time()
    try:
        made = foldcut.compile(
            network,
            data.calibration,
            goal=foldcut.Latency(ratio),
            rewrites=ALL if method == "joint" else (method,),
            mimic=arguments.mimic,
            views=(foldcut.horizontal_flip,) if arguments.views else (),
            seed=arguments.seed,
            progress=False,
            cache=cache,
        )
    except foldcut.GoalError as unmet:
        if unmet.best is None:
            return {"method": method, "goal": ratio, "met": False, "reason": unmet.message}
        made = unmet.best
    report = made.report
    kinds = [d["kind"] for d in report.decisions]
    return {
        "method": method,
        "goal": ratio,
        "met": report.met,
        "latency": dict(report.latency),
        "macs": report.macs["after"] / report.macs["before"],
        "accuracy": onnx_accuracy(made.onnx, data),
        "output_errors": dict(report.output_errors),
        "decisions": [kinds.count(kind) for kind in ("drop_blocks", "prune_channels", "factorize")],
        "seconds": report.seconds,
        "cpu_s": time.process_time() - started,
    }


def _torch_pruning(network: CifarResNet, data: Cifar, ratios: list[float]) -> list[Row]:
    """The row with the best accuracy of those that reach each goal."""
    program = capture(network, data.calibration[:2])
    probe = LatencyProbe(
        program,
        to_onnx(program),
        resolve_backend("onnxruntime"),
        CalibrationSet.of(data.calibration[:1]),
        Conditions(seed=0),
    )
    inner = [name for name, _ in network.named_modules() if name.endswith(".conv1")]
    ways = {
        "first convolutions": functools.partial(prune_with_torch_pruning, network, data.calibration, inner),
        "whole": functools.partial(prune_whole_with_torch_pruning, network, data.calibration),
    }
    found: list[dict[str, Any]] = []
    for what, prune in ways.items():
        for keep in KEEPS:
            started = time.process_time()
            pruned = prune(keep)
            seconds = time.process_time() - started
            model = to_onnx(capture(pruned, data.calibration[:2]))
            measured = probe.final(model)
            latency = {"ratio": measured.ratio, "low": measured.low, "high": measured.high}
            accuracy = onnx_accuracy(model, data)
            found.append({"keep": keep, "pruned": what, "latency": latency, "accuracy": accuracy, "cpu_s": seconds})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    rows = []
    for ratio in ratios:
        reached = [row for row in found if row["latency"]["ratio"] <= ratio]
        best = max(reached, key=lambda row: row["accuracy"], default=None)
        rows.append(
            {"method": "torch_pruning", "goal": ratio, "met": best is not None, **(best or {"reason": "no share"})}
        )
    return rows


def _earlier(arguments: argparse.Namespace) -> list[Row]:
    if not (arguments.resume and arguments.output and arguments.output.exists()):
        return []
    found = json.loads(arguments.output.read_text())
    if found["settings"] != _settings(arguments):
        sys.exit(f"{arguments.output} was made with {found['settings']}: give another --output")
    return list(found["rows"])


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("net", "samples", "mimic", "views", "seed")
    return {name: getattr(arguments, name) for name in names}


def _show(rows: list[Row], arguments: argparse.Namespace) -> None:
    print(_line(rows[-1]), flush=True)
    if arguments.output:
        write_json(arguments.output, {"settings": _settings(arguments), "rows": rows})


def _line(row: Row) -> str:
    if "latency" not in row:
        return f"| {row['method']} | {row['goal']} | not reached: {row['reason']} | | | | |"
    latency = row["latency"]
    spread = f"{latency['ratio']:.3f} ({latency['low']:.3f} to {latency['high']:.3f})"
    unmet = "" if row["met"] else ", not met"
    errors = list(row.get("output_errors", {}).values())
    error = f"{errors[-1]:.4f}" if errors else ""
    cut = f"keep {row['keep']}, {row['pruned']}" if "keep" in row else ", ".join(map(str, row["decisions"]))
    cells = (f"{spread}{unmet}", f"{row['accuracy']:.2f}", error, cut, f"{row['cpu_s']:.0f}")
    return f"| {row['method']} | {row['goal']} | {' | '.join(cells)} |"


def _joint_is_best(rows: list[Row]) -> bool:
    """Whether the mix is at least as accurate as each rewrite alone at every goal that the latter reaches."""
    by = {(row["method"], row["goal"]): row for row in rows if row.get("met")}
    goals = {goal for method, goal in by if method == "joint"}
    worse = [
        f"{method} at {goal}: {by[method, goal]['accuracy']:.2f}, the mix {by['joint', goal]['accuracy']:.2f}"
        for goal in sorted(goals)
        for method in ALL
        if (method, goal) in by and by[method, goal]["accuracy"] > by["joint", goal]["accuracy"]
    ]
    for line in worse:
        print(f"better than the mix: {line}")
    return not worse
