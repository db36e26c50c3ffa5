"""What must be cut together, read off the graph: no architecture is known to the analysis."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foldcut.compiler.analysis.provenance import Provenance, find_units
from foldcut.compiler.analysis.unit_groups import UnitGroup
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from foldcut.compiler.support.errors import RewriteError
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """Layers by name, and a forward that is given as a function of them and the input."""

    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)


def pooled(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3))


def units_of(module: nn.Module, *shape: int) -> Provenance:
    return find_units(capture(module.eval(), torch.zeros(2, *(shape or (3, 4, 4)))))


def by_name(provenance: Provenance) -> dict[str, UnitGroup]:
    """Groups by name, which has to be unique: budgets speak of groups by name."""
    groups = {g.name: g for g in provenance.groups}
    assert len(groups) == len(provenance.groups)
    return groups


def sizes(provenance: Provenance) -> dict[str, int]:
    """Units of each prunable group."""
    return {name: len(group) for name, group in by_name(provenance).items() if group.reason is None}


def layers(slots: tuple[tuple[str, int], ...]) -> list[str]:
    """The layers behind (parameter, dimension) slots."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name, _ in slots))


def test_a_residual_stream_couples_its_producers(residual: Program) -> None:
    groups = by_name(find_units(residual))
    stream = groups["stem.0"]
    assert layers(stream.producers) == ["stem.0", *(f"blocks.{i}.conv2" for i in range(3))]
    assert layers(stream.consumers) == [*(f"blocks.{i}.conv1" for i in range(3)), "head"]
    assert len(stream) == 8
    assert stream.widths == (1,)
    for i in range(3):
        inner = groups[f"blocks.{i}.conv1"]
        assert layers(inner.producers) == [f"blocks.{i}.conv1"]
        assert inner.consumers == ((f"blocks.{i}.conv2.weight", 1),)


def test_the_output_layer_is_locked(residual: Program) -> None:
    head = by_name(find_units(residual))["head"]
    assert head.reason is not None
    assert "output" in head.reason
    assert "linear" in head.reason


def test_the_inputs_make_no_units(residual: Program) -> None:
    provenance = find_units(residual)
    image = provenance.values["x"]
    assert not image.any()
    assert all(("stem.0.weight", 1) not in (*g.producers, *g.consumers) for g in provenance.prunable)


def test_every_node_knows_the_units_of_its_elements(residual: Program) -> None:
    provenance = find_units(residual)
    stream = by_name(provenance)["stem.0"].units
    for name in ("relu", "relu_2", "relu_4"):
        value = provenance.values[name]
        assert value.shape == residual.shape(residual.nodes[name])
        assert torch.equal(value[0, :, 3, 5], stream)


def test_batch_norm_parameters_follow_the_channels(residual: Program) -> None:
    provenance = find_units(residual)
    stream = by_name(provenance)["stem.0"].units
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(provenance.constants[f"stem.1.{leaf}"], stream)


def test_concatenation_keeps_producers_apart(nets: SimpleNamespace) -> None:
    groups = by_name(find_units(capture(nets.DenseNet().eval(), nets.images())))
    assert {n: len(g) for n, g in groups.items()} == {"stem": 8, **{f"layers.{i}.1": 4 for i in range(3)}, "head": 4}
    assert layers(groups["layers.1.1"].producers) == ["layers.1.1"]
    assert layers(groups["layers.1.1"].consumers) == ["layers.2.1", "head"]


def test_depthwise_inherits(inverted: Program) -> None:
    provenance = find_units(inverted)
    groups = by_name(provenance)
    assert len(groups["1.branch.0.0"]) == 16
    assert groups["1.branch.0.0"].consumers == (("1.branch.2.weight", 1),)
    carried = [s for s in provenance.slots if s.role == "carry"]
    assert {s.parameter for s in carried} == {"1.branch.1.0.weight", "2.branch.1.0.weight"}
    assert torch.equal(carried[0].labels, groups["1.branch.0.0"].units)


def test_a_convolution_with_many_small_groups_is_cut_by_whole_groups() -> None:
    net = Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 16, 3, groups=4), c=conv(16, 4))
    group = by_name(units_of(net))["a"]
    assert len(group) == 4
    assert group.widths == (2,)
    assert group.consumers == (("c.weight", 1),)


def test_a_convolution_with_few_large_groups_is_cut_inside_them() -> None:
    net = Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 12, 3, groups=2), c=conv(12, 4))
    groups = by_name(units_of(net))
    assert (len(groups["a"]), groups["a"].widths) == (4, (2,))
    assert (len(groups["b"]), groups["b"].widths) == (6, (2,))
    assert groups["a"].consumers == (("b.weight", 1),)
    assert groups["b"].consumers == (("c.weight", 1),)


