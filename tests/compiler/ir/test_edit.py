"""The one module that changes graphs: exactness, refusals, and that the old Program is left alone."""

from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit import bypass, expose, rebuild, set_tensors
from foldcut.compiler.ir.edit_folds import fold_batch_norms, unfold_tensors
from foldcut.compiler.ir.execute import bind, run_until
from foldcut.compiler.ir.program import Program
from foldcut.compiler.support.errors import RewriteError
from torch import nn
from torch.nn import functional as F


class Norms(nn.Module):
    """Convolutions and norms in the combinations that fold, and in those that must not."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.plain_bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.biased, self.biased_bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.depthwise_bn = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.shared, self.shared_bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.bare, self.bare_bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.plain_bn(self.plain(x)))
        x = F.relu(self.biased_bn(self.biased(x)))
        x = F.relu(self.depthwise_bn(self.depthwise(x)))
        twice = self.shared(x)
        x = twice + self.shared_bn(twice)
        return self.norm(F.relu(self.bare_bn(self.bare(x))))


class RootParameters(nn.Module):
    """Weights that belong to the network itself, not to a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(4, c, 3, 3)) for c in (3, 4))
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(F.conv2d(F.relu(self.norm1(F.conv2d(x, self.first))), self.second))


@pytest.fixture(scope="module")
def norms(nets: SimpleNamespace) -> Program:
    net = nets.seeded(Norms, seed=4)
    with torch.no_grad():
        net.biased_bn.weight[2] = 0
        net.plain_bn.weight[1] *= -1
    return capture(net, nets.images())


def test_a_zero_branch_is_bypassed_exactly(residual: Program, nets: SimpleNamespace) -> None:
    x = nets.images(5)
    assert torch.equal(bypass(residual, "relu_2", "relu_4")(x), residual(x))


def test_a_bypass_computes_the_network_without_the_block(
    residual: Program, residual_net: nn.Module, nets: SimpleNamespace
) -> None:
    x = nets.images(5)
    features = residual_net.blocks[2](residual_net.blocks[1](residual_net.stem(x)))
    wanted = residual_net.head(features.mean((2, 3)))
    torch.testing.assert_close(bypass(residual, "relu", "relu_2")(x), wanted, rtol=1e-5, atol=1e-6)


def test_a_bypass_leaves_the_original_alone(residual: Program, nets: SimpleNamespace) -> None:
    x = nets.images()
    text, output, keys = residual.text(), residual(x), set(residual.module.state_dict())
    bypassed = bypass(residual, "relu", "relu_2")
    assert not torch.equal(bypassed(x), output)
    assert residual.text() == text
    assert torch.equal(residual(x), output)
    assert set(residual.module.state_dict()) == keys


def test_parameters_of_a_bypassed_block_are_gone_and_others_shared(residual: Program) -> None:
    bypassed = bypass(residual, "relu", "relu_2")
    before, after = residual.module.state_dict(), bypassed.module.state_dict()
    assert set(before) - set(after) == {key for key in before if key.startswith("blocks.0.")}
    assert set(after) < set(before)
    assert all(after[key].data_ptr() == before[key].data_ptr() for key in after)


def test_surviving_nodes_keep_their_names(residual: Program) -> None:
    bypassed = bypass(residual, "relu", "relu_2")
    assert set(bypassed.nodes) < set(residual.nodes)
    assert {"conv2d_3", "relu_4", "linear"} < set(bypassed.nodes)
    assert bypassed.nodes["conv2d_3"].args[0].name == "relu"


@pytest.mark.parametrize(
    ("entry", "exit_", "message"),
    [
        ("nowhere", "relu_2", "no node 'nowhere'"),
        ("relu", "nowhere", "no node 'nowhere'"),
        ("x", "relu_2", "one shape and dtype"),
        ("relu_2", "relu", "does not come before"),
        ("relu", "relu", "does not come before"),
    ],
)
def test_bypasses_that_are_refused(residual: Program, entry: str, exit_: str, message: str) -> None:
    text = residual.text()
    with pytest.raises(RewriteError, match=message):
        bypass(residual, entry, exit_)
    assert residual.text() == text


def test_a_shape_mismatch_names_both_shapes_and_quotes_the_graph(residual: Program) -> None:
    with pytest.raises(RewriteError) as caught:
        bypass(residual, "x", "relu_2")
    assert "'3', '8', '8'" in str(caught.value.expected)
    assert "'8', '8', '8'" in str(caught.value.actual)
    assert "> %relu_2" in str(caught.value.excerpt)


