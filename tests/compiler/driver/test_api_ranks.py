"""Low rank end to end: goals, plans, reports, ONNX in and out, and clear errors."""

import json
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import foldcut
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from foldcut.compiler.driver.pipeline import planned_network
from foldcut.compiler.ir.compare import relative_error
from foldcut.compiler.ir.cost import program_cost
from foldcut.compiler.plan.option_milp import choose_options
from foldcut.passes.solve.resolve_network import ResolveSettings
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytestmark = pytest.mark.usefixtures("quick_measurement")
ONES = foldcut.PipelineSettings(ranks=foldcut.RankSettings(multiple_of=1))


def run(net: Any, data: Any, backend: Any, goal: Any, **options: Any) -> foldcut.Compiled:
    options = {"mimic": None, "progress": False, "settings": ONES, "rewrites": ("factorize",), **options}
    return foldcut.compile(net, data, goal=goal, backend=backend, **options)


@pytest.fixture(scope="module")
def halved(residual_net: nn.Module, counting_backend: Any, nets: SimpleNamespace) -> foldcut.Compiled:
    return run(residual_net, nets.images(80), counting_backend, foldcut.Macs(0.5))


def test_half_of_the_macs_are_gone(halved: foldcut.Compiled) -> None:
    before, after = (program_cost(p).macs for p in (halved.outcome.ctx.teacher, halved.program))
    assert 0.35 * before < after <= 0.5 * before
    assert halved.report.macs == {"before": before, "after": after}
    assert all(isinstance(d, foldcut.FactorizeLayer) for d in halved.plan.decisions)


def test_each_stage_is_no_worse_than_the_one_before(halved: foldcut.Compiled) -> None:
    errors = halved.report.output_errors
    assert list(errors) == ["rewritten", "re-solved"]
    assert errors["rewritten"] > errors["re-solved"] > 0


def test_it_runs_at_any_batch_size_and_exports(halved: foldcut.Compiled, nets: SimpleNamespace) -> None:
    for count in (1, 3):
        assert halved.module(nets.images(count)).shape == (count, 4)
    assert halved.report.onnx_difference < 1e-4
    onnx.checker.check_model(onnx.load_from_string(halved.onnx))


def test_the_plan_goes_round_and_applies(
    halved: foldcut.Compiled, residual_net: nn.Module, nets: SimpleNamespace
) -> None:
    plan = foldcut.Plan.from_dict(json.loads(json.dumps(halved.plan.to_dict())))
    assert plan == halved.plan
    applied = foldcut.apply_plan(foldcut.capture(residual_net, nets.images(2)), plan)
    assert applied.parameter_count() == halved.program.parameter_count()
    x = nets.images(16, seed=3)
    wanted = halved.outcome.ctx.teacher(x)
    assert relative_error(wanted, applied(x)) > relative_error(wanted, halved.program(x))


def test_the_same_seed_gives_the_same_weights(
    halved: foldcut.Compiled, residual_net: nn.Module, counting_backend: Any, nets: SimpleNamespace
) -> None:
    again = run(residual_net, nets.images(80), counting_backend, foldcut.Macs(0.5))
    assert again.plan == halved.plan
    assert again.program.fingerprint == halved.program.fingerprint


@pytest.mark.parametrize(
    "goal", [foldcut.Ranks(keep=0.5), foldcut.Ranks(rank=3), foldcut.Ranks(energy=0.95)], ids=lambda goal: str(goal)
)
def test_goals_for_single_layers(
    goal: foldcut.Ranks, residual_net: nn.Module, counting_backend: Any, nets: SimpleNamespace
) -> None:
    made = foldcut.compile(
        residual_net, nets.images(40), goal=goal, backend=counting_backend, mimic=None, progress=False, settings=ONES
    )
    assert made.plan.decisions
    assert made.report.macs["after"] < made.report.macs["before"]
    assert made.plan.goal == goal
    assert foldcut.Plan.from_dict(made.plan.to_dict()) == made.plan


def test_keeping_all_the_energy_changes_nothing(
    residual_net: nn.Module, counting_backend: Any, nets: SimpleNamespace
) -> None:
    with pytest.warns(UserWarning, match="nothing was factorised"):
        made = run(residual_net, nets.images(40), counting_backend, foldcut.Ranks(energy=1.0))
    x = nets.images(3, seed=4)
    assert not made.plan.decisions
    assert torch.equal(made.module(x), made.outcome.ctx.teacher(x))


def test_mimicking_follows_where_asked(residual_net: nn.Module, counting_backend: Any, nets: SimpleNamespace) -> None:
    brief = foldcut.MimicSettings(iterations=4, batch_size=16, checks=2, bfloat16=False)
    made = run(residual_net, nets.images(40), counting_backend, foldcut.Macs(0.5), mimic=brief)
    errors = made.report.output_errors
    assert errors["mimicked"] <= errors["re-solved"] * (
        1 + 1e-9
    )  # norms folded and taken out again differ in the last bit


def test_a_goal_out_of_reach_comes_back_with_the_best(
    residual_net: nn.Module, counting_backend: Any, nets: SimpleNamespace
) -> None:
    with pytest.raises(foldcut.GoalError, match="cannot be met") as caught:
        run(residual_net, nets.images(40), counting_backend, foldcut.Macs(0.02))
    assert caught.value.best.report.macs["after"] < 0.5 * caught.value.best.report.macs["before"]


