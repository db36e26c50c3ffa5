"""What the rewriter refuses ends in a Reject and another choice, not in an exception."""

from collections.abc import Callable

import foldcut
import pytest
import torch
from foldcut.compiler.analysis.provenance import find_units
from foldcut.compiler.driver.pipeline_settings import PipelineSettings
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.support.errors import RewriteError
from foldcut.passes.cut.cuttable import cut_again, cuttable_groups
from foldcut.passes.cut.prune_channels import CutRefusedError, prune_channels
from foldcut.passes.prune.channel_budget import ChannelLimits
from foldcut.passes.prune.decision import Channels
from foldcut.passes.prune.settings import ChannelSettings
from torch import nn

pytestmark = pytest.mark.usefixtures("quick_measurement")


class Between(nn.Module):
    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.between = between
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.between(self.a(x).relu())).relu()).mean((2, 3))


class Halves(nn.Module):
    """One layer, its halves read by two others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.a(x).relu().chunk(2, 1)
        return (self.b(one) + self.c(two)).mean((2, 3))


def diagonal(x: torch.Tensor) -> torch.Tensor:
    return x.diagonal(dim1=1, dim2=2).mT.unsqueeze(-1)


def test_halves_are_cut_evenly() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 4, 4)
    program = capture(Halves().eval(), x)
    found = find_units(program)
    good, bad = cuttable_groups(found, found.prunable)
    assert [len(g) for g in good if ("a.weight", 0) in g.producers] == [4, 4]
    assert bad == []
    smaller = prune_channels(found, torch.cat([g.units[1:3] for g in good])).program
    assert {name: smaller.tensor(name).shape[1] for name in ("b.weight", "c.weight")} == {"b.weight": 2, "c.weight": 2}


@pytest.mark.parametrize("shift", [3, 4])
def test_rolled_channels_are_cut(shift: int) -> None:
    """Whatever is chosen: the order of those that are left is written out."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    program = capture(Between(lambda y: y.roll(shift, 1)).eval(), x)
    found = find_units(program)
    group = next(g for g in found.prunable if g.name == "a")
    smaller = prune_channels(found, group.units[[0, 1, 5]]).program
    with torch.no_grad():
        y = torch.nn.functional.conv2d(x, program.tensor("a.weight"), program.tensor("a.bias")).relu()
        y[:, [0, 1, 5]] = 0
        y = torch.nn.functional.conv2d(y.roll(shift, 1), program.tensor("b.weight"), program.tensor("b.bias")).relu()
        wanted = torch.nn.functional.conv2d(y, program.tensor("c.weight"), program.tensor("c.bias")).mean((2, 3))
    assert torch.allclose(smaller(x), wanted, atol=1e-5)


def test_a_pattern_that_happens_to_pass_is_not_enough() -> None:
    """The first half of a diagonal is the diagonal of the first half; no other subset is."""
    program = capture(Between(diagonal).eval(), torch.randn(2, 3, 8, 8))
    found = find_units(program)
    group = next(g for g in found.prunable if g.name == "a")
    prune_channels(found, group.units[4:])
    with pytest.raises(RewriteError):
        prune_channels(found, group.units[:4])
    good, bad = cuttable_groups(found, found.prunable)
    assert [g.name for g in good] == ["b"]
    assert [g.name for g, _ in bad] == ["a"]


def test_a_refused_cut_is_chosen_again() -> None:
    program = capture(Between(diagonal).eval(), torch.randn(2, 3, 8, 8))
    found = find_units(program)
    tried = []

    def attempt(groups: list) -> int:
        tried.append([g.name for g in groups])
        smaller = prune_channels(found, torch.cat([g.units[:3] for g in groups])).program
        return smaller.parameter_count()

    size, left, rejects = cut_again(found, found.prunable, attempt)
    assert size < program.parameter_count()
    assert tried == [["a", "b"], ["b"]]
    assert [g.name for g in left] == ["b"]
    assert [r.node for r in rejects] == ["a"]
    assert "order" in rejects[0].reason


def test_the_units_of_a_refused_cut_are_named() -> None:
    found = find_units(capture(Between(diagonal).eval(), torch.randn(2, 3, 8, 8)))
    group = next(g for g in found.prunable if g.name == "a")
    with pytest.raises(CutRefusedError) as raised:
        prune_channels(found, group.units[:3])
    assert raised.value.units.tolist() == sorted(group.units[:3].tolist())
    assert raised.value.node


@pytest.mark.parametrize("between", [lambda y: y.roll(4, 1), diagonal], ids=["roll", "diagonal"])
def test_a_compile_goes_on_without_the_group(between: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    settings = PipelineSettings(channels=ChannelSettings(limits=ChannelLimits(multiple_of=1)))
    done = foldcut.compile(Between(between).eval(), torch.randn(16, 3, 8, 8), goal=Channels(0.5), settings=settings)
    assert done.program.tensor("b.weight").shape[0] == 4


class Mixing(nn.Module):
    """Hidden channels and samples in one dimension."""

    def __init__(self, mix: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.mix(self.a(x).relu()))


MIXES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reshape": lambda x: x.reshape(8, -1).t(),
    "reshape and back": lambda x: x.reshape(8, -1).relu().reshape(-1, 8),
    "roll": lambda x: x.roll(1),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_is_right_for_one_sample_only_is_refused_or_right(name: str) -> None:
    """For one sample these move channels; for more they mix samples."""
    torch.manual_seed(0)
    net = Mixing(MIXES[name]).eval()
    found = find_units(capture(net, torch.randn(3, 8)))
    for group in found.prunable:
        gone = group.units[4:]
        try:
            smaller = prune_channels(found, gone).program
        except CutRefusedError:
            continue
        dead = Mixing(MIXES[name]).eval()
        dead.load_state_dict(net.state_dict())
        x = torch.randn(5, 8)
        with torch.no_grad():
            dead.a.weight[4:], dead.a.bias[4:] = 0, 0
        torch.testing.assert_close(smaller(x), dead(x))


def test_a_split_into_a_single_part_is_cut() -> None:
    torch.manual_seed(0)
    found = find_units(capture(Between(lambda x: x.split(8, 1)[0]).eval(), torch.randn(3, 3, 4, 4)))
    good, bad = cuttable_groups(found, found.prunable)
    assert good and not bad
    prune_channels(found, torch.cat([g.units[:2] for g in good])).program.check()


def test_heads_beside_the_batch_are_still_cut() -> None:
    """Attention with batch and heads in one dimension: channels of each sample lie one behind the other."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, length, _ = x.shape

            def split(y: torch.Tensor) -> torch.Tensor:
                return y.view(n, length, 4, 4).transpose(1, 2).reshape(n * 4, length, 4)

            weights = torch.bmm(split(self.q(x)), split(self.k(x)).mT).softmax(-1)
            heads = torch.bmm(weights, split(self.v(x))).view(n, 4, length, 4)
            return self.o(heads.transpose(1, 2).reshape(n, length, 16))

    torch.manual_seed(0)
    found = find_units(capture(Heads().eval(), torch.randn(3, 5, 16)))
    good, bad = cuttable_groups(found, found.prunable)
    assert good and not bad
    prune_channels(found, good[0].units[:1]).program.check()
