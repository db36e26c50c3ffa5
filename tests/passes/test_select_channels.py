"""Choosing channels over a whole network."""

import foldcut
import torch
from foldcut.compiler.calibration_set import CalibrationSet
from foldcut.compiler.edit_folds import fold_batch_norms
from foldcut.passes.select_channels import choose_channels
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
