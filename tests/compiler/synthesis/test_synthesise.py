"""Calibration samples from the network alone: what they match, that they come again, and what cannot be made."""

import functools
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import foldcut
import numpy as np
import pytest
import torch
from foldcut.compiler.data.synthetic import SyntheticSet, as_npz
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit_folds import fold_batch_norms
from foldcut.compiler.ir.program import Program
from foldcut.compiler.report.contact_sheet import contact_sheet
from foldcut.compiler.report.page import report_page
from foldcut.compiler.store import checkpoint
from foldcut.compiler.support.progress import PlainProgress, StageClock, silent
from foldcut.compiler.synthesis.descent import Descent
from foldcut.compiler.synthesis.norm_statistics import NormTarget, norm_targets, statistics_distance
from foldcut.compiler.synthesis.synthesise import Watched, made_samples
from PIL import Image
from torch import nn
from torch.nn import functional

SETTINGS = foldcut.SynthesisSettings(count=12, batch=6, input_shape=(3, 12, 12), iterations=8)


class Reads(nn.Module):
    """Convolutions with batch norms that have seen images of some range."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


def smooth(count: int, seed: int = 0) -> torch.Tensor:
    """Images of mean 0 and deviation 1, other than dead leaves."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    found = functional.interpolate(coarse, size=(12, 12), mode="bilinear")
    return found / found.std()


@functools.cache
def trained(mean: float = 0.0, deviation: float = 1.0) -> nn.Module:
    """A network whose batch norms remember images of such a range."""
    torch.manual_seed(0)
    net = Reads()
    for part in net.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(part.bias)
    net.train()
    with torch.no_grad():
        for step in range(40):
            net(smooth(16, step) * deviation + mean)
    return net.eval()


@functools.cache
def program(mean: float = 0.0, deviation: float = 1.0) -> Program:
    return capture(trained(mean, deviation), torch.zeros(2, 3, 12, 12))


def made(model: Any, settings: foldcut.SynthesisSettings = SETTINGS, **options: Any) -> SyntheticSet:
    """A program is not captured again: that takes longer than all the rest."""
    if not isinstance(model, Program):
        return foldcut.synthesise(model, settings, **{"progress": False, "cache": False, **options})
    show, folder = options.get("progress", silent), options.get("cache")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        watched = Watched(clock=StageClock(), show=show, seed=options.get("seed", 0), folder=folder)
        return made_samples(model, settings, watched)


def worded(*parts: str) -> str:
    return ".*".join(map(re.escape, parts))


pytestmark = pytest.mark.filterwarnings("ignore:no data were given", "ignore:samples made without data are weak")


def test_the_distance_is_what_it_says() -> None:
    value = torch.randn(64, 2, 5, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    variance, mean = torch.var_mean(value, (0, 2, 3), correction=0)
    exact = NormTarget(source="x", mean=mean, deviation=variance.sqrt())
    assert float(statistics_distance([exact], {"x": value})) == pytest.approx(0, abs=1e-8)
    other = NormTarget(source="x", mean=mean + 2 * variance.sqrt(), deviation=variance.sqrt() / 3)
    # 2 deviations of a third of the size are 6; three times as wide is 2 more than it should be
    assert float(statistics_distance([other], {"x": value})) == pytest.approx(6**2 + 2**2, rel=1e-4)


def test_the_statistics_are_those_of_the_norms() -> None:
    net = trained()
    targets = norm_targets(program())
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(targets) == len(norms) == 2
    for target, norm in zip(targets, norms, strict=True):
        assert torch.allclose(target.mean, norm.running_mean)  # type: ignore[arg-type]
        assert torch.allclose(target.deviation, (norm.running_var + norm.eps).sqrt())  # type: ignore[operator]


def test_the_samples_come_near_to_what_the_norms_remember() -> None:
    net: Any = trained()
    found = made(program())
    distance = found.made["distance"]
    assert distance["after"] < distance["before"] / 2
    assert found.made["norms"] == 2 and found.made["weak"] is None
    # not by its own account alone
    with torch.no_grad():
        begun = made(program(), replace(SETTINGS, iterations=0))
        wide = [net.body[0](part.leaves[0]).var((0, 2, 3), correction=0) for part in (begun, found)]
    apart = [float((w / net.body[1].running_var - 1).square().mean()) for w in wide]  # type: ignore[operator]
    assert apart[1] < 0.7 * apart[0]


def test_the_same_seed_gives_the_same_bits() -> None:
    first, again = made(program()), made(program())
    assert torch.equal(first.leaves[0], again.leaves[0])
    assert not torch.equal(first.leaves[0], made(program(), seed=1).leaves[0])
    assert len(set(first.digests)) == 12


def test_the_caller_s_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    made(program())
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("step", [1, 7, 8, 11])
def test_what_was_interrupted_goes_on_and_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    net = program()
    whole = made(net)
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 0.0)
    seen: list[int] = []

    def until(stage: str, done: int, total: int) -> None:
        seen.append(done)
        assert total == 16
        if len(seen) == step + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(net, progress=until, cache=tmp_path)
    again: list[int] = []
    found = made(net, progress=lambda stage, done, total: again.append(done), cache=tmp_path)
    assert again[0] == step + 1, "what was done is not done again"
    assert again[-1] == 16
    assert torch.equal(found.leaves[0], whole.leaves[0])
    assert found.made["distance"] == whole.made["distance"]


