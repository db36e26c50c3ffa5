"""Patterns of what is left alone reach every rewrite of a mix, and only those that they say something to."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
from foldcut.compiler.driver.ignore_patterns import ignored_layers, sorted_ignores
from foldcut.compiler.driver.joint_rewrite import JointSettings
from foldcut.compiler.ir.program import Program
from foldcut.passes.drop.recoverability import RecoverabilitySettings
from foldcut.passes.solve.resolve_network import ResolveSettings

BASE = JointSettings(
    resolve=ResolveSettings(),
    channels=foldcut.ChannelSettings(),
    ranks=foldcut.RankSettings(),
    recoverability=RecoverabilitySettings(),
)


def with_ignores(channels: tuple[str, ...], ranks: tuple[str, ...]) -> JointSettings:
    limits = foldcut.ChannelLimits(ignore=channels)
    return replace(BASE, channels=replace(BASE.channels, limits=limits), ranks=replace(BASE.ranks, ignore=ranks))


@pytest.mark.parametrize(("channels", "ranks"), [(("blocks.0*",), ()), ((), ("blocks.0*",))])
def test_a_name_counts_for_every_kind(channels: tuple[str, ...], ranks: tuple[str, ...], residual: Program) -> None:
    found = sorted_ignores(residual, with_ignores(channels, ranks))
    assert found.channels.limits.ignore == found.ranks.ignore == ("blocks.0*",)


def test_a_name_of_one_kind_is_left_to_that(residual: Program) -> None:
    found = sorted_ignores(residual, with_ignores(("stem.0.weight",), ()))
    assert found.ranks.ignore == ("stem.0.weight",) and found.channels.limits.ignore == ()
    output = residual.outputs[0].name
    found = sorted_ignores(residual, with_ignores((output,), ()))
    assert found.channels.limits.ignore == (output,) and found.ranks.ignore == ()


def test_a_name_of_nothing_is_refused(residual: Program) -> None:
    with pytest.raises(foldcut.GoalError, match="no layer, unit group or output matches 'heads'"):
        sorted_ignores(residual, with_ignores(("head", "heads"), ()))


def test_without_patterns_nothing_changes(residual: Program) -> None:
    assert sorted_ignores(residual, BASE) is BASE


def test_blocks_with_such_a_layer_are_not_dropped(
    nets: SimpleNamespace, work_backend: Any, quick_measurement: None
) -> None:
    import torch

    torch.manual_seed(0)
    net = nets.ResNet(3, 8).eval()
    names = ignored_layers(foldcut.capture(net, nets.images(2)), ["blocks.1.*"])
    assert len(names) == 2
    made = foldcut.compile(
        net,
        nets.images(32),
        goal=foldcut.Latency(0.5),
        backend=work_backend,
        rewrites=("drop_blocks", "factorize"),
        mimic=False,
        settings=foldcut.PipelineSettings(ranks=foldcut.RankSettings(multiple_of=4, ignore=("blocks.1.*",))),
        progress=False,
        cache=False,
    )
    assert names <= made.program.nodes.keys()
    before, after = made.outcome.ctx.teacher, made.program
    for name in names:
        weight = str(after.nodes[name].args[1].target)  # type: ignore[union-attr]
        assert after.tensor(weight).shape == before.tensor(weight).shape
