"""How well `LatencyTable` predicts what a rewrite does to latency: predicted against measured ratios of whole networks.

    python benchmarks/latency_prediction.py
    python benchmarks/latency_prediction.py --network resnet56 --batch 8 --output latency_prediction.json

Each network is rewritten in several ways (blocks dropped, channels pruned, convolutions factorised, layers in int8 or
some of them, in what was dropped, pruned and factorised as well), weights random, for latency does not depend on them.
The table times segments only and is fitted on whole networks that are not among those predicted: the original, and for
int8 the original with all of its layers in int8.
Measured is the paired protocol on whole networks. The ratio of multiply-accumulates stands beside it as what one would
guess without measuring. Fails when the median error is above 3 %, or 4 % of those in int8, or the worst above 10 %.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from cifar_data import CifarResNet
from foldcut.compiler.analysis.provenance import find_units
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.analysis.unit_groups import surplus_units
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.cost import program_cost
from foldcut.compiler.ir.edit_folds import fold_batch_norms, fold_parameters
from foldcut.compiler.ir.program import Program
from foldcut.passes.cut.cuttable import cuttable_groups
from foldcut.passes.cut.prune_channels import prune_channels
from foldcut.passes.drop.drop_blocks import drop_blocks
from foldcut.passes.prune.channel_budget import ChannelLimits, free_groups, uniform_counts
from foldcut.passes.quantize.decision import QuantizeLayer
from foldcut.passes.quantize.rewrite import Quantize
from foldcut.passes.quantize.values import quantizable
from foldcut.runtime.measure.backend import Backend, resolve_backend
from foldcut.runtime.measure.conditions import Conditions
from foldcut.runtime.measure.loading import loaded
from foldcut.runtime.measure.measure import measure_pair
from foldcut.runtime.measure.measurement_cache import MeasurementCache
from foldcut.runtime.measure.timing import Timing, Until
from foldcut.runtime.onnxruntime.backend import random_inputs
from foldcut.runtime.predict.integer_kernels import IntegerKernels, probe_integers
from foldcut.runtime.predict.latency_table import LatencyTable
from foreign_ops import declare_torchvision_ops
from rows import Row, write_json
from torch import nn

MEDIAN_LIMIT, INTEGER_LIMIT, WORST_LIMIT = 0.03, 0.04, 0.10
PRECISIONS = ("float32", "int8")
NETWORKS = ("resnet18", "resnet56", "mobilenet_v2")


def main() -> None:
    arguments = parse_arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    backend = resolve_backend(arguments.backend)
    rows: list[Row] = []
    print("| network, batch | rewrite | MACs | predicted | measured (95 %) | error | new segments | s |")
    print(f"|{'---|' * 8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cache = MeasurementCache(arguments.cache or Path(folder))
        for name in arguments.network:
            network, sample = make(name)
            for batch in arguments.batch:
                for row in predictions(name, network, sample, backend, batch, arguments, cache):
                    rows.append(row)
                    print(table_row(row), flush=True)
                    if arguments.output:
                        write_json(arguments.output, {"environment": backend.environment(), "rows": rows})
    sys.exit(0 if summarise(rows) else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--cache", type=Path, help="folder to keep segment times in; default: none is kept")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="for one whole-network measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file, written after each row")
    return parser.parse_args()


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network with random weights and two inputs."""
    torch.manual_seed(0)
    if name == "resnet56":
        return CifarResNet(9).eval(), torch.randn(2, 3, 32, 32)
    declare_torchvision_ops()
    from torchvision import models

    return models.get_model(name).eval(), torch.randn(2, 3, 224, 224)


def predictions(
    name: str,
    network: nn.Module,
    sample: torch.Tensor,
    backend: Backend,
    batch: int,
    arguments: argparse.Namespace,
    cache: MeasurementCache,
) -> Iterator[Row]:
    """One row for each variant of a network."""
    original = fold_parameters(capture(network, sample))
    table = LatencyTable(backend, Conditions(batch=batch, seed=arguments.seed), cache=cache)
    started = time.perf_counter()
    plain = table.predict(original)
    kernels = probe_integers(backend, cache=cache) if "int8" in arguments.precision else None
    wholes = [original] if kernels is None else [original, in_int8(original, kernels, lambda: True)]
    models = [to_onnx(program) for program in wholes]
    units = table.measure_networks(models)
    table.fit(list(zip(wholes, units, strict=True)))
    before = table.predict(original)
    yield {
        "network": name,
        "batch": batch,
        "rewrite": "none: predicted over measured, before the fit",
        "sum_of_segments": plain.units / units[0],
        "measured_segments": plain.measured,
        "seconds": time.perf_counter() - started,
    }
    macs = program_cost(original).macs
    made = list(variants(network, sample, original))
    if kernels is not None:
        made += list(integer_variants(made, original, kernels, arguments.seed))
    for rewrite, variant in made:
        if PRECISIONS["int8" in rewrite] not in arguments.precision:
            continue
        started = time.perf_counter()
        after = table.predict(variant)
        seconds = time.perf_counter() - started
        inputs = random_inputs(models[0], batch, arguments.seed)
        with loaded(backend, [(models[0], inputs), (to_onnx(variant), inputs)]) as (first, second):
            measured = measure_pair(
                first, second, Timing(seed=arguments.seed), until=Until(max_seconds=arguments.max_seconds)
            )
        predicted = after.ratio_to(before)
        yield {
            "network": name,
            "batch": batch,
            "rewrite": rewrite,
            "macs": program_cost(variant).macs / macs,
            "predicted": predicted,
            "measured": measured.ratio,
            "low": measured.low,
            "high": measured.high,
            "contended": measured.contended,
            "error": predicted / measured.ratio - 1,
            "measured_segments": after.measured,
            "seconds": seconds,
        }


