"""Constants that the graph computes beside the stream: position tables by ids, scales in another shape, normalised
tables. What a cut leaves of them is solved with and counted."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.analysis.provenance import find_units
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.frontend.capture import capture
from foldcut.passes.cut.prune_channels import prune_channels
from foldcut.passes.prune.select_channels import choose_channels
from foldcut.passes.solve.changes import Changes
from foldcut.passes.solve.resolve_network import ResolveSettings, resolve_network
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("quick_measurement")

LENGTH, WIDTH = 6, 16


class Beside(nn.Module):
    """A layer, a constant that is computed and added to what it makes, and a layer that reads the sum."""

    def __init__(self, constant: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.constant = constant
        self.table, self.scale = nn.Parameter(torch.randn(LENGTH, WIDTH)), nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.rows = nn.Embedding(LENGTH, WIDTH)
        self.register_buffer("ids", torch.arange(LENGTH))
        self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.gelu(self.first(x) + self.constant(self)))


CONSTANTS: dict[str, Callable[[Any], torch.Tensor]] = {
    "rows by ids": lambda net: net.rows(net.ids),
    "rows by arange": lambda net: net.rows(torch.arange(LENGTH)),
    "another shape": lambda net: net.scale.view(1, 1, -1),
    "a slice": lambda net: net.table[:1],
    "exp": lambda net: net.scale.exp(),
    "twice": lambda net: net.table * 2,
    "a sum": lambda net: net.table + net.scale,
    "sin": lambda net: net.table.sin(),
    "layer norm": lambda net: F.layer_norm(net.table, (WIDTH,)),
    "softmax": lambda net: net.table.softmax(0),
}


@pytest.fixture(params=CONSTANTS)
def net(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return Beside(CONSTANTS[request.param]).eval()


def test_what_is_left_is_solved_with(net: nn.Module) -> None:
    """Channels that nobody reads go for nothing, through the choice, the cut and a solve of the network."""
    gone = torch.tensor([1, 6, 7, 12])
    with torch.no_grad():
        net.last.weight[:, gone] = 0  # type: ignore[union-attr, operator, index]
    x = torch.randn(200, LENGTH, 5)
    program, samples = capture(net, x), CalibrationSet.of(x)
    units = find_units(program)
    group = next(g for g in units.prunable if ("first.weight", 0) in g.producers)
    settings = ResolveSettings(ridge=1e-9, refine=0)
    choice = choose_channels(units, samples, {group.name: WIDTH - len(gone)}, resolve=settings)
    pruned = prune_channels(units, choice.removed, choice.tensors)
    solved = resolve_network(program, pruned.program, samples, Changes(kept=pruned.kept), settings=settings).program
    assert solved.tensor("first.weight").shape == (WIDTH - len(gone), 5)
    inputs = torch.randn(7, LENGTH, 5)
    for found in (pruned.program, solved):
        found.check()
        torch.testing.assert_close(found(inputs), program(inputs), rtol=1e-3, atol=1e-4)


def test_what_is_left_is_counted(net: nn.Module) -> None:
    """Evaluated or not, values that come from trained ones are trained values."""
    program = capture(net, torch.randn(3, LENGTH, 5))
    units = find_units(program)
    smaller = prune_channels(units, units.prunable[0].units[:1]).program
    stored = {t.data_ptr(): t.numel() for t in smaller.module.state_dict().values() if t.is_floating_point()}
    assert smaller.parameter_count() == sum(stored.values())


@pytest.mark.parametrize("name", ["rows by ids", "layer norm"])
def test_a_goal_is_met_with_them(name: str, counting_backend: Any, nets: SimpleNamespace) -> None:
    made = foldcut.compile(
        nets.seeded(lambda: Beside(CONSTANTS[name])),
        torch.randn(60, LENGTH, 5, generator=torch.Generator().manual_seed(1)),
        goal=foldcut.Parameters(0.6),
        backend=counting_backend,
        mimic=None,
        progress=False,
        cache=False,
    )
    left = made.report.parameters
    assert 0.5 <= sum(p.numel() for p in made.module.parameters()) / left["before"] <= 0.6
    assert left["after"] == sum(p.numel() for p in made.module.parameters())
