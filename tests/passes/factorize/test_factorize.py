"""Low rank: exact at full rank, optimal where that is known, never another function than the factors stand for."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.output_error import BROKEN, output_error
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.cost import node_macs, program_cost
from foldcut.compiler.ir.edit_chain import Link, replace_layers
from foldcut.compiler.ir.program import Program
from foldcut.compiler.support.errors import RewriteError
from foldcut.passes.factorize.decision import FactorizeLayer, Ranks
from foldcut.passes.factorize.decompositions import PLAIN, Geometry, Metric
from foldcut.passes.factorize.factorize import Factors, decompose, factorize, factorize_for_timing, factorize_plain
from foldcut.passes.factorize.low_rank import SCHEMES
from foldcut.passes.factorize.rank_trials import RankTrials
from foldcut.passes.factorize.select_ranks import RankAnalysis, RankSettings, not_dominated
from foldcut.passes.solve.layers import find_layers
from foldcut.passes.solve.moments import collect_moments
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

LAYERS: dict[str, Any] = {
    "3x3": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "strided": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1),
    "oblong": lambda: nn.Conv2d(8, 6, (3, 5), stride=(2, 1), padding=(0, 2)),
    "dilated": lambda: nn.Conv2d(8, 8, 3, padding=(2, 3), dilation=(2, 3)),
    "grouped": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=2, bias=False),
    "wide": lambda: nn.Conv2d(8, 8, (1, 5), stride=(2, 3), padding=(0, 1)),
    "tall": lambda: nn.Conv2d(8, 8, (5, 1), stride=2, padding=(2, 0)),
    "1x1": lambda: nn.Conv2d(8, 12, 1, stride=2),
    "same": lambda: nn.Conv2d(8, 12, 3, padding="same", dilation=2),
    "reflect": lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"),
}


#: A kernel of 1 has nothing to be split along.
UNSUITABLE = {("1x1", "spatial"), ("1x1", "tucker"), ("tall", "spatial")}
CAPTURED: dict[Any, Program] = {}


def one_layer(make: Any, nets: SimpleNamespace) -> tuple[Program, torch.Tensor]:
    """The layer as a program, captured once for all tests, and images for it."""
    images = torch.randn(6, 8, 11, 9, generator=torch.Generator().manual_seed(0))
    if make not in CAPTURED:
        CAPTURED[make] = capture(nets.seeded(make, seed=1), images[:2])
    return CAPTURED[make], images


def only_layer(program: Program) -> Any:
    (layer,) = find_layers(program)[0].values()
    return layer


def metric_of(program: Program, data: torch.Tensor, *, centred: bool, ridge: float = 1e-6) -> Metric:
    layers = find_layers(program)[0]
    (moments,) = collect_moments(program, layers, CalibrationSet.of(data)).values()
    return Metric.of(moments, ridge=ridge, centred=centred)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("data_aware", [True, False], ids=["data", "weights"])
def test_full_rank_is_exact(kind: str, scheme: str, data_aware: bool, nets: SimpleNamespace) -> None:
    program, images = one_layer(LAYERS[kind], nets)
    layer = only_layer(program)
    size = Geometry.of(program, layer)
    assert SCHEMES[scheme].suits(size) == ((kind, scheme) not in UNSUITABLE)
    if (kind, scheme) in UNSUITABLE:
        return
    metric = metric_of(program, images, centred=layer.bias is not None) if data_aware else PLAIN
    decomposition = decompose(program, layer, scheme, metric)
    full = SCHEMES[scheme].full(size)
    smaller = factorize(program, [Factors.of(layer.node, decomposition, full)])
    torch.testing.assert_close(smaller(images), program(images), rtol=1e-4, atol=1e-5)
    assert decomposition.error(full) < 1e-6
    assert program_cost(smaller).macs == SCHEMES[scheme].macs(size, full)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_linear_layer_over_tokens(scheme: str, nets: SimpleNamespace) -> None:
    tokens = torch.randn(5, 7, 10)
    program = capture(nets.seeded(lambda: nn.Linear(10, 6), seed=1), tokens[:2])
    layer = only_layer(program)
    size = Geometry.of(program, layer)
    assert SCHEMES[scheme].suits(size) == (scheme == "channel")
    if scheme == "channel":
        made = factorize(program, [Factors.of(layer.node, decompose(program, layer, scheme, PLAIN), (6,))])
        torch.testing.assert_close(made(tokens), program(tokens), rtol=1e-4, atol=1e-5)
        assert made(torch.randn(3, 7, 10)).shape == (3, 7, 6)


def test_one_dimension(nets: SimpleNamespace) -> None:
    signal = torch.randn(5, 8, 20)
    program = capture(nets.seeded(lambda: nn.Conv1d(8, 6, 5, stride=2, padding=2, groups=2), seed=1), signal[:2])
    layer = only_layer(program)
    for name, scheme in SCHEMES.items():
        size = Geometry.of(program, layer)
        full = scheme.full(size)
        made = factorize(program, [Factors.of(layer.node, decompose(program, layer, name, PLAIN), full)])
        torch.testing.assert_close(made(signal), program(signal), rtol=1e-4, atol=1e-5)
        assert program_cost(made).macs == scheme.macs(size, full)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("centred", [True, False])
def test_the_error_is_the_one_on_the_data(scheme: str, centred: bool, nets: SimpleNamespace) -> None:
    """The predicted relative error is that of the layer's outputs, without their mean where a bias takes it over."""
    program, images = one_layer(lambda: nn.Conv2d(8, 12, 3, padding=1, bias=centred), nets)
    images = images + 1
    layer = only_layer(program)
    decomposition = decompose(program, layer, scheme, metric_of(program, images, centred=centred, ridge=0.0))
    ranks = (3, 4) if scheme == "tucker" else (4,)
    made = factorize(program, [Factors.of(layer.node, decomposition, ranks)])
    wanted, got = program(images).double(), made(images).double()
    if layer.bias is not None:
        bias = program.module.get_parameter(layer.bias).double().view(1, -1, 1, 1)
        wanted, got = wanted - bias, got - bias
    wanted, got = wanted.detach(), got.detach()
    about = wanted.mean((0, 2, 3), keepdim=True) if centred else torch.zeros(())
    error = float((got - wanted).square().sum() / (wanted - about).square().sum())
    assert decomposition.error(ranks) == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_known_ranks_take_less_work_and_give_the_same(scheme: str, nets: SimpleNamespace) -> None:
    program, images = one_layer(lambda: nn.Conv2d(8, 12, 3, padding=1), nets)
    layer, metric = only_layer(program), metric_of(program, images, centred=True)
    ranks = (3, 4) if scheme == "tucker" else (4,)
    whole, short = (decompose(program, layer, scheme, metric, most=most) for most in (None, ranks))
    torch.testing.assert_close(short.dense(ranks), whole.dense(ranks), rtol=1e-9, atol=1e-12)
    assert short.error(ranks) == pytest.approx(whole.error(ranks), rel=1e-9)


