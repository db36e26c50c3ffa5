"""Compiles of a network with large inputs, each within a limit of its own: run by test_memory_limit.py, in a process of
its own.

    python limited_compile.py FOLDER

A child for each limit, so many MiB above what the process has once everything is imported and the samples are there;
what each found is written to FOLDER as JSON. A child's peak is its own from where it begins.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import foldcut
import torch
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.support import memory
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
import conftest

MORE_MIB = {"none": 0, "memory_bytes": 280, "RLIMIT_DATA": 250, "RLIMIT_AS": 700}


def compiled(kind: str, net: nn.Module, samples: torch.Tensor) -> dict[str, Any]:
    """What a compile within a limit found."""
    _, resident, data = memory._taken()
    taken = {"RLIMIT_AS": memory._taken()[0], "RLIMIT_DATA": data}.get(kind, resident)
    limit = taken + (MORE_MIB[kind] << 20)
    if kind.startswith("RLIMIT"):
        resource.setrlimit(getattr(resource, kind), (limit, limit))
    out = foldcut.compile(
        net,
        samples,
        goal=foldcut.Channels(0.5),
        backend=conftest.WorkBackend(),
        mimic=foldcut.MimicSettings(iterations=1),
        progress=False,
        cache=False,
        settings=foldcut.PipelineSettings(
            channels=foldcut.ChannelSettings(limits=foldcut.ChannelLimits(multiple_of=2)),
            memory_bytes=limit if kind == "memory_bytes" else None,
        ),
    )
    return {
        "before": resident,
        "limit": limit,
        "peak": memory.peak_bytes(),
        "memory": out.report.memory,
        "error": out.report.output_error,
        "macs": out.report.macs,
        "weights": hashlib.sha256(out.onnx).hexdigest(),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ends = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    net = nn.Sequential(conftest.conv_bn(3, 16), conftest.Residual(16), *ends).eval()
    samples = torch.randn(24, 3, 160, 160)
    # what torch.onnx and a compile import at their first use, the children then have
    memory.import_late()
    to_onnx(capture(conftest.ResNet(1, 4).eval(), conftest.images()))
    for kind in MORE_MIB:
        child = os.fork()
        if not child:
            code = 1
            try:
                (Path(sys.argv[1]) / f"{kind}.json").write_text(json.dumps(compiled(kind, net, samples)))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
