"""Parameters before planning: what the graph computes from constants is stored, what layers share is theirs."""

from __future__ import annotations

import foldcut
import torch
from foldcut.compiler.ir.edit_folds import fold_parameters
from torch import nn


class Shared(nn.Module):
    """Two convolutions of one bias, as exporters write equal biases; and a matrix that is tied on purpose."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.second.bias = self.first.bias
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.down.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))
        return self.down(torch.relu(self.up(x)))


def test_shared_vectors_are_separated_and_tied_matrices_stay() -> None:
    net, x = Shared().eval(), torch.randn(2, 3, 6, 6)
    program = foldcut.capture(net, x)
    separated = fold_parameters(program)
    assert torch.equal(separated(x), program(x))
    assert separated.parameter_count() == program.parameter_count() + 8
    shared = [p.dim() for p in separated.module.parameters() if p.data_ptr() in separated.shared_storage]
    assert shared and set(shared) == {2}
    assert {n for n, _ in program.module.named_parameters()} <= {n for n, _ in separated.module.named_parameters()}


def test_layers_of_one_bias_are_cut_on_their_own() -> None:
    program = foldcut.capture(Shared().eval(), torch.randn(2, 3, 6, 6))
    tied = [g for g in foldcut.find_units(program).prunable if len(g) == 8]
    free = [g for g in foldcut.find_units(fold_parameters(program)).prunable if len(g) == 8]
    assert len(free) > len(tied)


def test_a_program_that_shares_nothing_comes_back_as_it_is() -> None:
    program = foldcut.capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(2, 4))
    assert fold_parameters(program) is program
