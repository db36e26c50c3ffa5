"""Two states of foldcut on the same rows, in one run: what got better, what got worse.

    python benchmarks/before_after.py --before v0.1.0 --after . --models ../shared/models --data ../shared/data
        [--rows joint channels low_rank drop_blocks] [--output before_after.jsonl] [--quick]

A state is a git revision or the folder of a checkout. Each row is a whole compile without gradient from 500 unlabelled
images, in a process of its own that imports foldcut from that state and keeps nothing; the two states take turns, row
by row. Accuracy is on all test images by ONNX Runtime, latency in pairs with the original. A row of the output that was
made with the same sources and settings is not made again. Exit code 1: a row failed, or lost more than --most points.

    joint         ResNet-56, Latency(0.6), whatever rewrites cost least            (docs/joint.md)
    channels      ResNet-56, Macs(0.5) by the first convolutions of the blocks     (docs/prune_channels.md)
    uniform       the same, half of each                                           (docs/prune_channels.md)
    low_rank      ResNet-20, Macs(0.5) by ranks                                    (docs/low_rank.md)
    drop_blocks   ResNet-56, 12 of 27 blocks dropped                               (docs/drop_blocks.md)
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rows import Row, append_line, best_compiled, read_lines

PARTS = ("compiler", "passes", "runtime")
NETWORKS = {
    "joint": "resnet56",
    "channels": "resnet56",
    "uniform": "resnet56",
    "low_rank": "resnet20",
    "drop_blocks": "resnet56",
}
SIDES = ("before", "after")


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        json.dump(made_row(arguments.child, arguments), sys.stdout)
        return
    done = {_key(row): row for row in read_lines(arguments.output)}
    with tempfile.TemporaryDirectory(prefix="foldcut-before-after-") as folder:
        roots = {side: import_root(getattr(arguments, side), Path(folder) / side) for side in SIDES}
        sources = {side: digest(root) for side, root in roots.items()}
        for index, name in enumerate(arguments.rows):
            for side in SIDES if index % 2 == 0 else SIDES[::-1]:
                row: Row = {"row": name, "sources": sources[side], "settings": settings_of(arguments)}
                if _key(row) not in done:
                    row |= {"state": getattr(arguments, side)} | run_apart(name, roots[side], arguments)
                    done[_key(row)] = row
                    append_line(arguments.output, row)
                    print(json.dumps(row), file=sys.stderr, flush=True)
        wanted = [
            tuple(
                done[_key({"row": name, "sources": sources[side], "settings": settings_of(arguments)})]
                for side in SIDES
            )
            for name in arguments.rows
        ]
    sys.exit(0 if table(wanted, arguments.most) else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="a git revision, or the folder of a checkout")
    parser.add_argument("--after", default=".", help="the same")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--test-limit", type=int, help="take the first so many test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=float, default=0.3, help="points of accuracy that a row may lose")
    parser.add_argument("--quick", action="store_true", help="a small network and few images: does it run?")
    parser.add_argument("--output", type=Path, default=Path("before_after.jsonl"))
    parser.add_argument("--child", choices=NETWORKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.child and not arguments.before:
        parser.error("--before is missing")
    if arguments.quick:
        arguments.samples, arguments.test_limit = min(arguments.samples, 64), min(arguments.test_limit or 500, 500)
    return arguments


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a row depends on, sources aside."""
    return {name: getattr(arguments, name) for name in ("samples", "test_limit", "seed", "quick")}


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps([row[name] for name in ("row", "sources", "settings")])


def import_root(state: str, folder: Path) -> Path:
    """A folder that foldcut can be imported from as that state has it: copied out of git, or linked to a checkout."""
    source = Path(state).resolve()
    if not source.is_dir():
        source = folder / "source"
        command = ["git", "-C", str(Path(__file__).resolve().parents[1]), "archive", state, *PARTS]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        with tarfile.open(fileobj=io.BytesIO(found)) as archive:
            archive.extractall(source, filter="data")
    package = folder / "import" / "foldcut"
    package.mkdir(parents=True)
    for path in [*(source / part for part in PARTS), *(source / "compiler" / "_package").iterdir()]:
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    return package.parent


def digest(root: Path) -> str:
    """Of all source files, so that a checkout that has changed since is another state."""
    found = hashlib.blake2b(digest_size=8)
    for part in PARTS:
        base = (root / "foldcut" / part).resolve()
        for path in sorted(base.rglob("*.py")):
            found.update(f"{part}/{path.relative_to(base)}".encode() + path.read_bytes())
    return found.hexdigest()


