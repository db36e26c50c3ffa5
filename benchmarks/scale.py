"""How the work of a compile is divided among processes: multiply-accumulates, CPU seconds and bytes of each.

    python benchmarks/scale.py [--processes 1,2,4] [--goals blocks,channels,mimic] [--model m.onnx --calib images.npy]
                               [--samples 256] [--output scale.jsonl] [--table]

The same compile is made by so many processes of one thread each, over torch.distributed's gloo. With m_r the
multiply-accumulates of process r and m those of one process alone, what is not divided is u = (sum m_r - m) / (n - 1),
and the share that is divided 1 - u / m. Imbalance is the largest m_r over their mean. The weights of all runs are
compared. Without a model it is a residual network with random weights at 64 px. The speed-up means something on as many
free cores as there are processes. Rows are kept line by line: a second call goes on, `--table` prints them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compile_growth import Residual
from rows import Row, append_line, best_compiled, read_lines
from torch import nn

GOALS = ("blocks", "channels", "mimic")


def network() -> nn.Module:
    """Random weights, the same in every process."""
    torch.manual_seed(0)
    stages: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1, stride=2), nn.ReLU()]
    for width in (32, 64):
        stages += [*(Residual(width) for _ in range(4)), nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), nn.ReLU()]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)).eval()


def images(samples: int) -> torch.Tensor:
    return torch.randn(samples, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def run(arguments: argparse.Namespace, goal: str) -> None:
    """What one process does; the first one writes what all did."""
    import foldcut
    from foldcut.compiler.processes.launching import launched, rank_given
    from foldcut.compiler.support.tally import Tally, counted_into

    torch.set_num_threads(1)
    model: Any = arguments.model or network()
    data = images(arguments.samples) if arguments.calib is None else torch.from_numpy(np.load(arguments.calib))
    goals = {"blocks": foldcut.Blocks(2), "channels": foldcut.Channels(0.5), "mimic": foldcut.Blocks(1)}
    mimic = foldcut.MimicSettings(iterations=60) if goal == "mimic" else None
    options: dict[str, Any] = {"goal": goals[goal], "progress": False, "cache": False, "mimic": mimic}
    began, done = time.perf_counter(), Tally()
    with warnings.catch_warnings(), launched(), counted_into(done):
        warnings.simplefilter("ignore")
        out = best_compiled(model, data[: arguments.samples], **options)
    wall_s = time.perf_counter() - began
    if rank_given():
        return
    assert out is not None
    weights = hashlib.blake2b(b"".join(v.numpy().tobytes() for v in out.module.state_dict().values()), digest_size=8)
    report = out.report
    alone = {
        "macs": [sum(done.values())],
        "cpu_s": [round(time.process_time(), 3)],
        "sent_bytes": [0],
        "exchanges": [0],
    }
    stages = {row["stage"]: row["wall_s"] for row in report.profile}
    found = {"wall_s": round(wall_s, 2), **(report.processes or alone), "weights": weights.hexdigest()}
    print(json.dumps({**found, "error": report.output_error, "stages": stages}))


def made(arguments: argparse.Namespace, goal: str, size: int) -> Row:
    """The row of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, *sys.argv, "--run", goal]
    with tempfile.TemporaryFile() as said:
        processes = []
        for rank in range(size):
            given = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": port}
            given |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, env={**os.environ, **given}, stdout=said))
        if sum(process.wait() != 0 for process in processes):
            raise SystemExit(f"{goal} by {size} processes failed")
        said.seek(0)
        found = json.loads(said.read().splitlines()[-1])
    return {"goal": goal, "processes": size, "model": str(arguments.model or "random"), **found}


def figures(row: Row, alone: Row) -> Row:
    """What a row says beside that of one process."""
    macs, whole, size = row["macs"], sum(alone["macs"]), row["processes"]
    twice = (sum(macs) - whole) / max(1, size - 1)
    return {
        "divided": 1 - twice / whole,
        "imbalance": max(macs) / (sum(macs) / size),
        "speed_up": alone["wall_s"] / row["wall_s"],
        "sent_mib": sum(row["sent_bytes"]) / 2**20,
        "same": row["weights"] == alone["weights"],
    }


def table(rows: list[Row]) -> None:
    print(
        "| goal | processes | GMACs of each | CPU s of each | s | divided | imbalance | speed-up | MiB sent | weights |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        alone = next(
            (r for r in rows if (r["goal"], r["model"], r["processes"]) == (row["goal"], row["model"], 1)), None
        )
        macs = ", ".join(f"{m / 1e9:.0f}" for m in row["macs"])
        cpu = ", ".join(f"{s:.0f}" for s in row["cpu_s"])
        head = f"| {row['goal']} | {row['processes']} | {macs} | {cpu} | {row['wall_s']:.0f} "
        if alone is None or row is alone:
            print(f"{head}| | | | | |")
            continue
        found = figures(row, alone)
        same = "the same bits" if found["same"] else "others"
        print(
            f"{head}| {100 * found['divided']:.1f} % | {found['imbalance']:.3f} | {found['speed_up']:.2f} "
            f"| {found['sent_mib']:.0f} | {same} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--goals", default=",".join(GOALS))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("scale.jsonl"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments, arguments.run)
        return
    rows = read_lines(arguments.output)
    known = {(row["goal"], row["model"], row["processes"]) for row in rows}
    for goal in () if arguments.table else arguments.goals.split(","):
        for size in map(int, arguments.processes.split(",")):
            if (goal, str(arguments.model or "random"), size) not in known:
                rows.append(made(arguments, goal, size))
                append_line(arguments.output, rows[-1])
    table(rows)


if __name__ == "__main__":
    main()