def test_the_next_call_takes_them_from_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = program()
    first = made(net, cache=tmp_path)
    monkeypatch.setattr(Descent, "step", lambda self: pytest.fail("it is made again"))
    assert torch.equal(made(net, cache=tmp_path).leaves[0], first.leaves[0])


def test_how_long_it_takes_is_said_once_a_step_was_timed() -> None:
    lines: list[str] = []
    made(program(), progress=PlainProgress(lines.append))
    said = "12 samples to make without data: dead leaves of 3 x 12 x 12, changed in 8 steps to the statistics of 2"
    assert any(line.startswith(said) for line in lines)
    assert sum(line.startswith("about") and "for synthesise" in line for line in lines) == 1


def test_where_nothing_is_changed_progress_goes_by_what_is_drawn() -> None:
    seen: list[tuple[str, int, int]] = []
    made(program(), replace(SETTINGS, iterations=0), progress=lambda *far: seen.append(far))
    assert seen == [("synthesise", 1, 2), ("synthesise", 2, 2)]


@pytest.mark.parametrize(
    ("mean", "deviation", "name"),
    [(0.0, 1.0, "mean 0, deviation 1"), (0.45, 0.25, "0 to 1"), (115.0, 64.0, "0 to 255")],
)
def test_the_range_is_found_with_norms(mean: float, deviation: float, name: str) -> None:
    found = made(program(mean, deviation))
    assert found.made["range"] == name
    assert float(found.leaves[0].std()) == pytest.approx(deviation, rel=0.4)


@pytest.mark.parametrize(
    ("mean", "deviation", "names"),
    [
        (0.0, 1.0, {"mean 0, deviation 1", "-1 to 1", "0 to 1"}),
        (0.0, 64.0, {"-128 to 127", "0 to 255"}),
        (115.0, 64.0, {"0 to 255"}),
    ],
)
def test_the_range_is_found_where_norms_are_folded(mean: float, deviation: float, names: set[str]) -> None:
    """Nothing but the biases that are left of the norms says it."""
    without, folded = fold_batch_norms(program(mean, deviation))
    assert len(folded) == 2
    found = made(without)
    assert found.made["range"] in names and found.made["norms"] == 0
    assert "no batch norms, or has them folded" in found.made["weak"]


class Tokens(nn.Module):
    """Looks its inputs up; a mask may say which count."""

    def __init__(self, rows: int = 7) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        found = self.table(ids)
        return self.head((found if mask is None else found * mask.unsqueeze(-1)).mean(1))


def exported(net: nn.Module, *example: torch.Tensor) -> torch.export.ExportedProgram:
    dims = tuple({0: torch.export.Dim.DYNAMIC} for _ in example)
    return torch.export.export(net.eval(), example, dynamic_shapes=dims)


@pytest.mark.parametrize("form", ["module", "exported"])
def test_token_ids_are_uniform_over_the_vocabulary(form: str) -> None:
    net = Tokens().eval()
    settings = foldcut.SynthesisSettings(count=200, input_shape=(5,) if form == "module" else None)
    found = made(net if form == "module" else exported(net, torch.zeros(2, 5, dtype=torch.int64)), settings)
    (ids,) = found.leaves
    assert ids.shape == (200, 5) and ids.dtype == torch.int64
    counts = ids.flatten().bincount(minlength=7)
    assert len(counts) == 7 and int(counts.min()) > 90


