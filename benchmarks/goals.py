"""Latency goals reached by all rewrites together: the measured ratio against the goal, the rounds and the time it took.

    pip install --no-deps torchvision
    python benchmarks/goals.py --data ../shared/data --models ../shared/models [--network NAME ...]
        [--goals 0.8 0.6 0.45] [--samples 64] [--size 128] [--output goals.json [--resume]]

Every row is a whole compile of one network for one goal, on ONNX Runtime at batch 1 with one thread, without mimicking,
in a process of its own. `resnet20` and `resnet56` are the ones trained on CIFAR-10, with 500 unlabelled images; every
other name is a torchvision classifier with random weights, batch norms with the statistics of the images, and
`--samples` images of random patches at `--size`: there the question is latency, not accuracy. A goal is reached when
the final measurement is at most 3 % above it. Rounds: how often a plan was measured as a whole network until the one
that stands reached the goal, and in brackets how often over all plans that were tried. Stages are shares of the wall
time; a stage inside another counts in both. Exit code 1 when a goal is not reached or took more than 3 rounds.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import foldcut
import torch
from cifar_data import load_cifar, load_resnet
from coverage import enliven
from foreign_ops import declare_torchvision_ops
from rows import Record, Row, best_compiled, make_rows

NETWORKS = (
    "resnet20",
    "resnet56",
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "regnet_y_400mf",
    "convnext_tiny",
)
TRAINED = ("resnet20", "resnet56")
GOALS = (0.8, 0.6, 0.45)
REWRITES = ("drop_blocks", "prune_channels", "factorize")
DECISIONS = (foldcut.DropBlock, foldcut.PruneChannels, foldcut.FactorizeLayer)
CIFAR_SAMPLES = 500
#: Images whose statistics the batch norms of a network with random weights take.
STATISTICS = 16
#: How far above its goal a ratio still counts as reached, relative, and in how many rounds.
WITHIN, MOST_ROUNDS = 0.03, 3
#: Stages shown for each row, those that take longest.
SHOWN = 5


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        _, name, path = arguments.child
        make_row(name, Record(Path(path)), arguments)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # takes the running child along
    names = [
        ("trained" if network in TRAINED else "torchvision", f"{network}@{goal:g}")
        for network in arguments.network
        for goal in arguments.goals
    ]
    print("| network | goal | ratio (95 %) | reached | rounds | dropped + pruned + factorised | MACs | ", end="")
    print("output error | wall s | stages |")
    print(f"|{'---|' * 10}", flush=True)
    rows = make_rows(arguments, names, ("data", "models", "samples", "size", "seed"), table_row)
    sys.exit(0 if summarise(rows) else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder of the CIFAR-10 archives, for the trained networks")
    parser.add_argument("--models", default="", help="folder of the trained networks")
    parser.add_argument("--network", nargs="+", metavar="NAME", default=list(NETWORKS))
    parser.add_argument("--goals", nargs="+", type=float, default=list(GOALS))
    parser.add_argument("--samples", type=int, default=64, help="images for a network with random weights")
    parser.add_argument("--size", type=int, default=128, help="their height and width")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=7200.0, help="wall seconds for one row")
    parser.add_argument("--output", type=Path, help="JSON file, written after each row")
    parser.add_argument("--resume", action="store_true", help="skip the rows that --output already holds")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resume and not arguments.output:
        parser.error("--resume needs --output")
    trained = not arguments.child and set(arguments.network) & set(TRAINED)
    if trained and not (arguments.data and arguments.models):
        parser.error(f"{' and '.join(TRAINED)} need --data and --models")
    return arguments


def make_row(name: str, record: Record, arguments: argparse.Namespace) -> None:
    """One network compiled for one goal; what comes of it goes into `record`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    network_name, _, goal = name.partition("@")
    with record.to_the_end():
        record.note(stage="build", network=network_name, goal=float(goal))
        network, images = make(network_name, arguments)
        record.note(stage="compile")
        started = time.perf_counter()

        def show(stage: str, done: int, total: int) -> None:
            record.note(stage=f"{stage} ({done} of {total})")

        made = best_compiled(
            network,
            images,
            goal=foldcut.Latency(float(goal)),
            rewrites=REWRITES,
            mimic=False,
            seed=arguments.seed,
            progress=show,
        )
        record.note(wall_s=time.perf_counter() - started, **described(made.report))