def variants(network: nn.Module, sample: torch.Tensor, original: Program) -> Iterator[tuple[str, Program]]:
    blocks = find_regions(original).blocks
    for share in (1 / 8, 1 / 3, 2 / 3):
        count = max(1, round(share * len(blocks)))
        places = np.linspace(0, len(blocks) - 1, count).round().astype(int)
        yield f"drop {count} of {len(blocks)} blocks", drop_blocks(original, [blocks[i] for i in dict.fromkeys(places)])
    for keep, multiple in ((0.75, 16), (0.5, 8), (0.4, 4)):
        yield f"keep {keep:g} of the channels, in {multiple}s", pruned(original, keep, multiple)
    for share in (0.5, 0.25):
        yield f"rank {share:g} of full", fold_parameters(capture(factorised(network, share), sample))


def integer_variants(
    made: list[tuple[str, Program]], original: Program, kernels: IntegerKernels, seed: int
) -> Iterator[tuple[str, Program]]:
    """Some layers in int8, drawn at random, and all of each network that was rewritten before."""
    chance = np.random.default_rng(seed)
    for share in (0.75, 0.5, 0.25):
        yield f"{share:g} of the layers in int8", in_int8(original, kernels, lambda s=share: chance.random() < s)  # type: ignore[misc]
    for name, program in made:
        yield f"{name}, in int8", in_int8(program, kernels, lambda: True)


def in_int8(program: Program, kernels: IntegerKernels, taken: Callable[[], bool]) -> Program:
    """The program with those of its layers in int8 that are `taken`."""
    folded, _ = fold_batch_norms(program)
    decisions = [QuantizeLayer.for_kernels(name, kernels) for name in quantizable(folded) if taken()]
    return Quantize().shape(folded, decisions)


def pruned(original: Program, keep: float, multiple: int) -> Program:
    provenance = find_units(original)
    limits = ChannelLimits(multiple_of=multiple)
    groups, _ = cuttable_groups(provenance, free_groups(provenance, limits))
    counts = uniform_counts(groups, keep, limits)
    return prune_channels(provenance, surplus_units(groups, counts)).program


def factorised(network: nn.Module, share: float) -> nn.Module:
    """Convolutions of one group with 32 input and output channels or more as two of lower rank: k x k to r channels,
    then 1 x 1."""
    result = copy.deepcopy(network)
    for path, conv in list(result.named_modules()):
        if not isinstance(conv, nn.Conv2d) or conv.groups > 1 or min(conv.in_channels, conv.out_channels) < 32:
            continue
        rank = max(8, round(share * min(conv.in_channels, conv.out_channels) / 8) * 8)
        first = nn.Conv2d(conv.in_channels, rank, conv.kernel_size, conv.stride, conv.padding, bias=False)
        second = nn.Conv2d(rank, conv.out_channels, 1, bias=conv.bias is not None)
        owner, _, leaf = path.rpartition(".")
        setattr(result.get_submodule(owner), leaf, nn.Sequential(first, second))
    return result.eval()


def table_row(row: Row) -> str:
    label = f"{row['network']}, {row['batch']}"
    if "sum_of_segments" in row:
        cells = ["", f"x{row['sum_of_segments']:.3f}", "1", ""]
    else:
        measured = f"{row['measured']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        measured += " contended" if row["contended"] else ""
        cells = [f"{row['macs']:.3f}", f"{row['predicted']:.3f}", measured, f"{row['error']:+.1%}"]
    return f"| {label} | {row['rewrite']} | {' | '.join(cells)} | {row['measured_segments']} | {row['seconds']:.0f} |"


def summarise(rows: list[Row]) -> bool:
    """Print the errors over all variants, by precision; whether they are within the limits."""
    found = [row for row in rows if "error" in row]
    kept = True
    for precision, limit in zip(PRECISIONS, (MEDIAN_LIMIT, INTEGER_LIMIT), strict=True):
        of = [row for row in found if ("int8" in row["rewrite"]) == (precision == "int8")]
        if not of:
            continue
        errors = np.abs([row["error"] for row in of])
        guesses = np.abs([row["macs"] / row["measured"] - 1 for row in of])
        worst = of[int(errors.argmax())]
        print(f"\n{precision}, {len(of)} variants: median error {np.median(errors):.1%} (limit {limit:.0%}), ", end="")
        print(
            f"worst {errors.max():.1%} (limit {WORST_LIMIT:.0%}): {worst['network']}, batch {worst['batch']}, ", end=""
        )
        print(f"{worst['rewrite']}")
        print(
            "taking the ratio of multiply-accumulates instead: "
            f"median {np.median(guesses):.1%}, worst {guesses.max():.1%}"
        )
        kept = kept and bool(np.median(errors) <= limit and errors.max() <= WORST_LIMIT)
    return kept


if __name__ == "__main__":
    main()
