"""The three parts of a calibration set: disjoint, in fair order, the same for a seed whatever order the samples came
in."""

from __future__ import annotations

from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.output_error import output_error
from foldcut.compiler.data.sample_sets import MOST_JUDGE, MOST_TEST, SampleSets, divided
from foldcut.compiler.driver.pipeline import planned_network
from foldcut.compiler.driver.pipeline_settings import PipelineSettings
from hypothesis import given
from hypothesis import strategies as st
from torch import nn


def numbered(count: int) -> CalibrationSet:
    return CalibrationSet.of(torch.arange(count).view(-1, 1))


def numbers(samples: CalibrationSet) -> list[int]:
    return [int(n) for n in samples.leaves[0].flatten()]


def parts(sets: SampleSets) -> list[list[int]]:
    return [numbers(part) for part in (sets.fit, sets.judge, sets.test)]


@given(count=st.integers(3, 400), seed=st.integers(0, 5), share=st.floats(0.0, 0.9))
def test_the_parts_are_disjoint_and_cover_all(count: int, seed: int, share: float) -> None:
    data = numbered(count)
    sets = divided(data, seed, share)
    assert not sets.shared
    assert sorted(n for part in parts(sets) for n in part) == list(range(count))
    assert all(parts(sets))
    assert len(sets.judge) <= MOST_JUDGE and len(sets.test) <= MOST_TEST
    assert parts(divided(data, seed, share)) == parts(sets)


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(3, (1, 1, 1)), (10, (8, 1, 1)), (50, (40, 5, 5)), (500, (400, 50, 50)), (3000, (2680, 64, 256))],
)
def test_small_sets_keep_enough_to_solve_with(count: int, sizes: tuple[int, int, int]) -> None:
    sets = divided(numbered(count), 0)
    assert tuple(sets.sizes.values()) == (*sizes, False)


def test_one_and_two_samples_are_shared_and_that_is_said() -> None:
    net = nn.Linear(1, 1).eval()
    for count, warning in ((1, "1 calibration sample cannot"), (2, "2 calibration samples cannot")):
        data = CalibrationSet.of(torch.rand(count, 1))
        program = foldcut.capture(net, data.batch(slice(0, 2)))
        with pytest.warns(UserWarning, match=warning):
            sets = PipelineSettings().split(data, program)
        assert tuple(sets.sizes.values()) == (1, 1, 1, True)
    fit, judge, test = parts(divided(numbered(2), 0))
    assert judge == test != fit


def test_another_seed_divides_otherwise() -> None:
    data = numbered(100)
    assert parts(divided(data, 0)) != parts(divided(data, 1))


@pytest.mark.parametrize("seed", range(3))
def test_every_beginning_of_a_part_is_a_fair_sample(seed: int) -> None:
    """Ten classes, one after the other: the first 64 to fit with hold all of them, about evenly."""
    sets = divided(numbered(1000), seed)
    for part in (sets.fit.take(slice(0, 64)), sets.fit.take(slice(64, 128)), sets.judge, sets.test):
        counts = torch.bincount(part.leaves[0].flatten() // 100, minlength=10)
        expected = len(part) / 10
        # chi square with 9 degrees of freedom: above 33.7 once in ten thousand
        assert float(((counts - expected) ** 2 / expected).sum()) < 33.7


@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_samples_come_makes_no_difference(seed: int) -> None:
    """Several inputs of several types, some samples twice."""
    generator = torch.Generator().manual_seed(seed)
    x, ids = torch.randn(60, 3, 2, generator=generator), torch.randint(0, 4, (60,), generator=generator)
    x[40:] = x[:20]
    order = torch.randperm(60, generator=generator)
    one, two = CalibrationSet.of((x, ids)), CalibrationSet.of((x[order], ids[order]))
    both = [divided(samples, seed) for samples in (one, two)]
    pairs = [*zip(*((sets.fit, sets.judge, sets.test) for sets in both), strict=True)]
    for a, b in (*pairs, *zip(one.split(seed), two.split(seed), strict=True)):
        assert all(map(torch.equal, a.leaves, b.leaves))


@given(counts=st.lists(st.integers(1, 60), min_size=3, max_size=60), seed=st.integers(0, 5))
def test_equal_samples_are_in_one_part(counts: list[int], seed: int) -> None:
    """Whatever is there how often: nothing that is fitted judges or tests."""
    values = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    sets = divided(CalibrationSet.of(values.view(-1, 1)), seed)
    found = parts(sets)
    assert not sets.shared and all(found)
    assert sorted(n for part in found for n in part) == values.tolist()
    fit, judge, test = map(set, found)
    assert not fit & judge and not fit & test and not judge & test
    again = divided(CalibrationSet.of(values[torch.randperm(len(values))].view(-1, 1)), seed)
    assert parts(again) == found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ([50, *[1] * 7], (55, 1, 1)),
        ([2] * 50, (80, 10, 10)),
        ([50, 40, 40], (50, 40, 40)),
        ([500, 10, 10, 10], (510, 10, 10)),
    ],
    ids=["one many times", "all twice", "three", "few"],
)
def test_many_equal_samples_are_fitted_with(counts: list[int], sizes: tuple[int, ...], seed: int) -> None:
    values = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert tuple(divided(CalibrationSet.of(values.view(-1, 1)), seed).sizes.values()) == (*sizes, False)