def make(name: str, arguments: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    """The network in eval mode, and its calibration images."""
    if name in TRAINED:
        data = load_cifar(Path(arguments.data), CIFAR_SAMPLES, test_limit=1)
        return load_resnet(Path(arguments.models), name), data.calibration
    declare_torchvision_ops()
    import torchvision

    torch.manual_seed(arguments.seed)
    network = torchvision.models.get_model(name, weights=None)
    images = patches(arguments.samples, arguments.size, arguments.seed)
    enliven(network, images[:STATISTICS])
    return network.eval(), images


def patches(count: int, size: int, seed: int) -> torch.Tensor:
    """Random patches with a little noise: other than pure noise, they do not average out in the pooling at the end."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 7, 7, generator=generator)
    noise = torch.randn(count, 3, size, size, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(size, size)) + 0.3 * noise


def described(report: foldcut.Report) -> Row:
    """What the table shows, and the plans that were tried."""
    standing = next((plan for plan in report.tried if plan["chosen"]), None)
    return {
        "met": report.met,
        "latency": {key: report.latency[key] for key in ("ratio", "low", "high", "before_ms", "contended")},
        "rounds": standing["rounds"] if standing else 0,
        "measured": sum(plan["rounds"] for plan in report.tried),
        "plans": [dict(plan) for plan in report.tried],
        "decisions": dict(Counter(decision["kind"] for decision in report.decisions)),
        "macs": report.macs["after"] / report.macs["before"],
        "output_errors": dict(report.output_errors),
        "seconds": dict(report.seconds),
    }


def reached(row: Row) -> bool:
    """At most 3 % above the goal, in at most three rounds."""
    if row.get("failure"):
        return False
    return bool(row["latency"]["ratio"] <= (1 + WITHIN) * row["goal"] and row["rounds"] <= MOST_ROUNDS)


def table_row(row: Row) -> str:
    if row.get("failure"):
        network, _, goal = row["name"].partition("@")
        failure = " ".join(row["failure"].splitlines()[:2]).replace("|", "/")
        return f"| {network} | {goal} | FAILED: {failure} |" + " |" * 7
    latency, decisions = row["latency"], row["decisions"]
    wall_s = row["wall_s"]
    longest = sorted(row["seconds"].items(), key=lambda item: -item[1]["wall"])[:SHOWN]
    cells = [
        row["network"],
        f"{row['goal']:g}",
        f"{latency['ratio']:.3f} ({latency['low']:.3f} to {latency['high']:.3f})",
        "yes" if reached(row) else "NO",
        f"{row['rounds']} ({row['measured']})",
        " + ".join(str(decisions.get(kind.kind, 0)) for kind in DECISIONS),
        f"x{row['macs']:.3f}",
        f"{list(row['output_errors'].values())[-1]:.4f}",
        f"{wall_s:.0f}",
        ", ".join(f"{stage} {spent['wall'] / wall_s:.0%}" for stage, spent in longest),
    ]
    return f"| {' | '.join(cells)} |"


def summarise(rows: Sequence[Row]) -> bool:
    """Print what the table comes to; whether every goal was reached."""
    found = [row for row in rows if reached(row)]
    print(f"\nwithin {WITHIN:.0%} of the goal or below, in at most {MOST_ROUNDS} rounds: {len(found)} of {len(rows)}")
    whole = [row for row in rows if not row.get("failure")]
    if whole:
        most = max(whole, key=lambda row: row["latency"]["ratio"] / row["goal"])
        print(f"farthest from its goal: {most['network']} at {most['goal']:g}, {most['latency']['ratio']:.3f}")
        slowest = max(whole, key=lambda row: row["wall_s"])
        print(f"slowest: {slowest['network']} at {slowest['goal']:g}, {slowest['wall_s']:.0f} s; all together ", end="")
        print(f"{sum(row['wall_s'] for row in whole):.0f} s", flush=True)
    return len(found) == len(rows)


if __name__ == "__main__":
    main()
