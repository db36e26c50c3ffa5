"""Channels evened out before they are rounded: the same network in floating point, and a better one in integers."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.output_error import output_error
from foldcut.compiler.ir.edit_folds import fold_batch_norms
from foldcut.passes.quantize.equalise import Precision, choose_scales, equalised
from foldcut.passes.quantize.grids import choose_grids
from foldcut.passes.quantize.quantize import Rounding, quantize
from foldcut.passes.quantize.ranges import GridKind
from foldcut.passes.quantize.scaling_groups import rescaled, scaling_groups
from foldcut.passes.quantize.values import quantizable
from torch import nn

CHANNELS = 8


class Stream(nn.Module):
    """A residual stream without activations on it, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 1))
        self.head = nn.Conv2d(CHANNELS, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        return self.head(x + self.branch(x)).mean((2, 3))


def plain() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3), nn.LeakyReLU(0.1)),
        *(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 6), nn.ReLU(), nn.Linear(6, 4)),
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, CHANNELS, 1), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS), nn.ReLU()),
        *(nn.Conv2d(CHANNELS, CHANNELS, 1, groups=2), nn.AvgPool2d(2), nn.Conv2d(CHANNELS, 4, 1), nn.Flatten()),
    )


def whole(name: str, nets: Any) -> nn.Module:
    made: nn.Module = getattr(nets, name)()
    if name in ("ResNet", "DenseNet"):
        return made
    return nets.image_net(made, channels=CHANNELS * (1 + (name == "Downsample")))  # type: ignore[no-any-return]


def behind(between: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(3, CHANNELS, 1), between, nn.Conv2d(CHANNELS, 4, 1))


NETWORKS = {"plain": (plain, 3), "depthwise": (depthwise, 3), "stream": (Stream, 2)}


def captured(make: Callable[[], nn.Module], nets: Any) -> foldcut.Program:
    program: foldcut.Program = foldcut.capture(nets.seeded(make), nets.images(2))
    return program


def spread(program: foldcut.Program, ratio: float = 100.0) -> foldcut.Program:
    """The same network with channels whose ranges differ by `ratio`."""
    torch.manual_seed(1)
    scales = {
        name: torch.logspace(0, -torch.tensor(ratio).log10().item(), group.channels)[torch.randperm(group.channels)]
        for name, group in scaling_groups(program).items()
    }
    return rescaled(program, {name: scale.double() for name, scale in scales.items()})


def lost(program: foldcut.Program, samples: CalibrationSet, unseen: CalibrationSet, *, equalise: bool) -> float:
    layers, kind = list(quantizable(program)), GridKind()
    scales = choose_scales(program, layers, samples, Precision(kind, "best", 127)) if equalise else {}
    assert bool(scales) == equalise
    even = equalised(program, scales)
    made = quantize(even, layers, choose_grids(even, layers, samples, kind, "best"), samples, Rounding(limit=127))
    return output_error(program, made, unseen)


@pytest.mark.parametrize("name", NETWORKS)
def test_floats_stay_as_they_are(name: str, nets: SimpleNamespace) -> None:
    make, count = NETWORKS[name]
    program = captured(make, nets)
    groups = scaling_groups(program)
    assert len(groups) == count
    torch.manual_seed(0)
    powers = {name: torch.randint(-6, 7, (group.channels,)).tolist() for name, group in groups.items()}
    even = equalised(program, powers)
    even.check(program)
    x = nets.images(5, seed=3)
    assert torch.equal(even(x), program(x))
    for group in groups.values():
        for writer in group.writers:
            before, after = (p.module.get_parameter(writer.weight).detach() for p in (program, even))
            assert not torch.equal(before, after)


def test_whole_networks_stay_as_they_are(nets: SimpleNamespace) -> None:
    for name in ("ResNet", "PreActivation", "Inverted", "Gated", "Nested", "Downsample", "DenseNet"):
        program = captured(functools.partial(whole, name, nets), nets)
        folded, _ = fold_batch_norms(program)
        powers = {name: [i % 5 - 2 for i in range(group.channels)] for name, group in scaling_groups(folded).items()}
        x = nets.images(5, seed=3)
        assert torch.equal(equalised(folded, powers)(x), folded(x)), name


@pytest.mark.parametrize(
    "between",
    [nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.Sigmoid(), nn.Hardtanh(-2, 2), nn.Softmax(1), nn.LocalResponseNorm(3)],
)
def test_what_does_not_commute_with_a_scale_is_left_alone(between: nn.Module, nets: SimpleNamespace) -> None:
    assert not scaling_groups(captured(behind(between), nets))
    assert scaling_groups(captured(behind(nn.ReLU()), nets))