def test_a_mask_cannot_be_made_up() -> None:
    net = exported(Tokens(), torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64))
    with pytest.raises(
        foldcut.CalibrationError, match=f"(?s){worded('cannot be made up', 'int64', 'calibration set')}"
    ):
        made(net, foldcut.SynthesisSettings(count=4))


def test_other_numbers_are_noise_and_follow_the_norms_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    net.train()
    for _ in range(60):
        net(torch.randn(64, 6) * torch.arange(1.0, 7.0))
    settings = foldcut.SynthesisSettings(count=64, batch=64, iterations=40, input_shape=(6,))
    found = made(net.eval(), settings)
    assert found.made["how"].startswith("Gaussian noise") and found.made["range"] is None
    assert found.made["distance"]["after"] < found.made["distance"]["before"] / 2


def test_images_whose_channels_come_last_are_images() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = trained()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.permute(0, 3, 1, 2))

    settings = replace(SETTINGS, input_shape=(12, 12, 3))
    found = made(Last().eval(), settings)
    assert found.made["how"].startswith("dead leaves of 12 x 12 x 3")
    assert found.made["distance"]["after"] < found.made["distance"]["before"] / 2


def test_a_network_without_gradient_keeps_what_it_begins_with() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = trained()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.to(torch.int32).float())

    with pytest.warns(UserWarning, match=worded("weak here: they could not be changed by its gradient")):
        found = made(Rounded().eval())
    assert found.leaves[0].shape == (12, 3, 12, 12)


def test_values_that_overflow_end_the_descent_and_not_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = made(program(), replace(SETTINGS, iterations=0))
    honest, steps = Descent._loss, []

    def overflowing(self: Descent, **options: Any) -> tuple[float, torch.Tensor]:
        distance, loss = honest(self, **options)
        steps.append(1)
        return distance, loss * torch.inf if torch.is_grad_enabled() else loss

    monkeypatch.setattr(Descent, "_loss", overflowing)
    found = made(program())
    assert steps and "values overflow" in found.made["weak"]
    assert torch.equal(found.leaves[0], begun.leaves[0])


def test_inside_no_grad_samples_are_made_all_the_same() -> None:
    with torch.no_grad():
        assert torch.equal(made(program()).leaves[0], made(program()).leaves[0])
        assert made(program()).made["weak"] is None


