"""ONNX in, ONNX out: files imported, compared with ONNX Runtime, exported and compared again.

    pip install --no-deps torchvision
    python benchmarks/onnx_round_trip.py [--light [NAME ...]] [--torchvision [NAME ...]] [--output FILE.json [--resume]]

Without either: both. --light: the `light_*` models of the onnx wheel with random weights in place of their constant
fills; the import and the file exported from it against ONNX Runtime on the original, at the file's batch.
--torchvision: all classifiers (or those named) with random weights, written by both of torch's exporters and imported
again, at batch 1 and 3, with as many parameters as the file holds. A network that an exporter refuses makes no file:
that is a row, not a failure. Each row has its own process with one torch thread; the smallest models come first.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import foldcut
import numpy as np
import onnx
import torch
from coverage import leaves, make, relative
from foldcut.compiler.export.exporter import save_onnx
from foldcut.compiler.onnx.session import reference_session
from foldcut.compiler.onnx_import.importer import import_onnx
from foreign_ops import declare_torchvision_ops
from light_models import image, light_files, with_random_weights
from rows import Record, Row, make_rows

TOLERANCE = 1e-4
#: Where the module itself differs from its file by more, an import may differ by this much of that.
AS_THE_MODULE = 1.5
#: What the older exporter writes.
SCRIPT_OPSET = 17
EXPORTERS = ("dynamo", "script")


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        source, name, path = arguments.child
        check_model(source, name, Record(Path(path)), arguments.seed)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # takes the running child along
    names = wanted(arguments)
    print("| file | parameters: torch, file, import | import vs ONNX Runtime | export vs ONNX Runtime | ", end="")
    print("interface | names kept | opset | import s (CPU) | peak MiB | |")
    print(f"|{'---|' * 10}", flush=True)
    failed = summarise(make_rows(arguments, names, ("seed",), table_row))
    sys.exit(1 if failed else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--light", nargs="*", metavar="NAME", help="light models of the onnx wheel; default: all")
    parser.add_argument("--torchvision", nargs="*", metavar="NAME", help="torchvision classifiers; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=1800.0, help="wall seconds for one row")
    parser.add_argument("--output", type=Path, help="JSON file, written after each row")
    parser.add_argument("--resume", action="store_true", help="skip the rows that --output already holds")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resume and not arguments.output:
        parser.error("--resume needs --output")
    if arguments.light is None and arguments.torchvision is None:
        arguments.light, arguments.torchvision = [], []
    return arguments


def wanted(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """(source, name) of the rows."""
    names = []
    if arguments.light is not None:
        light = [path.stem for path in light_files()]
        names += [("light", name) for name in light if name in (arguments.light or light)]
        strange = set(arguments.light) - set(light)
        if strange:
            sys.exit(f"no such light models: {', '.join(sorted(strange))}; there are {', '.join(light)}")
    if arguments.torchvision is not None:
        for name in by_size(arguments.torchvision):
            names += [(exporter, name) for exporter in EXPORTERS]
    return names


def by_size(names: Sequence[str]) -> list[str]:
    """The classifiers (all where no names are given) by their number of parameters, which torchvision tells."""
    declare_torchvision_ops()
    from torchvision import models

    def size(name: str) -> int:
        return int(next(iter(models.get_model_weights(name))).meta["num_params"])

    return sorted(names or models.list_models(module=models), key=size)


def check_model(source: str, name: str, record: Record, seed: int) -> None:
    """Everything about one file, into `record`; what goes wrong is noted there as well."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with record.to_the_end(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if source == "light":
            check_light(name, path, record, seed)
        else:
            check_torchvision(source, name, path, record, seed)


def check_light(name: str, path: Path, record: Record, seed: int) -> None:
    """Import, compare; export, compare again."""
    record.note(stage="build")
    original = next(p for p in light_files() if p.stem == name)
    model = with_random_weights(original, seed)
    onnx.save(model, path)
    images, others = (torch.from_numpy(image(model, seed + i)) for i in (1, 2))
    del model
    program = imported(path, record)
    expected = reference(path, images)
    record.note(import_difference=worst(leaves(program(images)), expected), rows_spread=spread(path, others, expected))
    record.note(stage="export")
    again = path.with_name("again.onnx")
    started = time.process_time()
    save_onnx(program, again)
    record.note(export_seconds=round(time.process_time() - started, 2))
    record.note(stage="run the export", **interface_kept(path, again))
    record.note(export_difference=worst(reference(again, images), expected))
    judge(record)