@pytest.fixture(scope="module")
def cut(contexts: Any) -> Any:
    def made(net: nn.Module, data: torch.Tensor, ratio: float, fresh: torch.Tensor, **resolve: Any) -> foldcut.Applied:
        """Without export and measurement."""
        teacher = foldcut.capture(net, data[:2])
        samples, held_out = (foldcut.CalibrationSet.of(x) for x in (data, fresh))
        ctx = contexts(teacher, samples, held_out, goal=foldcut.Macs(ratio), resolve=ResolveSettings(**resolve))
        return planned_network(ctx, [foldcut.Factorize(multiple_of=1)])[0]

    return made


@pytest.mark.parametrize("kind", ["PreActivation", "Inverted", "Gated", "Nested", "Downsample"])
def test_other_kinds_of_blocks(nets: SimpleNamespace, cut: Any, kind: str) -> None:
    make = getattr(nets, kind)
    parts, channels = ((make(), make()), 8) if kind != "Downsample" else ((make(),), 16)
    net = nets.seeded(lambda: nets.image_net(*parts, channels=channels), seed=6)
    made = cut(net, nets.images(48), 0.7, nets.images(16, seed=5))
    assert made.errors["re-solved"] <= made.errors["rewritten"]
    assert program_cost(made.program).macs <= 0.7 * program_cost(foldcut.capture(net, nets.images(2))).macs


def test_a_transformer(nets: SimpleNamespace, cut: Any) -> None:
    net = nets.seeded(lambda: nets.Transformer(2, width=16), seed=2)
    made = cut(net, nets.tokens(64), 0.7, nets.tokens(16, seed=5))
    assert made.program(nets.tokens(3)).shape == (3, 4)
    assert made.errors["re-solved"] < 0.2


def test_a_chain_without_branches(nets: SimpleNamespace, cut: Any) -> None:
    """No residual addition anywhere: first factors are refined for their own layer's error."""

    def make() -> nn.Module:
        return nets.image_net(*(part for _ in range(3) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())))

    left = {}
    for refine in (0, 2):
        made = cut(nets.seeded(make, seed=6), nets.images(128), 0.4, nets.images(64, seed=9), refine=refine)
        assert all(0 <= layer.after <= layer.before for layer in made.layers)
        left[refine] = sum(layer.after for layer in made.layers)
        assert made.errors["re-solved"] < made.errors["rewritten"]
    assert left[2] < left[0]


def test_from_onnx_to_onnx(residual_net: nn.Module, counting_backend: Any, nets: SimpleNamespace) -> None:
    buffer = BytesIO()
    torch.onnx.export(
        residual_net,
        (nets.images(2),),
        buffer,
        dynamo=False,
        input_names=["picture"],
        output_names=["logits"],
        dynamic_axes={"picture": {0: "n"}, "logits": {0: "n"}},
    )
    made = run(onnx.load_from_string(buffer.getvalue()), nets.images(40), counting_backend, foldcut.Macs(0.5))
    session = onnxruntime.InferenceSession(made.onnx, providers=["CPUExecutionProvider"])
    x = nets.images(5, seed=4)
    (out,) = session.run(["logits"], {"picture": x.numpy()})
    np.testing.assert_allclose(out, made.program(x).numpy(), rtol=1e-3, atol=1e-4)
    names = [d.layer for d in made.plan.decisions]
    assert names and set(names) <= set(made.program.nodes)


def test_a_latency_goal_is_measured(residual_net: nn.Module, nets: SimpleNamespace, work_backend: Any) -> None:
    made = run(residual_net, nets.images(40), work_backend, foldcut.Latency(0.7))
    assert made.report.latency["ratio"] <= 0.7
    assert made.plan.decisions
    assert "time options" in made.report.seconds


def test_layers_that_get_no_faster_stay_whole(
    residual_net: nn.Module, nets: SimpleNamespace, counting_backend: Any
) -> None:
    """A clock that counts layers: two factors always take longer than one layer."""
    with pytest.raises(foldcut.GoalError, match="nothing can be done towards") as caught:
        run(residual_net, nets.images(40), counting_backend, foldcut.Latency(0.7))
    assert caught.value.best is None


def test_the_rewrite_must_reach_the_goal(residual_net: nn.Module, nets: SimpleNamespace, counting_backend: Any) -> None:
    with pytest.raises(foldcut.GoalError, match="reached by prune_channels"):
        run(residual_net, nets.images(8), counting_backend, foldcut.Channels(0.5))
    with pytest.raises(foldcut.GoalError, match="reached by factorize"):
        run(residual_net, nets.images(8), counting_backend, foldcut.Ranks(keep=0.5), rewrites=("drop_blocks",))


@pytest.mark.parametrize(
    "wrong", [{}, {"rank": 0}, {"rank": 2.5}, {"keep": 0.0}, {"keep": 1.5}, {"energy": True}, {"rank": 4, "keep": 0.5}]
)
def test_goals_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(foldcut.GoalError, match="is not a goal"):
        foldcut.Ranks(**wrong)


@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    budget=st.integers(0, 30),
)
def test_the_choice_is_the_best_there_is(rows: list[list[tuple[int, int]]], budget: int) -> None:
    """Against every combination."""
    import itertools

    errors, costs = [[e for e, _ in row] for row in rows], [[c for _, c in row] for row in rows]
    found = choose_options(errors, costs, budget)
    allowed = [
        sum(errors[i][j] for i, j in enumerate(picks))
        for picks in itertools.product(*(range(len(row)) for row in rows))
        if sum(costs[i][j] for i, j in enumerate(picks)) <= budget
    ]
    if not allowed:
        assert found is None
        return
    assert found is not None
    assert sum(costs[i][j] for i, j in enumerate(found)) <= budget
    assert sum(errors[i][j] for i, j in enumerate(found)) == pytest.approx(min(allowed), abs=1e-2)
