"""How far samples are from the data of a network: from what its batch norms keep, or from a reference."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.data_distance import FAR, MOST, DataDistance, data_distance, warn_if_far
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.report.page import report_page
from torch import nn

pytestmark = pytest.mark.usefixtures("quick_measurement")

Images = torch.Tensor


class Normed(nn.Module):
    """Two batch norms that have seen data of its own."""

    def __init__(self, images: Images) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8, momentum=None)])
        self.train()
        for batch in images.split(32):
            self(batch)
        self.eval()

    def forward(self, x: Images) -> Images:
        value = self.norms[0](self.first(x)).relu()
        return self.norms[1](self.last(value)).relu().mean((2, 3))


class Plain(nn.Module):
    """No batch norm; tokens of features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Images) -> Images:
        return self.last(self.first(x).relu())


def own(count: int = 128, seed: int = 0) -> Images:
    return 0.5 * torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) + 0.3


def found(network: nn.Module, samples: Any, reference: Any = None) -> DataDistance | None:
    program = capture(network, samples[:2])
    return data_distance(
        program, CalibrationSet.of(samples), None if reference is None else CalibrationSet.of(reference)
    )


def test_its_own_data_are_near_and_others_far() -> None:
    torch.manual_seed(0)
    network = Normed(own(256))
    near = found(network, own(seed=1))
    assert near is not None
    assert near.known_from == "batch norms" and len(near.by_layer) == 2
    assert near.median < 0.1 and not near.far
    for other in (own() * 255, own() - 1, own() * 0.3):
        far = found(network, other)
        assert far is not None and far.far and far.median > FAR


def test_the_distance_is_that_of_normal_distributions() -> None:
    """A shift of all channels by a standard deviation, and one that is twice as wide, are one away each."""
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(3, affine=False, eps=0).eval()
    norm.running_mean, norm.running_var = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 4.0, 4.0])
    images = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True, correction=0)
    images = images.float()
    means = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    for shifted, expected in (
        (2 * images + means, 0.0),
        (2 * images + means + 2, 1.0),
        (4 * images + means, 1.0),
        (4 * images + means + 2, 2**0.5),
        (2000 * images + means, MOST),
    ):
        distance = found(norm, shifted)
        assert distance is not None
        assert distance.median == pytest.approx(expected, abs=1e-5)


def test_a_reference_stands_for_the_norms() -> None:
    torch.manual_seed(2)
    network = Plain().eval()
    samples, other = torch.randn(64, 5, 6), torch.randn(64, 5, 6)
    assert found(network, samples) is None
    near, far = found(network, samples, other), found(network, 3 * samples + 1, other)
    assert near is not None and far is not None
    assert near.known_from == "reference" and len(near.by_layer) == 2
    assert near.median < 0.15 < 1 < far.median
    with_norms = found(Normed(own()), own() * 9, own() * 9)
    assert with_norms is not None and with_norms.median == pytest.approx(0, abs=1e-6)


def test_norms_that_were_never_trained_say_nothing() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    assert found(network, own(8)) is None


def test_samples_in_any_order_and_a_constant_channel() -> None:
    """Samples are taken evenly from all: sorted ones are no nearer nor farther. Channels that never vary are fine."""
    torch.manual_seed(3)
    network = Normed(own(256))
    mixed = torch.cat([own(200) - 1, own(200) + 1])
    there, back = found(network, mixed), found(network, mixed.flip(0))
    assert there is not None and back is not None
    assert there.median == pytest.approx(back.median, rel=0.1)
    dead = Normed(own(64))
    dead.norms[0].running_var.zero_()  # type: ignore[union-attr, operator]
    distance = found(dead, own())
    assert distance is not None and 0 <= distance.median <= MOST


@pytest.mark.parametrize(("count", "warned"), [(40, True), (4, False)])
def test_far_samples_are_warned_of_unless_they_are_few(count: int, warned: bool) -> None:
    torch.manual_seed(4)
    distance = found(Normed(own(256)), own(count) * 255)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_far(distance, count)
        warn_if_far(None, count)
    assert [("10.00 standard deviations" in str(w.message)) for w in caught] == [True] * warned


