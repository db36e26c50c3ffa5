"""int8 alone and in a mix, beside ONNX Runtime's static quantisation and NNCF's.

    python benchmarks/int8.py --models ../shared/models --data ../shared/data --net resnet56 --output int8.jsonl
        [--samples 500] [--alone 0.8] [--mix 0.6 0.45] [--methods original onnxruntime nncf pruned alone mix] [--mimic]
        [--pruned 0.75 0.5] [--cuts 0.8] [--macs 0.8] [--search-seconds 300]

Each row: a file measured on ONNX Runtime, batch 1, one thread, in pairs with the original, and its accuracy on images
that nothing was calibrated with, twice: as ONNX Runtime runs it on this machine, and as ONNX defines it (without
fusion). Where the two differ, the machine's integer kernels overflow. `alone` is a compile to a Latency goal with
``rewrites=("quantize",)``, `mix` one with all rewrites, `cuts` one with all but int8, `macs` one to a Macs goal by
channels alone, `pruned` ONNX Runtime's int8 (min-max, 7-bit weights) after Torch-Pruning to a share of the channels.
`vit` is trained by cifar_vit.py, its file among the models. Rows are kept line by line: a second call goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foldcut
import torch
from cifar_data import Cifar, load_cifar, load_resnet, onnx_accuracy
from cifar_vit import load_vit
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.export.exporter import to_onnx
from foldcut.runtime.measure.backend import resolve_backend
from foldcut.runtime.measure.conditions import Conditions
from foldcut.runtime.probe.latency_probe import LatencyProbe
from imagenet_data import load_imagenet
from int8_peers import nncf_static, onnxruntime_static
from rows import Row, append_line, best_compiled, read_lines
from torch_pruning_peer import prune_whole_with_torch_pruning

REWRITES = ("drop_blocks", "prune_channels", "factorize", "quantize")
METHODS = ("original", "onnxruntime", "nncf", "pruned", "alone", "mix", "cuts", "macs")
NETS = ("resnet20", "resnet56", "mobilenetv2", "vit")


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    bench = Bench(arguments)
    print("| method | latency ratio (95 %) | top-1 as run | top-1 as defined | CPU s |")
    print(f"|{'---|' * 5}")
    for name, make in bench.rows().items():
        known = [row for row in read_lines(arguments.output) if row["name"] == name and row["net"] == arguments.net]
        if not known:
            known = [bench.row(name, make)]
            append_line(arguments.output, known[0])
        print(_line(known[0]), flush=True)


class Bench:
    """One network with its images, and what is made of it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, net = arguments, arguments.net
        if net == "mobilenetv2":
            self.model: Any = str(arguments.models / "mobilenetv2.onnx")
            self.data: Cifar = load_imagenet(arguments.data, arguments.samples)
        else:
            self.model = load_vit(arguments.models) if net == "vit" else load_resnet(arguments.models, net)
            self.data = load_cifar(arguments.data, arguments.samples)
        program = foldcut.capture(self.model, self.data.calibration[:2])
        self.original = Path(self.model).read_bytes() if isinstance(self.model, str) else to_onnx(program)
        self.probe = LatencyProbe(
            program,
            self.original,
            resolve_backend("onnxruntime"),
            CalibrationSet.of(self.data.calibration[:1]),
            Conditions(seed=0),
        )

    def rows(self) -> dict[str, Callable[[], tuple[bytes, Row]]]:
        """What makes the file of each row."""
        found: dict[str, Callable[[], tuple[bytes, Row]]] = {"original": lambda: (self.original, {})}
        images = self.data.calibration
        for method in ("minmax", "percentile", "entropy"):
            for bits, reduced in ((8, False), (7, True)):
                found[f"onnxruntime {method} {bits}-bit weights"] = lambda m=method, r=reduced: (  # type: ignore[misc]
                    onnxruntime_static(self.original, images, m, reduce_range=r),
                    {},
                )
        found["nncf"] = lambda: (nncf_static(self.original, images), {})
        for keep in self.arguments.pruned:
            found[f"pruned {keep}"] = lambda k=keep: (self._pruned(k), {})  # type: ignore[misc]
        compiled: dict[str, tuple[tuple[str, ...], type[foldcut.Latency | foldcut.Macs]]] = {
            "alone": (("quantize",), foldcut.Latency),
            "mix": (REWRITES, foldcut.Latency),
            "cuts": (REWRITES[:-1], foldcut.Latency),
            "macs": (("prune_channels",), foldcut.Macs),
        }
        for method, (rewrites, goal) in compiled.items():
            for share in getattr(self.arguments, method):
                words = f"{method} {share}, mimicked" if self.arguments.mimic else f"{method} {share}"
                found[words] = functools.partial(self._compiled, goal(share), rewrites)
        return {name: make for name, make in found.items() if name.split()[0] in self.arguments.methods}

    def row(self, name: str, make: Callable[[], tuple[bytes, Row]]) -> Row:
        """A row of the table; with the reason where there is no file."""
        start = time.process_time()
        row: Row = {"net": self.arguments.net, "samples": self.arguments.samples, "name": name}
        try:
            model, more = make()
        except Exception as cause:  # a peer may refuse a network in its own way
            return row | {"failure": f"{type(cause).__name__}: {cause}"[:300]}
        row |= more | {"cpu_s": time.process_time() - start}
        latency = self.probe.final(model)
        row["latency"] = {"ratio": latency.ratio, "low": latency.low, "high": latency.high}
        row["as_run"] = onnx_accuracy(model, self.data, batch=50)
        row["as_defined"] = onnx_accuracy(model, self.data, batch=50, fused=False, count=self.arguments.test)
        return row | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}

    def _pruned(self, keep: float) -> bytes:
        """int8 after Torch-Pruning, which takes a module."""
        if isinstance(self.model, str):
            raise ValueError("Torch-Pruning takes no ONNX file")
        images = self.data.calibration
        pruned = prune_whole_with_torch_pruning(self.model, images, keep)
        model = to_onnx(foldcut.capture(pruned, images[:2]))
        return onnxruntime_static(model, images, "minmax", reduce_range=True)

    def _compiled(self, goal: foldcut.Latency | foldcut.Macs, rewrites: tuple[str, ...]) -> tuple[bytes, Row]:
        options: dict[str, Any] = {"mimic": self.arguments.mimic, "progress": False, "cache": self.arguments.cache}
        options["settings"] = foldcut.PipelineSettings(search_seconds=self.arguments.search_seconds)
        made = best_compiled(self.model, self.data.calibration, goal=goal, rewrites=rewrites, **options)
        kinds = [decision.kind for decision in made.plan.decisions]
        report = made.report
        more = {"met": report.met, "decisions": {kind: kinds.count(kind) for kind in REWRITES}}
        more |= {"output_error": report.output_error, "seconds": report.seconds, "details": report.details}
        more["tried"] = list(report.tried)
        return made.onnx, more


