"""Parameter groups: which weights get which set, and that radii come from the layer and not from the shape."""

import math

import pytest
import torch
from foldcut.passes.frank_wolfe import (
    FrankWolfe,
    GroupKSupport,
    KSparse,
    LpBall,
    SpectralKSupport,
    current_norm,
    parameter_groups,
    redrawn_norm,
)
from torch import nn


class Net(nn.Module):
    """A linear layer whose bias has the shape of the batch norm's scale and shift, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 4)
        self.table = nn.Parameter(torch.zeros(8))


def test_convs_and_linears_are_constrained_and_the_rest_is_not() -> None:
    net = Net()
    groups = parameter_groups(net, lambda w: SpectralKSupport(k=w.shape[0] // 2), ignore=("head.*",))
    assert [g["name"] for g in groups] == ["conv.weight", "first.weight", "unconstrained"]
    assert groups[0]["constraint"].k == 4 and groups[0]["params"] == [net.conv.weight]
    assert groups[-1]["constraint"] is None
    listed = [p for g in groups for p in g["params"]]
    assert len(listed) == len({*listed}) == len(list(net.parameters()))


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_the_diameter_is_two_factors_of_the_norm_at_initialisation(factor: float) -> None:
    net = Net()
    with torch.no_grad():
        net.conv.weight.mul_(7)  # trained: the radius is still that of the initialisation
    # uniform in +-1/sqrt(fan in), so each entry has the variance 1 / (3 fan in)
    expected = 2 * factor * math.sqrt(net.conv.weight.numel() / (3 * 27))
    for make in (lambda w: KSparse(k=20), lambda w: GroupKSupport(k=2), lambda w: LpBall(p=1.5), lambda w: LpBall(p=3)):
        group = parameter_groups(net, make, factor=factor)[0]
        assert group["constraint"].diameter(net.conv.weight) == pytest.approx(expected, rel=0.05)
    now = parameter_groups(net, lambda w: LpBall(), factor=factor, initial_norm=current_norm)[0]
    assert now["constraint"].radius == pytest.approx(factor * float(net.conv.weight.detach().norm()))


def test_tensors_of_one_shape_have_radii_of_their_own() -> None:
    """The scale of a batch norm starts at 1, its shift at 0, a bias at random: all of 8 entries."""
    groups = parameter_groups(Net(), lambda w: LpBall(), factor=10.0, others=lambda w: LpBall())
    radii = {g["name"]: g["constraint"].radius for g in groups}
    assert radii["bn.weight"] == pytest.approx(10 * math.sqrt(8))
    assert radii["bn.bias"] == 10.0  # no scale to go by
    assert radii["table"] == 10.0
    assert radii["first.bias"] == pytest.approx(10 * math.sqrt(8 / (3 * 8)), rel=0.2)
    assert len(radii) == len(list(Net().parameters())) and "unconstrained" not in radii


def test_radii_are_the_same_on_every_rank() -> None:
    torch.manual_seed(1)
    net = Net()
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in net.state_dict().items()}
    one = redrawn_norm(net.conv, "weight")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert redrawn_norm(Net().conv, "weight") == one
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_radii_can_be_left_to_the_factory_and_layers_chosen() -> None:
    net = Net()
    groups = parameter_groups(net, lambda w: LpBall(radius=2.5), factor=None, layers=(nn.ConvTranspose2d,))
    assert [g["name"] for g in groups] == ["up.weight", "unconstrained"]
    assert groups[0]["constraint"] == LpBall(radius=2.5)


def test_a_model_trains_from_its_groups() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    groups = parameter_groups(net, lambda w: SpectralKSupport(k=2), others=lambda w: LpBall())
    optimizer = FrankWolfe(groups, lr=0.05, momentum=0.9)
    assert optimizer.make_feasible() == 0
    x, y = torch.randn(64, 3, 8, 8), torch.arange(64) % 4
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    for group in optimizer.param_groups:
        assert all(group["constraint"].norm(p) <= group["constraint"].radius for p in group["params"])
