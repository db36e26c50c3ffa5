"""Costs against numbers worked out by hand."""

from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.cost import node_macs, program_cost, region_cost
from foldcut.compiler.ir.program import Program
from torch import nn
from torch.nn import functional as F


class Zoo(nn.Module):
    """One of each contraction; every result is returned so that none is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(4, 4, 5, padding=2, groups=4)
        self.dilated = nn.Conv2d(4, 2, 3, dilation=2)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.line = nn.Conv1d(8, 5, 3)
        self.linear = nn.Linear(8, 7)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = t.view(t.shape[0], 2, 3, 8)
        return {
            "plain": self.plain(x),
            "grouped": self.grouped(x),
            "depthwise": self.depthwise(x),
            "dilated": self.dilated(x),
            "up": self.up(x),
            "line": self.line(t.transpose(1, 2)),
            "linear": self.linear(t),
            "matmul": t @ t.transpose(1, 2),
            "attention": F.scaled_dot_product_attention(rows, rows[:, :, :2], rows[:, :, :2, :6]),
            "einsum": torch.einsum("nld,nmd->nlm", t, t),
            "nothing": x.relu() + 1,
        }


@pytest.fixture(scope="module")
def zoo() -> Program:
    return capture(Zoo().eval(), (torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8)))


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("plain", 6 * 4 * 4 * (4 * 9)),
        ("grouped", 8 * 8 * 8 * (2 * 9)),
        ("depthwise", 4 * 8 * 8 * 25),
        ("dilated", 2 * 4 * 4 * (4 * 9)),
        ("up", 4 * 8 * 8 * (3 * 4)),
        ("line", 5 * 4 * (8 * 3)),
        ("linear", 6 * 7 * 8),
        ("matmul", 6 * 6 * 8),
        ("attention", 2 * 3 * 2 * (8 + 6)),
        ("einsum", 6 * 6 * 8),
        ("nothing", 0),
    ],
)
def test_macs_of_each_contraction(zoo: Program, name: str, macs: int) -> None:
    outputs = [spec.name for spec in zoo.outputs]
    result = next(n for n in zoo.graph.nodes if n.op == "output").args[0]
    node = torch.utils._pytree.tree_leaves(result)[outputs.index(name)]
    # an einsum may arrive as a product with views behind it
    while node_macs(zoo, node) == 0 and name != "nothing" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    assert node_macs(zoo, node) == macs


def test_cost_of_a_network(residual: Program) -> None:
    cost = program_cost(residual)
    block = 2 * 8 * 64 * 8 * 9
    assert cost.macs == 8 * 64 * 3 * 9 + 3 * block + 4 * 8
    assert cost.parameters == residual.parameter_count()


def test_bytes_are_weights_read_and_results_written(residual: Program) -> None:
    cost = region_cost(residual, [residual.nodes["conv2d_1"]])
    assert cost.parameters == 8 * 8 * 9
    assert cost.bytes_ == 4 * (8 * 8 * 9 + 8 * 64)


def test_a_shared_parameter_counts_once(nets: SimpleNamespace) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.linear(x).relu())

    cost = program_cost(capture(Twice().eval(), nets.tokens()))
    assert cost.parameters == 6 * 6 + 6
    assert cost.macs == 2 * 5 * 6 * 6


def test_costs_add_up(residual: Program) -> None:
    first, second = (region_cost(residual, [residual.nodes[n]]) for n in ("conv2d_1", "conv2d_2"))
    both = region_cost(residual, [residual.nodes[n] for n in ("conv2d_1", "conv2d_2")])
    assert first + second == both
