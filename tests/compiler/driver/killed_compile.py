"""Compiles that are killed at random moments and started again: run by test_resume.py, in a process of its own.

    python killed_compile.py FOLDER KILLS SEED mix|macs

A compile in FOLDER/whole runs undisturbed. Then others, each with a cache and an output folder of its own, are killed
again and again and continued until they end, KILLS times in all. Prints what was found as JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import foldcut
import foldcut.compiler.store.checkpoint as checkpoint
import foldcut.runtime.measure.measure as measure
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import conftest
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture

#: What has to be the same whether or not a compile was killed on the way. The report holds times.
SAME = ("model.onnx", "model.pt2", "plan.json")


def start(folder: Path) -> int:
    """Compile in a child; its process number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net = conftest.ResNet(3, 8).eval()
        made = foldcut.compile(
            net,
            conftest.images(48),
            goal=foldcut.Latency(0.7) if sys.argv[4] == "mix" else foldcut.Macs(0.7),
            backend=conftest.WorkBackend(),
            mimic=foldcut.MimicSettings(iterations=20),
            settings=foldcut.PipelineSettings(
                channels=foldcut.ChannelSettings(limits=foldcut.ChannelLimits(multiple_of=2)),
                ranks=foldcut.RankSettings(multiple_of=2),
            ),
            progress=False,
            cache=folder / "cache",
        )
        made.save(folder / "out")
        code = 0
    finally:
        os._exit(code)
    return 0


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / "out" / name).read_bytes()).hexdigest() for name in SAME}


def half_written(folder: Path) -> list[str]:
    """Files of an output folder that is there though the compile was killed, and is not whole."""
    out = folder / "out"
    if not out.exists():
        return []
    try:
        foldcut.load(out)
    except foldcut.CompilerError as error:
        return [str(error)]
    return []


def stopped(child: int, delay_s: float) -> bool:
    """Wait for a compile to end, and kill it after `delay_s`; whether it was killed. A compile that fails raises."""
    end = time.perf_counter() + delay_s
    while time.perf_counter() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"the compile failed with status {status}")
            return False
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> None:
    root, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    # the backend's clock is known in advance: nothing has to be warmed up or repeated
    measure.warm_up = lambda runner, _ms: runner.run()
    measure.choose_repeats = lambda _runner, _ms: 1
    generator = random.Random(seed)
    checkpoint.EVERY_S = checkpoint.SHARE = 0.0  # a training of a second is kept at every iteration
    # what torch.onnx imports at its first use, the children then have
    to_onnx(capture(conftest.ResNet(1, 4).eval(), conftest.images()))
    began = time.perf_counter()
    stopped(start(root / "whole"), math.inf)
    whole_s = time.perf_counter() - began
    moments: list[float] = []
    ended: list[dict[str, str]] = []
    torn: list[str] = []
    while len(moments) < kills or (root / f"killed-{len(ended)}").exists():
        folder = root / f"killed-{len(ended)}"
        # the last one is left to end, whatever is left of it
        delay = generator.uniform(0, whole_s) if len(moments) < kills else math.inf
        if stopped(start(folder), delay):
            moments.append(delay)
            torn += half_written(folder)
        else:
            ended.append(digests(folder))
    print(
        json.dumps(
            {"whole": digests(root / "whole"), "whole_s": whole_s, "moments_s": moments, "ended": ended, "torn": torn}
        )
    )


if __name__ == "__main__":
    main()
