"""How well latency ratios repeat on a busy machine: interleaved pairs beside the medians of two separate measurements.

    pip install --no-deps torchvision
    python benchmarks/measure_stability.py [--backend onnxruntime|openvino|torch] [--repeats 6] [--output FILE.json]

ResNet-18 at 224 x 224 against itself with half of all channels, while one busy process for each core takes its share.
Every repeat loads both networks anew and takes as many samples by each protocol, and measures ResNet-18 against a
second load of itself. The spread is (largest - smallest) / median of the ratios. Exit code 1 when the pairs spread by
more than 3 %, or when the median over the loads of the network against itself leaves 1 +- 0.01: where a load happens to
put its buffers is part of what it measures, and no number of pairs averages that out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foldcut
import numpy as np
import torch
from foldcut.compiler.analysis.provenance import find_units
from foldcut.compiler.analysis.unit_groups import surplus_units
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.edit_folds import fold_parameters
from foldcut.passes.cut.cuttable import cuttable_groups
from foldcut.passes.cut.prune_channels import prune_channels
from foldcut.runtime.measure.backend import Clock, Runner, resolve_backend
from foldcut.runtime.measure.environment import cpus_available
from foldcut.runtime.measure.loading import opened
from foldcut.runtime.measure.measure import measure_pair, measure_single
from foldcut.runtime.measure.measurement import Measurement
from foldcut.runtime.measure.timing import Timing, Until
from foreign_ops import declare_torchvision_ops
from rows import write_json

MOST_SPREAD = 0.03
MOST_OFF = 0.01
#: Ends by itself when its parent is gone, however that came about, and after an hour.
BUSY = """
import os, time
parent, end = os.getppid(), time.monotonic() + 3600
while os.getppid() == parent and time.monotonic() < end:
    for _ in range(1_000_000):
        pass
"""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The ratios that one way of measuring gave, repeat by repeat."""

    name: str
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.ratios))

    @property
    def spread(self) -> float:
        return (max(self.ratios) - min(self.ratios)) / self.median


class WallRunner:
    """A runner timed by elapsed time, whatever clock it has itself."""

    clock: Clock = "wall"

    def __init__(self, runner: Runner) -> None:
        self.run, self.outputs, self.close = runner.run, runner.outputs, runner.close


