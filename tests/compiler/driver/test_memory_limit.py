"""A compile within a limit of memory: it finishes, stays under the limit, and says what it took."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.report.page import report_page
from foldcut.compiler.support import memory
from foldcut.passes.solve.least_memory import GRAMS, REST_BYTES, least_bytes
from torch import nn


class Words(HTMLParser):
    """The text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a child is Linux's to say")
MIB = 1 << 20


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What each of the compiles of limited_compile.py found."""
    folder = tmp_path_factory.mktemp("limited")
    script = Path(__file__).with_name("limited_compile.py")
    made = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True)

    def one(kind: str) -> dict[str, Any]:
        path = folder / f"{kind}.json"
        assert path.is_file(), made.stderr
        read: dict[str, Any] = json.loads(path.read_text())
        return read

    return one


@LINUX
@pytest.mark.parametrize("kind", ["memory_bytes", "RLIMIT_DATA", "RLIMIT_AS"])
def test_a_compile_stays_under_its_limit(kind: str, found: Callable[[str], dict[str, Any]]) -> None:
    whole, limited = found("none"), found(kind)
    taken = {name: run["peak"] - run["before"] for name, run in (("whole", whole), ("limited", limited))}
    assert taken["whole"] > 400 * MIB, "without a limit it takes clearly more"
    assert taken["limited"] < 280 * MIB
    assert limited["macs"] == whole["macs"] and limited["error"] == pytest.approx(whole["error"], rel=0.1)
    assert limited["memory"]["peak_bytes"] <= limited["peak"]
    if kind == "memory_bytes":
        assert limited["memory"] == {"peak_bytes": limited["peak"], "limit_bytes": limited["limit"]}
        assert limited["peak"] < limited["limit"]


def compiled(limit_bytes: int | None, mimic: foldcut.MimicSettings, backend: Any) -> foldcut.Compiled:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return foldcut.compile(
        net.eval(),
        torch.randn(60, 3, 8, 8),
        goal=foldcut.Channels(0.5),
        backend=backend,
        mimic=mimic,
        progress=False,
        cache=False,
        settings=foldcut.PipelineSettings(memory_bytes=limit_bytes),
    )


def test_a_generous_limit_changes_nothing(counting_backend: Any) -> None:
    mimic = foldcut.MimicSettings(iterations=4)
    free, limited = (compiled(size, mimic, counting_backend) for size in (None, 64 << 30))
    assert free.onnx == limited.onnx and free.report.output_error == limited.report.output_error
    *_, (name, _, peak, note) = free.report.rows()
    assert name == "peak memory" and peak.endswith("iB") and note == "of the process"
    assert limited.report.rows()[-1][3] == "of the process; limit 64.00 GiB"
    assert f"peak memory {peak}" in " ".join(Words(report_page(free.report.to_dict())).text.split())
    assert free.report.memory["limit_bytes"] is None and limited.report.memory["limit_bytes"] == 64 << 30


def test_too_little_is_refused_with_what_is_needed(counting_backend: Any) -> None:
    with pytest.raises(foldcut.CompilerError, match=r"limit of 1 MiB is too little: about .* are needed") as refused:
        compiled(MIB, foldcut.MimicSettings(iterations=4), counting_backend)
    assert refused.value.hint
    assert memory.limit_in_effect() is None, "the next compile is free of it"


def test_what_is_needed_follows_from_the_network() -> None:
    small, wide = (capture(nn.Sequential(nn.Linear(width, 8)).eval(), torch.zeros(2, width)) for width in (64, 4096))
    assert least_bytes(small) < REST_BYTES + MIB
    assert least_bytes(wide) > REST_BYTES + GRAMS * 8 * 4096**2, "a layer's Gram matrix is in float64"
    assert least_bytes(wide, measuring_bytes=1 << 40) > 1 << 40
