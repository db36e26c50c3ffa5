"""Programs that are kept and checked between passes: `save_temps`, `FOLDCUT_CHECK`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.rewrite.instruments import CHECK
from foldcut.compiler.support.errors import ProgramError
from foldcut.passes.prune.rewrite import Prune
from torch import nn

pytestmark = pytest.mark.usefixtures("quick_measurement")
OPTIONS: dict[str, Any] = {"mimic": False, "progress": False, "cache": False}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


@pytest.fixture(scope="module")
def samples() -> torch.Tensor:
    return torch.randn(60, 6, generator=torch.Generator().manual_seed(0))


def test_each_pass_leaves_its_program(net: nn.Module, samples: torch.Tensor, tmp_path: Path) -> None:
    settings = foldcut.PipelineSettings(save_temps=tmp_path / "temps")
    out = foldcut.compile(net, samples, goal=foldcut.Channels(0.5), settings=settings, **OPTIONS)
    passes = ["00-capture", "01-prune_channels", "02-re-solve"]
    names = sorted(path.name for path in (tmp_path / "temps").iterdir())
    assert names == sorted(f"{stem}{suffix}" for stem in passes for suffix in (".pt2", ".txt"))
    texts = [(tmp_path / "temps" / f"{stem}.txt").read_text() for stem in passes]
    assert texts[0] == foldcut.capture(net, samples[:2]).text() and texts[2] == out.program.text()
    pruned = foldcut.capture(tmp_path / "temps" / "01-prune_channels.pt2", samples[:2])
    assert pruned.parameter_count() == out.program.parameter_count()


def test_each_goal_of_a_sweep_has_its_own(net: nn.Module, samples: torch.Tensor, tmp_path: Path) -> None:
    settings = foldcut.PipelineSettings(save_temps=tmp_path)
    goals = [foldcut.Channels(0.5), foldcut.Channels(0.75)]
    points = foldcut.sweep(net, samples, goals=goals, settings=settings, **OPTIONS).points
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(point.name for point in points)
    for point in points:
        assert point.compiled is not None
        assert (tmp_path / point.name / "02-re-solve.txt").read_text() == point.compiled.program.text()


@dataclass(frozen=True, kw_only=True)
class Careless(Prune):
    """A rewrite whose program states a shape that its nodes do not have."""

    def apply(self, program: Any, decisions: Any, ctx: Any) -> Any:
        done = super().apply(program, decisions, ctx)
        node = next(node for node in done.program.graph.nodes if node.op == "call_function")
        node.meta["val"] = node.meta["val"].new_empty(2, 99)
        return replace(done, plain=None)


def test_a_wrong_program_is_found_between_passes(
    net: nn.Module, samples: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHECK, "1")
    foldcut.compile(net, samples, goal=foldcut.Channels(0.5), **OPTIONS)
    with pytest.raises(ProgramError):
        foldcut.compile(net, samples, goal=foldcut.Channels(0.5), rewrites=[Careless()], **OPTIONS)
