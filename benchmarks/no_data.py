"""Blocks dropped with calibration images that were made from the network alone, beside real ones.

    python benchmarks/no_data.py --models ../shared/models --data ../shared/data --network resnet56 --blocks 8
    python benchmarks/no_data.py --models ../shared/models --data ../shared/data --network mobilenetv2 --blocks 1 2

For each source of images and each number of blocks: the blocks chosen, the accuracy after dropping them (nothing
solved), after the re-solve and, with `--iterations`, after mimicking, and the CPU seconds of making the images and of
each stage. Sources: `real` (the first so many training images), `synthetic` (what `foldcut.compile(net, None)` makes),
`leaves` (what that begins with), `noise` (Gaussian, mean 0 and deviation 1). Accuracy is top-1 on all 10,000 CIFAR-10
test images, and on the last 400 of the 700 ImageNet images, run by ONNX Runtime; agreement is the share of test images
with the original's top-1. Rows go to a JSON-lines file; rows that it has are not made again. One torch thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import foldcut
import numpy as np
import torch
from cifar_data import Cifar, load_cifar, load_resnet
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.driver.pipeline import mimicking, planned_network
from foldcut.compiler.driver.pipeline_settings import PipelineSettings
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit_folds import fold_parameters
from foldcut.compiler.store.analysis_store import NOTHING_KEPT
from foldcut.compiler.support.progress import StageClock, silent
from imagenet_data import load_imagenet
from rows import append_line, read_lines

SOURCES = ("real", "synthetic", "leaves", "noise")
#: What makes a row another one.
KEY = ("network", "source", "blocks", "samples", "seed", "iterations", "synthesis")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = {tuple(map(str, (row[name] for name in KEY))) for row in read_lines(arguments.output)}
    wanted = [key_of(arguments, source, blocks) for source in arguments.source for blocks in arguments.blocks]
    left = [key for key in wanted if tuple(map(str, key.values())) not in known]
    if not left:
        sys.exit(f"all rows are in {arguments.output}")
    network, data = load(arguments)
    program = fold_parameters(capture(network, data.calibration[:2]))
    original = predictions(to_onnx(program), data)
    print(f"{arguments.network}: {accuracy(original, data):.2f} % on {len(data.labels)} test images", flush=True)
    images: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {}
    for key in left:
        if key["source"] not in images:
            images[key["source"]] = made(network, data, key, arguments)
        row = {**key, **run_point(program, data, original, images[key["source"]], arguments, key["blocks"])}
        append_line(arguments.output, row)
        print(json.dumps(row), flush=True)


def key_of(arguments: argparse.Namespace, source: str, blocks: int) -> dict[str, Any]:
    """What says which row it is."""
    return {
        "network": arguments.network,
        "source": source,
        "blocks": blocks,
        "samples": arguments.samples or (500 if arguments.network == "resnet56" else 300),
        "seed": arguments.seed,
        "iterations": arguments.iterations,
        "synthesis": json.loads(arguments.synthesis) if source == "synthetic" else {},
    }


def load(arguments: argparse.Namespace) -> tuple[Any, Cifar]:
    """The network as its users have it, and its data."""
    if arguments.network == "resnet56":
        return load_resnet(arguments.models, "resnet56"), load_cifar(arguments.data, 500, arguments.test_limit)
    return arguments.models / "mobilenetv2.onnx", load_imagenet(arguments.data, 300)


def made(
    network: Any, data: Cifar, key: dict[str, Any], arguments: argparse.Namespace
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The calibration images of a source, and what is to be known of how they were made."""
    count, shape = key["samples"], tuple(data.calibration.shape[1:])
    if key["source"] == "real":
        return data.calibration[:count], {}
    if key["source"] == "noise":
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(key["seed"])), {}
    given = {"iterations": 0} if key["source"] == "leaves" else key["synthesis"]
    settings = foldcut.SynthesisSettings(count=count, input_shape=shape, seed=key["seed"], **given)
    began = time.process_time()
    found = foldcut.synthesise(network, settings, progress=False, cache=False)
    if arguments.keep_images:
        np.savez(arguments.keep_images / f"{key['network']}_{key['source']}.npz", images=found.leaves[0].numpy())
    return found.leaves[0], {**found.made, "cpu_s": round(time.process_time() - began, 1)}


def run_point(
    program: Any,
    data: Cifar,
    original: np.ndarray[Any, Any],
    images: tuple[torch.Tensor, dict[str, Any]],
    arguments: argparse.Namespace,
    blocks: int,
) -> dict[str, Any]:
    """So many blocks dropped with these images."""
    samples, said = images
    mimic = foldcut.MimicSettings(iterations=arguments.iterations) if arguments.iterations else None
    settings = PipelineSettings(seed=arguments.seed, views=(foldcut.horizontal_flip,), mimic=mimic)
    clock = StageClock()
    goal = foldcut.Blocks(blocks)
    ctx = settings.context(program, CalibrationSet.of(samples), goal, NOTHING_KEPT, clock, silent)
    rewrites = [foldcut.Drop()]
    done, _ = planned_network(ctx, rewrites)
    row: dict[str, Any] = {"dropped_blocks": [getattr(decision, "path", "") for decision in done.decisions]}
    solved = predictions(to_onnx(done.program), data)
    row["re-solved"] = accuracy(solved, data)
    row["agreement"] = agreement(solved, original)
    if mimic is not None:
        done = mimicking(ctx, rewrites, done, settings)
        trained = predictions(to_onnx(done.program), data)
        row["mimicked"] = accuracy(trained, data)
        row["agreement"] = agreement(trained, original)
        row["unmimicked"] = done.unmimicked
    row["judged"] = {name: round(error, 5) for name, error in done.errors.items()}
    row["original"] = accuracy(original, data)
    row["made"] = said
    row["cpu_s"] = {name: round(seconds, 1) for name, seconds in clock.cpu_s.items()}
    return row


def predictions(model: bytes, data: Cifar, batch: int = 50) -> np.ndarray[Any, Any]:
    """The classes that ONNX Runtime says of all test images, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [
        session.run(None, {name: data.test[i : i + batch].numpy()})[0].argmax(1)
        for i in range(0, len(data.labels), batch)
    ]
    return np.concatenate(parts)


def accuracy(found: np.ndarray[Any, Any], data: Cifar) -> float:
    """Top-1 in percent."""
    return round(100 * float((found == data.labels.numpy()).mean()), 2)


def agreement(found: np.ndarray[Any, Any], original: np.ndarray[Any, Any]) -> float:
    """The share of images, in percent, of which both say the same."""
    return round(100 * float((found == original).mean()), 2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=["resnet56", "mobilenetv2"], default="resnet56")
    parser.add_argument("--source", choices=SOURCES, nargs="+", default=["synthetic"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8])
    parser.add_argument("--samples", type=int, help="calibration images; 500, of MobileNetV2 300")
    parser.add_argument("--iterations", type=int, default=0, help="of mimicking; none without")
    parser.add_argument("--synthesis", default="{}", help="further SynthesisSettings, as JSON")
    parser.add_argument("--test-limit", type=int, help="fewer test images, for a quick look")
    parser.add_argument("--keep-images", type=Path, metavar="FOLDER", help="write the images that were made there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("no_data.jsonl"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