def shuffled(x: torch.Tensor, groups: int) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def test_a_channel_shuffle_ties_columns() -> None:
    """ShuffleNet v1: the cut inside the groups of one convolution must be one inside those of the next."""
    layers_ = {"a": conv(3, 12), "b": conv(12, 12, groups=2), "c": conv(12, 12, groups=2), "d": conv(12, 4)}
    net = Net(lambda m, x: m.d(m.c(shuffled(F.relu(m.b(m.a(x))), 2))), **layers_)
    provenance = units_of(net)
    groups = by_name(provenance)
    assert len(groups["a"]) == 6
    assert len(groups["b"]) == 3
    assert groups["b"].widths == (4,)
    shuffled_value = provenance.values[next(n for n in provenance.values if n.startswith("view"))]
    assert shuffled_value.shape == (1, 2, 6, 4, 4)


def test_a_channel_shuffle_between_plain_convolutions_ties_what_stays_rectangular() -> None:
    net = Net(lambda m, x: m.b(shuffled(m.a(x), 2)), a=conv(3, 12), b=conv(12, 4))
    assert sizes(units_of(net)) == {"a": 6}


def test_split_halves_that_multiply_are_cut_together() -> None:
    def glu(m: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = m.a(x).chunk(2, 1)
        return m.b(a * torch.sigmoid(b))

    group = by_name(units_of(Net(glu, a=conv(3, 12), b=conv(6, 4))))["a"]
    assert len(group) == 6
    assert group.widths == (2,)


def test_groups_have_names_of_their_own() -> None:
    """One half of a producer joins a residual stream, the other does not: two groups with one first producer."""

    def halves(m: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = m.a(x).chunk(2, 1)
        return m.c(torch.cat([a + m.b(x), b], 1))

    provenance = units_of(Net(halves, a=conv(3, 8), b=conv(3, 4), c=conv(8, 4)))
    assert sorted(len(g) for g in provenance.prunable) == [4, 4]
    by_name(provenance)


def test_squeeze_and_excite_gates_follow_what_they_gate(nets: SimpleNamespace) -> None:
    groups = by_name(find_units(capture(nets.image_net(nets.Gated()).eval(), nets.images())))
    assert layers(groups["0"].producers) == ["0", "1.conv", "1.excite"]
    assert layers(groups["0"].consumers) == ["1.conv", "1.squeeze", "4"]
    assert len(groups["1.squeeze"]) == 4


def test_spatial_attention_leaves_the_channels_alone() -> None:
    """A map with one channel gates all of them."""

    def gate(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.c(x * torch.sigmoid(m.b(x)))

    assert sizes(units_of(Net(gate, a=conv(3, 8), b=conv(8, 1), c=conv(8, 4)))) == {"a": 8}


def test_a_weight_may_be_a_buffer() -> None:
    """A frozen filter bank: no parameter, and all the same something that makes and reads channels."""

    class Filtered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, 6), conv(5, 4)
            self.register_buffer("bank", torch.randn(5, 6, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.conv2d(self.a(x), self.bank))

    groups = by_name(units_of(Filtered()))
    assert groups["a"].consumers == (("bank", 1),)
    assert len(groups["bank"]) == 5


def test_flatten_in_front_of_a_linear_layer() -> None:
    net = Net(lambda m, x: m.b(m.a(x).flatten(1)), a=conv(3, 5), b=nn.Linear(80, 4))
    provenance = units_of(net)
    group = by_name(provenance)["a"]
    assert len(group) == 5
    assert group.consumers == (("b.weight", 1),)
    slot = next(s for s in provenance.slots if s.parameter == "b.weight" and s.role == "in")
    assert torch.equal(slot.labels, group.units.repeat_interleave(16))


def test_a_layer_scale_follows_the_channels() -> None:
    def scaled(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.c(x + m.gamma.weight.view(-1, 1, 1) * m.b(x))

    gamma = nn.BatchNorm2d(6)  # only its weight is read
    provenance = units_of(Net(scaled, a=conv(3, 6), b=conv(6, 6), c=conv(6, 4), gamma=gamma))
    group = by_name(provenance)["a"]
    assert layers(group.producers) == ["a", "b"]
    assert torch.equal(provenance.constants["gamma.weight"], group.units)


def test_zero_padded_shortcuts_join_the_stream() -> None:
    """ResNet-56 of CIFAR: strided, and filled up with channels of zeros on both sides."""

    def block(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(m.a(x))
        return m.c(F.relu(m.b(x) + F.pad(x, (0, 0, 0, 0, 2, 2))))

    provenance = units_of(Net(block, a=conv(3, 4), b=conv(4, 8), c=conv(8, 4)))
    found = sorted((len(g), layers(g.producers)) for g in provenance.prunable)
    assert found == [(4, ["a", "b"]), (4, ["b"])]
    by_name(provenance)


def test_pixel_shuffle_ties_what_becomes_one_channel() -> None:
    net = Net(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 12), b=conv(3, 4))
    group = by_name(units_of(net))["a"]
    assert len(group) == 3
    assert group.widths == (4,)
    assert group.consumers == (("b.weight", 1),)


@pytest.mark.parametrize(("groups", "units", "width"), [(1, 8, 1), (4, 4, 2), (8, 8, 1), (2, 4, 2)])
def test_group_norm_is_cut_by_whole_groups_or_alike_inside(groups: int, units: int, width: int) -> None:
    net = Net(lambda m, x: m.b(m.n(m.a(x))), a=conv(3, 8), n=nn.GroupNorm(groups, 8), b=conv(8, 4))
    group = by_name(units_of(net))["a"]
    assert (len(group), group.widths) == (units, (width,))


def test_shared_weights_are_cut_one_way() -> None:
    """One layer applied twice: what goes in is what comes out."""
    net = Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.b(m.a(x)))))), a=conv(3, 6), b=conv(6, 6), c=conv(6, 4))
    group = by_name(units_of(net))["a"]
    assert len(group) == 6
    assert layers(group.producers) == ["a", "b"]
    assert layers(group.consumers) == ["b", "c"]


