"""Shapes from a few batch sizes: what torch's symbolic shapes say, or no answer."""

from collections.abc import Callable

import pytest
import torch
from foldcut.compiler.analysis.provenance import find_units
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir import edit
from foldcut.compiler.ir.program import Program
from foldcut.compiler.ir.trial_shapes import TrialShapes, UnknownShapeError
from foldcut.compiler.support.errors import ProgramError
from foldcut.passes.cut.prune_channels import prune_channels
from torch import nn
from torch.nn import functional as F

FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": lambda x: x.relu(),
    "flatten": lambda x: x.flatten(1)[:, :, None, None].expand(-1, -1, 4, 4)[:, :8],
    "batch and rows": lambda x: x.permute(0, 2, 3, 1).reshape(-1, 8).relu().view(-1, 4, 4, 8).permute(0, 3, 1, 2),
    "two of a batch": lambda x: torch.cat([x, x * 2])[: x.shape[0]] + x,
    "norm": lambda x: F.batch_norm(x, torch.zeros(8), torch.ones(8)),
    "sums": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "largest": lambda x: x.max(2, keepdim=True).values.expand(-1, -1, 4, -1),
    "pool": lambda x: F.max_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3),
}


class Between(nn.Module):
    def __init__(self, form: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.form = form
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.form(self.a(x))).mean((2, 3))


def program_of(form: Callable[[torch.Tensor], torch.Tensor]) -> Program:
    torch.manual_seed(0)
    return capture(Between(form).eval(), torch.randn(3, 3, 4, 4))


def stated(program: Program) -> dict[str, str]:
    """Shape and dtype of every node."""
    return {node.name: edit._shapes(node.meta.get("val")) for node in program.graph.nodes if node.op != "output"}


@pytest.mark.parametrize("name", FORMS)
def test_a_cut_has_the_shapes_that_torch_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(FORMS[name])
    units = find_units(program)
    if not units.prunable:
        pytest.fail("nothing to cut")
    gone = units.prunable[0].units[1:4]
    by_trial = prune_channels(units, gone).program

    def unknown(*_: object) -> None:
        raise UnknownShapeError

    monkeypatch.setattr(TrialShapes, "symbolic", unknown)
    assert stated(prune_channels(units, gone).program) == stated(by_trial)
    by_trial.check()


@pytest.mark.parametrize("name", FORMS)
def test_every_node_of_a_captured_network_is_settled(name: str) -> None:
    program = program_of(FORMS[name])
    trials = TrialShapes(program, trials=2)
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert trials.agrees(node), node.name
            found = TrialShapes(program).symbolic(node, node.meta["val"])
            assert edit._shapes(found) == edit._shapes(node.meta["val"])


def test_what_trials_do_not_tell() -> None:
    """A size that the data decide has no number before they are there."""

    class Positive(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x[:, 0] > 0].sum(0, keepdim=True) + x

    program = capture(Positive().eval(), torch.randn(4, 3))
    trials = TrialShapes(program)
    unknown = []
    for node in program.graph.nodes:
        if node.op == "call_function":
            try:
                trials.agrees(node)
            except UnknownShapeError:
                unknown.append(str(node.target))
    assert any("index" in target or "nonzero" in target for target in unknown)
    program.check()


def test_another_form_is_not_guessed() -> None:
    """A size that follows the batch does not come from one that does not, nor another rank or number of results."""
    program = program_of(FORMS["relu"])
    node = next(n for n in program.graph.nodes if "relu" in str(n.target))
    trials, value = TrialShapes(program), node.meta["val"]
    assert trials.symbolic(node, value) is value
    for like in (torch.empty(7, 8, 4, 4), value[0], (value, value), 3):
        with pytest.raises(UnknownShapeError):
            trials.symbolic(node, like)


def test_a_wrong_statement_is_noticed() -> None:
    program = program_of(FORMS["relu"])
    node = next(n for n in program.graph.nodes if "relu" in str(n.target))
    node.meta["val"] = node.meta["val"][:, :4]
    assert not TrialShapes(program).agrees(node)
    with pytest.raises(ProgramError, match="its value is not as stated"):
        program.check()