def test_equal_samples_are_scattered_over_their_part() -> None:
    """Half of the samples are one and the same: so are about half of the first 100 to fit with."""
    for seed in range(5):
        fit = divided(CalibrationSet.of(torch.arange(1000).clamp(min=499).view(-1, 1)), seed).fit
        assert 30 <= numbers(fit.take(slice(0, 100))).count(499) <= 80


@pytest.mark.parametrize(
    ("counts", "warning", "sizes"),
    [
        ([20], "20 calibration samples that are all equal cannot .* was also solved", (20, 1, 1, True)),
        ([2], "2 calibration samples that are all equal cannot .* was also solved", (2, 1, 1, True)),
        ([3, 20], "23 calibration samples with only two contents cannot .* plans were", (20, 1, 1, True)),
    ],
    ids=["all equal", "two equal", "two contents"],
)
def test_fewer_than_three_contents_are_shared(counts: list[int], warning: str, sizes: tuple[int, ...]) -> None:
    values = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).float()
    data = CalibrationSet.of(values.view(-1, 1))
    program = foldcut.capture(nn.Linear(1, 1).eval(), torch.rand(2, 1))
    with pytest.warns(UserWarning, match=warning):
        assert tuple(PipelineSettings().split(data, program).sizes.values()) == sizes


def test_samples_that_all_differ_are_divided_by_one_permutation() -> None:
    """As before equal samples were kept together: figures rest on it."""
    data = CalibrationSet.of(torch.randn(200, 3))
    order = data.content_order[torch.randperm(200, generator=torch.Generator().manual_seed(4))]
    sets = divided(data, 4)
    joined = torch.cat([sets.judge.leaves[0], sets.test.leaves[0], sets.fit.leaves[0]])
    assert torch.equal(joined, data.leaves[0][order])


def test_parts_are_fair_samples() -> None:
    """Means that differ from that of all samples by what chance makes."""
    values = torch.linspace(-1, 1, 2000).view(-1, 1)
    for seed in range(2):
        sets = divided(CalibrationSet.of(values), seed)
        for part in (sets.fit.take(slice(0, 128)), sets.judge, sets.test):
            mean = float(part.leaves[0].mean())
            assert abs(mean) < 4 * 3**-0.5 / len(part) ** 0.5


def test_views_are_behind_the_originals_and_of_the_fitting_samples_only() -> None:
    data = CalibrationSet.of(torch.rand(30, 3, 4, 4))
    program = foldcut.capture(nn.Conv2d(3, 2, 1).eval(), data.batch(slice(0, 2)))
    plain = PipelineSettings(seed=3).split(data, program)
    sets = PipelineSettings(seed=3, views=(foldcut.horizontal_flip,)).split(data, program)
    assert len(sets.fit) == 2 * len(plain.fit)
    assert torch.equal(sets.fit.leaves[0][: len(plain.fit)], plain.fit.leaves[0])
    assert torch.equal(sets.fit.leaves[0][len(plain.fit) :], plain.fit.leaves[0].flip(-1))
    assert torch.equal(sets.judge.leaves[0], plain.judge.leaves[0])
    assert torch.equal(sets.test.leaves[0], plain.test.leaves[0])


def test_a_split_in_two_keeps_the_random_order() -> None:
    fit, held_out = numbered(200).split(seed=0)
    assert numbers(fit) != sorted(numbers(fit)) and numbers(held_out) != sorted(numbers(held_out))


def classes(count: int, seed: int) -> torch.Tensor:
    """Ten classes one after the other, each in a subspace of its own with noise around it."""
    generator = torch.Generator().manual_seed(seed)
    bases = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1))).Q[:30].view(10, 3, 32)
    inside = torch.einsum("cnk,ckd->cnd", 2 + torch.randn(10, count // 10, 3, generator=generator), bases)
    return (inside + 0.05 * torch.randn(inside.shape, generator=generator)).reshape(-1, 32)


@pytest.mark.parametrize("seed", [0, 1])
def test_samples_sorted_by_class_prune_as_shuffled_ones(seed: int, contexts: Any) -> None:
    """On fresh samples of all classes the network errs alike, in whatever order its samples came."""
    torch.manual_seed(seed)
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    data, fresh = classes(1000, 2), CalibrationSet.of(classes(500, 3))
    teacher = foldcut.capture(nn.Sequential(*layers).eval(), data[:2])
    errors = []
    for samples in (data, data[torch.randperm(1000, generator=torch.Generator().manual_seed(4))]):
        sets = PipelineSettings().split(CalibrationSet.of(samples), teacher)
        ctx = contexts(teacher, sets.fit, sets.judge, goal=foldcut.Channels(0.5))
        made, _ = planned_network(ctx, [foldcut.Prune()])
        errors.append(output_error(teacher, made.program, fresh))
    in_order, shuffled = errors
    assert in_order < 1.5 * shuffled and shuffled < 1.5 * in_order
