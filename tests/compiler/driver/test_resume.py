"""A compile that was killed goes on where it was and ends with the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import foldcut
import foldcut.compiler.store.checkpoint as checkpoint
import pytest
import torch
from torch import nn

#: ``FOLDCUT_KILLS=20`` kills a compile that mixes rewrites under a latency goal; a run of all tests has no time for it.
WHOLE = "FOLDCUT_KILLS" in os.environ
KILLS = int(os.environ.get("FOLDCUT_KILLS", "5"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = Path(__file__).with_name("killed_compile.py")
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path_factory.mktemp("kill"))]
    command += [str(KILLS), "0", "mix" if WHOLE else "macs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_a_killed_compile_ends_with_the_same_bytes(killed: dict[str, Any]) -> None:
    assert len(killed["moments_s"]) == KILLS and killed["ended"]
    assert all(digests == killed["whole"] for digests in killed["ended"])


@pytest.mark.slow
def test_a_killed_compile_leaves_no_part_of_its_output(killed: dict[str, Any]) -> None:
    assert killed["torn"] == []


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


GOALS = [
    (foldcut.Channels(0.5), None),
    (foldcut.Macs(0.7), None),
    (foldcut.Macs(0.7), ("factorize",)),
    (foldcut.Ranks(keep=0.5), None),
]


@pytest.mark.parametrize(("goal", "rewrites"), GOALS, ids=lambda v: str(v))
def test_the_second_time_nothing_is_computed_again(
    goal: foldcut.Plan, rewrites: Any, net: nn.Module, tmp_path: Path, quick_measurement: None
) -> None:
    images = torch.randn(24, 3, 10, 10, generator=torch.Generator().manual_seed(1))

    def compiled(cache: Any) -> tuple[foldcut.Compiled, set[str]]:
        stages: set[str] = set()
        made = foldcut.compile(
            net,
            images,
            goal=goal,
            rewrites=rewrites,
            mimic=foldcut.MimicSettings(iterations=4),
            settings=foldcut.PipelineSettings(
                channels=foldcut.ChannelSettings(limits=foldcut.ChannelLimits(multiple_of=2)),
                ranks=foldcut.RankSettings(multiple_of=2),
            ),
            progress=lambda stage, _done, _total: stages.add(stage),
            cache=cache,
        )
        return made, stages

    first, worked = compiled(tmp_path)
    second, again = compiled(tmp_path)
    fresh, _ = compiled(False)
    assert {"re-solve", "mimic"} <= worked
    assert not again & {"re-solve", "mimic", "channel moments", "choose channels", "decompose layers", "factorise"}
    for name in ("model.onnx", "model.pt2", "plan.json"):
        assert first.files[name] == second.files[name] == fresh.files[name]


def test_mimicking_goes_on_where_it_was(
    net: nn.Module, tmp_path: Path, quick_measurement: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 0.0)
    images = torch.randn(24, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    seen: list[int] = []

    def compiled(cache: Any, stop_at: int = 0) -> foldcut.Compiled:
        def progress(stage: str, done: int, _total: int) -> None:
            if stage == "mimic":
                seen.append(done)
                if done == stop_at:
                    raise KeyboardInterrupt

        mimic = foldcut.MimicSettings(iterations=12, patience=12)
        channels = foldcut.ChannelSettings(limits=foldcut.ChannelLimits(multiple_of=2))
        return foldcut.compile(
            net,
            images,
            goal=foldcut.Channels(0.5),
            mimic=mimic,
            settings=foldcut.PipelineSettings(channels=channels),
            progress=progress,
            cache=cache,
        )

    with pytest.raises(KeyboardInterrupt):
        compiled(tmp_path, stop_at=7)
    seen.clear()
    continued = compiled(tmp_path)
    assert seen == list(range(7, 13))  # the seventh was not finished
    whole = compiled(False)
    for name in ("model.onnx", "model.pt2", "plan.json"):
        assert continued.files[name] == whole.files[name]
    assert not list(tmp_path.rglob("*.unfinished"))