def test_tied_embeddings_are_locked_where_they_are_the_output() -> None:
    """The rows of the table are the vocabulary; its columns may go."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix = nn.Embedding(7, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.mix(self.table(ids))))

    provenance = find_units(capture(Tied().eval(), torch.zeros(2, 5, dtype=torch.long)))
    groups = by_name(provenance)
    assert [len(g) for g in provenance.prunable] == [6]
    stream = provenance.prunable[0]
    assert ("mix.weight", 0) in stream.producers
    assert ("mix.weight", 1) in stream.consumers
    assert any(len(g) == 7 and g.reason for g in groups.values())


def test_an_input_added_to_channels_locks_them() -> None:
    group = by_name(units_of(Net(lambda m, x: m.b(x + m.a(x)), a=conv(3, 3), b=conv(3, 4))))["a"]
    assert group.reason is not None
    assert "add" in group.reason


@pytest.mark.parametrize(
    ("name", "function", "said"),
    [
        ("fft", lambda x: torch.fft.fft(x, dim=1).real, "fft"),
        ("cumsum", lambda x: x.cumsum(1), "cumsum"),
        ("norm", lambda x: F.normalize(x, dim=1), "norm"),
        ("argmax", lambda x: x * x.argmax(1, keepdim=True), "argmax"),
        ("softmax", lambda x: x.softmax(1), "softmax"),
    ],
)
def test_what_mixes_channels_locks_them_with_a_reason(name: str, function: Any, said: str) -> None:
    provenance = units_of(Net(lambda m, x: m.b(function(m.a(x))), a=conv(3, 6), b=conv(6, 4)))
    group = by_name(provenance)["a"]
    assert group.reason is not None
    assert said in group.reason
    assert not provenance.prunable


def test_an_unknown_operator_is_named() -> None:
    provenance = units_of(Net(lambda m, x: m.b(torch.fft.fft(m.a(x), dim=1).real), a=conv(3, 6), b=conv(6, 4)))
    assert any("fft" in target and nodes for target, nodes in provenance.unknown.items())


def test_a_known_network_has_nothing_unknown(residual: Program, transformer: Program, inverted: Program) -> None:
    assert not any(find_units(p).unknown for p in (residual, transformer, inverted))


def test_an_operator_without_a_rule_leaves_the_rest_prunable() -> None:
    net = Net(lambda m, x: m.c(m.b(torch.fft.fft(m.a(x), dim=1).real)), a=conv(3, 6), b=conv(6, 5), c=conv(5, 4))
    assert sizes(units_of(net)) == {"b": 5}


def test_removal_refuses_what_is_locked_or_unknown(residual: Program) -> None:
    provenance = find_units(residual)
    groups = by_name(provenance)
    for units in (groups["head"].units[:1], torch.tensor([0]), torch.tensor([provenance.size + 5])):
        with pytest.raises(RewriteError, match="locked or not units"):
            provenance.removal(units)
    mask = provenance.removal(groups["stem.0"].units[2:4].tolist())
    assert mask.nonzero().reshape(-1).tolist() == groups["stem.0"].units[2:4].tolist()


def test_consumers_of_a_unit(residual: Program) -> None:
    provenance = find_units(residual)
    for group in provenance.prunable:
        found = {provenance.slots[i].parameter for i in provenance.consumers[int(group.units[0])]}
        assert found == {parameter for parameter, _ in group.consumers}


@pytest.mark.parametrize(
    ("keep", "multiple", "count"), [(0.5, 1, 4), (0.5, 4, 4), (0.01, 1, 1), (0.01, 4, 4), (1.0, 3, 8), (0.9, 8, 8)]
)
def test_counts_are_whole_multiples(residual: Program, keep: float, multiple: int, count: int) -> None:
    assert by_name(find_units(residual))["stem.0"].count_for(keep, multiple) == count
