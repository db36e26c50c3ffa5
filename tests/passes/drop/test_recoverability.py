"""Which blocks the rest of the network can do without."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.execute import bind, run_until
from foldcut.compiler.ir.program import Program
from foldcut.passes.drop import recoverability
from foldcut.passes.drop.drop_blocks import drop_blocks
from foldcut.passes.drop.recoverability import Recoverability, RecoverabilitySettings
from foldcut.passes.solve.resolve_network import QUICK_RESOLVE, ResolveSettings
from torch import nn

MODES = ("plain", "local", "exact")


def score(program: Program, data: torch.Tensor, mode: str) -> Recoverability:
    return Recoverability(program, CalibrationSet.of(data), settings=RecoverabilitySettings(mode=mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_zero_branch_costs_nothing(residual: Program, nets: SimpleNamespace, mode: str) -> None:
    blocks = find_regions(residual).blocks
    errors = score(residual, nets.images(24), mode)([], blocks)
    assert set(errors) == {r.name for r in blocks}
    assert errors[blocks[1].name] < 1e-8
    assert min(errors[blocks[0].name], errors[blocks[2].name]) > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_a_zero_branch_costs_nothing_beside_another_drop(residual: Program, nets: SimpleNamespace, mode: str) -> None:
    """The error with both gone is about that of the other one alone."""
    blocks = find_regions(residual).blocks
    both = score(residual, nets.images(32), mode)([blocks[1]], [blocks[0]])[blocks[0].name]
    alone = score(residual, nets.images(32), mode)([], [blocks[0]])[blocks[0].name]
    assert both == pytest.approx(alone, rel=0.3)


@pytest.mark.parametrize("mode", MODES)
def test_a_weak_block_goes_before_a_strong_one(nets: SimpleNamespace, mode: str) -> None:
    net = nets.seeded(lambda: nets.ResNet(2), seed=3)
    with torch.no_grad():
        for norm, factor in ((net.blocks[0].bn2, 0.02), (net.blocks[1].bn2, 2.0)):
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
    program = capture(net, nets.images())
    weak, strong = find_regions(program).blocks
    errors = score(program, nets.images(32), mode)([], [strong, weak])
    assert errors[weak.name] < 0.1 * errors[strong.name]


def test_the_plain_error_is_that_of_the_dropped_network(residual: Program, nets: SimpleNamespace) -> None:
    data = nets.images(20)
    blocks = find_regions(residual).blocks
    errors = score(residual, data, "plain")([blocks[0]], blocks[2:])
    judged = data[10:]
    student = drop_blocks(residual, [blocks[0], blocks[2]])
    with torch.no_grad():
        wanted = run_until(residual, ["relu_6"], bind(residual, judged))["relu_6"]
        value = run_until(student, ["relu_4"], bind(student, judged))["relu_4"]
    direct = float((value - wanted).square().sum() / wanted.square().sum())
    assert errors[blocks[2].name] == pytest.approx(direct, rel=1e-4)


def test_the_local_solve_helps(residual: Program, nets: SimpleNamespace) -> None:
    blocks = find_regions(residual).blocks
    plain, local = (score(residual, nets.images(64), mode)([], blocks) for mode in ("plain", "local"))
    assert sum(local.values()) < sum(plain.values())


@pytest.mark.parametrize("mode", MODES)
def test_candidates_are_judged_each_for_itself(residual: Program, nets: SimpleNamespace, mode: str) -> None:
    blocks = find_regions(residual).blocks
    together = score(residual, nets.images(24), mode)([], blocks)
    for block in blocks:
        alone = score(residual, nets.images(24), mode)([], [block])
        assert alone[block.name] == pytest.approx(together[block.name], rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_the_choice_may_change_between_calls(residual: Program, nets: SimpleNamespace, mode: str) -> None:
    """The kept student is that of the regions chosen, whatever was asked before."""
    blocks = find_regions(residual).blocks
    asked = score(residual, nets.images(16), mode)
    first = asked([], [blocks[0]])
    asked([blocks[2]], [blocks[0]])
    assert asked([], [blocks[0]]) == first


@pytest.mark.parametrize("mode", MODES)
def test_nested_plain_and_gate_regions_have_finite_errors(
    inverted: Program, transformer: Program, nets: SimpleNamespace, mode: str
) -> None:
    for program, data in ((inverted, nets.images(12)), (transformer, nets.tokens(12))):
        regions = find_regions(program).regions
        errors = score(program, data, mode)([], regions)
        assert all(0 <= value < 1e6 for value in errors.values())
        assert len(errors) == len(regions)


def test_one_sample_is_enough(residual: Program, nets: SimpleNamespace) -> None:
    blocks = find_regions(residual).blocks
    assert all(torch.tensor(v).isfinite() for v in score(residual, nets.images(1), "local")([], blocks).values())


def test_only_a_part_of_the_calibration_set_is_read(residual: Program, nets: SimpleNamespace) -> None:
    blocks = find_regions(residual).blocks
    data = nets.images(40)
    for settings, read in (
        (RecoverabilitySettings(samples=16, finalists=0), 16),
        (RecoverabilitySettings(samples=16, final_samples=24), 24),
    ):
        few = Recoverability(residual, CalibrationSet.of(data[:read]), settings=settings)([], blocks)
        many = Recoverability(residual, CalibrationSet.of(data), settings=settings)([], blocks)
        assert few == many


def test_the_best_are_looked_at_again_on_more_samples(transformer: Program, nets: SimpleNamespace) -> None:
    blocks = find_regions(transformer).blocks
    data = CalibrationSet.of(nets.tokens(96))
    resolve = replace(QUICK_RESOLVE, rows_per_column=ResolveSettings().rows_per_column)

    def shares(samples: int, finalists: int) -> dict[str, float]:
        settings = RecoverabilitySettings(samples=samples, finalists=finalists, final_samples=96, resolve=resolve)
        return Recoverability(transformer, data, settings=settings).calibration_of(blocks)

    few, one, each, more = shares(16, 0), shares(16, 1), shares(16, len(blocks)), shares(96, 0)
    settings = RecoverabilitySettings(samples=16, mode="exact", resolve=resolve)
    exact = Recoverability(transformer, data, settings=settings)([], blocks)
    best = min(exact, key=exact.__getitem__)
    assert each == more == shares(96, 1), "all of them, and where there are no more samples"
    assert one[best] == more[best] != few[best]
    assert all(one[name] == pytest.approx(min(1.0, few[name] * more[best] / few[best])) for name in few)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.first(x.relu())
        return x + self.second(x.relu())


@pytest.mark.parametrize("mode", MODES)
def test_a_block_whose_exit_is_the_output(nets: SimpleNamespace, mode: str) -> None:
    program = capture(nets.seeded(Backbone), torch.randn(2, 6))
    data = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    errors = score(program, data, mode)([], find_regions(program).blocks)
    assert len(errors) == 2
    assert all(0 < value < 2 for value in errors.values())


def test_moments_that_do_not_fit_together_are_read_in_turns(
    residual: Program, nets: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = find_regions(residual).blocks
    together = score(residual, nets.images(16), "local")([], blocks)
    passes: list[int] = []
    solved = Recoverability._solve_together

    def counted(self: Recoverability, student: Program, trials: Sequence[object]) -> None:
        passes.append(len(trials))
        solved(self, student, trials)

    monkeypatch.setattr(Recoverability, "_solve_together", counted)
    monkeypatch.setattr("foldcut.passes.drop.recoverability.MEMORY_BYTES", 1)
    assert score(residual, nets.images(16), "local")([], blocks) == together
    assert len(blocks) > 1 and passes == [1] * len(blocks)


@pytest.mark.parametrize("mode", ["exact", "calibrated"])
def test_networks_too_large_to_be_looked_at_together(
    residual: Program, nets: SimpleNamespace, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other says the same."""
    blocks = find_regions(residual).blocks
    together = score(residual, nets.images(32), mode)([], blocks)
    monkeypatch.setattr(recoverability, "TRIALS_BYTES", 1)
    assert score(residual, nets.images(32), mode)([], blocks) == together


def test_networks_too_large_to_solve_for_every_region(
    residual: Program, nets: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only regions of least local error are looked at closely, and the others are scored like them."""
    blocks = find_regions(residual).blocks
    local = score(residual, nets.images(32), "local")([], blocks)
    whole = score(residual, nets.images(32), "calibrated")
    whole([], blocks)
    monkeypatch.setattr(recoverability, "LOOK_MACS", 1)
    monkeypatch.setattr(recoverability, "LEAST_LOOKED", 2)
    look = score(residual, nets.images(32), "calibrated")
    errors = look([], blocks)
    least = sorted(local, key=local.__getitem__)[:2]
    assert set(whole.recovery) == set(local) == set(errors) and set(look.recovery) == set(least)
    assert all(errors[name] == pytest.approx(look.recovery[name] * local[name]) for name in least)
    left = next(name for name in local if name not in least)
    assert errors[left] == pytest.approx(max(look.recovery.values()) * local[left])
