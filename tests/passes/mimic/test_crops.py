"""Training on crops: only where a network takes parts of its images, and judged on whole ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.compare import squared_distance
from foldcut.compiler.ir.execute import bind, run_until
from foldcut.compiler.ir.program import Batch, Program, output_nodes
from foldcut.compiler.store.checkpoint import Standing
from foldcut.passes.drop.drop_blocks import drop_blocks
from foldcut.passes.mimic import crops
from foldcut.passes.mimic.crops import Crop, Read, find_crop, step_of, takes_parts
from foldcut.passes.mimic.settings import MimicSettings
from foldcut.passes.mimic.training import Lesson, Training
from foldcut.passes.mimic.training_macs import TrainingMacs
from foldcut.passes.mimic.training_stage import Mimicked, mimic
from torch import nn
from torch.nn import functional as F

HEIGHT, WIDTH = 96, 128
ITERATIONS = 16
OPTIONS: dict[str, Any] = {"iterations": ITERATIONS, "batch_size": 4, "checks": 4, "bfloat16": False}


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Two strides of two, residual blocks, and a head."""

    def __init__(self, nets: SimpleNamespace, head: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nets.conv_bn(3, 8, stride=2), nets.conv_bn(8, 8, stride=2))
        self.blocks = nn.Sequential(nets.Residual(8), nets.Residual(8))
        self.head = head

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.blocks(self.stem(x)))


class Resized(nn.Module):
    """A map in the size of the image, which tracing freezes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, size=(4 * x.shape[2], 4 * x.shape[3]), mode="bilinear")


class Tokens(nn.Module):
    """Attention between all places."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(rows, rows, rows).mean(1)


