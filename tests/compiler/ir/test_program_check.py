"""`Program.check`: what a rewrite must leave as it found it is found when it is not."""

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.analysis.provenance import find_units
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit import bypass
from foldcut.compiler.ir.program import Program
from foldcut.compiler.support.errors import ProgramError
from foldcut.passes.cut.prune_channels import prune_channels
from torch import nn


def own(program: Program) -> Program:
    """A copy whose graph may be changed."""
    return replace(program, module=copy.deepcopy(program.module))


def first(program: Program, part: str) -> torch.fx.Node:
    return next(n for n in program.graph.nodes if part in n.name and n.op == "call_function")


def stale_shape(program: Program) -> str:
    node = first(program, "conv2d")
    node.meta["val"] = node.meta["val"][:, 1:]
    return node.name


def stale_dtype(program: Program) -> str:
    node = first(program, "relu")
    node.meta["val"] = node.meta["val"].double()
    return node.name


def fixed_batch(program: Program) -> str:
    node = first(program, "relu")
    node.meta["val"] = node.meta["val"].new_empty([2, *node.meta["val"].shape[1:]])
    return node.name


def other_tensor(program: Program) -> str:
    node = next(n for n in program.graph.nodes if n.op == "get_attr" and n.meta["val"].dim() == 4)
    program.module.get_submodule("stem.0").weight = nn.Parameter(torch.zeros(8, 2, 3, 3))
    return node.name


def lost_tensor(program: Program) -> str:
    node = next(n for n in program.graph.nodes if n.op == "get_attr" and n.target == "head.weight")
    del program.module.head.weight
    return node.name


def wrong_argument(program: Program) -> str:
    node = first(program, "linear")
    node.args = (node.args[1], node.args[1])
    return node.name


def two_of_a_name(program: Program) -> str:
    node = first(program, "relu")
    object.__setattr__(node, "name", "linear")
    return "linear"


DEFECTS = (stale_shape, stale_dtype, fixed_batch, other_tensor, lost_tensor, wrong_argument, two_of_a_name)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.__name__)
def test_a_defect_is_found_at_its_node(defect: Callable[[Program], str], residual: Program) -> None:
    program = own(residual)
    program.check()
    node = defect(program)
    with pytest.raises(ProgramError) as raised:
        program.check()
    assert raised.value.node == node
    assert raised.value.hint
    residual.check()


def test_the_signature_is_held_to_the_graph(residual: Program) -> None:
    (output,) = residual.outputs
    (given,) = residual.inputs
    for wrong in (
        replace(residual, outputs=(replace(output, shape=("batch", 5)),)),
        replace(residual, outputs=(replace(output, shape=(2, 4)),)),
        replace(residual, outputs=(replace(output, dtype=torch.float64),)),
        replace(residual, outputs=(output, output)),
        replace(residual, inputs=()),
        replace(residual, inputs=(replace(given, name="other"),)),
    ):
        with pytest.raises(ProgramError):
            wrong.check(residual)


def test_rewrites_of_all_kinds_pass(residual: Program, transformer: Program, inverted: Program) -> None:
    for program in (residual, transformer, inverted):
        found = find_units(program)
        prune_channels(found, torch.cat([g.units[1::2] for g in found.prunable])).program.check(program)
    bypass(residual, "relu_2", "relu_4").check(residual)


class Tied(nn.Module):
    """Two names of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


def test_weights_that_were_tied_stay_tied(nets: SimpleNamespace) -> None:
    program = capture(nets.seeded(Tied), torch.randn(2, 4))
    program.module.b.weight = program.module.a.weight
    own(program).check(program)
    apart = own(program)
    apart.module.b.weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ProgramError, match="no longer one tensor"):
        apart.check(program)


def test_sizes_that_depend_on_data_are_no_defect() -> None:
    class Select(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x[:, 0] > 0].sum(0)

    capture(Select(), torch.randn(4, 3)).check()
