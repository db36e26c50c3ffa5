"""Samples made against another network: what disagreement is, that it grows, and what does not fit."""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.data.synthetic import SyntheticSet
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.report.words import synthetic_words
from foldcut.compiler.store import checkpoint
from foldcut.compiler.support.progress import StageClock, silent
from foldcut.compiler.synthesis.descent import Descent
from foldcut.compiler.synthesis.disagreement import Rival, classes_apart, outputs_apart
from foldcut.compiler.synthesis.synthesise import COMPETE, Watched, made_samples
from torch import nn
from torch.nn import functional

SETTINGS = foldcut.SynthesisSettings(count=24, batch=12, input_shape=(3, 12, 12), iterations=16, compete=0.03)
pytestmark = [
    pytest.mark.usefixtures("quick_measurement"),
    pytest.mark.filterwarnings("ignore:no data were given", "ignore:samples made without data are weak"),
]


class Reads(nn.Module):
    """A classifier whose batch norms have seen images."""

    def __init__(self, head: nn.Module, *, norms: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16) if norms else nn.Identity(), nn.ReLU()
        )
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


@functools.cache
def trained(*, norms: bool = True, probabilities: bool = False) -> Reads:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(16, 5), nn.Softmax(1) if probabilities else nn.Identity())
    nn.init.normal_(head[0].weight, std=2.0)  # type: ignore[arg-type]
    net = Reads(head, norms=norms).train()
    with torch.no_grad():
        for step in range(30):
            coarse = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            net(functional.interpolate(coarse, size=(12, 12), mode="bilinear"))
    return net.eval()


def changed(net: Reads, seed: int = 1, size: float = 0.4) -> Reads:
    """The network as something has left it that is not quite right."""
    import copy

    other = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (other.body[0].weight, other.head[0].weight):  # type: ignore[index]
            weight += size * weight.std() * torch.randn(weight.shape, generator=generator)  # type: ignore[union-attr, operator]
    return other


@functools.cache
def program(**options: bool) -> Any:
    return capture(trained(**options), torch.zeros(2, 3, 12, 12))


def made(
    network: Any,
    against: Any,
    settings: foldcut.SynthesisSettings = SETTINGS,
    *,
    show: Any = silent,
    folder: Any = None,
) -> SyntheticSet:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        watched = Watched(clock=StageClock(), show=show, seed=0, folder=folder)
        return made_samples(network, settings, watched, against=against)


def test_the_divergence_of_classes_is_that_of_jensen_and_shannon() -> None:
    same, first, second = (torch.tensor([row]) for row in ([0.25] * 4, [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]))
    logs = [value.clamp_min(1e-12).log() for value in (same, first, second)]
    assert float(classes_apart(logs[0], logs[0])) == pytest.approx(0, abs=1e-6)
    assert float(classes_apart(logs[1], logs[2])) == pytest.approx(1, abs=1e-6)  # one bit: nothing in common
    by_hand = 0.5 * math.log2(4 / 3) + 0.5 * (0.5 * math.log2(2 / 3) + 0.5 * math.log2(2))  # M: 3/8, 3/8, 1/8, 1/8
    assert float(classes_apart(logs[1], logs[0])) == pytest.approx(by_hand, abs=1e-6)
    both = [torch.cat([a, b]) for a, b in ((logs[1], logs[0]), (logs[2], logs[0]))]
    assert float(classes_apart(*both)) == pytest.approx(0.5, abs=1e-6)  # the mean over samples


def test_other_outputs_are_as_far_apart_as_their_distance_is_large() -> None:
    ours, theirs = [torch.tensor([[3.0, 4.0]])], [torch.tensor([[3.0, 9.0]])]
    assert float(outputs_apart(ours, theirs)) == pytest.approx(0.5)  # as large as the outputs themselves
    assert float(outputs_apart(ours, ours)) == 0
    more = [ours[0], torch.tensor([[[5.0]]])], [theirs[0], torch.tensor([[[5.0]]])]
    assert float(outputs_apart(*more)) == pytest.approx(25 / 75)
    assert float(outputs_apart([torch.zeros(1, 2)], [torch.zeros(1, 2)])) == 0


def test_probabilities_are_taken_as_they_are() -> None:
    ours, theirs = (torch.randn(6, 4, generator=torch.Generator().manual_seed(s)) for s in range(2))
    numbers = Rival(program=program(), outputs=(), classes=True).disagreement([ours], [theirs])
    certain = Rival(program=program(), outputs=(), classes=True, certain=(True, False))
    assert torch.allclose(certain.disagreement([ours.softmax(1)], [theirs]), numbers, atol=1e-6)


