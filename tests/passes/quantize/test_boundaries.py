"""Which layers hand integers on to each other, and what it costs where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import foldcut
import pytest
import torch
from foldcut.compiler.ir.edit_folds import fold_batch_norms
from foldcut.compiler.ir.segments import find_segments, is_dequantized
from foldcut.passes.quantize.boundaries import borders, boundary_costs
from foldcut.passes.quantize.decision import QuantizeLayer
from foldcut.passes.quantize.rewrite import Quantize
from foldcut.passes.quantize.savings import Saved
from foldcut.passes.quantize.values import quantizable
from torch import nn


def between(net: nn.Module, nets: SimpleNamespace) -> dict[tuple[str, str], int]:
    program = foldcut.capture(net.eval(), nets.images(2))
    layers = [name for name in program.nodes if name.startswith(("conv2d", "linear"))]
    return borders(program, {name: [name] for name in layers})


def test_neighbours_in_a_chain(nets: SimpleNamespace) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 1), nn.SiLU(), nn.Conv2d(6, 2, 1)
    )
    height, width = nets.images(1).shape[2:]
    assert between(net, nets) == {("conv2d", "conv2d_1"): 4 * (height // 2) * (width // 2)}


def test_neighbours_through_a_sum(nets: SimpleNamespace) -> None:
    """The layer behind an addition reads what the branch and the shortcut bring."""
    found = between(Residual(), nets)
    assert found.keys() == {("conv2d", "conv2d_1"), ("conv2d_1", "conv2d_2"), ("conv2d_2", "conv2d_3")}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (x + self.two(self.one(x).relu())).relu()
        result: torch.Tensor = self.head(x)
        return result


def test_the_cost_is_what_every_second_layer_lacks() -> None:
    found = {name: Saved(saving=0.1, time=0.2) for name in "abcd"}
    pairs = {("a", "b"): 10, ("b", "c"): 20, ("c", "d"): 10}
    asked: list[Sequence[str]] = []

    def measured(names: Sequence[str]) -> float:
        asked.append(names)
        return 0.16

    costs = boundary_costs(found, pairs, measured)
    assert asked == [["a", "c"]]
    assert costs["a"] == pytest.approx({"b": 0.01}) and costs["b"] == pytest.approx({"a": 0.01, "c": 0.02})
    assert costs["c"] == pytest.approx({"b": 0.02, "d": 0.01}) and costs["d"] == pytest.approx({"c": 0.01})


def test_no_cost_where_half_of_them_save_what_they_should() -> None:
    found = {name: Saved(saving=0.1, time=0.2) for name in "ab"}
    assert boundary_costs(found, {("a", "b"): 10}, lambda names: 0.11) == {}
    assert boundary_costs(found, {}, pytest.fail) == {}


class Strided(nn.Module):
    """A pooling between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.last(nn.functional.max_pool2d(self.stem(x).relu(), 2))
        return pooled


@pytest.mark.parametrize("both", [True, False])
def test_a_pooling_of_integers_is_timed_with_the_layer_before_it(both: bool, nets: SimpleNamespace) -> None:
    """ONNX Runtime takes 3.5 ms instead of 0.04 for a pooling of integers that begins a network (112 px)."""
    folded, _ = fold_batch_norms(foldcut.capture(nets.seeded(Strided).eval(), nets.images(2)))
    layers = list(quantizable(folded))
    made = Quantize().shape(folded, [QuantizeLayer(layer=name) for name in layers[: 1 + both]])
    first, second = find_segments(made)
    assert "max_pool2d" in first.nodes
    assert first.exits == (("max_pool2d_quantized",) if both else ("max_pool2d",))
    assert any(is_dequantized(made.nodes[name]) for name in second.nodes) == both
