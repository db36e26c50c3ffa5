"""Damaged ONNX files: each must end in a CompilerError or in an import that computes what ONNX Runtime computes.

    python benchmarks/onnx_fuzz.py [--count 2000] [--seed 0] [--jobs 1] [--first N] [--only CASE ...] [--save FOLDER]

A case is determined by its seed and number alone. The cases run in worker processes, one after another, a fresh worker
every so often and whenever one dies. Any other exception, an import that differs from ONNX Runtime on fresh inputs,
more than 10 s, or the death of the worker is a failure; it is printed with what repeats it. Exit status 1 when there
is one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

#: Wall seconds that one case may take, and that a worker may take to start.
LIMIT, START_LIMIT = 10.0, 300.0
#: A worker is replaced after so many cases, and may allocate so much beyond what it starts with.
CASES_PER_WORKER, MEMORY_BYTES = 250, 6 << 30
TOLERANCE = 1e-4
REFUSED, IMPORTED, FIXED = "CompilerError", "imported", "imported, fixed batch"
FINE = (REFUSED, IMPORTED, FIXED)

Row = dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker is not None:
        serve(arguments.worker, arguments.seed)
        return
    numbers = arguments.only or list(range(arguments.first, arguments.first + arguments.count))
    print(f"seed {arguments.seed}, cases {numbers[0]} to {numbers[-1]}, {arguments.jobs} workers", flush=True)
    started, rows = time.perf_counter(), []
    for row in run_all(numbers, arguments):
        rows.append(row)
        if row["outcome"] not in FINE or arguments.only:
            print(described(row, arguments.seed), flush=True)
        if len(rows) % 100 == 0:
            print(f"... {len(rows)} cases, {time.perf_counter() - started:.0f} s", flush=True)
    summarise(rows, time.perf_counter() - started)
    if arguments.output:
        arguments.output.write_text(json.dumps({"seed": arguments.seed, "rows": rows}, indent=1) + "\n")
    sys.exit(any(row["outcome"] not in FINE for row in rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="+", metavar="CASE", help="these cases, each with its outcome")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the files of --only there")
    parser.add_argument("--output", type=Path, help="JSON file with every outcome")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_all(numbers: Sequence[int], arguments: argparse.Namespace) -> Iterator[Row]:
    """The outcomes, in order."""
    if arguments.save and arguments.only:
        save_files(numbers, arguments)
    own = threading.local()
    workers: list[Worker] = []

    def run(number: int) -> Row:
        if not hasattr(own, "worker"):
            own.worker = Worker(arguments.seed)
            workers.append(own.worker)
        row: Row = own.worker.run(number)
        return row

    try:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            yield from pool.map(run, numbers)
    finally:
        for worker in workers:
            worker.stop()


def save_files(numbers: Sequence[int], arguments: argparse.Namespace) -> None:
    from fuzz_mutations import make_case

    arguments.save.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        path = arguments.save / f"case{number}.onnx"
        path.write_bytes(make_case(arguments.seed, number).content)
        print(f"written: {path}")


class Worker:
    """A process that runs cases. It is started when it is needed and replaced when it dies, hangs or grows old."""

    def __init__(self, seed: int) -> None:
        self.seed, self.done = seed, 0
        self.process: subprocess.Popen[str] | None = None
        self.answers = -1

    def run(self, number: int) -> Row:
        if self.process is None or self.done >= CASES_PER_WORKER:
            self.stop()
            self.start()
        assert self.process is not None
        assert self.process.stdin is not None
        started = time.perf_counter()
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        row = self.answer(LIMIT)
        self.done += 1
        if row is None:
            row = {"outcome": "hang", "case": number, "text": f"no answer within {LIMIT:.0f} s"}
            self.stop()
        elif not row:
            row = {"outcome": "crash", "case": number, "text": f"the process ended with {self.process.wait()}"}
            self.stop()
        return row | {"seconds": round(time.perf_counter() - started, 2)}

    def start(self) -> None:
        self.answers, theirs = os.pipe()
        command = [sys.executable, "-W", "ignore", __file__, "--seed", str(self.seed), "--worker", str(theirs)]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, text=True, pass_fds=[theirs]
        )
        os.close(theirs)
        self.done = 0
        if not self.answer(START_LIMIT):
            raise RuntimeError("the worker does not start")

    def answer(self, limit: float) -> Row | None:
        """The worker's next line; {} when it has ended, None when it takes too long."""
        content, end = b"", time.perf_counter() + limit
        while not content.endswith(b"\n"):
            ready, _, _ = select.select([self.answers], [], [], max(0.0, end - time.perf_counter()))
            if not ready:
                return None
            part = os.read(self.answers, 1 << 16)
            if not part:
                return {}
            content += part
        row: Row = json.loads(content)
        return row

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            os.close(self.answers)
            self.process = None


