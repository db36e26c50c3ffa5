"""Random networks through every rewrite, beside an oracle that knows nothing of foldcut's analyses.

    python benchmarks/hardening.py --networks 10000 --seed 0 --jobs 2 --output F.jsonl [--resume] [--markdown F.md]
    python benchmarks/hardening.py --only 1234     # one network alone: its number and the seed are all it takes

A network of 5 to 40 operators (hardening_networks.py) is captured, cut at random units several times, bypassed at
random regions and run at two batch sizes; every third is factorised at full rank, every twentieth exported and run in
ONNX Runtime, every thirtieth re-solved. Cuts are compared with hardening_oracle.py, drops with the graph run beside a
swapped value, and what may change nothing with the network itself (hardening_exact.py). Each network counts as the most
severe of what was found: `wrong`, `exception` (no CompilerError), `unknown` (the oracle cannot tell), `refused` (a
CompilerError), `ok`.

Every failure is made small, by leaving out pieces of the network for as long as it still fails, printed, and kept as a
file that shows it again, under --keep. --output holds one JSON line a network; --resume goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
#: Networks that one process handles before a fresh one takes over: memory that torch keeps goes with it.
CHUNK = 100
#: Wall seconds for one network.
LIMIT_SECONDS = 120


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first network")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--onnx-every", type=int, default=20, help="one network in so many goes through ONNX Runtime")
    parser.add_argument("--deep-every", type=int, default=30, help="one in so many is re-solved")
    parser.add_argument("--output", type=Path, default=Path("hardening.jsonl"))
    parser.add_argument("--resume", action="store_true", help="skip the networks that --output already holds")
    parser.add_argument("--keep", type=Path, help="folder for reproductions; default: beside --output")
    parser.add_argument("--minimise", type=int, default=40, help="how many failures of one kind are made small")
    parser.add_argument("--markdown", type=Path, help="write the tally there")
    parser.add_argument("--only", type=int, help="this network alone")
    parser.add_argument("--worker", nargs=2, type=int, metavar=("FIRST", "END"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.keep = arguments.keep or arguments.output.with_suffix(".failures")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.only is not None:
        arguments.worker, arguments.output = [arguments.only, arguments.only + 1], Path("/dev/stdout")
    if arguments.worker:
        work(arguments, *arguments.worker)
        return
    if not arguments.resume:
        arguments.output.unlink(missing_ok=True)
    start = time.time()
    run_all(arguments)
    rows = read_rows(arguments)
    from hardening_tally import tally, write_markdown

    text = tally(rows)
    print(text)
    print(f"{time.time() - start:.0f} s")
    if arguments.markdown:
        write_markdown(arguments.markdown, rows, arguments.seed)
    failed = Counter(row["status"] for row in rows)
    sys.exit(1 if failed["wrong"] + failed["exception"] + failed["crash"] else 0)


def read_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The last row of each network of this run, in order."""
    rows: dict[int, dict[str, Any]] = {}
    if arguments.output.exists():
        for line in arguments.output.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut off when the run was killed
                continue
            if row["seed"] == arguments.seed:
                rows[row["number"]] = row
    wanted = range(arguments.first, arguments.first + arguments.networks)
    return [rows[n] for n in wanted if n in rows]


def run_all(arguments: argparse.Namespace) -> None:
    """Chunks of numbers, each in a process of its own, `jobs` at a time. A process that dies names its network."""
    done = {row["number"] for row in read_rows(arguments)}
    end = arguments.first + arguments.networks
    chunks = [(a, min(a + CHUNK, end)) for a in range(arguments.first, end, CHUNK)]
    chunks = [c for c in chunks if not done.issuperset(range(*c))][::-1]
    running: dict[subprocess.Popen[bytes], tuple[int, int]] = {}
    while chunks or running:
        while chunks and len(running) < arguments.jobs:
            chunk = chunks.pop()
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", *map(str, chunk)]
            running[subprocess.Popen(command)] = chunk
        time.sleep(0.2)
        for process in [p for p in running if p.poll() is not None]:
            first, last = running.pop(process)
            here = {row["number"] for row in read_rows(arguments)}
            missing = [n for n in range(first, last) if n not in here]
            if missing and process.returncode:
                finding = {"status": "crash", "stage": "process", "message": f"ended with {process.returncode}"}
                row = {"number": missing[0], "seed": arguments.seed, "status": "crash", "findings": [finding]}
                append(arguments.output, row)
                chunks.append((first, last))


def append(path: Path, row: dict[str, Any]) -> None:
    """One line in one write, so that several processes may do it."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(row) + "\n").encode())
    finally:
        os.close(handle)


class TimeoutWallError(Exception):
    """A network that takes too long."""


def _too_long(*_: Any) -> None:
    raise TimeoutWallError(f"more than {LIMIT_SECONDS} s")


def work(arguments: argparse.Namespace, first: int, end: int) -> None:
    """The networks from `first` to `end` that the output does not hold yet."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    from hardening_minimise import keep
    from hardening_networks import random_recipe
    from hardening_torch import collect, once

    torch.set_num_threads(1)
    once()
    signal.signal(signal.SIGALRM, _too_long)
    done = set() if arguments.only is not None else {row["number"] for row in read_rows(arguments)}
    for number in range(first, end):
        if number in done:
            continue
        recipe = random_recipe(number, arguments.seed)
        row = run_one(arguments, recipe, number)
        if row["status"] in {"wrong", "exception"} and arguments.minimise:
            signal.alarm(3 * LIMIT_SECONDS)
            try:
                row["minimal"] = keep(recipe, number, row, arguments.keep, most=arguments.minimise)
            except TimeoutWallError:
                row["minimal"] = "took too long to make small"
            finally:
                signal.alarm(0)
        append(arguments.output, row)
        collect(number)


def run_one(arguments: argparse.Namespace, recipe: Any, number: int) -> dict[str, Any]:
    """The row of one network."""
    from hardening_checks import run

    start = time.process_time()
    row: dict[str, Any] = {"number": number, "seed": arguments.seed}
    signal.alarm(LIMIT_SECONDS)
    try:
        case = run(recipe, number, onnx=number % arguments.onnx_every == 0, deep=number % arguments.deep_every == 0)
    except Exception as cause:
        said = f"{type(cause).__name__}: {cause}"[:300]
        return row | {
            "status": "exception",
            "findings": [{"status": "exception", "stage": "harness", "message": said}],
        }
    finally:
        signal.alarm(0)
    return row | {
        "status": case.status,
        "findings": case.findings,
        "counts": dict(case.counts),
        "locks": dict(case.locks),
        "pieces": case.pieces,
        "seconds": {k: round(v, 3) for k, v in case.seconds.items()},
        "cpu_s": round(time.process_time() - start, 2),
    }


if __name__ == "__main__":
    main()
