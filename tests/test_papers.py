"""The pure parts of benchmarks/papers.py: rows that are not made twice, the peers by their definitions."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foldcut
import pytest
import torch
from foldcut.passes.frank_wolfe import GroupKSupport
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def ranked() -> Any:
    """A convolution that reads five channels, two of which say much the same."""
    from papers_scores import Ranked

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 3, 3), nn.Flatten(), nn.Linear(48, 4))
    with torch.no_grad():
        net[0].weight[1] = net[0].weight[0] + 0.01 * torch.randn(2, 3, 3)
    images = torch.randn(40, 2, 6, 6)
    provenance = foldcut.find_units(foldcut.capture(net.eval(), images[:2]))
    groups = tuple(g for g in provenance.prunable if g.name == "0")
    return Ranked(provenance=provenance, groups=groups, images=images, labels=torch.arange(40) % 4)


def test_rows_are_made_once_and_a_failed_one_again(tmp_path: Path) -> None:
    from papers_run import Options, PaperRun, make_rows, rows_of

    made: list[int] = []

    def make(case: dict[str, Any], options: Options) -> dict[str, Any]:
        made.append(case["seed"])
        if case["seed"] == 1 and made.count(1) == 1:
            raise ValueError("the first time")
        return {"top1": 10.0 * case["seed"], "quick files": str(options.beside("net"))}

    run = PaperRun(
        name="trial",
        what="",
        shows="",
        hours=0,
        cases=lambda options: [{"seed": seed} for seed in options.seeds_or(3)],
        make=make,
        table=str,
    )
    options = Options(data=tmp_path, models=tmp_path, output=tmp_path / "rows.jsonl")
    assert make_rows(run, options) == 1
    assert make_rows(run, options) == 0
    assert made == [0, 1, 2, 1]
    assert {row["case"]["seed"]: row["top1"] for row in rows_of("trial", options.output)} == {0: 0, 1: 10, 2: 20}
    quick = Options(data=tmp_path, models=tmp_path, output=options.output, quick=True)
    assert make_rows(run, quick) == 0
    assert made[-1] == 0 and len(rows_of("trial", options.output)) == 3


def test_a_row_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    from papers_run import kept_rows

    path = tmp_path / "rows.jsonl"
    path.write_text('{"run": "a", "case": {"seed": 0}, "quick": false}\n{"run": "a", "case": {"se')
    assert [row["case"] for row in kept_rows(path).values()] == [{"seed": 0}]


def test_every_run_stands_for_something_in_a_paper() -> None:
    from papers import RUNS
    from papers_coverage import SHOWN, coverage_table

    assert {shown.run for shown in SHOWN} - {None} == set(RUNS)
    assert coverage_table({}).count("not run yet") == sum(shown.run is not None for shown in SHOWN)


def test_one_shot_residual_is_what_a_refit_without_the_channel_loses(ranked: Any) -> None:
    from papers_scores import objectives, residual

    objective = next(iter(objectives(ranked).values()))

    def left(units: torch.Tensor) -> float:
        columns = torch.cat([objective.always, units.reshape(-1)])
        gram, cross = objective.solved_gram()[:, columns][:, :, columns], objective.solved_cross[:, columns]
        return -float((torch.linalg.lstsq(gram, cross, driver="gelsd").solution * cross).sum())

    whole = left(objective.units)
    expected = [left(objective.units[[j for j in range(5) if j != i]]) - whole for i in range(5)]
    found = residual(objective)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-8)
    # of two channels that say the same neither is missed
    assert set(found.argsort()[:2].tolist()) == {0, 1}


def test_greedy_explains_what_a_fit_on_its_channels_does(ranked: Any) -> None:
    from foldcut.passes.prune.submodular import select_units
    from papers_scores import objectives
    from papers_submodular import best_explained, explained

    objective = next(iter(objectives(ranked).values()))
    selection = select_units([objective], 5)
    for count in range(1, 6):
        greedy = float(selection.errors[0] - selection.errors[count])
        assert explained(objective, selection.order[:count]) == pytest.approx(greedy, abs=1e-6)
        best = best_explained(objective, count, 100)
        assert best is not None and best >= greedy - 1e-6
    pairs = [explained(objective, torch.tensor(pair)) for pair in itertools.combinations(range(5), 2)]
    assert best_explained(objective, 2, 100) == max(pairs)
    assert best_explained(objective, 2, 9) is None


def test_activation_gradients_are_those_of_the_values_that_the_next_layer_reads(ranked: Any) -> None:
    from papers_scores import activation_gradients

    module = ranked.provenance.program.module
    weight, bias = (module.get_parameter(f"0.{name}").detach() for name in ("weight", "bias"))
    rest = [module.get_parameter(name).detach() for name in ("2.weight", "2.bias", "4.weight", "4.bias")]
    values = nn.functional.conv2d(ranked.images, weight, bias, padding=1).relu().requires_grad_()
    hidden = nn.functional.conv2d(values, rest[0], rest[1]).flatten(1)
    loss = nn.functional.cross_entropy(nn.functional.linear(hidden, rest[2], rest[3]), ranked.labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, values)
    expected = (values.detach() * gradient).sum((2, 3)).abs().sum(0).double()
    torch.testing.assert_close(activation_gradients(ranked)["0"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["random", "l1", "activation-gradient", "layer-sampling", "one-shot-residual"])
def test_every_method_ranks_all_channels(ranked: Any, method: str) -> None:
    from papers_scores import orders

    assert orders(method, ranked, seed=0)["0"].order.sort().values.tolist() == list(range(5))


def test_budgets_of_equal_loss_take_the_smallest_shares_that_reach_the_target() -> None:
    from papers_submodular import equal_loss

    losses = {"a": {0.25: 9.0, 0.5: 1.0, 1.0: 0.0}, "b": {0.25: 2.0, 0.5: 1.5, 1.0: 0.0}}
    assert equal_loss(losses, {"a": 8, "b": 8}, sum, 13) == {"a": 5, "b": 8}
    assert equal_loss(losses, {"a": 8, "b": 8}, sum, 8) == {"a": 4, "b": 4}
    assert equal_loss(losses, {"a": 8, "b": 8}, sum, 6) == {"a": 4, "b": 2}


@pytest.mark.parametrize("by_filter", [False, True])
def test_a_proximal_operator_is_the_minimiser(by_filter: bool) -> None:
    from frank_wolfe_rivals import shrunk

    torch.manual_seed(0)
    weight, by = torch.randn(4, 3, 2, 2), 0.8

    def cost(point: torch.Tensor) -> float:
        norm = point.flatten(1).norm(dim=1).sum() if by_filter else point.abs().sum()
        return float(0.5 * (point - weight).square().sum() + by * norm)

    found = shrunk(weight, by, by_filter=by_filter)
    for _ in range(200):
        assert cost(found) <= cost(found + 0.05 * torch.randn_like(weight)) + 1e-6
    assert torch.equal(shrunk(weight, 100.0, by_filter=by_filter), torch.zeros_like(weight))


@pytest.mark.parametrize("kind", ["filter", "nuclear"])
def test_penalties_in_the_loss_have_its_gradient(kind: str) -> None:
    from frank_wolfe_rivals import PenalisedSGD

    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64).requires_grad_()
    matrix = weight.flatten(1)
    penalty = matrix.norm(dim=1).sum() if kind == "filter" else torch.linalg.svdvals(matrix).sum()
    (expected,) = torch.autograd.grad(penalty, weight)
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    PenalisedSGD([weight], lr=0.1, momentum=0.9, kind=kind, penalty=0.5).step()
    torch.testing.assert_close((before - weight.detach()) / 0.05, expected)


def test_rivals_and_sets_are_runs_of_the_training() -> None:
    import argparse

    from frank_wolfe_rivals import PenalisedSGD
    from frank_wolfe_train import Run
    from papers_frank_wolfe import TRAINED

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    found = {run: Run.parse(run) for _, run in TRAINED}
    assert len({run.name for run in found.values()}) == len(found)
    assert isinstance(found["prox_l1:1e-4@0.1"].optimizer(network), PenalisedSGD)
    assert isinstance(found["group:30:0.5@0.2"].constraint(network[1].weight), GroupKSupport)
    with pytest.raises(argparse.ArgumentTypeError, match="prox_l1"):
        Run.parse("prox_l1:1:2")


def test_the_figure_has_a_point_for_each_score_of_each_block() -> None:
    from papers_recoverability import plot, rank_correlation

    rows = [
        {"case": {"network": "net"}, "path": f"b{i}", "left": 0.1 * i, "scores": {"plain": 0.2 * i, "local": 0.3 / i}}
        for i in (1, 2, 3)
    ]
    assert plot(rows).count("<circle") == 6
    assert rank_correlation([1, 2, 3], [1, 4, 9]) == pytest.approx(1)
    assert plot([]).startswith("<svg")


def test_claims_are_put_to_the_test_and_failures_told() -> None:
    from papers import RUNS
    from papers_claims import claims_section

    def row(method: str, seed: int, top1: float) -> dict[str, Any]:
        case = {"network": "lenet", "keep": 0.5, "method": method, "seed": seed}
        return {"case": case, "plain": {"top1": 10.0}, "resolved": {"top1": top1}}

    rows = [
        row("greedy-asymmetric", 0, 80.0),
        row("greedy-asymmetric", 1, 90.0),
        row("l1", 0, 86.0),
        row("random", 0, 1),
    ]
    text = claims_section({name: [] for name in RUNS} | {"submodular_lenet": rows})
    assert "all solved again: holds in 1 of 2 comparisons, not here:" in text
    assert "greedy-asymmetric 85.00 ± 7.07, l1 86.00" in text
    assert "better than leaving them: holds in 2 of 3 comparisons" in text
    assert "finetune" not in text
