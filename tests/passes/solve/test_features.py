"""Where two networks are compared."""

from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from foldcut.passes.solve.features import head_features
from torch import nn


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(x).relu()
        return {"mask": self.head(features), "score": self.head(features).mean((1, 2, 3))}


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x).relu()
        return y, (y.mean((1, 2, 3)) > 0).long()


def test_a_classifier(residual: Program, transformer: Program, inverted: Program) -> None:
    assert head_features(residual) == ("relu_6",)
    (name,) = head_features(transformer)
    assert name.startswith("layer_norm")
    (name,) = head_features(inverted)
    assert name.startswith("add")


def test_outputs_that_share_their_features_give_them_once(nets: SimpleNamespace) -> None:
    assert head_features(capture(Segmenter().eval(), nets.images())) == ("relu",)


def test_a_backbone_is_its_own_feature_and_integers_are_left_out(nets: SimpleNamespace) -> None:
    assert head_features(capture(Backbone().eval(), nets.images())) == ("relu",)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_network_of_linear_layers(layers: int) -> None:
    net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers)]).eval()
    assert head_features(capture(net, torch.randn(2, 3))) == ("linear",)
