"""Choosing channels over a whole network."""

import foldcut
import pytest
import torch
from foldcut.compiler.analysis.provenance import find_units
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit_folds import fold_batch_norms
from foldcut.passes.cut.prune_channels import prune_channels
from foldcut.passes.prune.select_channels import choose_channels
from torch import nn


class Residual(nn.Module):
    """A stem, two residual blocks and a head; batch norms with scales that differ by orders of magnitude."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 12, 3, padding=1, bias=False),
                nn.BatchNorm2d(12),
                nn.ReLU(),
                nn.Conv2d(12, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, 5)
        generator = torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data = torch.exp(2 * torch.randn(module.num_features, generator=generator))
                module.running_var.data = torch.exp(2 * torch.randn(module.num_features, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def test_folding_the_batch_norms_changes_no_choice() -> None:
    """The same network, exported with its norms or with them merged into the convolutions, is cut alike."""
    torch.manual_seed(0)
    net, images = Residual().eval(), torch.randn(48, 3, 8, 8)
    program = foldcut.capture(net, images[:2])
    folded, norms = fold_batch_norms(program)
    assert len(norms) == 5
    kept = []
    for network in (program, folded):
        provenance = foldcut.find_units(network)
        counts = {g.name: len(g) // 2 for g in provenance.prunable}
        choice = choose_channels(provenance, CalibrationSet.of(images), counts)
        kept.append({name: s.order.tolist() for name, s in choice.selections.items()})
    assert len(kept[0]) == 3
    assert kept[0] == kept[1]


class SideBySide(nn.Module):
    """A layer that reads the channels of two others, the second of which makes the same ones as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.two.load_state_dict(self.one.state_dict())
        self.behind = nn.Conv2d(16, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.behind(torch.relu(torch.cat([self.one(x), self.two(x)], 1)))


def test_groups_that_one_layer_reads_make_up_for_each_other() -> None:
    """Of each channel that is there twice one is kept: what the first group loses, the second does not count on."""
    torch.manual_seed(0)
    net, images = SideBySide().eval(), torch.randn(48, 3, 8, 8)
    provenance = foldcut.find_units(foldcut.capture(net, images[:2]))
    counts = {g.name: 4 for g in provenance.prunable}
    assert set(counts) == {"one", "two"}
    choice = choose_channels(provenance, CalibrationSet.of(images), counts)
    kept = {name: set(selection.order.tolist()) for name, selection in choice.selections.items()}
    assert kept["one"] | kept["two"] == set(range(8))
    assert len(choice.removed) == 8
    (layer,) = choice.layers
    assert layer.after < 0.03 * layer.before


@pytest.mark.parametrize("kind", ["transposed", "product"])
def test_without_a_layer_to_solve_what_nobody_reads_goes_first(kind: str) -> None:
    """Readers that have no closed form: dead channels cost nothing, however large they are made."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make = nn.Conv2d(3, 8, 3, padding=1)
            self.read, self.product = nn.ConvTranspose2d(8, 4, 2), nn.Parameter(torch.randn(8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.make(x).relu()
            return self.read(x) if kind == "transposed" else x.mean((2, 3)) @ self.product

    torch.manual_seed(0)
    net, dead = Reader().eval(), torch.tensor([1, 4, 5])
    with torch.no_grad():
        net.read.weight[dead], net.product[dead] = 0, 0
        net.make.weight[dead] *= 10
    x = torch.randn(40, 3, 6, 6)
    program = capture(net, x)
    units = find_units(program)
    (group,) = units.prunable
    choice = choose_channels(units, CalibrationSet.of(x), {group.name: 5})
    smaller = prune_channels(units, choice.removed, choice.tensors).program
    torch.testing.assert_close(smaller(x), program(x), rtol=1e-4, atol=1e-5)