class Pooled(nn.Module):
    def __init__(self, places: int) -> None:
        super().__init__()
        self.places, self.linear = places, nn.Linear(8 * places**2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(F.adaptive_avg_pool2d(x, self.places).flatten(1))


class Gate(nn.Module):
    """A gate by the whole map, two scales, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.down, self.out = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        low = self.down(x)
        return self.out(x + F.interpolate(low, scale_factor=2.0)), self.out(low)


TAKES: dict[str, Callable[[], nn.Module]] = {
    "pooled": lambda: Pooled(1),
    "map": lambda: nn.Conv2d(8, 5, 1),
    "gate": Gate,
    "valid": lambda: nn.Conv2d(8, 5, 3),
    "upsampled": lambda: nn.ConvTranspose2d(8, 3, 8, 8),
}
REFUSES: dict[str, Callable[[], nn.Module]] = {
    "flatten": lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * HEIGHT * WIDTH // 16, 4)),
    "pooled to four": lambda: Pooled(2),
    "resized": Resized,
    "attention": Tokens,
}


@pytest.fixture(scope="module")
def program(nets: SimpleNamespace) -> Callable[[Callable[[], nn.Module]], Program]:
    def captured(head: Callable[[], nn.Module]) -> Program:
        return capture(nets.seeded(lambda: Net(nets, head()), seed=1), images(2))

    return captured


@pytest.fixture(scope="module")
def data() -> tuple[CalibrationSet, CalibrationSet]:
    return CalibrationSet.of(images(12, seed=1)), CalibrationSet.of(images(4, seed=2))


def lesson_of(teacher: Program, data: tuple[CalibrationSet, CalibrationSet]) -> Lesson:
    fit, judge = data
    return Lesson(
        teacher=teacher, student=drop_blocks(teacher, [find_regions(teacher).blocks[0]]), fit=fit, judge=judge
    )


def budget(lesson: Lesson, part: float) -> int:
    """Such a part of the work that all iterations on whole images take, and all looks."""
    work = TrainingMacs.of(
        lesson.teacher, lesson.student, (len(lesson.fit), len(lesson.judge)), MimicSettings(**OPTIONS)
    )
    looks = (work.checks + 1) * work.look_macs
    return int(looks + part * (work.asked(cached=False) - looks))


def trained(lesson: Lesson, part: float, **options: Any) -> Mimicked:
    return mimic(lesson, MimicSettings(**{**OPTIONS, "macs": budget(lesson, part), **options}))


def read_all(program: Program) -> Read:
    return Read(program=program, names=[node.name for node in output_nodes(program.graph)])


@pytest.mark.parametrize("head", TAKES)
def test_training_on_crops_mends_whole_images(
    head: str, program: Any, data: tuple[CalibrationSet, CalibrationSet]
) -> None:
    lesson = lesson_of(program(TAKES[head]), data)
    result = trained(lesson, 0.5)
    assert result.iterations == ITERATIONS
    assert re.search(r"it is trained on crops of 6\d x (88|80) of 96 x 128; ", result.said[0])
    assert result.after < 0.9 * result.before
    assert result.program.text() == lesson.student.text()


def test_the_error_is_that_of_whole_images(program: Any, data: tuple[CalibrationSet, CalibrationSet]) -> None:
    lesson = lesson_of(program(TAKES["map"]), data)
    result = trained(lesson, 0.5)
    (output,) = read_all(lesson.teacher).names
    feature = lesson.teacher.nodes[output].args[0].name
    batch = data[1].batch(slice(None))
    with torch.no_grad():
        wanted = run_until(lesson.teacher, [feature, output], bind(lesson.teacher, batch))
        found = run_until(result.program, [feature, output], bind(result.program, batch))
    parts = [squared_distance(wanted[name], found[name]) for name in (feature, output)]
    assert result.after == pytest.approx(sum(float(e / w) for e, w in parts) / 2, rel=1e-3)


@pytest.mark.parametrize("head", REFUSES)
def test_a_network_that_needs_the_whole_image_is_never_cropped(
    head: str, program: Any, data: tuple[CalibrationSet, CalibrationSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_args: Any) -> Batch:
        raise AssertionError("it was trained on a crop")

    lesson = lesson_of(program(REFUSES[head]), data)
    assert find_crop([read_all(lesson.teacher)], data[0], 0.5, lambda _: [1.0]) is None
    monkeypatch.setattr(Training, "_mean_squares", cut)
    result = trained(lesson, 0.5)
    assert 0 < result.iterations < ITERATIONS and "crops" not in result.said[0]
    assert f"{result.iterations} iterations are made" in result.said[0]
    assert result.after <= result.before


def test_with_work_enough_nothing_is_cropped(program: Any, data: tuple[CalibrationSet, CalibrationSet]) -> None:
    lesson = lesson_of(program(TAKES["map"]), data)
    plain, whole = trained(lesson, 1.0, macs=None), trained(lesson, 1.0)
    assert plain.said == whole.said == ()
    state, other = (found.program.module.state_dict() for found in (plain, whole))
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_crops_first_then_fewer_iterations(program: Any, data: tuple[CalibrationSet, CalibrationSet]) -> None:
    result = trained(lesson_of(program(TAKES["map"]), data), 0.1)
    assert "trained on crops of 64 x 64" in result.said[0] and "iterations are made" in result.said[0]
    assert 0 < result.iterations < ITERATIONS


def test_a_training_on_crops_goes_on_and_repeats(program: Any, data: tuple[CalibrationSet, CalibrationSet]) -> None:
    lesson = lesson_of(program(TAKES["map"]), data)
    settings = MimicSettings(**OPTIONS, macs=budget(lesson, 0.5))
    states: list[Standing] = []

    class Kept:
        def __init__(self, first: Standing | None) -> None:
            self.first = first

        def read(self) -> Standing | None:
            return self.first

        def keep(self, standing: Callable[[], Standing]) -> None:
            data, tensors = standing()
            states.append((json.loads(json.dumps(data)), {name: value.clone() for name, value in tensors.items()}))

    first = mimic(lesson, settings, checkpoint=Kept(None))
    again = mimic(lesson, settings, checkpoint=Kept(states[5]))
    assert (first.after, first.said) == (again.after, again.said) and "crops" in first.said[0]
    one, two = (found.program.module.state_dict() for found in (first, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_crops_of_an_augmented_batch(program: Any, data: tuple[CalibrationSet, CalibrationSet]) -> None:
    seen: list[torch.Size] = []

    def flip(batch: Batch, _generator: torch.Generator) -> Batch:
        assert isinstance(batch, torch.Tensor)
        seen.append(batch.shape)
        return batch.flip(-1)

    result = trained(lesson_of(program(TAKES["map"]), data), 0.5, augment=flip)
    assert set(seen) == {(4, 3, HEIGHT, WIDTH)} and result.after < result.before


def test_a_crop_is_the_same_place_of_every_input() -> None:
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    places = (100 * rows + columns).expand(6, 1, 20, 30)
    crop = Crop(size=(8, 12), whole=(20, 30))
    batch = {"a": places, "n": torch.arange(6), "b": -places.expand(6, 3, 20, 30)}
    cut: Any = crop.cut(batch, torch.Generator().manual_seed(0))
    assert cut["a"].shape == (6, 1, 8, 12) and cut["b"].shape == (6, 3, 8, 12)
    assert torch.equal(cut["n"], batch["n"]) and torch.equal(cut["a"][:, 0], -cut["b"][:, 1])
    corners = cut["a"][:, 0, 0, 0]
    assert torch.equal(cut["a"][:, 0] - corners.view(-1, 1, 1), (100 * rows + columns)[:8, :12].expand(6, 8, 12))
    assert len(set(corners.tolist())) > 1 and crop.share == 0.16
    assert torch.equal(cut["a"], crop.cut(places, torch.Generator().manual_seed(0)))  # type: ignore[arg-type]


def test_sizes_are_whole_steps(program: Any) -> None:
    teacher = read_all(program(Gate))
    assert step_of(teacher, (HEIGHT, WIDTH)) == 8
    found = list(crops._sizes((1280, 960), 32, 0.05))
    assert [crop.size for crop in found] == [(256, 192), (384, 288), (544, 416), (800, 576)]
    assert all(n % 32 == 0 for crop in found for n in crop.size)
    assert next(crop.size for crop in crops._sizes((1280, 100), 4, 0.0)) == (64, 64)
    assert list(crops._sizes((96, 96), 32, 0.1)) == [] == list(crops._sizes((20, 20), 32, 0.5))


def test_crops_grow_until_features_are_alike(program: Any, data: tuple[CalibrationSet, CalibrationSet]) -> None:
    """Features of a mean square that small crops do not have; one that none has."""
    networks = [read_all(program(TAKES["map"]))]

    def larger(batch: Batch) -> list[float]:
        assert isinstance(batch, torch.Tensor)
        return [1.0, 1.0 if batch.shape[-1] >= 96 else 1.2]

    def alike(batch: Batch) -> list[float]:
        return [1.0]

    def never(batch: Batch) -> list[float]:
        assert isinstance(batch, torch.Tensor)
        return [float(batch.shape[-1])]

    least, grown = (find_crop(networks, data[0], 0.1, look) for look in (alike, larger))
    assert least is not None and grown is not None
    assert least.size == (64, 64) and grown.size[1] >= 96
    assert find_crop(networks, data[0], 0.1, never) is None


def test_what_is_no_image_is_not_cropped(transformer: Program, nets: SimpleNamespace, program: Any) -> None:
    networks = [read_all(transformer)]
    assert find_crop(networks, CalibrationSet.of(nets.tokens(8)), 0.5, lambda _: [1.0]) is None
    two = CalibrationSet.of((images(4), torch.randn(4, 3, 64, 64)))
    assert find_crop([read_all(program(TAKES["map"]))], two, 0.5, lambda _: [1.0]) is None


@pytest.mark.parametrize("head", [*TAKES, *REFUSES])
def test_parts_are_compared_with_the_graph(head: str, program: Any) -> None:
    network = read_all(program({**TAKES, **REFUSES}[head]))
    assert takes_parts(network, images(2), images(2)[..., :64, :64]) == (head in TAKES)