def test_the_report_says_how_far(nets: SimpleNamespace, counting_backend: Any) -> None:
    torch.manual_seed(5)
    network = Normed(own(256))
    options: dict[str, Any] = {"mimic": False, "progress": False, "cache": False, "backend": counting_backend}
    goal = foldcut.Channels(0.5)
    with pytest.warns(UserWarning, match="what is fitted to them may not hold"):
        far = foldcut.compile(network, own(40) * 255, goal=goal, **options)
    distance = far.report.calibration["distance"]
    assert distance["known_from"] == "batch norms" and distance["median"] > FAR
    assert any("what is fitted to them may not hold" in warning for warning in far.report.warnings)
    settings = foldcut.PipelineSettings(reference=own(40) * 255)
    near = foldcut.compile(network, own(40, seed=1) * 255, goal=goal, settings=settings, **options)
    assert near.report.calibration["distance"]["known_from"] == "reference"
    assert near.report.calibration["distance"]["median"] < FAR
    assert "from what the reference gives" in report_page(near.report.to_dict())


def test_a_reference_that_does_not_fit_is_refused(counting_backend: Any) -> None:
    network = Normed(own(64))
    settings = foldcut.PipelineSettings(reference=torch.randn(8, 5, 12, 12))
    with pytest.raises(foldcut.CalibrationError, match="reference"):
        foldcut.compile(
            network, own(40), goal=foldcut.Channels(0.5), settings=settings, progress=False, backend=counting_backend
        )


class Signals(nn.Module):
    """Batch norms on (N, C, L), trained; as long as there are channels, or not."""

    def __init__(self, signals: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv1d(2, 8, 3, padding=1), nn.BatchNorm1d(8, momentum=None)
        self.train()(signals)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x)).relu().mean(2)


@pytest.mark.parametrize("length", [8, 5])
def test_channels_of_one_dimensional_signals(length: int) -> None:
    """(N, C, L) is not taken for (N, L, C): not where both fit, and not where they do not."""
    signals = 3 * torch.randn(64, 2, length) + 1
    network = Signals(signals)
    distance, other = found(network, signals), found(network, signals, signals + 2)
    assert distance is not None and distance.median < 0.01
    assert other is not None and other.median > 0.3


def test_a_reference_is_read_as_samples_are() -> None:
    """Doubles of numpy are converted, and a generator lasts for a sweep."""
    network, samples = Plain().eval(), torch.randn(12, 5, 6)
    options: Any = {"progress": False, "cache": False, "mimic": False}
    halves = (half for half in torch.randn(12, 5, 6).double().numpy().reshape(2, 6, 5, 6))
    limits = foldcut.ChannelSettings(limits=foldcut.ChannelLimits(multiple_of=1))
    settings = foldcut.PipelineSettings(channels=limits, reference=halves)
    goals = [foldcut.Channels(0.75), foldcut.Channels(0.5)]
    points = foldcut.sweep(network, samples, goals=goals, settings=settings, **options).points
    found = [point.compiled.report.calibration["distance"] for point in points if point.compiled is not None]
    assert len(found) == 2 and found[0] == found[1] and found[0]["known_from"] == "reference"


def test_a_reference_may_be_a_list_of_single_samples() -> None:
    """Which are told from batches by running the network, as those to calibrate with are."""
    network = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    samples, options = list(torch.randn(12, 5)), {"progress": False, "cache": False, "mimic": False}
    for reference in (samples, {"input": torch.stack(samples)}):
        settings = foldcut.PipelineSettings(reference=reference)  # type: ignore[arg-type]
        made = foldcut.compile(network, samples, goal=foldcut.Channels(0.5), settings=settings, **options)  # type: ignore[arg-type]
        assert made.report.calibration["distance"]["known_from"] == "reference"
