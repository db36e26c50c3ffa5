"""What every pass asks of a Program: identity, sizes, constants, structure of inputs."""

from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit import bypass, set_tensors
from foldcut.compiler.ir.program import Program, data_inputs, is_call, is_size, output_nodes
from foldcut.compiler.support.errors import CaptureError
from torch import nn


def test_equal_networks_have_equal_fingerprints(residual: Program, residual_net: nn.Module) -> None:
    again = capture(residual_net, torch.zeros(5, 3, 8, 8))
    assert again is not residual
    assert again.fingerprint == residual.fingerprint


@pytest.mark.parametrize("name", ["head.weight", "blocks.2.bn1.running_var"])
def test_one_changed_value_changes_the_fingerprint(residual: Program, name: str) -> None:
    value = residual.module.state_dict()[name].clone()
    value.view(-1)[-1] += 1e-3
    changed = set_tensors(residual, {name: value}, note="nudge")
    assert changed.fingerprint != residual.fingerprint
    assert changed.text() == residual.text()


def test_a_changed_graph_changes_the_fingerprint(residual: Program) -> None:
    assert bypass(residual, "relu", "relu_2").fingerprint != residual.fingerprint


def test_history_names_the_rewrites_in_order(residual: Program) -> None:
    assert residual.history == ()
    once = bypass(residual, "relu", "relu_2")
    twice = set_tensors(once, {"head.bias": torch.zeros(4)}, note="clear")
    assert twice.history == ("bypass relu -> relu_2", "clear")
    assert residual.history == ()


def test_shapes_at_a_batch_size(residual: Program) -> None:
    node = residual.nodes["relu_2"]
    assert residual.shape(node) == (1, 8, 8, 8)
    assert residual.shape(node, batch=5) == (5, 8, 8, 8)


def test_parameter_count(residual: Program, residual_net: nn.Module) -> None:
    assert residual.parameter_count() == sum(p.numel() for p in residual_net.parameters())


def test_constants_are_the_tensors_themselves(residual: Program, residual_net: nn.Module) -> None:
    node = next(n for n in residual.graph.nodes if n.target == "blocks.1.conv1.weight")
    assert torch.equal(residual.constant(node), residual_net.blocks[1].conv1.weight)


def test_paths_are_those_of_the_modules(residual: Program) -> None:
    assert residual.path(residual.nodes["conv2d_3"]) == "blocks.1.conv1"


def test_data_inputs_leave_out_parameters_and_sizes(transformer: Program) -> None:
    view = transformer.nodes["view"]
    assert [n.name for n in data_inputs(view)] == ["linear_1"]
    size = next(n for n in view.all_input_nodes if is_size(n))
    assert size.name.startswith("sym_size")
    assert [n.name for n in data_inputs(transformer.nodes["linear"])] == ["x"]


def test_calls_match_any_overload(residual: Program) -> None:
    join = next(n for n in residual.graph.nodes if n.name.startswith("add"))
    assert is_call(join, torch.ops.aten.add)
    assert is_call(join, torch.ops.aten.add.Tensor)
    assert not is_call(join, torch.ops.aten.mul)
    assert not is_call(output_nodes(residual.graph)[0], torch.ops.aten.add)


def test_a_batch_of_another_structure_is_refused(residual: Program, nets: SimpleNamespace) -> None:
    x = nets.images()
    assert residual.flatten(x)[0] is x
    assert residual.flatten((x,))[0] is x
    assert residual.flatten({"x": x})[0] is x
    with pytest.raises(CaptureError, match="structure of the captured inputs"):
        residual.flatten((x, x))


def test_a_call_runs_without_gradients(residual: Program, nets: SimpleNamespace) -> None:
    assert not residual(nets.images()).requires_grad
    assert residual.module(nets.images()).requires_grad
