"""A network of gigabytes, compiled whole under a limit: seconds and memory of each stage.

    python benchmarks/large_weights.py [--gigabytes 3] [--limit 6G] [--goal "Blocks(1)"] [--folder DIR] [--module]

The network has random weights: residual blocks of 2,048 values, widened to 4,096. It is written once to `--folder` as
model.onnx with its weights beside it, and compiled from there by a process in a control group of the given limit
(cgroup version 1 or 2, which takes the rights to make one); `--module` compiles it as a module in memory, which holds
the weights a second time. `RssAnon` is what the process alone has in memory, `RssFile` pages of files, which the system
takes back when it needs room. Both are the most seen in a stage, looked at ten times a second.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

WIDTH, SAMPLES = 2048, 64
#: Control groups of version 2 and of version 1: where they are, and how the limit is called.
GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(torch.relu(self.wide(self.norm(x))))


def network(gigabytes: float) -> nn.Module:
    torch.manual_seed(0)
    count = max(1, round(gigabytes * 1e9 / (4 * 4 * WIDTH**2)))
    return nn.Sequential(*(Block() for _ in range(count)), nn.Linear(WIDTH, 16)).eval()


def write(gigabytes: float, path: Path) -> None:
    import foldcut
    from foldcut.compiler.export.exporter import save_onnx

    save_onnx(foldcut.capture(network(gigabytes), torch.randn(2, WIDTH)), path)


class Watch:
    """The most memory of each stage."""

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in {"RssAnon", "RssFile"}:
                    self.most[name] = max(self.most.get(name, 0), int(value.split()[0]) >> 10)
            time.sleep(0.1)


def compile_here(model: Any, goal: str, folder: Path) -> None:
    import foldcut
    from foldcut.compiler.support.progress import StageClock

    watch, began, stage = Watch(), time.perf_counter(), StageClock.stage

    @contextmanager
    def told(clock: StageClock, name: str) -> Iterator[None]:
        watch.most.clear()
        start, cpu = time.perf_counter(), time.process_time()
        with stage(clock, name):
            yield
        seconds = f"{time.perf_counter() - start:.1f} s, CPU {time.process_time() - cpu:.1f} s"
        print(f"| {name} | {seconds} | {watch.most.get('RssAnon')} | {watch.most.get('RssFile')} |", flush=True)

    StageClock.stage = told  # type: ignore[method-assign, assignment]
    print("| stage | time | own memory, MiB | pages of files, MiB |\n|---|---|---|---|")
    samples = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))
    out = foldcut.compile(
        model, samples, goal=eval(f"foldcut.{goal}", {"foldcut": foldcut}), mimic=None, cache=False, progress=False
    )
    watch.most.clear()
    out.save(folder / "compiled")
    saved = sum(path.stat().st_size for path in (folder / "compiled").iterdir())
    print(f"| save ({saved / 1e9:.2f} GB) | | {watch.most.get('RssAnon')} | {watch.most.get('RssFile')} |")
    error, latency = out.tested.error if out.tested else float("nan"), out.report.latency
    print(
        f"{time.perf_counter() - began:.0f} s in all; {len(out.plan.decisions)} decisions, output error {error:.2g}, "
        f"latency x{latency['ratio']:.3f} ({latency['low']:.3f} to {latency['high']:.3f}), ONNX Runtime differs from "
        f"torch by {out.report.onnx_difference:.1g}"
    )


def limited(command: list[str], limit: str) -> int:
    """Run a command in a control group of its own, and say what the group had at most."""
    from foldcut.compiler.support.memory import read_bytes

    for root, bound, most in GROUPS:
        group = root / f"foldcut-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if not (group / bound).exists():
            group.rmdir()
            continue
        try:
            (group / bound).write_text(str(read_bytes(limit)))
            join = f'echo $$ > {group / "cgroup.procs"} && exec "$@"'
            code = subprocess.run(["sh", "-c", join, "sh", *command], check=False).returncode
            print(f"exit code {code}; the group had {int((group / most).read_text()) >> 20} MiB at most of {limit}")
            return code
        finally:
            group.rmdir()
    sys.exit("no control group can be made here: run as root, or under systemd-run -p MemoryMax with --here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--limit", default="6G")
    parser.add_argument("--goal", default="Blocks(1)")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--module", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        model = network(given.gigabytes) if given.module else given.folder / "model.onnx"
        return compile_here(model, given.goal, given.folder)
    with tempfile.TemporaryDirectory(prefix="foldcut-large-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not given.module and not (folder / "model.onnx").exists():
            write(given.gigabytes, folder / "model.onnx")
        own = [sys.executable, __file__, "--here", "--folder", str(folder), "--goal", given.goal]
        own += ["--gigabytes", str(given.gigabytes), *(["--module"] if given.module else [])]
        sys.exit(limited(own, given.limit))


if __name__ == "__main__":
    main()