def run_apart(name: str, root: Path, arguments: argparse.Namespace) -> Row:
    """One row in a process that imports foldcut from `root`; what went wrong, where it failed."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", name, "--samples", str(arguments.samples)]
    command += ["--models", str(arguments.models), "--data", str(arguments.data), "--seed", str(arguments.seed)]
    command += ["--quick"] if arguments.quick else []
    command += ["--test-limit", str(arguments.test_limit)] if arguments.test_limit else []
    return child_row(command, root)


def child_row(command: Sequence[str], root: Path, seconds: float | None = None) -> Row:
    """The row that a command prints, run on one thread with foldcut from `root`; what went wrong, where it failed or
    took longer than so many seconds. Raises RuntimeError where it ran with another foldcut."""
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    try:
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failure": f"not done after {seconds:g} s"}
    if found.returncode:
        return {"failure": found.stderr.strip().splitlines()[-1] if found.stderr.strip() else f"{found.returncode}"}
    made: Row = json.loads(found.stdout.splitlines()[-1])
    if Path(made["imported"]).parent != root / "foldcut":
        raise RuntimeError(f"it ran with foldcut from {made['imported']}, not from {root}: {' '.join(command)}")
    return made


def made_row(name: str, arguments: argparse.Namespace) -> Row:
    """A compile with the foldcut that this process imports."""
    import foldcut
    import torch
    from cifar_data import load_cifar, load_resnet, onnx_accuracy

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    network = load_resnet(arguments.models, "resnet20" if arguments.quick else NETWORKS[name])
    data = load_cifar(arguments.data, arguments.samples, arguments.test_limit)
    settings, options = compile_options(name, network, data.calibration, arguments.quick)
    started = time.process_time()
    made = best_compiled(
        network,
        data.calibration,
        mimic=None,
        cache=False,
        seed=arguments.seed,
        progress=False,
        settings=settings,
        **options,
    )
    seconds = time.process_time() - started
    report = made.report.to_dict()
    return {
        "imported": foldcut.__file__,
        "accuracy": onnx_accuracy(made.onnx, data),
        "met": report["met"],
        "macs": report["macs"]["after"] / report["macs"]["before"],
        "latency": report["latency"],
        "output_error": report["output_error"],
        "output_errors": report["output_errors"],
        "decisions": len(report["decisions"]),
        "cpu_s": seconds,
    }


def compile_options(name: str, network: Any, images: Any, quick: bool) -> tuple[Any, dict[str, Any]]:
    """(settings, goal and rewrites) of a row."""
    import foldcut

    if name == "joint":
        seconds = 20 if quick else None
        return foldcut.PipelineSettings(search_seconds=seconds), {"goal": foldcut.Latency(0.8 if quick else 0.6)}
    if name == "low_rank":
        return foldcut.PipelineSettings(), {"goal": foldcut.Macs(0.5), "rewrites": ("factorize",)}
    if name == "drop_blocks":
        views = (foldcut.horizontal_flip,)
        return foldcut.PipelineSettings(), {"goal": foldcut.Blocks(3 if quick else 12), "views": views}
    units = foldcut.find_units(foldcut.capture(network, images[:2]))
    streams = tuple(group.name for group in units.prunable if len(group.consumers) > 1)
    limits = foldcut.ChannelLimits(multiple_of=1, least=0.05, ignore=streams)
    settings = foldcut.PipelineSettings(channels=foldcut.ChannelSettings(limits=limits))
    goal = foldcut.Channels(0.5) if name == "uniform" else foldcut.Macs(0.5)
    return settings, {"goal": goal, "rewrites": ("prune_channels",)}


def table(pairs: Sequence[Sequence[Row]], most: float) -> bool:
    """Print the rows side by side; whether none failed or lost more than so many points."""
    print("| row | accuracy before | after | points | MACs before | after | latency before | after | CPU s |")
    print(f"|{'---|' * 9}")
    fine = True
    for before, after in pairs:
        failures = [row["failure"] for row in (before, after) if "failure" in row]
        if failures:
            print(f"| {before['row']} | failed: {'; '.join(failures)} |")
            fine = False
            continue
        points = after["accuracy"] - before["accuracy"]
        fine = fine and points >= -most
        cells = [before["row"], *(f"{row['accuracy']:.2f}" for row in (before, after)), f"{points:+.2f}"]
        cells += [f"{row['macs']:.3f}" for row in (before, after)]
        cells += [_interval(row["latency"]) + ("" if row["met"] else ", not met") for row in (before, after)]
        print(f"| {' | '.join(cells)} | {before['cpu_s']:.0f} and {after['cpu_s']:.0f} |", flush=True)
    return fine


def _interval(latency: Mapping[str, Any]) -> str:
    return f"{latency['ratio']:.3f} ({latency['low']:.3f} to {latency['high']:.3f})" if "ratio" in latency else "-"


if __name__ == "__main__":
    main()