def _line(row: Row) -> str:
    if "failure" in row:
        return f"| {row['name']} | {row['failure']} | | | |"
    latency = row["latency"]
    ratio = f"{latency['ratio']:.3f} ({latency['low']:.3f} to {latency['high']:.3f})"
    mix = f" {json.dumps(row['decisions'])}" if "decisions" in row else ""
    return f"| {row['name']}{mix} | {ratio} | {row['as_run']:.2f} | {row['as_defined']:.2f} | {row['cpu_s']:.0f} |"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--net", choices=NETS, default="resnet56")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--test", type=int, default=2000, help="test images of the runs without fusion, which are slow")
    parser.add_argument("--alone", type=float, nargs="*", default=[0.8])
    parser.add_argument("--mix", type=float, nargs="*", default=[0.6])
    parser.add_argument("--cuts", type=float, nargs="*", default=[0.8])
    parser.add_argument("--macs", type=float, nargs="*", default=[0.8])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pruned", type=float, nargs="*", default=[0.75, 0.5], help="shares of the channels")
    parser.add_argument("--search-seconds", type=float, default=None)
    parser.add_argument("--mimic", action="store_true")
    parser.add_argument("--cache", type=Path, default=None, help="folder that analyses are kept in, shared by the rows")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.cache = arguments.cache or False
    return arguments


if __name__ == "__main__":
    main()
