"""Channels pruned with images that were made from the network alone, and with half of them made against the result.

    python benchmarks/no_data_against.py --models ../shared/models --data ../shared/data --compete 0.1 1

For each seed: ResNet-20 with `Channels(keep)`, re-solved, no gradient, from images that were made without data; then
again with the first half of these images, and another half that was made anew: against the first result, with each
weight of `SynthesisSettings(compete=)`. Weight 0 makes them anew without it: what the term adds is measured beside
that. `--real` adds as many real images. Accuracy is top-1 on the CIFAR-10 test images, run by ONNX Runtime; agreement
is the share of test images with the original's top-1. Rows go to a JSON-lines file. One torch thread.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import foldcut
import torch
from cifar_data import Cifar, load_cifar, load_resnet
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.driver.pipeline import planned_network
from foldcut.compiler.driver.pipeline_settings import PipelineSettings
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit_folds import fold_parameters
from foldcut.compiler.ir.program import Program
from foldcut.compiler.store.analysis_store import NOTHING_KEPT
from foldcut.compiler.support.progress import StageClock, silent
from no_data import accuracy, agreement, predictions
from rows import append_line


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    network = load_resnet(arguments.models, "resnet20")
    data = load_cifar(arguments.data, arguments.samples, arguments.test_limit)
    program = fold_parameters(capture(network, data.calibration[:2]))
    original = predictions(to_onnx(program), data)
    print(f"resnet20: {accuracy(original, data):.2f} % on {len(data.labels)} test images", flush=True)

    def told(source: str, seed: int, images: torch.Tensor, made: dict[str, Any] | None = None) -> Program:
        began = time.process_time()
        cut = pruned(program, images, arguments.keep, seed)
        found = predictions(to_onnx(cut), data)
        row = {"source": source, "seed": seed, "samples": len(images), "keep": arguments.keep}
        row |= {"top-1": accuracy(found, data), "agreement": agreement(found, original)}
        row |= {"made": made or {}, "cpu_s": round(time.process_time() - began, 1)}
        append_line(arguments.output, row)
        print(json.dumps(row), flush=True)
        return cut

    for seed in arguments.seeds:
        points(network, data, arguments, seed, told)


def points(network: Any, data: Cifar, arguments: argparse.Namespace, seed: int, told: Any) -> None:
    """All rows of one seed."""
    shape, half = tuple(data.calibration.shape[1:]), arguments.samples // 2
    settings = foldcut.SynthesisSettings(count=arguments.samples, input_shape=shape, seed=seed)
    if arguments.real:
        told("real", seed, data.calibration)
    begun = foldcut.synthesise(network, settings, progress=False, cache=False)
    first = told("made", seed, begun.leaves[0], dict(begun.made))
    for compete in arguments.compete:
        anew = replace(settings, count=arguments.samples - half, seed=seed + 1000, compete=compete)
        more = foldcut.synthesise(network, anew, against=first.module, progress=False, cache=False)
        both = torch.cat([begun.leaves[0][:half], more.leaves[0]])
        told(f"half with compete={compete:g}", seed, both, dict(more.made))


def pruned(program: Program, images: torch.Tensor, keep: float, seed: int) -> Program:
    """The network with that share of its channels, solved on the images and their mirrored copies."""
    settings = PipelineSettings(seed=seed, views=(foldcut.horizontal_flip,), mimic=None)
    goal = foldcut.Channels(keep)
    ctx = settings.context(program, CalibrationSet.of(images), goal, NOTHING_KEPT, StageClock(), silent)
    done, _ = planned_network(ctx, [foldcut.Prune()])
    return done.program


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=300, help="calibration images, half of them made anew")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the channels that stays")
    parser.add_argument("--compete", type=float, nargs="+", default=[0.0, 0.1], help="weights of the term")
    parser.add_argument("--real", action="store_true", help="a row with as many real images too")
    parser.add_argument("--test-limit", type=int, help="fewer test images, for a quick look")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("no_data_against.jsonl"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
