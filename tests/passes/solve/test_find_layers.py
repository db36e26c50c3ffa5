"""Which layers can be re-solved, and why the others cannot."""

from types import SimpleNamespace

import torch
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from foldcut.passes.solve.layers import find_layers
from torch import nn
from torch.nn import functional as F


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.first.weight
        self.register_buffer("fixed", torch.ones(2, 3, 1, 1))
        self.named = nn.Conv2d(3, 2, 3, padding="same")
        self.free = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.shared(x))
        x = self.tied(self.first(x).relu())
        computed = F.conv2d(x, self.free.weight * 2)
        return computed + F.conv2d(x, self.fixed) + self.named(x) + self.free(x)


def test_every_layer_of_a_network(residual: Program) -> None:
    layers, rejects = find_layers(residual)
    assert not rejects
    assert list(layers) == sorted(layers, key=residual.order.__getitem__)
    assert [layer.weight for layer in layers.values()][:2] == ["stem.0.weight", "blocks.0.conv1.weight"]
    head = layers["linear"]
    assert (head.input, head.bias, head.groups, head.window) == ("mean", "head.bias", 1, None)
    conv = layers["conv2d"]
    assert (conv.input, conv.bias, conv.window) == ("x", None, ((1, 1), (1, 1), (1, 1)))


def test_depthwise_layers_have_a_group_for_each_channel(inverted: Program) -> None:
    layers, _ = find_layers(inverted)
    assert [layer.groups for layer in layers.values() if layer.weight.endswith("1.0.weight")] == [16, 16]


def test_locked_layers_say_why(nets: SimpleNamespace) -> None:
    layers, rejects = find_layers(capture(Locked().eval(), nets.images()))
    reasons = sorted(r.reason for r in rejects)
    assert reasons.count("its weight is shared with another layer") >= 4
    assert "its weight is computed in the graph, not stored" in reasons
    assert "its weight is not a trained parameter" in reasons
    assert not {layer.weight for layer in layers.values()} & {"shared.weight", "first.weight", "tied.weight", "fixed"}


def test_a_layer_with_its_padding_by_name_computes_right_or_is_locked(nets: SimpleNamespace) -> None:
    program = capture(nets.seeded(lambda: nn.Sequential(nn.Conv2d(3, 2, 3, padding="same"))), nets.images())
    layers, rejects = find_layers(program)
    if not layers:
        assert [r.reason for r in rejects] == ["its padding is given by name"]
        return
    (layer,) = layers.values()
    x = nets.images()
    product = torch.bmm(
        layer.matrix(program.module.get_parameter(layer.weight).detach()), layer.rows(program, x)
    ) + program.module.get_parameter(str(layer.bias)).detach().view(1, -1, 1)
    torch.testing.assert_close(layer.outputs(program(x)), product, rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_a_vector_is_left_alone() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return x * F.linear(x, self.weight).unsqueeze(-1)

    layers, rejects = find_layers(capture(Gate().eval(), torch.randn(3, 8)))
    assert [layer.weight for layer in layers.values()] == ["first.weight"]
    assert [reject.reason for reject in rejects] == ["its weight is a vector"]
