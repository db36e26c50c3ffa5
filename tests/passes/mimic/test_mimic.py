"""Feature mimicking: never worse, repeatable, and it does mend what is broken."""

import json
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit import set_tensors
from foldcut.compiler.ir.execute import bind, run_until
from foldcut.compiler.ir.program import Batch, Program, output_nodes
from foldcut.compiler.store.checkpoint import Standing
from foldcut.compiler.support.errors import CalibrationError
from foldcut.passes.drop.drop_blocks import drop_blocks
from foldcut.passes.mimic.pairs import stage_ends
from foldcut.passes.mimic.settings import MimicSettings
from foldcut.passes.mimic.training import Lesson
from foldcut.passes.mimic.training_stage import Mimicked, mimic
from hypothesis import given, settings
from hypothesis import strategies as st

QUICK = {"iterations": 12, "batch_size": 8, "checks": 4, "bfloat16": False}


@pytest.fixture(scope="module")
def teacher(nets: SimpleNamespace) -> Program:
    return capture(nets.seeded(lambda: nets.ResNet(3), seed=1), nets.images())


@pytest.fixture(scope="module")
def student(teacher: Program) -> Program:
    return drop_blocks(teacher, [find_regions(teacher).blocks[0]])


@pytest.fixture(scope="module")
def data(nets: SimpleNamespace) -> tuple[CalibrationSet, CalibrationSet]:
    return CalibrationSet.of(nets.images(24, seed=1)), CalibrationSet.of(nets.images(8, seed=2))


def lesson(teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet], seed: int = 0) -> Lesson:
    fit, judge = data
    return Lesson(teacher=teacher, student=student, fit=fit, judge=judge, seed=seed)


def train(
    teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet], seed: int = 0, **options: object
) -> Mimicked:
    return mimic(lesson(teacher, student, data, seed=seed), MimicSettings(**{**QUICK, **options}))


class Kept:
    """A checkpoint in memory: keeps the state of every iteration, begins with one of them."""

    def __init__(self, first: Standing | None = None) -> None:
        self.first, self.states = first, []

    def read(self) -> Standing | None:
        return self.first

    def keep(self, standing: Callable[[], Standing]) -> None:
        data, tensors = standing()
        self.states.append((json.loads(json.dumps(data)), {name: value.clone() for name, value in tensors.items()}))


def judged_error(teacher: Program, student: Program, samples: CalibrationSet) -> float:
    """Mean of the relative errors of the features before the head (what the pooling reads) and of the output."""
    batch = samples.batch(slice(None))
    output = output_nodes(teacher.graph)[0].name
    features = teacher.nodes["mean"].args[0].name
    with torch.no_grad():
        wanted = run_until(teacher, [features, output], bind(teacher, batch))
        name = student.nodes["mean"].args[0].name
        value = run_until(student, [name, output], bind(student, batch))
    pairs = [(value[name], wanted[features]), (value[output], wanted[output])]
    return sum(float((s - t).square().sum() / t.square().sum()) for s, t in pairs) / 2


def same_weights(a: Program, b: Program) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_damaged_network_is_mended(teacher: Program, data: tuple[CalibrationSet, CalibrationSet]) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: p.detach() * (1 + 0.3 * torch.randn(p.shape, generator=generator))
        for name, p in teacher.module.named_parameters()
    }
    damaged = set_tensors(teacher, noise, note="damage")
    result = train(teacher, damaged, data, iterations=60)
    assert result.after < 0.5 * result.before
    assert result.after == pytest.approx(judged_error(teacher, result.program, data[1]), rel=1e-3)
    assert result.before == pytest.approx(judged_error(teacher, damaged, data[1]), rel=1e-3)


def test_a_dropped_block_is_made_up_for(
    teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet]
) -> None:
    result = train(teacher, student, data, iterations=60)
    assert result.after < 0.8 * result.before
    assert result.after == pytest.approx(judged_error(teacher, result.program, data[1]), rel=1e-3)
    assert result.program.text() == student.text()
    assert result.program.history[-1].startswith("mimic")


@given(seed=st.integers(0, 1000), rate=st.sampled_from([1e-6, 1e-2, 0.3, 10.0, 1e6, 1e30]))
@settings(max_examples=6)
def test_it_never_ends_worse(
    teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet], seed: int, rate: float
) -> None:
    result = train(teacher, student, data, seed=seed, learning_rate=rate)
    assert result.after <= result.before
    before, after = (judged_error(teacher, p, data[1]) for p in (student, result.program))
    assert after <= before * (1 + 1e-4)
    assert all(value.isfinite().all() for value in result.program.module.state_dict().values())


