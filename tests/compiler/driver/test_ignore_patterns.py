"""Patterns of what is left alone reach every rewrite of a mix, and only those that they say something to."""

from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
from foldcut.compiler.driver.ignore_patterns import sorted_ignores
from foldcut.compiler.ir.program import Program
from foldcut.passes.solve.layers import matching_layers


def rewrites(channels: tuple[str, ...], ranks: tuple[str, ...]) -> list[foldcut.Rewrite]:
    limits = foldcut.ChannelLimits(ignore=channels)
    return [foldcut.Drop(ignore=ranks), foldcut.Prune(limits=limits), foldcut.Factorize(ignore=ranks)]


@pytest.mark.parametrize(("channels", "ranks"), [(("blocks.0*",), ()), ((), ("blocks.0*",))])
def test_a_name_counts_for_every_kind(channels: tuple[str, ...], ranks: tuple[str, ...], residual: Program) -> None:
    found = sorted_ignores(residual, rewrites(channels, ranks))
    assert [rewrite.ignore for rewrite in found] == [("blocks.0*",)] * 3


def test_a_name_of_one_kind_is_left_to_that(residual: Program) -> None:
    found = sorted_ignores(residual, rewrites(("stem.0.weight",), ()))
    assert [rewrite.ignore for rewrite in found] == [("stem.0.weight",), (), ("stem.0.weight",)]
    output = residual.outputs[0].name
    found = sorted_ignores(residual, rewrites((output,), ()))
    assert [rewrite.ignore for rewrite in found] == [(), (output,), ()]


def test_a_name_of_nothing_is_refused(residual: Program) -> None:
    with pytest.raises(foldcut.GoalError, match="no layer, unit group or output matches 'heads'"):
        sorted_ignores(residual, rewrites(("head", "heads"), ()))
    with pytest.raises(foldcut.GoalError, match=r"no unit group or output matches 'blocks\.0\.conv2'"):
        sorted_ignores(residual, rewrites(("blocks.0.conv2",), ())[1:2])


def test_without_patterns_nothing_changes(residual: Program) -> None:
    base = rewrites((), ())
    assert sorted_ignores(residual, base) == base


def test_blocks_with_such_a_layer_are_not_dropped(
    nets: SimpleNamespace, work_backend: Any, quick_measurement: None
) -> None:
    import torch

    torch.manual_seed(0)
    net = nets.ResNet(3, 8).eval()
    names = matching_layers(foldcut.capture(net, nets.images(2)), ["blocks.1.*"])
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


def test_names_of_a_file_are_those_that_inspect_shows(nets: SimpleNamespace, tmp_path: Any) -> None:
    """Exporters begin the paths of nodes with a slash, which `foldcut inspect` leaves out."""
    import torch

    path = tmp_path / "net.onnx"
    torch.onnx.export(nets.ResNet(3, 8).eval(), (nets.images(2),), path, dynamo=False, input_names=["x"])
    program = foldcut.capture(str(path), nets.images(2))
    with_slash = matching_layers(program, ["/blocks/blocks.1/*"])
    assert len(with_slash) == 2
    assert matching_layers(program, ["blocks/blocks.1/*"]) == with_slash
