"""What importing costs: seconds and peak memory of `import_onnx` beside `onnx.load` and an ONNX Runtime session.

    pip install --no-deps torchvision
    python benchmarks/onnx_import.py [--models NAME ...] [--repeats 3] [--output FILE.json]

ResNet-50 and ViT-B/16 (torchvision, random weights, written by torch's dynamo exporter) and a stack of 16 linear
layers of 4096 x 4096 (1.07 GB) with its weights beside the file and inside it. Each measurement has its own process
with one thread, and both ways take turns. Before measuring, the process does the same with a network of a few
bytes, so that loading torch and ONNX Runtime is not counted (`first` is what that took); memory is the peak beyond what
the process held then. `import_onnx` checks its result against a session of its own, so it contains the other.
`bare session` is that session without `onnx.load`, from the path.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

WAYS = ("import_onnx", "onnx.load + session", "bare session")
LAYERS, WIDTH = 16, 4096

Row = dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    if arguments.make:
        MODELS[arguments.make[0]](Path(arguments.make[1]))
        return
    if arguments.measure:
        way, path = arguments.measure
        print(json.dumps(measure(way, Path(path))))
        return
    print("| model | file MB | way | wall s | CPU s | peak MiB | peak / weights | first s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for name in arguments.models:
        for row in rows_of(name, arguments):
            rows.append(row)
            print(table_row(row), flush=True)
    print_ratios(rows)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3, help="medians are printed")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def rows_of(name: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """Medians of every way of reading one model; the ways take turns."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        child("--make", name, str(path))
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        found: dict[str, list[Row]] = {way: [] for way in WAYS}
        for _ in range(arguments.repeats):
            for way in WAYS:
                found[way].append(json.loads(child("--measure", way, str(path)).splitlines()[-1]))
    for way, runs in found.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        yield {"model": name, "bytes": size, "way": way, **medians, "runs": runs}


def child(*command: str) -> str:
    """What a process of this script prints."""
    run = subprocess.run([sys.executable, "-W", "ignore", __file__, *command], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{' '.join(command)}: exit status {run.returncode}\n{run.stderr[-2000:]}")
    return run.stdout


def measure(way: str, path: Path) -> Row:
    """Seconds and memory of one way in this process."""
    import onnxruntime
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    onnxruntime.set_default_logger_severity(4)
    read = READERS[way]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.onnx"
        linear_layers(small, layers=1, width=2, beside=False)
        read(small)
    first = time.perf_counter() - started
    before = reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    held = read(path)
    row = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    del held
    return row | {"peak_mib": peak_mib() - before, "baseline_mib": before, "first_seconds": first}


def reset_peak() -> float:
    """The process's memory now in MiB; where the system allows it, the peak is measured from here on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def peak_mib() -> float:
    """Largest resident memory of this process. A child process inherits its parent's in `getrusage`, so the system's
    own figure comes first."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read_foldcut(path: Path) -> Any:
    from foldcut.compiler.onnx_import.importer import import_onnx

    return import_onnx(path)


def read_both(path: Path) -> Any:
    import onnx

    return onnx.load(path), read_session(path)


def read_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


READERS: dict[str, Callable[[Path], Any]] = dict(zip(WAYS, (read_foldcut, read_both, read_session), strict=True))


def torchvision_model(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import torch
        from foreign_ops import declare_torchvision_ops

        declare_torchvision_ops()
        import torchvision

        torch.manual_seed(0)
        network = torchvision.models.get_model(name, weights=None).eval()
        for parameter in network.parameters():
            if parameter.dim() > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)  # a head that starts at zero
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        images = torch.randn(2, 3, 224, 224)
        torch.onnx.export(network, (images,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)

    return write


def linear_layers(path: Path, *, layers: int = LAYERS, width: int = WIDTH, beside: bool) -> None:
    """Gemm and MatMul by turns with Relu between them; `beside`: the weights in a file of their own."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng, nodes, weights, value = np.random.default_rng(0), [], [], "x"
    for i in range(layers):
        matrix = rng.standard_normal((width, width), dtype=np.float32) * np.float32((2 / width) ** 0.5)
        weights.append(numpy_helper.from_array(matrix, f"layers.{i}.weight"))
        if i % 2:
            nodes.append(helper.make_node("MatMul", [value, weights[-1].name], [f"h{i}"], name=f"layers.{i}"))
        else:
            weights.append(numpy_helper.from_array(np.full(width, 0.01, np.float32), f"layers.{i}.bias"))
            inputs = [value, weights[-2].name, weights[-1].name]
            nodes.append(helper.make_node("Gemm", inputs, [f"h{i}"], name=f"layers.{i}", transB=1))
        value = "y" if i == layers - 1 else f"r{i}"
        nodes.append(helper.make_node("Relu", [f"h{i}"], [value]))
    interface = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", width]) for n in "xy"]
    graph = helper.make_graph(nodes, "linear_layers", interface[:1], interface[1:], weights)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, path, save_as_external_data=beside, location="weights.bin" if beside else None)


MODELS: dict[str, Callable[[Path], None]] = {
    "resnet50": torchvision_model("resnet50"),
    "vit_b_16": torchvision_model("vit_b_16"),
    "linear_1GB_beside": lambda path: linear_layers(path, beside=True),
    "linear_1GB_inside": lambda path: linear_layers(path, beside=False),
}


def table_row(row: Row) -> str:
    share = row["peak_mib"] * 2**20 / row["bytes"]
    cells = [row["model"], f"{row['bytes'] / 1e6:.0f}", row["way"], f"{row['wall_seconds']:.2f}"]
    cells += [f"{row['cpu_seconds']:.2f}", f"{row['peak_mib']:.0f}", f"x{share:.2f}", f"{row['first_seconds']:.1f}"]
    return f"| {' | '.join(cells)} |"


def print_ratios(rows: Sequence[Row]) -> None:
    """`import_onnx` as a multiple of the others."""
    print(f"\n| model | import_onnx over | wall | CPU | peak memory |\n|{'---|' * 5}")
    by = {(row["model"], row["way"]): row for row in rows}
    for model in dict.fromkeys(row["model"] for row in rows):
        ours = by[model, WAYS[0]]
        for way in WAYS[1:]:
            keys = ("wall_seconds", "cpu_seconds", "peak_mib")
            ratios = [f"x{ours[k] / max(by[model, way][k], 1e-9):.1f}" for k in keys]
            print(f"| {model} | {way} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
