"""Running a graph in part."""

from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.ir.execute import bind, descendants, evaluate, required, run_until
from foldcut.compiler.ir.program import Program
from foldcut.compiler.support.errors import CompilerError
from torch import nn


def test_running_to_the_end_equals_the_module(
    residual: Program, residual_net: nn.Module, nets: SimpleNamespace
) -> None:
    x = nets.images(3)
    with torch.no_grad():
        values = run_until(residual, ["linear"], bind(residual, x))
        torch.testing.assert_close(values["linear"], residual_net(x), rtol=1e-5, atol=1e-6)


def test_running_to_the_end_with_sizes_and_tuples(transformer: Program, nets: SimpleNamespace) -> None:
    x = nets.tokens(3)
    (name,) = (n.name for n in transformer.graph.nodes if n.users and any(u.op == "output" for u in n.users))
    with torch.no_grad():
        assert torch.equal(run_until(transformer, [name], bind(transformer, x))[name], transformer(x))


def test_freeing_values_does_not_change_them(residual: Program, nets: SimpleNamespace) -> None:
    start = bind(residual, nets.images())
    wanted = ["relu", "relu_2", "linear"]
    kept = run_until(residual, wanted, start, free=False)
    freed = run_until(residual, wanted, start)
    assert set(freed) == set(wanted)
    assert {"conv2d_1", "getitem"} < set(kept)
    assert all(torch.equal(freed[name], kept[name]) for name in wanted)
    assert set(start) == {"x"}


def test_running_continues_from_known_values(residual: Program, nets: SimpleNamespace) -> None:
    known = torch.ones(2, 8, 8, 8)
    assert "conv2d_1" not in required(residual, ["linear"], {"relu_2"})
    value = run_until(residual, ["mean"], {"relu_6": known})["mean"]
    assert torch.equal(value, torch.ones(2, 8))
    from_input = run_until(residual, ["relu_4"], bind(residual, nets.images()))["relu_4"]
    middle = run_until(residual, ["relu_2"], bind(residual, nets.images()))
    assert torch.equal(run_until(residual, ["relu_4"], middle)["relu_4"], from_input)


def test_required_is_in_topological_order(residual: Program) -> None:
    names = required(residual, ["relu_2", "conv2d_1"], {"x"})
    assert names == sorted(names, key=residual.order.__getitem__)
    assert names[0] == "conv2d"
    assert names[-1] == "relu_2"
    assert required(residual, ["relu_2"], {"relu_2"}) == []


def test_tensors_take_the_place_of_weights(residual: Program, nets: SimpleNamespace) -> None:
    start = bind(residual, nets.images())
    replaced = {"head.weight": torch.zeros(4, 8), "head.bias": torch.arange(4.0)}
    value = run_until(residual, ["linear"], start, replaced)["linear"]
    assert torch.equal(value, torch.arange(4.0).expand(2, 4))
    assert not torch.equal(run_until(residual, ["linear"], start)["linear"], value)


def test_only_calls_are_evaluated(residual: Program) -> None:
    with pytest.raises(CompilerError, match="cannot evaluate a placeholder"):
        evaluate(residual, residual.nodes["x"], {})


def test_descendants(residual: Program) -> None:
    below = descendants(residual, ["relu_4"])
    assert {"conv2d_5", "relu_6", "linear", "output"} <= below
    assert not {"relu_4", "conv2d_3", "relu_2"} & below
    assert descendants(residual, ["conv2d_1", "relu_1"]) >= {"relu_1"}
    assert descendants(residual, []) == set()