def test_channels_of_scale_zero_do_not_falsify_the_result(
    residual: Program, data: tuple[CalibrationSet, CalibrationSet]
) -> None:
    """What folds to a weight of zero must not be trained, for it cannot be taken back: a scale of zero undoes it."""
    student = drop_blocks(residual, [find_regions(residual).blocks[0]])
    result = train(residual, student, data, iterations=60)
    assert result.after == pytest.approx(judged_error(residual, result.program, data[1]), rel=1e-4)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_any_block_may_be_dropped(teacher: Program, data: tuple[CalibrationSet, CalibrationSet], index: int) -> None:
    """Also the last one, behind which no layer takes part in the features."""
    student = drop_blocks(teacher, [find_regions(teacher).blocks[index]])
    result = train(teacher, student, data, iterations=30)
    assert result.after <= result.before
    assert result.after == pytest.approx(judged_error(teacher, result.program, data[1]), rel=1e-3)


def test_an_exact_student_is_kept_bit_for_bit(teacher: Program, data: tuple[CalibrationSet, CalibrationSet]) -> None:
    result = train(teacher, teacher, data)
    assert result.before == result.after == 0
    assert same_weights(result.program, teacher)


def test_the_student_and_the_teacher_are_left_alone(
    teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet]
) -> None:
    states = [{k: v.clone() for k, v in p.module.state_dict().items()} for p in (teacher, student)]
    flags = [p.requires_grad for p in student.module.parameters()]
    result = train(teacher, student, data)
    assert not same_weights(result.program, student)
    for program, state in zip((teacher, student), states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in program.module.state_dict().items())
    assert [p.requires_grad for p in student.module.parameters()] == flags


def test_the_same_seed_gives_the_same_bits(
    teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet]
) -> None:
    first, again, other = (train(teacher, student, data, seed=seed).program for seed in (5, 5, 6))
    assert same_weights(first, again)
    assert not same_weights(first, other)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("done", [1, 3, 8, 11])
def test_a_training_goes_on_from_any_state(
    done: int, augment: bool, teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet]
) -> None:
    def flip(batch: Batch, generator: torch.Generator) -> Batch:
        assert isinstance(batch, torch.Tensor)
        return batch.flip(-1) if float(torch.rand((), generator=generator)) < 0.5 else batch

    options = MimicSettings(**QUICK, augment=flip if augment else None)
    whole, again = Kept(), Kept()
    first = mimic(lesson(teacher, student, data), options, checkpoint=whole)
    again.first = whole.states[done - 1]
    second = mimic(lesson(teacher, student, data), options, checkpoint=again)
    assert len(whole.states) == QUICK["iterations"] and len(again.states) == QUICK["iterations"] - done
    assert (first.before, first.after, first.iterations) == (second.before, second.after, second.iterations)
    assert first.after < first.before
    assert same_weights(first.program, second.program)


def test_a_training_without_progress_stops_where_it_would_have(
    teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet]
) -> None:
    options = MimicSettings(**{**QUICK, "iterations": 40, "checks": 20}, patience=2, learning_rate=10.0)
    whole = Kept()
    first = mimic(lesson(teacher, student, data), options, checkpoint=whole)
    second = mimic(lesson(teacher, student, data), options, checkpoint=Kept(whole.states[2]))
    assert first.iterations == second.iterations == 4
    assert second.program is student


def test_the_global_random_state_does_not_matter_and_is_kept(
    teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet]
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = train(teacher, student, data).program
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert same_weights(first, train(teacher, student, data).program)


def test_a_step_that_is_not_finite_ends_the_training(
    teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet]
) -> None:
    result = train(teacher, student, data, iterations=50, patience=100, learning_rate=1e30)
    assert result.iterations < 50
    assert same_weights(result.program, student)
    assert result.before == result.after


