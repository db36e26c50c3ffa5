"""Bypassing several regions at once."""

from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.ir.program import Program
from foldcut.compiler.support.errors import RewriteError
from foldcut.passes.drop.decision import DropBlock
from foldcut.passes.drop.drop_blocks import changes_of_drops, drop_blocks, standing_for
from torch import nn


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_chain_of_blocks_in_any_order(
    residual: Program, residual_net: nn.Module, nets: SimpleNamespace, order: tuple[int, ...]
) -> None:
    blocks = find_regions(residual).blocks
    shorter = drop_blocks(residual, [blocks[i] for i in order])
    x = nets.images(3)
    with torch.no_grad():
        wanted = residual_net.head(residual_net.stem(x).mean((2, 3)))
    torch.testing.assert_close(shorter(x), wanted, rtol=1e-5, atol=1e-6)
    assert set(shorter.module.state_dict()) == {
        key for key in residual.module.state_dict() if not key.startswith("blocks.")
    }


def test_blocks_apart(residual: Program, residual_net: nn.Module, nets: SimpleNamespace) -> None:
    blocks = find_regions(residual).blocks
    x = nets.images(3)
    with torch.no_grad():
        wanted = residual_net.head(residual_net.blocks[1](residual_net.stem(x)).mean((2, 3)))
    for chosen in ((blocks[0], blocks[2]), (blocks[2], blocks[0])):
        torch.testing.assert_close(drop_blocks(residual, chosen)(x), wanted, rtol=1e-5, atol=1e-6)


def test_decisions_drop_as_regions_do(residual: Program) -> None:
    block = find_regions(residual).blocks[1]
    decision = DropBlock(entry=block.entry, exit=block.exit, path=block.path)
    assert drop_blocks(residual, [decision]).text() == drop_blocks(residual, [block]).text()
    assert drop_blocks(residual, [decision]).history == ("drop blocks.1",)


def test_nothing_to_drop(residual: Program) -> None:
    assert drop_blocks(residual, []) is residual


def test_a_region_of_another_program_is_refused(residual: Program) -> None:
    with pytest.raises(RewriteError, match="no node"):
        drop_blocks(residual, [DropBlock(entry="relu", exit="relu_99")])


def test_a_region_can_be_dropped_once(residual: Program) -> None:
    block = find_regions(residual).blocks[1]
    with pytest.raises(RewriteError):
        drop_blocks(residual, [block, block])


def test_who_stands_for_whom() -> None:
    drops = [DropBlock(entry="b", exit="c"), DropBlock(entry="a", exit="b")]
    assert standing_for("c", drops) == "a"
    assert standing_for("b", drops) == "a"
    assert standing_for("x", drops) == "x"
    assert changes_of_drops(drops).dropped == (("b", "c"), ("a", "b"))
