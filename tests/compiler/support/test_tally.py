"""Multiply-accumulates that are counted are those that are done."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.ir.cost import call_macs, program_cost
from foldcut.compiler.ir.execute import bind, run_until
from foldcut.compiler.ir.program import Program
from foldcut.compiler.support import tally
from foldcut.compiler.support.progress import StageClock
from foldcut.passes.prune.submodular import Objective, select_units
from foldcut.passes.solve.closed_form import solve
from foldcut.passes.solve.moments import LEAST_STRIPPED, Moments
from foldcut.passes.solve.weighing import forward_macs, least_solve_macs
from torch.utils.flop_counter import FlopCounterMode


def done(act: Callable[[], object]) -> tally.Tally:
    with tally.counted_into(tally.Tally()) as found:
        act()
    return found


def torch_counts(act: Callable[[], object]) -> int:
    """The multiply-accumulates of the operators that torch itself counts."""
    with FlopCounterMode(display=False) as counter:
        act()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("samples", [1, 3])
def test_a_run_is_counted_as_torch_counts_it(residual: Program, nets: SimpleNamespace, samples: int) -> None:
    images = nets.images(samples)
    whole = done(lambda: residual(images))
    assert whole == {tally.FORWARD: torch_counts(lambda: residual(images))}
    assert whole[tally.FORWARD] == samples * program_cost(residual).macs == forward_macs(residual, samples)
    assert done(lambda: run_until(residual, ["linear"], bind(residual, images))) == whole


def test_a_run_in_part_is_counted_in_part(residual: Program, nets: SimpleNamespace) -> None:
    start = bind(residual, nets.images(2))
    middle = run_until(residual, ["relu_2"], start)
    before = done(lambda: run_until(residual, ["relu_2"], start))
    behind = done(lambda: run_until(residual, ["linear"], dict(middle)))
    assert before[tally.FORWARD] > 0 < behind[tally.FORWARD]
    assert before + behind == done(lambda: run_until(residual, ["linear"], start))


def test_a_run_on_half_of_each_image_is_half_the_work(residual: Program, nets: SimpleNamespace) -> None:
    images = nets.images(2)
    half = images[..., : images.shape[-1] // 2]
    assert 2 * call_macs(residual, [half]) == call_macs(residual, [images]) == forward_macs(residual, 2)


@pytest.mark.parametrize("columns", [7, LEAST_STRIPPED + 5])
def test_moments_are_counted_as_torch_counts_them(columns: int) -> None:
    rows, residual = torch.randn(2, columns, 50), torch.randn(2, 3, 50)
    sums = 2 * columns * 50  # the column of ones, which is no contraction of two matrices
    assert done(lambda: Moments.of(rows, residual)) == {
        tally.MOMENTS: torch_counts(lambda: Moments.of(rows, residual)) - sums
    }


def test_a_solve_and_a_choice_are_algebra() -> None:
    moments = Moments.of(torch.randn(1, 12, 80), torch.randn(1, 5, 80))
    found = done(lambda: solve(moments, ridge=0.1, bias=False))
    assert found[tally.ALGEBRA] >= 12**3 // 6 + 12**2 * 5
    objective = Objective.of(moments, torch.randn(1, 5, 12), torch.arange(12).view(12, 1), bias=False)
    few, many = (done(lambda count=count: select_units([objective], count))[tally.ALGEBRA] for count in (3, 12))
    assert 0 < few < many / 3


def test_the_least_of_a_solve_is_one_gram_matrix_and_one_factorisation_of_each_layer(residual: Program) -> None:
    one, two = (least_solve_macs(residual, samples, None) for samples in (10, 20))
    capped = least_solve_macs(residual, 20, 1)
    assert capped < one < two < 2 * one  # the factorisation does not grow with the samples


def test_stages_count_their_own_and_what_lies_inside(residual: Program, nets: SimpleNamespace) -> None:
    clock, images = StageClock(), nets.images(1)
    macs = program_cost(residual).macs
    with clock.stage("outer"):
        residual(images)
        for _ in range(2):
            with clock.stage("inner"):
                residual(images)
    residual(images)
    assert clock.macs == {"inner": {tally.FORWARD: 2 * macs}, "outer": {tally.FORWARD: 3 * macs}}


def test_a_count_ends_with_an_error() -> None:
    found = tally.Tally()
    with pytest.raises(ValueError, match="inside"), tally.counted_into(found), tally.counted_into(tally.Tally()):
        tally.count(tally.ALGEBRA, 2)
        raise ValueError("inside")
    tally.count(tally.ALGEBRA, 5)
    assert found == {tally.ALGEBRA: 2}
