"""Calibration samples that are made are finite numbers: in half precision, of one number, where gradients are none."""

import foldcut
import numpy as np
import pytest
import torch
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:no data were given")


def normed(*layers: nn.Module, data: torch.Tensor) -> nn.Module:
    """Layers whose batch norms have seen some data."""
    net = nn.Sequential(*layers).train()
    with torch.no_grad():
        for _ in range(20):
            net(data)
    return net.eval()


def made(net: nn.Module, **settings: object) -> foldcut.SyntheticSet:
    return foldcut.synthesise(net, foldcut.SynthesisSettings(**settings), progress=False, cache=False)  # type: ignore[arg-type]


def test_half_precision() -> None:
    """Squares of gradients are 0 there, and sums of small steps too: they are made in float32."""
    torch.manual_seed(0)
    net = normed(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), data=torch.randn(20, 3, 10, 10)).half()
    found = made(net, count=4, input_shape=np.array([3, 10, 10]), iterations=3)
    (images,) = found.leaves
    assert images.dtype == torch.float16 and images.isfinite().all()
    assert found.made["weak"] is None and found.made["distance"]["after"] < found.made["distance"]["before"]


def test_one_number() -> None:
    torch.manual_seed(0)
    net = normed(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.ReLU(), data=torch.randn(20, 1))
    found = made(net, count=1, input_shape=(1,), iterations=2)
    assert found.leaves[0].isfinite().all() and found.made["weak"] is None


class Rooted(nn.Module):
    """The gradient of a root is infinite at 0, and that times 0 is none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm((x * 0).sqrt() + x)


def test_gradients_that_are_no_numbers() -> None:
    net = normed(Rooted(), data=torch.randn(20, 3, 8, 8) + 2)
    with pytest.warns(UserWarning, match="could not be changed by its gradient"):
        found = made(net, count=4, input_shape=(3, 8, 8), iterations=3)
    assert found.leaves[0].isfinite().all()


def test_tokens_are_not_said_to_lack_batch_norms() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(20, 8), nn.BatchNorm1d(8)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.norm(self.table(tokens).mean(1))

    with pytest.warns(UserWarning, match="indices are not changed by gradients"):
        made(normed(Tokens(), data=torch.randint(20, (30, 6))), count=2, input_shape=(6,))
