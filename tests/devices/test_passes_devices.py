"""Channels, ranks, integers and blocks on another device: as on the CPU, and nothing waits batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import foldcut
import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.output_error import output_error
from foldcut.compiler.export.edit_device import moved
from foldcut.compiler.ir.edit_folds import fold_batch_norms
from foldcut.compiler.ir.program import Program
from foldcut.passes.cut.prune_channels import prune_channels
from foldcut.passes.drop.adaptors import AdaptorSettings, Around, train_adaptors
from foldcut.passes.drop.drop_blocks import drop_blocks
from foldcut.passes.drop.recoverability import Recoverability, RecoverabilitySettings
from foldcut.passes.factorize.factorize import factorize, factorize_for_timing
from foldcut.passes.factorize.rank_trials import RankTrials
from foldcut.passes.factorize.select_ranks import RankAnalysis
from foldcut.passes.prune.select_channels import choose_channels
from foldcut.passes.quantize.grids import choose_grids
from foldcut.passes.quantize.quantize import Rounding, quantize
from foldcut.passes.quantize.ranges import GridKind
from foldcut.passes.quantize.values import quantizable
from foldcut.passes.solve.resolve_network import ResolveSettings
from torch import nn

CPU = torch.device("cpu")


def alike(there: dict[str, torch.Tensor], here: dict[str, torch.Tensor]) -> None:
    assert there.keys() == here.keys() and there
    for name, value in there.items():
        assert value.device.type == "elsewhere"
        torch.testing.assert_close(value.cpu(), here[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["asymmetric", "sequential", "layerwise"])
def test_channels(variant: str, residual: Program, nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    samples = CalibrationSet.of(nets.images(32))
    found = {}
    for device in (CPU, elsewhere.device):
        program = moved(residual, device)
        units = foldcut.find_units(program)
        counts = {group.name: len(group) // 2 for group in units.prunable}
        how = foldcut.ChannelSettings(variant=variant)
        choice = choose_channels(units, samples, counts, how=how)
        found[device.type] = choice, prune_channels(units, choice.removed).program
    (here, cut_here), (there, cut_there) = found["cpu"], found["elsewhere"]
    assert {n: s.order.tolist() for n, s in there.selections.items()} == {
        n: s.order.tolist() for n, s in here.selections.items()
    }
    alike(there.tensors, here.tensors)
    alike(cut_there.module.state_dict(), cut_here.module.state_dict())
    batch = nets.images(4)
    torch.testing.assert_close(cut_there(batch).cpu(), cut_here(batch), rtol=1e-4, atol=1e-5)


class Indexed(nn.Module):
    """Channels that are picked by a stored index, and tensors that the graph makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        self.register_buffer("order", torch.arange(15, -1, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x)).index_select(1, self.order)
        y = torch.relu(self.second(y)) * torch.linspace(0.5, 1.5, 8, device=x.device)
        return self.head(y.mean((2, 3)))


def test_channels_behind_an_index(nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    program = foldcut.capture(nets.seeded(Indexed, seed=2), nets.images())
    cuts = []
    for device in (CPU, elsewhere.device):
        units = foldcut.find_units(moved(program, device))
        assert units.prunable
        cuts.append(prune_channels(units, torch.cat([group.units[::2] for group in units.prunable])).program)
    batch = nets.images(4)
    assert [n.name for n in cuts[0].graph.nodes] == [n.name for n in cuts[1].graph.nodes]
    assert cuts[0].parameter_count() < program.parameter_count()
    torch.testing.assert_close(cuts[1](batch).cpu(), cuts[0](batch), rtol=1e-4, atol=1e-5)


def test_ranks(residual: Program, nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    samples, found = CalibrationSet.of(nets.images(24)), {}
    for device in (CPU, elsewhere.device):
        program = moved(residual, device)
        analysis = RankAnalysis(program, samples, settings=foldcut.RankSettings(multiple_of=1))
        choice = {name: candidate.trial() for name, candidate in analysis.candidates.items()}
        trials = RankTrials(analysis, samples)
        made = factorize(program, analysis.factors(choice))
        timed = factorize_for_timing(program, [analysis.decision(name, option) for name, option in choice.items()])
        found[device.type] = choice, trials.error(choice), trials.alone(choice), made(nets.images(4)), timed
    here, there = found["cpu"], found["elsewhere"]
    assert {n: (o.scheme, o.ranks) for n, o in there[0].items()} == {n: (o.scheme, o.ranks) for n, o in here[0].items()}
    assert there[1] == pytest.approx(here[1], rel=1e-4) and there[2] == pytest.approx(here[2], rel=1e-4)
    torch.testing.assert_close(there[3].cpu(), here[3], rtol=1e-4, atol=1e-5)
    assert {value.device.type for value in there[4].module.state_dict().values()} == {"elsewhere"}


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "each"])
def test_integers(ranges: str, residual: Program, nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    samples, found = CalibrationSet.of(nets.images(24)), {}
    folded = fold_batch_norms(residual)[0]
    for device in (CPU, elsewhere.device):
        program = moved(folded, device)
        layers = list(quantizable(program))
        grids = choose_grids(program, layers, samples, GridKind(), ranges)
        found[device.type] = grids, quantize(program, layers, grids, samples, Rounding(limit=127))
    (grids, here), (other, there) = found["cpu"], found["elsewhere"]
    for name, grid in other.items():
        assert grid.scale == pytest.approx(grids[name].scale, rel=1e-4) and grid.zero_point == grids[name].zero_point
    alike(there.module.state_dict(), here.module.state_dict())


@pytest.mark.parametrize("mode", ["plain", "local", "exact", "calibrated"])
def test_blocks(mode: str, nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    net = foldcut.capture(nets.seeded(lambda: nets.ResNet(3), seed=1), nets.images())
    blocks = find_regions(net).blocks
    samples, settings = CalibrationSet.of(nets.images(32)), RecoverabilitySettings(mode=mode)
    found = [
        Recoverability(moved(net, device), samples, settings=settings)([blocks[0]], blocks[1:])
        for device in (CPU, elsewhere.device)
    ]
    assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], rel=1e-4)


