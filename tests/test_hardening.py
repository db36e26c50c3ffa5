"""200 random networks through every rewrite, beside the oracle of benchmarks/hardening.py; and the oracle itself."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CHUNK = 10


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, CHUNK))
def test_random_networks(first: int) -> None:
    """Nothing computes another value than the oracle says, and nothing fails but with an error of foldcut's own."""
    from hardening_checks import run
    from hardening_networks import random_recipe

    counts: Counter[str] = Counter()
    for number in range(first, first + CHUNK):
        recipe = random_recipe(number, seed=0)
        case = run(recipe, number, onnx=number % CHUNK == 0, deep=number % CHUNK == 5)
        assert case.status in {"ok", "refused"}, (number, case.findings, recipe)
        counts += case.counts
    assert counts["cuts"] >= CHUNK / 2
    assert counts["cuts that show"] >= counts["cuts"] / 3


class Halves(nn.Module):
    """Two convolutions with a split, a shuffle and a layer norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x))
        x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        x = torch.cat(x.chunk(2, 1)[::-1], 1)
        return self.b(self.norm(x.movedim(1, -1)).movedim(-1, 1)).mean((2, 3))


def cut_by_hand(x: torch.Tensor, net: Halves, kept: list[int]) -> torch.Tensor:
    """The same with the channels that are left, identified by where each of them ends up."""
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    order = order[4:] + order[:4]
    places = [place for place, channel in enumerate(order) if channel in kept]
    x = F.relu(F.conv2d(x, net.a.weight, net.a.bias))[:, [order[p] for p in places]]
    y = F.layer_norm(x.movedim(1, -1), (len(kept),), net.norm.weight[places], net.norm.bias[places]).movedim(-1, 1)
    return F.conv2d(y, net.b.weight[:, places], net.b.bias).mean((2, 3))


def test_the_oracle_follows_what_is_gone() -> None:
    """From the missing rows of the first weight alone."""
    from hardening_expected import Expected

    torch.manual_seed(0)
    net, x = Halves().eval(), torch.randn(3, 3, 6, 6)
    nn.init.normal_(net.norm.weight)
    gone = torch.zeros(8, dtype=torch.bool)
    gone[[1, 4, 6]] = True
    lost = {"a.weight": gone.view(8, 1, 1, 1).expand(8, 3, 3, 3)}
    (found,) = Expected(net, lost, dict(net.named_parameters()))((x,))
    assert found.gone is None
    torch.testing.assert_close(found.value, cut_by_hand(x, net, [0, 2, 3, 5, 7]))
    with torch.no_grad():
        assert not torch.allclose(found.value, net(x), rtol=0.01)


def test_the_oracle_sees_an_output_that_is_gone() -> None:
    from hardening_expected import Expected

    net, x = nn.Sequential(nn.Linear(3, 6), nn.ReLU()).eval(), torch.randn(2, 3)
    lost = {"0.weight": torch.tensor([0, 0, 1, 0, 0, 0]).bool().view(6, 1).expand(6, 3)}
    (found,) = Expected(net, lost, dict(net.named_parameters()))((x,))
    assert found.gone is not None
    assert found.gone.any(0).tolist() == [False, False, True, False, False, False]


def test_an_operator_that_the_oracle_does_not_know_is_named() -> None:
    from hardening_expected import Expected
    from hardening_oracle import UnknownError

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(self.fc(x))

    net = Odd().eval()
    lost = {"fc.bias": torch.tensor([True, False, False, False])}
    with pytest.raises(UnknownError, match="inv"):
        Expected(net, lost, dict(net.named_parameters()))((torch.randn(2, 4, 4),))


def test_the_same_number_gives_the_same_network() -> None:
    from hardening_networks import build, random_recipe

    first, second = (build(random_recipe(17)) for _ in range(2))
    x = first.example(2, 1)
    with torch.no_grad():
        torch.testing.assert_close(first(*x), second(*x), rtol=0, atol=0)
    assert random_recipe(17) != random_recipe(18)


class Padded(nn.Module):
    """Zeros put beside the channels, then a norm, then what is added to both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(self.a(x), [1, 1])
        return (x + self.b(self.norm(x))).square()


def test_the_oracle_leaves_out_zeros_whose_scale_is_gone() -> None:
    """Where the zeros come from, no weight says that one of them is gone: the norm's own does."""
    from hardening_expected import Expected

    torch.manual_seed(0)
    net, x, kept = Padded().eval(), torch.randn(5, 3), [1, 2, 3, 4, 5]
    gone = torch.arange(6) == 0
    lost = {"norm.weight": gone, "norm.bias": gone, "b.bias": gone}
    lost["b.weight"] = gone.view(1, 6) | gone.view(6, 1)
    (found,) = Expected(net, lost, dict(net.named_parameters()))((x,))
    y = F.pad(net.a(x), [0, 1])
    normed = F.layer_norm(y, (5,), net.norm.weight[kept], net.norm.bias[kept])
    wanted = (y + F.linear(normed, net.b.weight[kept][:, kept], net.b.bias[kept])).square()
    assert found.gone is not None and bool(found.gone[:, 0].all()) and not bool(found.gone[:, 1:].any())
    torch.testing.assert_close(found.value[:, 1:], wanted)