def test_a_fixed_batch_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.view(2, 6))

    with pytest.raises(foldcut.CalibrationError, match="fixes the batch size"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made(Fixed().eval(), foldcut.SynthesisSettings(count=4, input_shape=(6,)))


@pytest.mark.parametrize(
    ("make", "settings", "texts"),
    [
        (trained, None, ("shape of one input must be known", "input_shape=(3, 224, 224)", "--input-shape")),
        (
            lambda: nn.Bilinear(4, 4, 2),
            foldcut.SynthesisSettings(input_shape=(4,)),
            ("the network takes 2", "ExportedProgram"),
        ),
        (trained, {"count": 3}, ("is no SynthesisSettings",)),
        (
            lambda: exported(nn.Linear(6, 3), torch.zeros(2, 6)),
            foldcut.SynthesisSettings(input_shape=(7,)),
            ("is not the shape that the network was exported with", "(6,)", "(7,)", "leave it out"),
        ),
    ],
    ids=["no shape", "two inputs", "no settings", "another shape"],
)
def test_what_cannot_be_made_says_what_to_pass(make: Callable[[], nn.Module], settings: Any, texts: tuple[str]) -> None:
    with pytest.raises(foldcut.CalibrationError, match=f"(?s){worded(*texts)}"):
        foldcut.synthesise(make(), settings, progress=False, cache=False)


def test_a_shape_that_does_not_fit_is_the_capture_s_to_refuse() -> None:
    with pytest.raises(foldcut.CaptureError, match="does not run on the example batch"):
        made(trained(), foldcut.SynthesisSettings(count=4, input_shape=(5, 12, 12)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"count": 0}, "count=0 is out of range"),
        ({"batch": 1}, "batch=1 is out of range"),
        ({"iterations": -1}, "iterations=-1 is out of range"),
        ({"learning_rate": 0}, "learning_rate=0 is out of range"),
        ({"diverse": -1}, "diverse=-1 is out of range"),
        ({"smooth": "much"}, "smooth='much' is not a number"),
        ({"seed": 1.5}, "seed=1.5 is not a whole number"),
        ({"input_shape": (3, 0, 8)}, r"input_shape=\(3, 0, 8\) is not a shape"),
        ({"input_shape": "3,8,8"}, "input_shape='3,8,8' is not a shape"),
        ({"input_shape": ()}, r"input_shape=\(\) is not a shape"),
        ({"input_shape": 8}, "input_shape=8 is not a shape"),
        ({"input_shape": {3, 8}}, "is not a shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(foldcut.CalibrationError, match=text):
        foldcut.SynthesisSettings(**options)


QUICK: dict[str, Any] = {"mimic": False, "progress": False, "cache": False}


@pytest.fixture(scope="module")
def compiled(counting_backend: Any) -> foldcut.Compiled:
    settings = replace(SETTINGS, count=40, batch=20, input_shape=None)
    net = exported(trained(), torch.zeros(2, 3, 12, 12))
    return foldcut.compile(net, settings, goal=foldcut.Channels(0.5), backend=counting_backend, **QUICK)


@pytest.mark.usefixtures("quick_measurement")
def test_none_in_the_place_of_samples_is_enough(counting_backend: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    given = exported(net, torch.zeros(2, 6))
    with pytest.warns(UserWarning, match=worded("no data were given: 500 calibration", "measure the result on real")):
        out = foldcut.compile(given, None, goal=foldcut.Channels(0.5), backend=counting_backend, **QUICK)
    assert out.report.calibration["synthetic"]["picture"] is None
    solved = foldcut.apply(given, out.plan, calibration=foldcut.SynthesisSettings(count=60), **QUICK)
    assert solved.tested is not None and solved.tested.samples == 6
    again = foldcut.sweep(given, None, goals=[foldcut.Channels(0.5)], backend=counting_backend, **QUICK)
    assert again.points[0].compiled is not None
    assert again.points[0].compiled.report.calibration["fingerprint"] == out.report.calibration["fingerprint"]


@pytest.mark.usefixtures("quick_measurement")
def test_a_compile_without_data_says_so(compiled: foldcut.Compiled) -> None:
    report = compiled.report
    said = report.calibration["synthetic"]
    assert (report.calibration["samples"], said["count"], said["norms"]) == (40, 40, 2)
    assert any(row[3].endswith("synthetic test samples") for row in report.rows())
    assert any(words.startswith("no data were given") for words in report.warnings)
    page = report_page(report.to_dict())
    assert 'id="synthetic"' in page and said["picture"] in page
    assert "4 synthetic test samples" in page
    without = report.to_dict()
    del without["calibration"]["synthetic"]
    plain = report_page(without)
    assert "synthetic test samples" not in plain and 'id="synthetic"' not in plain


@pytest.mark.usefixtures("quick_measurement")
def test_samples_that_were_made_before_are_known_as_such(counting_backend: Any, tmp_path: Path) -> None:
    found = made(program())
    path = tmp_path / "made.npz"
    path.write_bytes(as_npz(found, ["x"]))
    read = foldcut.read_calibration(path)
    assert isinstance(read, SyntheticSet)
    assert torch.equal(read.leaves[0], found.leaves[0])
    out = foldcut.compile(trained(), read, goal=foldcut.Channels(0.5), backend=counting_backend, **QUICK)
    assert out.report.calibration["synthetic"]["how"] == found.made["how"]
    np.savez(path, x=found.leaves[0].numpy())
    assert not isinstance(foldcut.read_calibration(path), SyntheticSet)


def test_only_a_picture_is_shown_as_one(compiled: foldcut.Compiled) -> None:
    report = compiled.report.to_dict()
    report["calibration"] = {**report["calibration"], "synthetic": {"count": 1, "how": "<b>", "picture": "http://x"}}
    page = report_page(report)
    assert "http://x" not in page and "<img" not in page and "&lt;b&gt;" in page


@pytest.mark.parametrize(("shape", "size"), [((40, 3, 16, 16), (796, 396)), ((3, 1, 200, 100), (152, 96))])
def test_the_picture_shows_the_first_samples(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    images = torch.zeros(shape)
    images[0] = 1.0
    sheet = Image.open(io.BytesIO(contact_sheet(images)))
    assert sheet.format == "PNG" and sheet.size == size
    assert sheet.getpixel((10, 10)) == (255, 255, 255)
    assert sheet.getpixel((size[0] - 1, 10)) == (0, 0, 0)
