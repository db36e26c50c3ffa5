"""Files that somebody has changed, or named oddly: read, or refused in one sentence."""

import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import foldcut
import numpy as np
import pytest
import torch
from foldcut.compiler.driver.sealed import with_plan
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.support.errors import CaptureError, CompilerError, OutputError, PlanError
from foldcut.compiler.support.strict_json import read_json
from PIL import Image
from torch import nn

pytestmark = pytest.mark.usefixtures("quick_measurement")

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    path = tmp_path_factory.mktemp("saved") / "net.pt2"
    dims = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(net, (torch.randn(2, 1, 4, 4),), dynamic_shapes=dims), path)
    return path.read_bytes()


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000 + "1" + "}" * 100_000, b"\xff\xfe\xff", "{", ""])
def test_json_that_is_none_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_json(text)


def test_a_plan_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(DEEP)
    with pytest.raises(PlanError, match="nested too deep") as caught:
        foldcut.Plan.load(tmp_path / "plan.json")
    assert caught.value.hint


def test_a_report_nested_without_end(tmp_path: Path) -> None:
    plan = foldcut.Plan(decisions=(), goal=foldcut.Blocks(1), fingerprint="", predicted={})
    files = with_plan(plan, {"model.onnx": b"", "model.pt2": b""})
    for name, content in {**files, "report.json": DEEP.encode()}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OutputError, match="nested too deep"):
        foldcut.load(tmp_path)


def flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def shuffled(content: bytes, draw: random.Random) -> bytes:
    place, length = draw.randrange(len(content)), draw.randrange(1, 400)
    return content[:place] + draw.randbytes(length) + content[place + length :]


@pytest.mark.parametrize("damage", [flipped, truncated, shuffled])
def test_a_damaged_file_is_refused_or_read(
    saved: bytes, tmp_path: Path, damage: Callable[[bytes, random.Random], bytes]
) -> None:
    for seed in range(12):
        (tmp_path / "net.pt2").write_bytes(damage(saved, random.Random(seed)))
        try:
            capture(tmp_path / "net.pt2")
        except CaptureError as error:
            assert error.hint


def rewritten(content: bytes, target: Path, change: Callable[[bytes], bytes]) -> None:
    """The archive with its graph changed and everything else as it was, checksums right."""
    target.write_bytes(content)
    with zipfile.ZipFile(target) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (graph,) = [name for name in entries if name.endswith("models/model.json")]
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name == graph else data)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"torch.ops.aten.relu.default", b"torch.ops.aten.nothing.default"),
        (b"torch.ops.aten.relu.default", b"torch.ops.aten.conv2d.default"),
        (b'"as_int": 4', b'"as_int": -4'),
        (b'"dtype": 7', b'"dtype": 99'),
        (b'"graph_module"', b'"graph_moduel"'),
        (b'"', b""),
    ],
)
def test_a_graph_that_was_tampered_with(saved: bytes, tmp_path: Path, old: bytes, new: bytes) -> None:
    rewritten(saved, tmp_path / "net.pt2", lambda data: data.replace(old, new))
    with pytest.raises(CaptureError) as caught:
        capture(tmp_path / "net.pt2")
    assert caught.value.hint


def test_an_archive_that_is_none(saved: bytes, tmp_path: Path) -> None:
    rewritten(saved, tmp_path / "deep.pt2", lambda _: DEEP.encode())
    with zipfile.ZipFile(tmp_path / "empty.pt2", "w"):
        pass
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("hello", "world")
    for name, said in {
        "deep": "not JSON",
        "empty": r"layout of a \.pt2",
        "other": r"layout of a \.pt2",
    }.items():
        with pytest.raises(CaptureError, match=said):
            capture(tmp_path / f"{name}.pt2")


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder whose name is not UTF-8."""
    folder = tmp_path / os.fsdecode(b"odd \xff")
    folder.mkdir()
    return folder


def test_networks_and_samples_under_a_name_that_is_no_text(saved: bytes, odd: Path) -> None:
    (odd / os.fsdecode(b"\xfe.pt2")).write_bytes(saved)
    assert capture(odd / os.fsdecode(b"\xfe.pt2")).inputs[0].shape == ("batch", 1, 4, 4)
    pixels = np.zeros((4, 4, 3), np.uint8)
    Image.fromarray(pixels).save(odd / os.fsdecode(b"\xfe.png"))
    assert len(foldcut.read_calibration(odd)) == 1
    np.save(odd / os.fsdecode(b"\xfe.npy"), pixels)
    assert len(foldcut.read_calibration(odd / os.fsdecode(b"\xfe.npy"))) == 4
    with pytest.raises(CompilerError, match="no such file"):
        capture(odd / "none.pt2")


def test_a_result_under_a_name_that_is_no_text(saved: bytes, odd: Path, tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(saved)
    images = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    (odd / os.fsdecode(b"\xfe.pt2")).write_bytes(saved)
    result = foldcut.compile(
        odd / os.fsdecode(b"\xfe.pt2"),
        images,
        goal=foldcut.Channels(1.0),
        mimic=None,
        progress=False,
        cache=odd / "cache",
    )
    result.save(odd / "out")
    again = foldcut.load(odd / "out")
    torch.testing.assert_close(again.module(images), result.module(images))
    with pytest.raises(CaptureError, match="not UTF-8"):
        capture(odd / "out" / "model.onnx", images[:2])