def test_channel_is_the_optimum_of_its_rank(nets: SimpleNamespace) -> None:
    """Eckart and Young: no other approximation of the outputs of that rank is nearer."""
    program, images = one_layer(lambda: nn.Conv2d(8, 12, 3, padding=1, bias=False), nets)
    layer = only_layer(program)
    decomposition = decompose(program, layer, "channel", metric_of(program, images, centred=False, ridge=0.0))
    outputs = program(images).movedim(1, -1).reshape(-1, 12).double()
    values = torch.linalg.svdvals(outputs).square()
    for rank in (1, 3, 8):
        assert decomposition.error((rank,)) == pytest.approx(float(values[rank:].sum() / values.sum()), abs=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_data_beats_the_weights_alone(scheme: str, nets: SimpleNamespace) -> None:
    program, images = one_layer(lambda: nn.Conv2d(8, 12, 3, padding=1, bias=False), nets)
    mixing = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).tril() * torch.logspace(0, -2, 8)
    mixed = torch.einsum("oi,nihw->nohw", mixing, images)
    layer = only_layer(program)
    ranks = (3, 4) if scheme == "tucker" else (4,)
    errors = []
    for metric in (metric_of(program, mixed, centred=False), PLAIN):
        made = factorize(program, [Factors.of(layer.node, decompose(program, layer, scheme, metric), ranks)])
        errors.append(float((made(mixed) - program(mixed)).square().sum()))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_errors_fall_with_the_rank(scheme: str, nets: SimpleNamespace) -> None:
    program, images = one_layer(LAYERS["grouped"], nets)
    layer = only_layer(program)
    decomposition = decompose(program, layer, scheme, metric_of(program, images, centred=False))
    full = SCHEMES[scheme].full(Geometry.of(program, layer))
    errors = [decomposition.error((r,) if len(full) == 1 else (min(r, full[0]), r)) for r in range(1, full[-1] + 1)]
    assert all(a >= b - 1e-9 for a, b in pairwise(errors))
    assert 0 < errors[0] < 1


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 6), scheme=st.sampled_from(sorted(SCHEMES)))
def test_a_layer_of_low_rank_is_found_exactly(seed: int, rank: int, scheme: str) -> None:
    """A weight that has the scheme's form at some rank is factorised exactly at that rank."""
    generator = torch.Generator().manual_seed(seed)
    ranks = (rank, max(1, rank - 1)) if scheme == "tucker" else (rank,)
    size = Geometry(groups=2, outputs=6, inputs=6, kernel=(3, 3), positions=4, middle=4, source=4, dims=2)
    shapes = SCHEMES[scheme].shapes(size, ranks)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    subscripts = {
        "channel": "griyx,gorba->goiyx",
        "spatial": "griya,gorbx->goiyx",
        "tucker": "gpiba,grpyx,gordc->goiyx",
    }
    weight = torch.einsum(subscripts[scheme], *made)
    rows = torch.randn(2, size.columns, 200, generator=generator, dtype=torch.float64)
    metric = Metric(gram=rows @ rows.transpose(1, 2) + 1e-6 * torch.eye(size.columns, dtype=torch.float64))
    decomposition = SCHEMES[scheme].decomposition(size, weight, metric, None)
    assert decomposition.error(ranks) < 1e-8
    torch.testing.assert_close(decomposition.dense(ranks), weight.reshape(2, 6, -1), rtol=1e-5, atol=1e-5)