def serve(answers: int, seed: int) -> None:
    """The worker: case numbers from standard input, one line of JSON for each to the file descriptor `answers`."""
    import onnxruntime
    import torch
    from foldcut.compiler.onnx_import.importer import import_onnx
    from fuzz_models import MODELS

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    onnxruntime.set_default_logger_severity(4)
    import_onnx(MODELS["convolutions"]())  # what torch and ONNX Runtime load when they are first used
    limit_memory()
    with os.fdopen(answers, "w") as out, tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"ready": True}), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(run_case(seed, int(line), Path(folder) / "model.onnx")), file=out, flush=True)


def limit_memory() -> None:
    """Allocations beyond the limit fail, so that a file that asks for too much shows and the machine goes on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_case(seed: int, number: int, path: Path) -> Row:
    """What becomes of one damaged file."""
    from foldcut.compiler.onnx_import.importer import import_onnx
    from foldcut.compiler.support.errors import CompilerError
    from fuzz_mutations import make_case

    case = make_case(seed, number)
    row: Row = {"case": number, "model": case.model, "mutation": case.mutation, "detail": case.detail}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path.write_bytes(case.content)
    try:
        program = import_onnx(path)
        row |= verified(program, path)
    except CompilerError as refusal:
        row |= {"outcome": REFUSED, "text": str(refusal.message)[:300]}
    except Exception as cause:
        end = traceback.format_exception(cause)[-6:]
        row |= {"outcome": type(cause).__name__, "text": "".join(end)[-1500:]}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return row | {"grown_mib": round(grown, 1)}


def verified(program: Any, path: Path) -> Row:
    """The import against ONNX Runtime once more, on inputs that the importer has not seen."""
    import numpy as np
    import onnxruntime
    from foldcut.compiler.ir.compare import compare
    from foldcut.compiler.onnx.session import reference_session

    onnxruntime.set_default_logger_severity(4)
    session, rng, worst = reference_session(str(path)), np.random.default_rng(1), 0.0
    inputs = program.origin.inputs
    fixed = {i.name: i.shape[0] for i in inputs if i.shape and isinstance(i.shape[0], int)}
    dynamic = any(s.shape and s.shape[0] == "batch" for s in program.inputs)
    for batch in (2, 3) if dynamic and not fixed else (2,):
        arrays = [drawn(s, fixed.get(s.name, batch), rng) for s in program.inputs]
        try:
            expected = session.run(None, {s.name: a.numpy() for s, a in zip(program.inputs, arrays, strict=True)})
        except Exception:  # a batch that the file itself cannot run
            continue
        difference = compare([as_tensor(e) for e in expected], program(tuple(arrays)))
        worst = max(worst, difference.relative)
    if worst > TOLERANCE:
        return {"outcome": "wrong result", "text": f"{worst:.1e} from ONNX Runtime", "difference": worst}
    return {"outcome": IMPORTED if dynamic else FIXED, "text": f"{worst:.1e} from ONNX Runtime", "difference": worst}


def as_tensor(array: Any) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(array, order="C").copy())


def drawn(spec: Any, batch: int, rng: Any) -> Any:
    """Random values of an input; integers as indices that any table has."""
    import torch

    shape = [batch, *(d if isinstance(d, int) else 2 for d in spec.shape[1:])] if spec.shape else []
    if spec.dtype.is_floating_point:
        return torch.from_numpy(rng.standard_normal(shape)).to(spec.dtype)
    return torch.from_numpy(rng.integers(0, 2, size=shape)).to(spec.dtype)


def described(row: Row, seed: int) -> str:
    head = f"{row['outcome']}: case {row['case']} (--seed {seed} --only {row['case']}), {row['seconds']:.1f} s"
    if "mutation" not in row:
        from fuzz_mutations import make_case

        case = make_case(seed, row["case"])
        row |= {"model": case.model, "mutation": case.mutation, "detail": case.detail}
    text = "\n    ".join(str(row.get("text", "")).splitlines())
    return f"{head}\n  {row['model']}, {row['mutation']}: {row['detail']}\n    {text}"


def summarise(rows: Sequence[Row], seconds: float) -> None:
    counts = Counter((row["mutation"], row["outcome"]) for row in rows)
    outcomes = [*FINE, *sorted({row["outcome"] for row in rows} - set(FINE))]
    print(f"\n| mutation | {' | '.join(outcomes)} |\n|{'---|' * (len(outcomes) + 1)}")
    for mutation in dict.fromkeys(row["mutation"] for row in sorted(rows, key=lambda row: str(row["mutation"]))):
        print(f"| {mutation} | {' | '.join(str(counts[mutation, o] or '') for o in outcomes)} |")
    totals = Counter(row["outcome"] for row in rows)
    print(f"| all | {' | '.join(str(totals[o]) for o in outcomes)} |")
    slowest = max(rows, key=lambda row: row["seconds"])
    largest = max(rows, key=lambda row: row.get("grown_mib", 0))
    failed = sum(count for outcome, count in totals.items() if outcome not in FINE)
    print(f"\nfailures: {failed} of {len(rows)} ({seconds:.0f} s)")
    print(f"slowest: case {slowest['case']} ({slowest['mutation']}), {slowest['seconds']:.1f} s")
    print(f"most memory: case {largest['case']} ({largest['mutation']}), {largest.get('grown_mib', 0):.0f} MiB more")


if __name__ == "__main__":
    main()