def check_torchvision(exporter: str, name: str, path: Path, record: Record, seed: int) -> None:
    """Write with an exporter, import, compare at two batch sizes."""
    record.note(stage="build")
    network, images = make("torchvision", name, seed)
    record.note(torch_parameters=sum(p.numel() for p in network.parameters()), stage="write the file")
    try:
        write(network, images[:2], exporter, path)
    except Exception as cause:
        record.note(no_file=f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:600])
        return
    del network
    program = imported(path, record)
    differences = []
    for batch in (1, 3):
        expected = reference(path, images[:batch])
        differences.append(worst(leaves(program(images[:batch])), expected))
    record.note(import_difference=max(differences))
    if max(differences) > TOLERANCE:
        record.note(module_difference=module_difference(name, path, seed))
    judge(record)


def module_difference(name: str, path: Path, seed: int) -> float:
    """How far the torch module itself is from its file in ONNX Runtime: the rounding that deep networks of random
    weights amplify, which no import can do without."""
    network, images = make("torchvision", name, seed)
    with torch.no_grad():
        return max(worst(leaves(network(images[:n])), reference(path, images[:n])) for n in (1, 3))


def write(network: torch.nn.Module, images: torch.Tensor, exporter: str, path: Path) -> None:
    """An ONNX file with a dynamic batch."""
    with torch.no_grad():
        if exporter == "dynamo":
            shapes = ({0: torch.export.Dim.DYNAMIC},)
            torch.onnx.export(network, (images,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        else:
            axes = {"input": {0: "batch"}, "output": {0: "batch"}}
            names = {"input_names": ["input"], "output_names": ["output"], "dynamic_axes": axes}
            torch.onnx.export(network, (images,), str(path), dynamo=False, opset_version=SCRIPT_OPSET, **names)


def imported(path: Path, record: Record) -> foldcut.Program:
    """The file as a Program; what it took, and the parameters of both are noted."""
    count, names = file_parameters(path)
    record.note(stage="import", file_parameters=count, memory_before_mib=record.row["peak_mib"])
    wall, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        program = import_onnx(path)
    record.note(
        stage="compare",
        import_wall_seconds=round(time.perf_counter() - wall, 2),
        import_cpu_seconds=round(time.process_time() - cpu, 2),
        warnings=[str(w.message)[:300] for w in said if issubclass(w.category, UserWarning)],
        parameters=program.parameter_count(),
        names=len(names),
        names_kept=len(names & {n for n, _ in program.module.named_parameters()}),
        opset=program.origin.opset,
    )
    return program


def file_parameters(path: Path) -> tuple[int, set[str]]:
    """Elements and names of the file's floating-point initializers that nodes read, without the running statistics of
    batch norms and single numbers. The older exporter writes tensors of equal values once, with an Identity for each
    other name: one tensor in the file is one parameter."""
    model = onnx.load(path, load_external_data=False)
    copies = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Identity"}
    readers = [node for node in model.graph.node if node.op_type != "Identity"]
    norms = [node for node in readers if node.op_type == "BatchNormalization"]
    statistics = {copies.get(name, name) for node in norms for name in node.input[3:5]}
    read = {copies.get(name, name) for node in readers for name in node.input} - statistics
    kinds = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
    held = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type in kinds}
    sizes = {name: held.get(name, 0) for name in read}
    return sum(s for s in sizes.values() if s > 1), {n for n, s in sizes.items() if s > 1}


def reference(path: Path, images: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of a file in ONNX Runtime."""
    session = reference_session(str(path))
    return [torch.from_numpy(np.asarray(v)) for v in session.run(None, {session.get_inputs()[0].name: images.numpy()})]


def spread(path: Path, images: torch.Tensor, expected: Sequence[torch.Tensor]) -> float:
    """How much the outputs change with the inputs. Next to nothing, or outputs of which hardly any is not zero (a
    saturated softmax), would make the comparison empty."""
    found = worst(reference(path, images), expected)
    shares = [float((e.abs() > 1e-3 * e.abs().max()).float().mean()) for e in expected]
    if not found > 10 * TOLERANCE or min(shares) < 0.01:
        raise RuntimeError(f"the outputs say little: {found:.1e} between inputs, {min(shares):.1%} not zero")
    return found


def worst(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max(relative(a, e) for a, e in zip(actual, expected, strict=True))


def interface_kept(path: Path, again: Path) -> Row:
    """Names, order, types and dimensions of inputs and outputs, and the opset, in both files."""
    before, after = (onnx.load(p, load_external_data=False) for p in (path, again))
    weights = {t.name for t in before.graph.initializer}
    inputs = [v for v in before.graph.input if v.name not in weights]
    same = [signature(v) for v in (*inputs, *before.graph.output)] == [
        signature(v) for v in (*after.graph.input, *after.graph.output)
    ]
    opsets = [max(o.version for o in m.opset_import if o.domain in ("", "ai.onnx")) for m in (before, after)]
    return {"interface_kept": same, "opset": opsets[0], "opset_after": opsets[1]}


def signature(value: onnx.ValueInfoProto) -> tuple[Any, ...]:
    kind = value.type.tensor_type
    return value.name, kind.elem_type, [d.dim_param or d.dim_value for d in kind.shape.dim]


def judge(record: Record) -> None:
    """Raise when something is not as it was before."""
    row, differences = record.row, ("import_difference", "export_difference")
    allowed = max(TOLERANCE, AS_THE_MODULE * row.get("module_difference", 0.0))
    far = [key for key in differences if key in row and not row[key] <= allowed]
    problems = [f"{key.replace('_', ' ')} {row[key]:.1e}" for key in far]
    if row["parameters"] != row["file_parameters"]:
        problems.append(f"{row['parameters']} parameters where the file has {row['file_parameters']}")
    if not row.get("interface_kept", True):
        problems.append("the interface has changed")
    if row.get("opset_after", row["opset"]) != row["opset"]:
        problems.append(f"opset {row['opset']} became {row['opset_after']}")
    if problems:
        raise RuntimeError("; ".join(problems))


def table_row(row: Row) -> str:
    counts = [f"{row[k]:,}" for k in ("torch_parameters", "file_parameters", "parameters") if k in row]
    after = row.get("opset_after", row.get("opset"))
    cells = [
        ", ".join(counts),
        f"{row['import_difference']:.0e}" if "import_difference" in row else "",
        f"{row['export_difference']:.0e}" if "export_difference" in row else "",
        {True: "kept", False: "CHANGED"}.get(row.get("interface_kept"), ""),  # type: ignore[arg-type]
        f"{row['names_kept']} of {row['names']}" if "names" in row else "",
        f"{row['opset']} -> {after}" if "opset_after" in row else str(row.get("opset", "")),
        f"{row['import_wall_seconds']:.1f} ({row['import_cpu_seconds']:.1f})" if "import_wall_seconds" in row else "",
        f"{row['peak_mib']:.0f}" if "peak_mib" in row else "",
    ]
    notes = [f"warned: {text}" for text in row.get("warnings", [])]
    notes += [f"the module itself {row['module_difference']:.1e}"] if "module_difference" in row else []
    notes += [f"no file: {row['no_file']}"] if row.get("no_file") else []
    notes += [f"FAILED: {' '.join(row['failure'].splitlines()[:3])}"] if row.get("failure") else []
    label = row["name"] if row["source"] == "light" else f"{row['name']} ({row['source']})"
    return " | ".join([f"| {label}", *cells, "; ".join(notes).replace("|", "/")]) + " |"


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Print what the table comes to; returns the rows that failed."""
    failed = [row for row in rows if row.get("failure")]
    refused = [row for row in rows if row.get("no_file")]
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source]
        bad, none = sum(r in failed for r in own), sum(r in refused for r in own)
        print(f"\n{source}: passed {len(own) - bad - none}, failed {bad}, no file {none}, of {len(own)}", end="")
    print(f" (tolerance {TOLERANCE:g} relative)\n")
    for row in refused:
        print(f"- no file: {row['source']} {row['name']}: {row['no_file']}")
    for row in failed:
        print(f"- FAILED: {row['source']} {row['name']}: {' '.join(row['failure'].splitlines()[:4])}")
    imports = [row for row in rows if "import_wall_seconds" in row]
    if imports:
        slowest = max(imports, key=lambda row: row["import_wall_seconds"])
        total = sum(row["import_wall_seconds"] for row in imports)
        print(f"slowest import: {slowest['name']}, {slowest['import_wall_seconds']:.1f} s; all together {total:.0f} s")
    sys.stdout.flush()
    return failed


if __name__ == "__main__":
    main()