def test_what_others_read_is_left_alone(nets: SimpleNamespace) -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, CHANNELS, 1), nn.Conv2d(CHANNELS, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.first(x).relu()
            return x, self.second(x)

    assert not scaling_groups(captured(Returned, nets))


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_of_very_different_ranges(name: str, nets: SimpleNamespace) -> None:
    program = spread(captured(NETWORKS[name][0], nets))
    samples, unseen = CalibrationSet.of(nets.images(64)), CalibrationSet.of(nets.images(32, seed=5))
    off, on = (lost(program, samples, unseen, equalise=equalise) for equalise in (False, True))
    assert on <= 0.1 * off


def test_channels_of_one_range_stay(nets: SimpleNamespace) -> None:
    """Powers of two are too coarse to make anything of what differs little: the loss would be that of chance."""
    program = captured(Stream, nets)
    for name, group in scaling_groups(program).items():
        values = program.module.get_parameter(group.writers[0].weight).detach()
        assert float(values.abs().flatten(1).amax(1).max() / values.abs().flatten(1).amax(1).min()) < 3, name
    few = CalibrationSet.of(nets.images(64))
    assert not choose_scales(program, list(quantizable(program)), few, Precision(GridKind(), "minmax", 127))


@pytest.fixture
def decided(
    nets: SimpleNamespace, contexts: Any
) -> tuple[foldcut.Program, list[foldcut.QuantizeLayer], foldcut.Program]:
    """A network whose channels need it, the decisions of all of its layers with what data say, and what they make."""
    program = spread(captured(plain, nets))
    asked = [foldcut.QuantizeLayer(layer=name) for name in quantizable(program)]
    done = foldcut.Quantize().apply(program, asked, contexts(program, CalibrationSet.of(nets.images(64))))
    return program, list(done.decisions), done.program


def test_without_data_a_plan_has_its_scales(decided: Any, nets: SimpleNamespace) -> None:
    """The grids are those of channels that were evened out: on the network as it was they would be useless."""
    program, decisions, made = decided
    assert all(decision.equalised for decision in decisions)
    read = [foldcut.QuantizeLayer.from_dict(decision.to_dict()) for decision in decisions]
    assert read == decisions
    again = foldcut.Quantize().plain(program, read)
    without = [dataclasses.replace(decision, equalised=()) for decision in decisions]
    unscaled = foldcut.Quantize().plain(program, without)
    unseen = CalibrationSet.of(nets.images(32, seed=5))
    error = output_error(program, again, unseen)
    assert error < 10 * output_error(program, made, unseen) < 0.01
    assert output_error(program, unscaled, unseen) > 10 * error
    # a layer alone has all that its own grids need
    for decision in read:
        assert output_error(program, foldcut.Quantize().plain(program, [decision]), unseen) < 0.01


def test_trials_and_the_result_agree(decided: Any, nets: SimpleNamespace, contexts: Any) -> None:
    program, decisions, made = decided
    ctx = contexts(program, CalibrationSet.of(nets.images(64)))
    asked = [dataclasses.replace(decision, grids=(), equalised=()) for decision in decisions]
    tried = foldcut.Quantize().apply(program, asked, dataclasses.replace(ctx, trial=True))
    # the powers may be others: trials take the ranges of all values alike
    evened = [[layer for layer, _ in decision.equalised] for decision in tried.decisions]
    assert evened == [[layer for layer, _ in decision.equalised] for decision in decisions]
    unseen = CalibrationSet.of(nets.images(32, seed=5))
    assert output_error(program, tried.program, unseen) < 3 * output_error(program, made, unseen)


def test_it_can_be_switched_off(decided: Any, nets: SimpleNamespace, contexts: Any) -> None:
    program, decisions, made = decided
    ctx = contexts(program, CalibrationSet.of(nets.images(64)))
    off = foldcut.Quantize(equalise=False).apply(program, decisions, ctx)
    assert not any(decision.equalised for decision in off.decisions)
    unseen = CalibrationSet.of(nets.images(32, seed=5))
    assert output_error(program, off.program, unseen) > 5 * output_error(program, made, unseen)


def test_a_saved_plan_is_read_back(decided: Any, nets: SimpleNamespace, tmp_path: Path) -> None:
    """From plan.json alone, and with the weights that were saved."""
    program, decisions, made = decided
    net = nets.seeded(plain)
    net.load_state_dict(program.module.state_dict())
    captured_again = foldcut.capture(net, nets.images(2))
    plan = foldcut.Plan(
        decisions=tuple(decisions), goal=foldcut.Latency(0.5), fingerprint=captured_again.fingerprint, predicted={}
    )
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_dict()))
    read = foldcut.Plan.load(path)
    assert read.decisions == plan.decisions
    x = nets.images(16, seed=5)
    alone = foldcut.apply_plan(captured_again, read)
    assert torch.equal(alone(x), foldcut.Quantize().plain(program, decisions)(x))
    again = foldcut.apply(net, path, weights=made.module, calibration=nets.images(4), progress=False, cache=False)
    assert torch.equal(again.program(x), made(x))


def test_scales_of_another_network_are_refused(decided: Any) -> None:
    program, decisions, _ = decided
    (name, powers), *_ = decisions[0].equalised
    for wrong, message in (
        ((("conv2d_99", powers),), "no such channels"),
        (((name, powers[1:]),), "no such channels"),
    ):
        edited = [dataclasses.replace(decisions[0], equalised=wrong)]
        with pytest.raises(foldcut.RewriteError, match=message):
            foldcut.Quantize().plain(program, edited)
    for power in (0.5, 500):
        data = {**decisions[0].to_dict(), "equalised": [[name, [power, *powers[1:]]]]}
        with pytest.raises(ValueError, match="power of two"):
            foldcut.QuantizeLayer.from_dict(data)


@pytest.mark.parametrize("wrong", ["yes", 1, None])
def test_it_is_a_switch(wrong: Any) -> None:
    with pytest.raises(foldcut.CompilerError, match="equalise"):
        foldcut.Quantize(equalise=wrong)