def test_adaptors(residual: Program, nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    block, samples = find_regions(residual).blocks[1], CalibrationSet.of(nets.images(16))
    around, settings = Around(entry=block.entry, drops=(block,)), AdaptorSettings(iterations=6, batch_size=8)
    found, waits = {}, {}
    for device in (CPU, elsewhere.device):
        teacher, student = moved(residual, device), moved(drop_blocks(residual, [block]), device)
        with elsewhere.watched() as waits[device.type]:
            found[device.type] = train_adaptors(teacher, student, samples, around, settings=settings)
    alike(found["elsewhere"].module.state_dict(), found["cpu"].module.state_dict())
    assert len(waits["elsewhere"]) == 1


def by_place(run: Callable[[int], object], elsewhere: SimpleNamespace) -> list[Counter[str]]:
    """Where is waited for the device, with so many samples and with twice as many."""
    found = []
    for count in (32, 64):
        with elsewhere.watched() as waits:
            run(count)
        found.append(Counter(place for place in waits if not place.startswith("closed_form.py")))
    return found


def test_nothing_waits_in_a_loop_over_batches(
    residual: Program, nets: SimpleNamespace, elsewhere: SimpleNamespace
) -> None:
    """Twice as many samples, in batches of the same size: as many waits."""
    program = moved(residual, elsewhere.device)
    folded = moved(fold_batch_norms(residual)[0], elsewhere.device)
    blocks, layers, units = find_regions(program).blocks, list(quantizable(folded)), foldcut.find_units(program)
    small = ResolveSettings(batch_size=4, guard_samples=0)

    def ranks(count: int) -> None:
        RankAnalysis(program, CalibrationSet.of(nets.images(count)))

    def integers(count: int) -> None:
        samples = CalibrationSet.of(nets.images(count))
        grids = choose_grids(folded, layers, samples, GridKind(), "minmax")
        quantize(folded, layers, grids, samples, Rounding(limit=127))

    def channels(count: int) -> None:
        counts = {group.name: len(group) // 2 for group in units.prunable}
        choose_channels(units, CalibrationSet.of(nets.images(count)), counts, resolve=small)

    def compared(count: int) -> None:
        settings = RecoverabilitySettings(mode="local", samples=count)
        Recoverability(program, CalibrationSet.of(nets.images(count)), settings=settings)([], blocks)

    def errors(count: int) -> None:
        output_error(program, folded, CalibrationSet.of(nets.images(count)), 4)

    for run in (ranks, integers, channels, compared, errors):
        few, many = by_place(run, elsewhere)
        assert few == many and few.total() > 0, run.__name__


def test_a_device_without_float64(residual: Program, nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    """Channels, ranks, integers and blocks again, from float32 products added up with compensation."""
    samples, folded = CalibrationSet.of(nets.images(24)), fold_batch_norms(residual)[0]

    def made(device: torch.device) -> dict[str, torch.Tensor]:
        program, whole = moved(folded, device), moved(residual, device)
        units = foldcut.find_units(whole)
        choice = choose_channels(units, samples, {group.name: len(group) // 2 for group in units.prunable})
        analysis = RankAnalysis(whole, samples, settings=foldcut.RankSettings(multiple_of=1))
        ranks = {name: candidate.trial() for name, candidate in analysis.candidates.items()}
        layers = list(quantizable(program))
        grids = choose_grids(program, layers, samples, GridKind(), "each")
        integers = quantize(program, layers, grids, samples, Rounding(limit=127))
        batch, found = nets.images(4), dict(choice.tensors)
        found["cut"] = prune_channels(units, choice.removed).program(batch)
        found["factorised"] = factorize(whole, analysis.factors(ranks))(batch)
        found["integers"] = integers(batch)
        return found

    wanted = made(CPU)
    with elsewhere.without_float64():
        found = made(elsewhere.device)
        recovered = Recoverability(moved(residual, elsewhere.device), samples)([], find_regions(residual).blocks)
    alike(found, wanted)
    assert recovered == pytest.approx(Recoverability(residual, samples)([], find_regions(residual).blocks), rel=1e-4)