def test_set_tensors_leaves_the_old_program_alone(residual: Program, nets: SimpleNamespace) -> None:
    x = nets.images()
    before, value = residual(x), torch.full((4,), 7.0)
    old = residual.module.state_dict()["head.bias"].clone()
    changed = set_tensors(residual, {"head.bias": value, "stem.1.running_mean": torch.ones(8)}, note="set")
    assert torch.equal(residual(x), before)
    assert torch.equal(residual.module.state_dict()["head.bias"], old)
    assert torch.equal(changed.module.state_dict()["head.bias"], value)
    assert torch.equal(changed.module.state_dict()["stem.1.running_mean"], torch.ones(8))
    assert not torch.equal(changed(x), before)
    assert isinstance(changed.module.get_parameter("head.bias"), nn.Parameter)


def test_set_tensors_keeps_the_dtype(residual: Program) -> None:
    changed = set_tensors(residual, {"head.bias": torch.ones(4, dtype=torch.float64)}, note="set")
    assert changed.module.get_parameter("head.bias").dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "shape", "message"), [("head.bias", (5,), "another shape"), ("head.nothing", (4,), "no tensor")]
)
def test_tensors_that_do_not_fit_are_refused(
    residual: Program, name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(RewriteError, match=message):
        set_tensors(residual, {name: torch.zeros(shape)}, note="set")


def test_exposed_values_are_those_of_the_graph(residual: Program, nets: SimpleNamespace) -> None:
    names = ["relu_2", "getitem", "relu_2"]
    values = run_until(residual, names, bind(residual, nets.images(3)))
    module = expose(residual, names)
    exposed = module(nets.images(3))
    assert len(exposed) == 3
    for name, value in zip(names, exposed, strict=True):
        assert torch.equal(value, values[name])
    assert "head.weight" not in module.state_dict()


def test_exposing_can_copy_the_weights(residual: Program, nets: SimpleNamespace) -> None:
    before = residual(nets.images())
    module = expose(residual, ["linear"], copy_tensors=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(residual(nets.images()), before)


def test_rebuild_copies_on_request(residual: Program) -> None:
    copied = rebuild(residual.module, residual.graph, copy_tensors=True).state_dict()
    for name, value in residual.module.state_dict().items():
        assert torch.equal(copied[name], value)
        assert copied[name].data_ptr() != value.data_ptr()


def test_norms_fold_into_the_convolutions_that_feed_only_them(norms: Program, nets: SimpleNamespace) -> None:
    folded, items = fold_batch_norms(norms)
    assert [item.weight for item in items] == ["plain.weight", "depthwise.weight"]
    remaining = [n for n in folded.graph.nodes if "batch_norm" in str(n.target)]
    assert len(remaining) == 4
    x = nets.images(4)
    torch.testing.assert_close(folded(x), norms(x), rtol=1e-5, atol=1e-5)


def test_folding_leaves_the_original_alone(norms: Program, nets: SimpleNamespace) -> None:
    text, before = norms.text(), norms(nets.images())
    state = {name: value.clone() for name, value in norms.module.state_dict().items()}
    fold_batch_norms(norms)
    assert norms.text() == text
    assert torch.equal(norms(nets.images()), before)
    assert all(torch.equal(value, state[name]) for name, value in norms.module.state_dict().items())


def test_folding_and_unfolding_gives_the_weights_back(norms: Program) -> None:
    folded, items = fold_batch_norms(norms)
    tensors = unfold_tensors(norms, folded, items)
    own = dict(norms.module.named_parameters())
    assert set(tensors) <= set(own)
    for name, value in tensors.items():
        torch.testing.assert_close(value, own[name], rtol=1e-5, atol=1e-5)


def test_trained_folded_weights_can_be_taken_back(norms: Program, nets: SimpleNamespace) -> None:
    folded, items = fold_batch_norms(norms)
    generator = torch.Generator().manual_seed(0)
    trained = {}
    for name, value in folded.module.named_parameters():
        change = 0.1 * torch.randn(value.shape, generator=generator)
        if name == "biased.weight":
            change[2] = 0  # behind a scale of zero a weight has no effect: it is not recovered
        trained[name] = value.detach() + change
    trained_program = set_tensors(folded, trained, note="train")
    back = set_tensors(norms, unfold_tensors(norms, trained_program, items), note="unfold")
    x = nets.images(4)
    assert not torch.allclose(back(x), norms(x), atol=1e-2)
    torch.testing.assert_close(back(x), trained_program(x), rtol=1e-4, atol=1e-4)


def test_a_channel_of_scale_zero_keeps_its_weights(norms: Program) -> None:
    """New weights could not be taken back through it, so such a norm is not folded at all."""
    folded, items = fold_batch_norms(norms)
    assert "biased.weight" not in {item.weight for item in items}
    tensors = unfold_tensors(norms, folded, items)
    assert torch.equal(tensors["biased.weight"], norms.module.get_parameter("biased.weight"))


def test_norms_fold_into_weights_of_the_network_itself(nets: SimpleNamespace) -> None:
    program = capture(nets.seeded(RootParameters, seed=5), nets.images())
    folded, items = fold_batch_norms(program)
    assert len(items) == 2
    x = nets.images(3)
    torch.testing.assert_close(folded(x), program(x), rtol=1e-4, atol=1e-4)