def judged(net: Reads, other: Reads, images: torch.Tensor) -> float:
    """How often two networks say another class, and how far apart they are, by hand."""
    with torch.no_grad():
        ours, theirs = net(images).softmax(1).double(), other(images).softmax(1).double()
    middle = (ours + theirs) / 2
    return float(sum((side * (side / middle).log2()).sum(1).mean() for side in (ours, theirs)) / 2)


@pytest.mark.parametrize("probabilities", [False, True])
def test_they_disagree_more_and_the_statistics_are_as_near(probabilities: bool) -> None:
    net = trained(probabilities=probabilities)
    other = changed(net)
    whole = program(probabilities=probabilities)
    found, plain = made(whole, other), made(whole, other, replace(SETTINGS, compete=0.0))
    said, without = found.made["disagreement"], plain.made["disagreement"]
    assert said["after"] > 1.25 * without["after"] and said["before"] == without["before"]
    assert found.made["distance"]["after"] < 1.1 * plain.made["distance"]["after"]
    assert found.made["how"].endswith("to the statistics of 1 batch norm and to be what another network disagrees on")
    assert "disagrees" not in plain.made["how"]
    if not probabilities:  # not by its own account alone
        assert judged(net, other, found.leaves[0]) == pytest.approx(said["after"], abs=1e-3)
        assert judged(net, other, found.leaves[0]) > 1.25 * judged(net, other, plain.leaves[0])


def test_without_another_network_nothing_is_said_of_one() -> None:
    plain = made(program(), None, replace(SETTINGS, compete=None))
    assert plain.made["disagreement"] == {}
    unused = made(program(), changed(trained()), replace(SETTINGS, compete=0.0))
    assert torch.equal(plain.leaves[0], unused.leaves[0])


def test_a_weight_without_another_network_is_refused() -> None:
    for run in (
        lambda: foldcut.synthesise(trained(), SETTINGS, progress=False, cache=False),
        lambda: foldcut.compile(trained(), SETTINGS, goal=foldcut.Channels(0.5), progress=False, cache=False),
    ):
        with pytest.raises(foldcut.CalibrationError, match=r"compete=0\.03 is about another network.*(?s:.*)against="):
            run()


def test_there_is_a_weight_where_none_is_given() -> None:
    other = changed(trained())
    usual, same = (made(program(), other, replace(SETTINGS, compete=compete)) for compete in (None, COMPETE))
    assert torch.equal(usual.leaves[0], same.leaves[0])
    assert (
        usual.made["disagreement"]["after"]
        > made(program(), other, replace(SETTINGS, compete=0.0)).made["disagreement"]["after"]
    )


def test_where_there_are_no_norms_they_still_come_to_disagree() -> None:
    found = made(program(norms=False), changed(trained(norms=False)))
    assert found.made["disagreement"]["after"] > 1.5 * found.made["disagreement"]["before"]
    assert found.made["distance"] == {} and "no batch norms" in found.made["weak"]
    assert found.made["how"].endswith("changed in 16 steps to be what another network disagrees on")


