"""What counts as the value of a metric, and how sure the loss between two values is."""

from typing import Any

import numpy as np
import pytest
import torch
from foldcut.compiler.metric.reading import SPARE, Loss, NoNumberError, Reading


@pytest.mark.parametrize("found", [0.5, 1, np.float32(0.5), np.int64(3), torch.tensor(0.5), torch.tensor(2), -0.25])
def test_numbers_are_values(found: Any) -> None:
    reading = Reading.of(found)
    assert reading.value == float(found) and reading.scores is None


@pytest.mark.parametrize("found", [[0.5], np.array([0.5]), torch.tensor([0.5]), torch.tensor(0.5).bfloat16()], ids=str)
def test_one_number_has_no_scatter(found: Any) -> None:
    """A mean over a kept dimension is no sample whose loss might be as large as its score."""
    reading = Reading.of(found)
    assert reading.value == 0.5 and reading.scores is None and Loss.between(reading, reading).most == 0


def test_one_sample_says_little() -> None:
    reading = Reading.of([100.0], sampled=True)
    assert Loss.between(reading, reading).most > 50


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_numbers_of_samples_have_a_mean(kind: Any) -> None:
    reading = Reading.of(kind([0.0, 1.0, 1.0, 0.0]))
    assert reading.value == 0.5 and reading.scores is not None and len(reading.scores) == 4


@pytest.mark.parametrize(
    "found",
    [
        None,
        True,
        "0.5",
        "nan",
        1j,
        object(),
        {"map": 0.5},
        [],
        torch.zeros(2, 2),
        [0.5, None],
        float("nan"),
        float("inf"),
        -float("inf"),
        torch.tensor([0.5, float("nan")]),
        [[1.0], [2.0, 3.0]],
        [1e200, 1e200],
        -1e308,
    ],
    ids=lambda found: type(found).__name__,
)
def test_all_else_is_no_number(found: Any) -> None:
    with pytest.raises(NoNumberError, match="gave"):
        Reading.of(found)


def test_a_plain_number_is_taken_at_its_word() -> None:
    loss = Loss.between(Reading.of(0.75), Reading.of(0.5))
    assert loss.value == loss.most == 0.25 and loss.error is None and loss.samples is None


def test_scores_of_other_samples_are_no_pairs() -> None:
    loss = Loss.between(Reading.of([1.0, 1.0]), Reading.of([1.0, 0.0, 0.0]))
    assert loss.error is None and loss.most == pytest.approx(2 / 3)


def test_samples_that_did_not_change_prove_little() -> None:
    few, many = (Loss.between(Reading.of([100.0] * n), Reading.of([100.0] * n)) for n in (20, 2000))
    assert few.value == many.value == 0
    assert few.most > 5 > 0.2 > many.most > 0


def test_the_interval_holds_the_loss_as_often_as_it_says() -> None:
    """Pairs of right and wrong with a known difference: the upper end is above it in about 95 of 100 sets."""
    generator = np.random.default_rng(0)
    lost, won, samples = 0.03, 0.01, 400
    held = 0
    for _ in range(1000):
        draw = generator.random(samples)
        before = np.where(draw < lost, 100.0, np.where(draw < lost + won, 0.0, 100.0))
        after = np.where(draw < lost, 0.0, 100.0)
        held += Loss.between(Reading.of(before), Reading.of(after)).most >= 100 * (lost - won)
    assert 0.93 < held / 1000 < 0.985
    assert pytest.approx(1.645) == SPARE