def test_a_silenced_output_does_no_harm(nets: SimpleNamespace) -> None:
    program, images = one_layer(LAYERS["3x3"], nets)
    gain = torch.ones(1, 12)
    gain[0, 3] = 0
    decomposition = decompose(program, only_layer(program), "channel", PLAIN, gain)
    dense = decomposition.dense((12,))
    assert bool(dense.isfinite().all())
    torch.testing.assert_close(dense[0], decomposition.weight[0], rtol=1e-4, atol=1e-4)
    assert images.shape[0] == 6


def test_dead_inputs(nets: SimpleNamespace) -> None:
    """Channels that are zero on all data: nothing is divided by, and full rank still gives the weight back."""
    program, images = one_layer(LAYERS["3x3"], nets)
    images[:, 2:5] = 0
    for scheme in SCHEMES:
        layer = only_layer(program)
        decomposition = decompose(program, layer, scheme, metric_of(program, images, centred=True))
        full = SCHEMES[scheme].full(Geometry.of(program, layer))
        made = factorize(program, [Factors.of(layer.node, decomposition, full)])
        fresh = torch.randn(3, 8, 11, 9)
        torch.testing.assert_close(made(fresh), program(fresh), rtol=1e-3, atol=1e-4)


def test_the_layer_keeps_its_name_and_the_program_its_own(nets: SimpleNamespace) -> None:
    program, images = one_layer(LAYERS["3x3"], nets)
    before, text = program(images), program.text()
    made = factorize_plain(program, [decision(program, "tucker", (4, 4))])
    layer = only_layer(program)
    assert [n for n in made.nodes if n.startswith(layer.node)] == [
        f"{layer.node}_first",
        f"{layer.node}_core",
        layer.node,
    ]
    names = {name for name, _ in made.module.named_parameters()}
    assert names == {"weight_first", "weight_core", "weight_last", "bias"}
    assert program.text() == text
    assert torch.equal(program(images), before)
    assert made(torch.randn(5, 8, 11, 9)).shape == (5, 12, 11, 9)
    assert made.history[-1] == "factorise 1 layer"