class Maps(nn.Module):
    """No classes: an image and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.body(x)
        return {"maps": self.out(y), "mean": y.mean((2, 3))}


def test_outputs_that_are_no_classes() -> None:
    torch.manual_seed(0)
    net, other = Maps().eval(), Maps().eval()
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        other.out.weight[0] *= 1.5
    settings = replace(SETTINGS, compete=1.0, count=12)
    given = capture(net, torch.zeros(2, 3, 12, 12))
    found, plain = made(given, other, settings), made(given, other, replace(settings, compete=0.0))
    assert found.made["disagreement"]["after"] > 1.2 * plain.made["disagreement"]["after"]


def test_the_same_seed_gives_the_same_bits() -> None:
    other = changed(trained())
    first = made(program(), other)
    assert torch.equal(first.leaves[0], made(program(), other).leaves[0])
    assert not torch.equal(first.leaves[0], made(program(), changed(trained(), seed=2)).leaves[0])


@pytest.mark.parametrize("step", [3, 15, 16, 20])
def test_what_was_interrupted_goes_on_and_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    other = changed(trained())
    whole = made(program(), other)
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 0.0)

    def until(stage: str, done: int, total: int) -> None:
        if done == step + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(program(), other, show=until, folder=tmp_path)
    again: list[int] = []
    found = made(program(), other, show=lambda stage, done, total: again.append(done), folder=tmp_path)
    assert again[0] == step + 1
    assert torch.equal(found.leaves[0], whole.leaves[0])
    assert {key: found.made[key] for key in ("distance", "disagreement")} == {
        key: whole.made[key] for key in ("distance", "disagreement")
    }


def test_they_are_kept_for_that_other_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = changed(trained())
    first = made(program(), other, folder=tmp_path)
    plain = made(program(), None, replace(SETTINGS, compete=None), folder=tmp_path)
    assert not torch.equal(first.leaves[0], plain.leaves[0])
    monkeypatch.setattr(Descent, "step", lambda self: pytest.fail("it is made again"))
    assert torch.equal(made(program(), other, folder=tmp_path).leaves[0], first.leaves[0])


def test_a_result_in_every_form_may_be_what_they_are_made_against(tmp_path: Path) -> None:
    """A module, a program, a file."""
    net, other, few = trained(), changed(trained()), replace(SETTINGS, count=4, batch=4, iterations=2)
    path = tmp_path / "other.onnx"
    path.write_bytes(to_onnx(capture(other, torch.zeros(2, 3, 12, 12))))
    exported = torch.export.export(other, (torch.zeros(2, 3, 12, 12),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    forms: list[Any] = [other, exported, path, str(path)]
    found = [foldcut.synthesise(net, few, against=form, progress=False, cache=False) for form in forms]
    assert {round(one.made["disagreement"]["before"], 4) for one in found} == {
        round(found[0].made["disagreement"]["before"], 4)
    }
    assert found[0].made["disagreement"]["after"] > 0


@pytest.mark.parametrize(
    ("against", "words"),
    [
        (lambda: Reads(nn.Sequential(nn.Linear(16, 6))), "against: a network that gives something else"),
        (lambda: nn.Conv2d(3, 5, 3), "against: a network that gives something else"),
        (lambda: nn.Conv2d(4, 5, 3), "against: the model does not run on the example batch"),
        (lambda: nn.Bilinear(4, 4, 2), "against: "),
        (lambda: 5, "against: cannot capture a int"),
    ],
    ids=["classes", "maps", "inputs", "more inputs", "no network"],
)
def test_a_network_that_does_not_fit_is_refused(against: Callable[[], Any], words: str) -> None:
    other = against()
    with pytest.raises(foldcut.CompilerError, match=words):
        made(program(), other.eval() if isinstance(other, nn.Module) else other)


def test_a_file_for_other_inputs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wide.onnx"
    path.write_bytes(to_onnx(capture(trained(), torch.zeros(2, 3, 16, 16))))
    with pytest.raises(foldcut.CaptureError, match="against: the example for 'x' has the wrong shape"):
        made(program(), path)


def test_parts_that_were_made_in_two_ways_stay_made_samples() -> None:
    few = replace(SETTINGS, count=4, batch=4, iterations=2)
    plain, more = made(program(), None, replace(few, compete=None)), made(program(), changed(trained()), few)
    both = plain.with_more(more)
    assert isinstance(both, SyntheticSet) and len(both) == both.made["count"] == 8
    assert torch.equal(both.leaves[0], torch.cat([plain.leaves[0], more.leaves[0]]))
    assert both.made["how"] == f"{plain.made['how']}; {more.made['how']}"
    assert both.made["disagreement"] == more.made["disagreement"]
    after = [part.made["distance"]["after"] for part in (plain, more)]
    assert both.made["distance"]["after"] == pytest.approx(sum(after) / 2)
    half: Any = plain.take(slice(0, 2))
    assert half.with_more(more).made["distance"]["after"] == pytest.approx((2 * after[0] + 4 * after[1]) / 6)
    assert plain.made.keys() == both.made.keys()
    other = SyntheticSet.from_leaves([torch.zeros(4, 3, 8, 8)], {})
    with pytest.raises(foldcut.CalibrationError, match="not for the same inputs"):
        plain.with_more(other)
    flipped: Any = plain.with_views([foldcut.horizontal_flip])
    with pytest.raises(foldcut.CalibrationError, match="add views when all are together"):
        flipped.with_more(more)


def test_a_report_says_how_much_they_disagree() -> None:
    told = dict(made(program(), changed(trained()), replace(SETTINGS, count=4, batch=4, iterations=2)).made)
    words = synthetic_words({"calibration": {"synthetic": told}})["how"]
    assert "another network's disagreement rose from 0." in words


@pytest.mark.parametrize("compete", [-1, "much", math.nan])
def test_weights_out_of_range(compete: Any) -> None:
    with pytest.raises(foldcut.CalibrationError, match="compete="):
        foldcut.SynthesisSettings(compete=compete)
