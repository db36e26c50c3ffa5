"""What compression leaves of networks trained by SGD and by stochastic Frank-Wolfe, without any retraining.

    python benchmarks/frank_wolfe.py --data ../shared/data --folder runs [--samples 500] [--output frank_wolfe.json]

Reads the networks that `frank_wolfe_train.py` left in the folder. Each is compressed in two ways: as the paper does,
from the weights alone (every k x k layer to a pair of rank r by a plain SVD, the same share of each layer's
multiply-accumulates; filters of least L2 norm removed, the same share of each group), and by foldcut's data-aware
passes from unlabelled images (ranks chosen together for the MACs, factors and consumers re-solved; submodular channels,
re-solved). Accuracy on all test images, and relative to the network's own.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from pathlib import Path

import torch
from cifar_data import Cifar, CifarResNet, accuracy, load_cifar
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.driver.channel_pipeline import ChannelSettings, cut_channels
from foldcut.compiler.driver.rank_pipeline import cut_ranks
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.goals.counted import Macs
from foldcut.compiler.ir.edit_folds import fold_parameters
from foldcut.compiler.ir.program import Program
from foldcut.compiler.support.progress import StageClock
from foldcut.passes.factorize.decision import Ranks
from foldcut.passes.factorize.select_ranks import RankSettings
from foldcut.passes.prune.channel_budget import ChannelLimits
from foldcut.passes.prune.decision import Channels
from foldcut.passes.solve.resolve_network import ResolveSettings
from frank_wolfe_train import BLOCKS
from rows import Row, write_json

MACS = (0.75, 0.5, 0.25)
KEEP = (0.75, 0.5, 0.25)
WAYS = ("low rank, plain SVD", "low rank, data-aware", "filters, L2 norm", "filters, submodular")


def main() -> None:
    arguments = parse_arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    data = load_cifar(arguments.data, arguments.samples, arguments.test_limit)
    rows: list[Row] = []
    print_header()
    for path in sorted(path for path in arguments.folder.glob("*.json") if arguments.match in path.stem):
        trained = json.loads(path.read_text())
        network = CifarResNet(BLOCKS[trained["network"]]).eval()
        network.load_state_dict(torch.load(path.with_suffix(".pt"), weights_only=True))
        row = {key: trained[key] for key in ("run", "method", "network", "epochs", "seed", "loss")}
        row["dense"] = accuracy(network, data)
        row["left"] = compressed(network, data)
        rows.append(row)
        print(table_row(row), flush=True)
        if arguments.output:
            write_json(arguments.output, {"samples": arguments.samples, "rows": rows})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--match", default="", help="only runs whose name has this in it")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file, written after each network")
    return parser.parse_args()


def compressed(network: CifarResNet, data: Cifar) -> dict[str, dict[str, float]]:
    """Accuracy by way of compressing and share left: of the MACs for low rank, of the filters otherwise."""
    teacher = fold_parameters(capture(network, data.calibration[:2]))
    samples = CalibrationSet.of(data.calibration)
    fit, held_out = samples.split(0, 0.1)
    found: dict[str, dict[str, float]] = {way: {} for way in WAYS}
    for share in MACS:
        for way, plain in ((WAYS[0], True), (WAYS[1], False)):
            found[way][f"{share:g}"] = accuracy(low_rank(teacher, fit, held_out, share, plain).module, data)
    for keep in KEEP:
        for way, plain in ((WAYS[2], True), (WAYS[3], False)):
            found[way][f"{keep:g}"] = accuracy(pruned(teacher, fit, held_out, keep, plain).module, data)
    return found


def low_rank(teacher: Program, fit: CalibrationSet, held_out: CalibrationSet, share: float, plain: bool) -> Program:
    settings = RankSettings(multiple_of=1, schemes=("channel",), metric="weights", resolve=False)
    if not plain:
        settings = RankSettings(multiple_of=2)
    goal = Ranks(macs=share) if plain else Macs(share)
    cut = cut_ranks(teacher, fit, held_out, goal, settings=settings, resolve=ResolveSettings(), clock=StageClock())
    return cut.program


def pruned(teacher: Program, fit: CalibrationSet, held_out: CalibrationSet, keep: float, plain: bool) -> Program:
    limits = ChannelLimits(multiple_of=2)
    settings = ChannelSettings(limits=limits)
    if plain:
        settings = ChannelSettings(limits=limits, score="l2", resolve=False)
    cut = cut_channels(
        teacher, fit, held_out, Channels(keep), settings=settings, resolve=ResolveSettings(), clock=StageClock()
    )
    return cut.program


def print_header() -> None:
    shares = [f"{way} {share:g}" for way, marks in zip(WAYS, (MACS, MACS, KEEP, KEEP), strict=True) for share in marks]
    print(f"| run | dense | {' | '.join(shares)} |")
    print(f"|{'---|' * (len(shares) + 2)}", flush=True)


def table_row(row: Row) -> str:
    cells = [f"{value:.1f}" for marks in row["left"].values() for value in marks.values()]
    name = re.sub(r"_lr", ", lr ", row["run"])
    return f"| {name} | {row['dense']:.2f} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