def main() -> None:
    arguments = parse_arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    backend = resolve_backend(arguments.backend)
    say("exporting ResNet-18 and its half")
    models = resnet_and_half(arguments.seed)
    inputs = {"x": np.random.default_rng(arguments.seed).standard_normal((1, 3, 224, 224)).astype(np.float32)}
    engines = [backend.build(model, inputs) for model in models]
    environment = {**backend.environment(), "threads": arguments.threads, "batch": 1}

    def load(engine: object) -> Runner:
        return backend.load(engine, inputs, threads=arguments.threads)

    def measured(before: object, after: object, seed: int) -> Measurement:
        with opened(backend, [(before, inputs), (after, inputs)], threads=arguments.threads) as runners:
            return measure_pair(
                *runners, Timing(seed=seed), until=Until(max_seconds=arguments.max_seconds), environment=environment
            )

    with busy_cores(cpus_available() if arguments.busy is None else arguments.busy) as busy:
        protocols, pairs, equal = compare_protocols(load, measured, engines, arguments.repeats)
    passed = show(protocols, pairs, equal, busy)
    if arguments.output:
        write_json(arguments.output, as_dict(protocols, pairs, equal, busy, passed))
    sys.exit(0 if passed else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--busy", type=int, metavar="N", help="busy processes; default: one for each core")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="for one measurement by pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file with every ratio")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or (arguments.busy is not None and arguments.busy < 0):
        parser.error("--repeats starts at 1, --busy at 0")
    return arguments


def resnet_and_half(seed: int) -> tuple[bytes, bytes]:
    """ResNet-18 with random weights as ONNX, and the same with half of the channels of every group."""
    declare_torchvision_ops()
    import torchvision

    torch.manual_seed(seed)
    network = torchvision.models.resnet18(weights=None).eval()
    program = fold_parameters(foldcut.capture(network, torch.randn(2, 3, 224, 224)))
    provenance = find_units(program)
    groups, _ = cuttable_groups(provenance, provenance.prunable)
    units = surplus_units(groups, {group.name: len(group) // 2 for group in groups})
    return to_onnx(program), to_onnx(prune_channels(provenance, units).program)


@contextmanager
def busy_cores(count: int) -> Iterator[int]:
    """So many processes that compute all the time; they are gone when the block ends, and when this process dies.
    RuntimeError when one of them did not last."""
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", BUSY])
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        yield count
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("a busy process ended before the measurement did")


def compare_protocols(
    load: Callable[[object], Runner],
    measured: Callable[[object, object, int], Measurement],
    engines: Sequence[object],
    repeats: int,
) -> tuple[list[Protocol], list[Measurement], list[Measurement]]:
    """Each protocol once in every repeat, so that all of them meet the same machine: what they gave, the measurements
    by pairs, and those of the network against itself."""
    pairs: list[Measurement] = []
    equal: list[Measurement] = []
    separate: list[float] = []
    separate_wall: list[float] = []
    for repeat in range(repeats):
        say(f"repeat {repeat + 1} of {repeats}")
        pairs.append(measured(engines[0], engines[1], repeat))
        separate.append(separate_ratio(load, engines, pairs[-1].pairs, wrap=lambda runner: runner))
        separate_wall.append(separate_ratio(load, engines, pairs[-1].pairs, wrap=WallRunner))
        equal.append(measured(engines[0], engines[0], repeat))
    clock = pairs[0].clock
    found = [
        Protocol(name=f"interleaved pairs, clock {clock}", ratios=tuple(m.ratio for m in pairs)),
        Protocol(name=f"separate medians, clock {clock}", ratios=tuple(separate)),
    ]
    if clock != "wall":
        found.append(Protocol(name="separate medians, clock wall", ratios=tuple(separate_wall)))
    return found, pairs, equal


def separate_ratio(
    load: Callable[[object], Runner], engines: Sequence[object], samples: int, *, wrap: Callable[[Runner], Runner]
) -> float:
    """Each network loaded, timed and closed before the next: the ratio of two medians."""
    medians = []
    for engine in engines:
        with closing(load(engine)) as runner:
            medians.append(measure_single(wrap(runner), samples=samples))
    return medians[1] / medians[0]


def show(protocols: Sequence[Protocol], pairs: Sequence[Measurement], equal: Sequence[Measurement], busy: int) -> bool:
    """Print the table; returns whether both limits were kept."""
    print(f"ResNet-18 and its half, {len(pairs)} repeats, {busy} busy processes")
    print(", ".join(f"{key} {value}" for key, value in equal[0].environment.items() if value != ""))
    print("\n| protocol | median ratio | smallest | largest | spread |")
    print("|---|---|---|---|---|")
    for protocol in protocols:
        low, high = min(protocol.ratios), max(protocol.ratios)
        print(f"| {protocol.name} | x{protocol.median:.3f} | {low:.3f} | {high:.3f} | {protocol.spread:.1%} |")
    counts = [m.pairs for m in pairs]
    widths = [m.half_width for m in pairs]
    contended = sum(m.contended for m in pairs)
    print(f"\npairs per repeat: {min(counts)} to {max(counts)}; half widths of the intervals: ", end="")
    print(f"{min(widths):.1%} to {max(widths):.1%}; flagged as contended: {contended} of {len(pairs)}")
    steady = protocols[0].spread <= MOST_SPREAD
    ratios = [m.ratio for m in equal]
    even = abs(float(np.median(ratios)) - 1) <= MOST_OFF
    print(f"spread of the pairs: {protocols[0].spread:.1%}, at most {MOST_SPREAD:.0%}: {verdict(steady)}")
    print(f"against itself: median x{np.median(ratios):.4f} of {len(ratios)} fresh loads ", end="")
    print(f"({min(ratios):.4f} to {max(ratios):.4f}), within 1 +- {MOST_OFF}: {verdict(even)}")
    return steady and even


def as_dict(
    protocols: Sequence[Protocol], pairs: Sequence[Measurement], equal: Sequence[Measurement], busy: int, passed: bool
) -> dict[str, Any]:
    return {
        "busy_processes": busy,
        "protocols": [{"name": p.name, "ratios": p.ratios, "spread": p.spread} for p in protocols],
        "pairs": [m.to_dict() for m in pairs],
        "against_itself": [m.to_dict() for m in equal],
        "passed": passed,
    }


def verdict(kept: bool) -> str:
    return "passed" if kept else "FAILED"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
