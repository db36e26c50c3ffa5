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

import foldcut
import torch
from cifar_data import Cifar, CifarResNet, accuracy, load_cifar
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.driver.pipeline import planned_network
from foldcut.compiler.driver.pipeline_settings import PipelineSettings
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit_folds import fold_parameters
from foldcut.compiler.ir.program import Program
from foldcut.compiler.plan.goal import Goal
from foldcut.compiler.rewrite.rewrite import Rewrite
from foldcut.compiler.store.analysis_store import NOTHING_KEPT
from foldcut.compiler.support.progress import StageClock, silent
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
    found: dict[str, dict[str, float]] = {way: {} for way in WAYS}
    for share in MACS:
        for way, plain in ((WAYS[0], True), (WAYS[1], False)):
            found[way][f"{share:g}"] = accuracy(low_rank(teacher, samples, share, plain).module, data)
    for keep in KEEP:
        for way, plain in ((WAYS[2], True), (WAYS[3], False)):
            found[way][f"{keep:g}"] = accuracy(pruned(teacher, samples, keep, plain).module, data)
    return found


def low_rank(teacher: Program, samples: CalibrationSet, share: float, plain: bool) -> Program:
    if plain:
        rewrite = foldcut.Factorize(multiple_of=1, schemes=("channel",), metric="weights", resolve=False)
        return rewritten(teacher, samples, foldcut.Ranks(macs=share), rewrite)
    return rewritten(teacher, samples, foldcut.Macs(share), foldcut.Factorize(multiple_of=2))


def pruned(teacher: Program, samples: CalibrationSet, keep: float, plain: bool) -> Program:
    limits = foldcut.ChannelLimits(multiple_of=2)
    rewrite = foldcut.Prune(limits=limits, score="l2", resolve=False) if plain else foldcut.Prune(limits=limits)
    return rewritten(teacher, samples, foldcut.Channels(keep), rewrite)


def rewritten(teacher: Program, samples: CalibrationSet, goal: Goal, rewrite: Rewrite) -> Program:
    """The network of the plan that one rewrite makes for a goal; nothing is measured, and no analysis is kept."""
    ctx = PipelineSettings(mimic=None).context(teacher, samples, goal, NOTHING_KEPT, StageClock(), silent)
    done, _ = planned_network(ctx, [rewrite])
    return done.program


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