def decision(program: Program, scheme: str, ranks: tuple[int, ...], layer: str | None = None) -> FactorizeLayer:
    return FactorizeLayer(layer=layer or only_layer(program).node, scheme=scheme, ranks=ranks, full=ranks)


@pytest.mark.parametrize(
    ("scheme", "ranks", "said"),
    [
        ("channel", (0,), "1 to 12"),
        ("channel", (13,), "1 to 12"),
        ("tucker", (4,), "1 to 8 x 1 to 12"),
        ("spatial", (-1,), "1 to 24"),
        ("cp", (4,), "channel, spatial, tucker"),
    ],
)
def test_ranks_out_of_range_are_refused(scheme: str, ranks: tuple[int, ...], said: str, nets: SimpleNamespace) -> None:
    program, _ = one_layer(LAYERS["3x3"], nets)
    for rewrite in (factorize_plain, factorize_for_timing):
        with pytest.raises(RewriteError, match=said):
            rewrite(program, [decision(program, scheme, ranks)])


def test_a_layer_that_is_not_there_is_refused(nets: SimpleNamespace) -> None:
    program, _ = one_layer(LAYERS["3x3"], nets)
    with pytest.raises(RewriteError, match="nowhere"):
        factorize_plain(program, [decision(program, "channel", (4,), "nowhere")])
    link = Link(name="last", target=torch.ops.aten.conv2d.default, weight=torch.zeros(12, 8, 3, 3))
    with pytest.raises(RewriteError, match="nowhere"):
        replace_layers(program, {"nowhere": [link]}, note="")


def test_a_chain_of_another_shape_is_refused(nets: SimpleNamespace) -> None:
    program, _ = one_layer(LAYERS["3x3"], nets)
    link = Link(name="last", target=torch.ops.aten.conv2d.default, weight=torch.zeros(12, 8, 3, 3))
    with pytest.raises(RewriteError, match="may not change"):
        replace_layers(program, {only_layer(program).node: [link]}, note="")


def test_a_chain_that_computes_something_else_is_refused(nets: SimpleNamespace) -> None:
    program, _ = one_layer(LAYERS["3x3"], nets)
    layer = only_layer(program)
    decomposition = decompose(program, layer, "channel", PLAIN)
    wrong = Factors(layer=layer.node, matrices=decomposition.matrices((4,)), dense=decomposition.dense((5,)))
    with pytest.raises(RewriteError, match="something else"):
        factorize(program, [wrong])


def test_what_cannot_be_factorised_is_left_alone(nets: SimpleNamespace) -> None:
    """Depthwise layers cannot get cheaper, shared weights are not touched."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.plain = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.plain(self.depthwise(self.conv(torch.relu(self.conv(x)))))

    images = torch.randn(16, 8, 11, 9)
    program = capture(nets.seeded(Shared, seed=1), images[:2])
    analysis = RankAnalysis(program, CalibrationSet.of(images))
    (candidate,) = analysis.candidates.values()
    assert candidate.layer.weight == "plain.weight"
    reasons = sorted(str(r) for r in analysis.rejects)
    assert len(reasons) == 3
    assert sum("shared" in r for r in reasons) == 2
    assert sum("no rank" in r for r in reasons) == 1


def test_options_are_cheaper_and_not_dominated(residual: Program, nets: SimpleNamespace) -> None:
    analysis = RankAnalysis(
        residual, CalibrationSet.of(nets.images(24)), settings=RankSettings(multiple_of=1), resolve=None
    )
    assert len(analysis.candidates) >= 5
    for name, candidate in analysis.candidates.items():
        assert not_dominated(candidate.options) == list(candidate.options)
        assert all(option.macs < candidate.size.macs for option in candidate.options)
        assert candidate.size.macs == node_macs(residual, residual.nodes[name])


def test_little_memory_changes_nothing(
    residual: Program, nets: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments that do not fit are collected again: more passes, the same factors."""
    data = CalibrationSet.of(nets.images(24))
    found = []
    for memory in (1 << 30, 1000):
        monkeypatch.setattr("foldcut.passes.solve.layer_moments.MEMORY_BYTES", memory)
        analysis = RankAnalysis(residual, data)
        choice = {name: candidate.trial() for name, candidate in analysis.candidates.items()}
        found.append(factorize(residual, analysis.factors(choice)))
    x = nets.images(4, seed=3)
    assert torch.equal(found[0](x), found[1](x))