def test_steps_that_are_too_long_are_made_shorter(
    teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet]
) -> None:
    """A rate with which the error only grows leads to something all the same, also where it was cut off meanwhile."""
    options = MimicSettings(iterations=60, checks=12, patience=12, batch_size=8, learning_rate=3.0)
    whole = Kept()
    first = mimic(lesson(teacher, student, data), options, checkpoint=whole)
    assert first.after < first.before
    for done in (5, 12, 20):  # the first of these right after a step back
        second = mimic(lesson(teacher, student, data), options, checkpoint=Kept(whole.states[done - 1]))
        assert (first.after, first.iterations) == (second.after, second.iterations)
        assert same_weights(first.program, second.program)


def test_it_stops_when_nothing_gets_better(
    teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet]
) -> None:
    result = train(teacher, student, data, iterations=40, checks=20, patience=2, learning_rate=10.0)
    assert result.iterations == 4


def test_the_augmentation_is_asked_for_every_batch(
    teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet]
) -> None:
    seen: list[int] = []

    def flip(batch: Batch, generator: torch.Generator) -> Batch:
        assert isinstance(batch, torch.Tensor)
        seen.append(len(batch))
        return batch.flip(-1) if float(torch.rand((), generator=generator)) < 0.5 else batch

    first = train(teacher, student, data, augment=flip)
    assert seen == [8] * first.iterations
    assert first.iterations == 12
    assert same_weights(first.program, train(teacher, student, data, augment=flip).program)
    assert not same_weights(first.program, train(teacher, student, data).program)


def test_the_teacher_sees_the_augmented_batch(
    teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet]
) -> None:
    """The same samples in another order: no difference if both see it, nonsense if only one does."""
    plain = train(teacher, student, data, iterations=40)
    turned = train(teacher, student, data, iterations=40, augment=lambda batch, _generator: batch.flip(0))
    assert turned.after == pytest.approx(plain.after, rel=0.02)


def test_values_that_do_not_fit_the_cache_are_computed_again(
    teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet]
) -> None:
    cached, computed = (train(teacher, student, data, cache_bytes=size) for size in (1 << 30, 0))
    assert computed.after == pytest.approx(cached.after, rel=1e-3)


@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
def test_gradients_of_parts_add_up_to_those_of_a_batch(
    teacher: Program,
    student: Program,
    data: tuple[CalibrationSet, CalibrationSet],
    cache_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With little memory a batch goes through in parts: of 8 samples 3, 3 and 2."""
    whole = train(teacher, student, data, iterations=40, cache_bytes=cache_bytes)
    monkeypatch.setattr("foldcut.passes.mimic.training.samples_at_once", lambda _bytes, most: min(3, most))
    parts = train(teacher, student, data, iterations=40, cache_bytes=cache_bytes)
    assert parts.after == pytest.approx(whole.after, rel=1e-3) and parts.after < parts.before
    assert parts.program.fingerprint != whole.program.fingerprint, "sums round in another way"


def test_fewer_samples_than_a_batch(teacher: Program, student: Program, nets: SimpleNamespace) -> None:
    few = CalibrationSet.of(nets.images(3))
    result = train(teacher, student, (few, few), batch_size=64)
    assert result.after <= result.before


@pytest.mark.parametrize("weights", [{"hints": 0.0}, {"outputs": 1.0}, {"hints": 0.0, "outputs": 2.0}], ids=str)
def test_the_weights_of_the_losses(
    teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet], weights: dict[str, float]
) -> None:
    result = train(teacher, student, data, iterations=30, **weights)
    assert result.after < result.before


def test_a_transformer(transformer: Program, nets: SimpleNamespace) -> None:
    student = drop_blocks(transformer, [find_regions(transformer).blocks[1]])
    data = CalibrationSet.of(nets.tokens(24)), CalibrationSet.of(nets.tokens(8, seed=3))
    result = train(transformer, student, data, iterations=40)
    assert result.after < result.before
    assert result.program.text() == student.text()


def test_progress_is_shown(teacher: Program, student: Program, data: tuple[CalibrationSet, CalibrationSet]) -> None:
    seen: list[tuple[str, int, int]] = []
    mimic(lesson(teacher, student, data), MimicSettings(**QUICK), progress=lambda *state: seen.append(state))
    assert seen == [("mimic", i + 1, 12) for i in range(12)]


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"checks": 0},
    ],
    ids=str,
)
def test_settings_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(CalibrationError, match="out of range") as caught:
        MimicSettings(**options)
    assert caught.value.expected is not None


def test_stages_end_at_the_last_stream_of_each_shape(teacher: Program, nets: SimpleNamespace) -> None:
    assert stage_ends(teacher) == ("relu_4",)
