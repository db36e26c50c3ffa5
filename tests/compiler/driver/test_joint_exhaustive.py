"""The search for the best mix against all plans of at most three changes, on small trained networks.

Everything is real (offers, plans in effect, output errors) but the clock: latency is multiply-accumulates, so that
every run of the test sees the same figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.driver import plan_search
from foldcut.compiler.driver.pipeline import planned_network
from foldcut.compiler.ir.cost import node_macs, program_cost
from foldcut.compiler.ir.edit_folds import fold_parameters
from foldcut.compiler.ir.program import Program
from foldcut.compiler.ir.segments import Segment, find_segments
from foldcut.compiler.plan.joint_search import MixSearch
from foldcut.compiler.plan.proposals import Mix, excluded_pairs
from foldcut.compiler.plan.tried import Found
from foldcut.compiler.store.analysis_store import NOTHING_KEPT
from foldcut.passes.prune.channel_budget import ChannelLimits
from foldcut.runtime.measure.conditions import Conditions
from foldcut.runtime.probe.stored_latency import StoredLatency
from torch import nn
from torch.nn import functional as F

#: How much more than the best plan of all the one found may lose.
WITHIN = 0.05
MOST_CHANGES = 3


class ResidualMlp(nn.Module):
    """x + down(relu(up(x))), three times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.up = nn.ModuleList(nn.Linear(16, 24) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(24, 16) for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.relu(up(x)))
        return self.head(x)


def chain(nets: SimpleNamespace) -> nn.Module:
    widths = ((8, 12), (12, 12), (12, 16))
    layers = [part for a, b in widths for part in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    return nets.image_net(*layers, channels=16)


def vectors(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points, and the classes that a fixed random network puts them into."""
    x = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))
    fixed = torch.Generator().manual_seed(5)
    first, second = torch.randn(12, 16, generator=fixed), torch.randn(16, 4, generator=fixed)
    return x, (torch.tanh(x @ first) @ second).argmax(1)


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight smooth patterns, two to a class, in noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    pattern = torch.randint(0, 8, (count,), generator=generator)
    smooth = F.interpolate(coarse, size=(8, 8), mode="bilinear")
    return smooth[pattern] + 0.7 * torch.randn(count, 3, 8, 8, generator=generator), pattern % 4


Task = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]


def trained(make: Callable[[], nn.Module], task: Task) -> nn.Module:
    """The network after 150 steps: layers then matter to different degrees."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make().train()
    x, labels = task(512, 0)
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        batch = torch.randint(len(x), (64,), generator=generator)
        loss = F.cross_entropy(network(x[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


class MacsTable:
    """Stands for `LatencyTable`: a segment takes its multiply-accumulates."""

    def __init__(self, program: Program) -> None:
        self.macs = float(program_cost(program).macs)

    def time_segments(self, program: Program, segments: Sequence[Segment], **_: Any) -> list[SimpleNamespace]:
        macs = [sum(node_macs(program, program.nodes[name]) for name in segment.nodes) for segment in segments]
        return [SimpleNamespace(units=float(each)) for each in macs]

    def predict(self, program: Program, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(units=self.macs, segments=self.time_segments(program, find_segments(program)))

    def measure_network(self, *_: Any) -> float:
        return self.macs


class MacsProbe:
    """Stands for `LatencyProbe`: the latency of a program is its multiply-accumulates."""

    model = before = b""
    inputs: Mapping[str, Any] = {}
    conditions = Conditions()
    backend = SimpleNamespace(environment=lambda: {"backend": "MACs"})

    def __init__(self, program: Program) -> None:
        self.program, self.macs = program, program_cost(program).macs

    def table(self) -> MacsTable:
        return MacsTable(self.program)

    def against(self, program: Program) -> SimpleNamespace:
        return SimpleNamespace(high=program_cost(program).macs / self.macs)


def macs_saved(latency: StoredLatency, regions: Sequence[foldcut.Region], **_: Any) -> dict[str, float]:
    """Stands for `region_savings`."""
    probe: Any = latency.probe
    return {region.name: region.cost.macs / probe.macs for region in regions}


@dataclass
class Searches:
    """What a compile searched and found."""

    made: list[tuple[MixSearch, Found]] = field(default_factory=list)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> Searches:
    """Few options of everything, and a search that can be looked at afterwards."""
    kept = Searches()

    class Kept(MixSearch):
        def run(self) -> Found:
            found = super().run()
            kept.made.append((self, found))
            return found

    monkeypatch.setattr(plan_search, "MixSearch", Kept)
    monkeypatch.setattr("foldcut.passes.drop.rewrite.region_savings", macs_saved)
    monkeypatch.setattr("foldcut.passes.prune.offers.KEEPS", (0.75, 0.5))
    monkeypatch.setattr("foldcut.passes.factorize.rank_latency.MOST_OPTIONS", 2)
    return kept


def plans(search: MixSearch) -> Iterator[Mix]:
    """Every plan of at most three changes that may reach the goal: together changes save what they save alone at most,
    (1 - a)(1 - b) of the work being left."""
    pairs = set(excluded_pairs(search.items))
    for count in range(1, MOST_CHANGES + 1):
        for places in combinations(range(len(search.items)), count):
            if pairs.isdisjoint(combinations(places, 2)):
                items = [search.items[place] for place in places]
                for taken in product(*(item.proposals for item in items)):
                    if sum(proposal.saving for proposal in taken) >= 1 - search.ratio - 1e-9:
                        yield dict(zip(items, taken, strict=True))


CASES = {
    "residual_mlp": (lambda nets: ResidualMlp(), vectors, 0.45),
    "chain": (chain, pictures, 0.5),
    "inverted": (lambda nets: nets.image_net(nets.Inverted(), nets.Inverted()), pictures, 0.55),
}


@pytest.mark.parametrize("name", CASES)
def test_no_plan_of_few_changes_is_much_better(
    name: str, searches: Searches, nets: SimpleNamespace, contexts: Any
) -> None:
    make, task, ratio = CASES[name]
    network = trained(lambda: make(nets), task)
    samples, held_out = CalibrationSet.of(task(96, 1)[0]), CalibrationSet.of(task(64, 2)[0])
    teacher = fold_parameters(foldcut.capture(network, task(2, 1)[0]))
    probe: Any = MacsProbe(teacher)
    latency = StoredLatency(NOTHING_KEPT, probe)
    ctx = contexts(teacher, samples, held_out, goal=foldcut.Latency(ratio), latency=latency)
    prune = foldcut.Prune(limits=ChannelLimits(multiple_of=2))
    planned_network(ctx, [foldcut.Drop(), prune, foldcut.Factorize(multiple_of=4, schemes=("channel",))])
    ((search, found),) = searches.made
    tried, measured = len(search._errors), len(search._ratios)
    reaching = [mix for mix in plans(search) if search._ratio(mix) <= ratio]
    errors = sorted(search._error(mix) for mix in reaching)
    print(f"{name}: {len(errors)} plans, {tried} tried, {measured} measured, {found.best.error / errors[0] - 1:+.1%}")
    assert len(errors) >= 20
    assert errors[len(errors) // 2] > 2 * errors[0], "plans that are all alike would prove nothing"
    assert found.met
    assert found.best.error <= (1 + WITHIN) * errors[0]
    assert tried < len(errors) / 2