def test_a_layer_that_is_of_low_rank_anyway_is_tried_where_it_loses_something(nets: SimpleNamespace) -> None:
    """Else its errors would count for nothing, and the least rank would look free."""

    def make() -> nn.Module:
        conv = nn.Conv2d(8, 16, 1, bias=False)
        with torch.no_grad():
            conv.weight.copy_((torch.randn(16, 2) @ torch.randn(2, 8))[..., None, None])
        return nn.Sequential(conv, nn.ReLU(), nn.Conv2d(16, 4, 1))

    images = torch.randn(12, 8, 6, 6)
    program = capture(nets.seeded(make, seed=1), images[:2])
    settings = RankSettings(multiple_of=1)
    analysis = RankAnalysis(program, CalibrationSet.of(images), settings=settings)
    candidate = next(iter(analysis.candidates.values()))
    assert [option.error < 1e-5 for option in candidate.options] == [False, True]  # no dearer exact one is kept
    assert candidate.trial() == candidate.options[0]


def test_the_widest_layers_do_without_data(
    residual: Program, nets: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import foldcut.passes.factorize.select_ranks as module

    monkeypatch.setattr(module, "WIDEST", 1)
    analysis = RankAnalysis(residual, CalibrationSet.of(nets.images(8)))
    assert {o.scheme for c in analysis.candidates.values() for o in c.options} == {"channel"}
    factorize(residual, analysis.factors({n: c.trial() for n, c in analysis.candidates.items()}))


@pytest.mark.parametrize(
    "goal", [Ranks(rank=4), Ranks(keep=0.5), Ranks(energy=0.9), Ranks(error=0.1)], ids=lambda goal: str(goal)
)
def test_ranks_for_single_layers(goal: Ranks, residual: Program, nets: SimpleNamespace) -> None:
    analysis = RankAnalysis(residual, CalibrationSet.of(nets.images(24)), settings=RankSettings(multiple_of=1))
    chosen = analysis.each(goal)
    assert chosen
    for name, option in chosen.items():
        candidate = analysis.candidates[name]
        full = SCHEMES[option.scheme].full(candidate.size)
        assert option.macs < candidate.size.macs
        if goal.rank is not None:
            assert option.ranks == tuple(min(4, f) for f in full)
        elif goal.keep is not None:
            assert option.ranks == tuple(max(1, round(0.5 * f)) for f in full)
        else:
            assert option.error <= 0.1 + 1e-12
            cheaper = [o for o in candidate.options if o.macs < option.macs]
            assert all(o.error > 0.1 for o in cheaper)


def test_trials_are_those_of_the_rewritten_network(residual: Program, nets: SimpleNamespace) -> None:
    """They run with the weights that the factors stand for; the rewritten programs give the same errors."""
    samples = CalibrationSet.of(nets.images(24))
    analysis = RankAnalysis(residual, samples)
    trials = RankTrials(analysis, samples)
    choice = {name: candidate.trial() for name, candidate in analysis.candidates.items()}

    def rewritten(names: Sequence[str]) -> float:
        student = factorize(residual, analysis.factors({name: choice[name] for name in names}))
        return output_error(residual, student, samples)

    assert trials.error(choice) == pytest.approx(rewritten(list(choice)), rel=1e-3)
    alone, without = trials.alone(choice), trials.without(choice)
    for name in choice:
        assert alone[name] == pytest.approx(rewritten([name]), rel=1e-3)
        assert without[name] == pytest.approx(rewritten([n for n in choice if n != name]), rel=1e-3)
    assert trials.error({}) == 0


def test_a_network_that_is_no_longer_finite_counts_as_broken(
    residual: Program, nets: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = CalibrationSet.of(nets.images(8))
    analysis = RankAnalysis(residual, samples)
    choice = {name: candidate.trial() for name, candidate in analysis.candidates.items()}
    lost = [replace(item, dense=item.dense * torch.nan, shift=None) for item in analysis.factors(choice)]
    monkeypatch.setattr(analysis, "factors", lambda _choice: lost)
    assert RankTrials(analysis, samples).error(choice) == BROKEN
