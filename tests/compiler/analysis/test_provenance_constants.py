"""Constants that the graph computes, tables whose rows are looked up, tensors that share memory: what a cut makes of
them."""

from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.analysis.provenance import Provenance, find_units
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit import replace_calls
from foldcut.compiler.ir.program import Program, tensor_identity
from foldcut.passes.cut.prune_channels import prune_channels
from torch import nn
from torch.nn import functional as F


class TiedHead(nn.Module):
    """An embedding whose table is the weight of a hidden layer too: its rows are token ids there, channels here."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.out = nn.Linear(12, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(F.linear(self.table(ids), self.table.weight).relu())


def groups_of(found: Provenance) -> dict[str, tuple[int, str | None]]:
    return {g.name: (len(g), g.reason) for g in found.groups}


def test_rows_that_are_looked_up_stay() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 12, (2, 5))
    program = capture(TiedHead().eval(), ids)
    found = find_units(program)
    rows = [g for g in found.groups if ("table.weight", 0) in g.producers and len(g) == 12]
    assert rows
    assert all(g.reason and "looked up" in g.reason for g in rows)
    for group in found.prunable:
        smaller = prune_channels(found, group.units[::2]).program
        assert smaller.tensor("table.weight").shape[0] == 12


class Scaled(nn.Module):
    """Channels times what the graph makes of a parameter."""

    def __init__(self, make: str) -> None:
        super().__init__()
        self.make = make
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.p = nn.Parameter(torch.rand(8) + 0.5)
        self.q = nn.Parameter(torch.rand(8, 8) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = {
            "softmax": lambda: self.p.softmax(0),
            "cumsum": lambda: self.p.cumsum(0),
            "sort": lambda: self.p.sort()[0],
            "norm": lambda: self.p / self.p.norm(dim=0),
            "sum": lambda: self.p / self.p.sum(),
            "diagonal": lambda: self.q.diagonal(),
            "view": lambda: -self.p.view(2, 4).exp().view(8),
        }[self.make]()
        return self.b(self.a(x).relu() * p)


@pytest.mark.parametrize("make", ["softmax", "cumsum", "sort", "norm", "sum", "view", "diagonal"])
def test_what_the_graph_makes_of_a_parameter_is_cut_not_made_anew(make: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    net = Scaled(make).eval()
    program = capture(net, x)
    found = find_units(program)
    group = next(g for g in found.prunable if g.name == "a")
    smaller = prune_channels(found, group.units[[1, 4, 5]]).program
    smaller.check()
    with torch.no_grad():
        net.b.weight[:, [1, 4, 5]] = 0
        wanted = net(x)
    assert torch.allclose(smaller(x), wanted, atol=1e-6)
    names = set(smaller.module.state_dict())
    # a parameter that is divided by a number stays a parameter; one that is mixed is stored as what became of it
    assert ("p" in names) == (make in ("norm", "sum"))


#: Left to itself, cdist takes another way from 26 rows on, and a graph of it would hold for fewer only.
DIRECT = "donot_use_mm_for_euclid_dist"


class Needed(nn.Module):
    """A parameter that one reader would cut, and that another needs whole, whichever comes first."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.p = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first:
            length = torch.cdist(x.repeat(1, 2), self.p.unsqueeze(0), compute_mode=DIRECT)
            return self.b(self.a(x) * self.p) + length
        y = self.b(self.a(x) * self.p)
        return y + torch.cdist(x.repeat(1, 2), self.p.unsqueeze(0), compute_mode=DIRECT)


@pytest.mark.parametrize("first", [True, False])
def test_a_constant_that_something_needs_whole_is_locked(first: bool) -> None:
    found = find_units(capture(Needed(first).eval(), torch.randn(2, 4)))
    size, reason = groups_of(found)["a"]
    assert size == 8
    assert reason


class Views(nn.Module):
    """A stored matrix and its transposed view: one memory, two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        weight = torch.randn(6, 6)
        self.register_buffer("weight", weight)
        self.register_buffer("turned", weight.t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(self.a(x).relu(), self.weight).relu()
        return self.b(F.linear(y, self.turned).relu())


def matrices(program: Program) -> dict[str, torch.Tensor]:
    return {name: program.tensor(name) for name in program.first_names if name == "weight" or "turned" in name}


def test_a_transposed_view_is_another_tensor(nets: SimpleNamespace) -> None:
    x = torch.randn(3, 4)
    net = nets.seeded(Views)
    program = capture(net, x)
    one, two = matrices(program).values()
    assert one.data_ptr() == two.data_ptr()
    assert len(set(program.first_names.values())) == len(program.first_names)
    found = find_units(program)
    group = next(g for g in found.prunable if ("weight", 0) in g.producers)
    smaller = prune_channels(found, group.units[[0, 3]]).program
    smaller.check()
    with torch.no_grad():
        net.turned = net.turned.clone()
        net.turned[:, [0, 3]] = 0
        wanted = net(x)
    assert torch.allclose(smaller(x), wanted, atol=1e-5)


def test_a_new_value_goes_to_the_names_of_its_tensor_only(nets: SimpleNamespace) -> None:
    program = capture(nets.seeded(Views), torch.randn(3, 4))
    changed = replace_calls(program, {}, {"weight": torch.zeros(6, 6)}, note="zero")
    assert bool((changed.tensor("weight") == 0).all())
    assert bool((changed.tensor("turned") != 0).all())


def test_what_makes_two_tensors_one() -> None:
    weight = torch.randn(4, 4)
    assert tensor_identity(weight) == tensor_identity(weight.detach())
    others = (weight.t(), weight[1:], weight[:2], weight.flatten(), weight.view(torch.int32), weight.clone())
    assert all(tensor_identity(weight) != tensor_identity(other) for other in others)
    assert tensor_identity(torch.empty(0)) != tensor_identity(torch.empty(0, 2))
