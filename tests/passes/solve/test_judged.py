"""How far a correction goes is judged on rows that it was not fitted to; only rows that are read are worked out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.frontend.capture import capture
from foldcut.passes.drop.drop_blocks import changes_of_drops, drop_blocks
from foldcut.passes.solve import resolve_network as module
from foldcut.passes.solve.closed_form import judged_solve, solve
from foldcut.passes.solve.moments import Moments, SplitMoments
from foldcut.passes.solve.resolve_network import ResolveSettings, resolve_network, rows_are_few
from torch import nn


def split(signal: float, rows: int = 40, columns: int = 32, *, noise: float = 1.0, seed: int = 0) -> SplitMoments:
    """A layer whose residual is `signal` times a linear map of its inputs, and noise."""
    layer, chance = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(rows)
    wanted = torch.randn(1, 4, columns, generator=layer, dtype=torch.float64) / columns**0.5
    inputs = torch.randn(1, columns, rows, generator=chance, dtype=torch.float64)
    residual = signal * wanted @ inputs + noise * torch.randn(1, 4, rows, generator=chance, dtype=torch.float64)
    part = rows // 4
    held = Moments.of(inputs[..., :part], residual[..., :part])
    return SplitMoments(whole=held + Moments.of(inputs[..., part:], residual[..., part:]), held=held)


def test_noise_alone_changes_nothing() -> None:
    """Fitted to 40 rows, 32 columns explain most of any noise, and make it worse elsewhere."""
    moments = split(0.0)
    assert solve(moments.whole, ridge=0.01, bias=True).after < 0.6 * moments.whole.error()
    found = judged_solve(moments, ridge=0.01, bias=True)
    assert not found.weight.any() and not found.bias.any()  # type: ignore[union-attr]
    assert found.before == found.after == pytest.approx(moments.whole.error())


def test_what_is_there_is_solved_with_the_ridge_that_was_asked_for() -> None:
    moments = split(1.0, rows=4000, noise=0.1)
    torch.testing.assert_close(
        judged_solve(moments, ridge=0.01, bias=True).weight, solve(moments.whole, ridge=0.01, bias=True).weight
    )


@pytest.mark.parametrize("seed", range(5))
def test_another_ridge_has_to_be_better_by_the_margin(seed: int) -> None:
    """Of the ridges judged the best is taken without a margin, the one asked for with a margin that none can meet."""
    moments = split(1.5, rows=160, columns=64, seed=seed)
    assert moments.held is not None
    fit = moments.whole - moments.held

    def held_out(factor: float) -> float:
        found = solve(fit, ridge=0.001 * factor, bias=True)
        assert found.bias is not None and moments.held is not None
        delta = torch.cat([found.weight, found.bias.reshape(1, -1, 1)], 2).transpose(1, 2)
        return float(moments.held.error_after(delta).sum())

    by_factor = {factor: held_out(factor) for factor in (1.0, 3.0, 10.0, 30.0, 100.0)}
    best = min(by_factor, key=lambda factor: by_factor[factor])
    assert best > 1 and by_factor[best] < moments.held.error()
    for margin, factor in ((0.0, best), (1.0, 1.0)):
        found = judged_solve(moments, ridge=0.001, bias=True, margin=margin)
        wanted = solve(moments.whole, ridge=0.001 * factor, bias=True)
        torch.testing.assert_close(found.weight, wanted.weight, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_between_the_two_it_loses_less_on_other_rows(seed: int) -> None:
    moments = split(0.3, rows=120, columns=64, seed=seed)
    others = split(0.3, rows=20_000, columns=64, seed=seed)  # other rows of the same map

    def lost(weight: torch.Tensor, bias: torch.Tensor | None) -> float:
        assert bias is not None
        delta = torch.cat([weight, bias.reshape(1, -1, 1)], 2).transpose(1, 2)
        return float(others.whole.error_after(delta).sum()) / others.whole.rows

    plain, judged = (way(m, ridge=0.001, bias=True) for way, m in ((solve, moments.whole), (judged_solve, moments)))
    assert lost(judged.weight, judged.bias) <= lost(plain.weight, plain.bias)


def test_without_rows_held_out_or_a_ridge_it_is_the_plain_solve() -> None:
    moments = split(0.0)
    for given, ridge in ((SplitMoments(whole=moments.whole), 0.01), (moments, 0.0)):
        found, plain = judged_solve(given, ridge=ridge, bias=True), solve(moments.whole, ridge=ridge, bias=True)
        torch.testing.assert_close(found.weight, plain.weight, rtol=0, atol=0)


class Bottlenecks(nn.Module):
    """Inverted residuals: norms, ReLU6 and a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)

        def block() -> nn.Sequential:
            wide = [nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6()]
            deep = [nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6()]
            return nn.Sequential(*wide, *deep, nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))

        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x.mean((2, 3))


@pytest.mark.parametrize("inverted", [True, False])
def test_rows_are_picked_before_residuals_are_worked_out(
    inverted: bool, nets: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same moments either way, to the last bit."""
    net = nets.seeded(Bottlenecks if inverted else lambda: nets.ResNet(2, 8))
    program = capture(net, nets.images(2))
    regions = list(find_regions(program).blocks[:1])
    samples = CalibrationSet.of(nets.images(24))
    settings = ResolveSettings(rows_per_column=5, guard_samples=0)
    picked: list[bool] = []
    thins = module._thins_first

    def counted(*arguments: object) -> bool:
        picked.append(thins(*arguments))  # type: ignore[arg-type]
        return picked[-1]

    found = []
    for rule in (counted, lambda *_: False):
        monkeypatch.setattr(module, "_thins_first", rule)
        student = drop_blocks(program, regions)
        found.append(resolve_network(program, student, samples, changes_of_drops(regions), settings=settings))
    assert any(picked)
    for key, value in found[0].program.module.state_dict().items():
        torch.testing.assert_close(value, found[1].program.module.state_dict()[key], rtol=0, atol=0)


def test_rows_are_few_where_most_weights_have_few_rows_for_their_columns(nets: SimpleNamespace) -> None:
    """A layer of 72 columns at 8 x 8 places has 64 rows a sample; one of 2,304 at 2 x 2 has 4."""
    early = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    late = nn.Sequential(
        nn.Conv2d(3, 256, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Conv2d(256, 256, 3, padding=1), nn.Flatten()
    )
    for network, most in ((early, -(-20 * 72 // 64)), (late, 20 * 2304 // 4)):
        program = capture(network.eval(), nets.images(2))
        assert rows_are_few(program, most - 1)
        assert not rows_are_few(program, most)
