"""Capture: what goes in, what is refused, and that the graph is the network."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.export.exporter import to_exported
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program, is_constant
from foldcut.compiler.support.errors import CaptureError
from foldcut.passes.solve.layers import find_layers
from torch import nn
from torch.nn import functional as F


class TwoInputs(nn.Module):
    """Takes (a, b), returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        joined = self.left(a) + self.right(b)
        return joined, joined.relu()


class DictOutput(TwoInputs):
    """Takes (a, b), returns a nested dict."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, object]:
        joined, positive = super().forward(a, b)
        return {"joined": joined, "parts": {"positive": positive}}


class InPlace(nn.Module):
    """Writes into its own intermediate values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.conv(x), inplace=True)
        y += 1
        y[:, 0] = 0.5
        return y.mul_(2).sum((2, 3))


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.arange(6.0).view(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.offset


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5, training=True)


class WritesInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def two_inputs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, generator=generator), torch.randn(count, 5, generator=generator)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()


@pytest.fixture(scope="module")
def exported(small: nn.Module) -> torch.export.ExportedProgram:
    dims = ({0: torch.export.Dim.DYNAMIC},)
    return torch.export.export(small, (torch.randn(2, 3, 4, 4),), dynamic_shapes=dims)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_module_runs_at_any_batch_size(
    residual: Program, residual_net: nn.Module, nets: SimpleNamespace, count: int
) -> None:
    x = nets.images(count)
    torch.testing.assert_close(residual(x), residual_net(x), rtol=1e-5, atol=1e-6)


def test_signature_of_a_module(residual: Program) -> None:
    (given,), (returned,) = residual.inputs, residual.outputs
    assert (given.name, given.shape, given.dtype) == ("x", ("batch", 3, 8, 8), torch.float32)
    assert (returned.name, returned.shape, returned.dtype) == ("output", ("batch", 4), torch.float32)


def test_state_dict_keys_are_those_of_the_module(residual: Program, residual_net: nn.Module) -> None:
    wanted = {key for key in residual_net.state_dict() if not key.endswith("num_batches_tracked")}
    assert set(residual.module.state_dict()) == wanted


def test_an_example_of_one_sample_is_enough(small: nn.Module) -> None:
    program = capture(small, torch.randn(1, 3, 4, 4))
    assert program.inputs[0].shape[0] == "batch"
    assert program(torch.zeros(5, 3, 4, 4)).shape == (5, 2)


def test_an_exported_program_and_its_file_give_the_same(
    small: nn.Module, exported: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    path = tmp_path / "net.pt2"
    torch.export.save(exported, path)
    x = torch.randn(3, 3, 4, 4)
    from_object, from_file = capture(exported), capture(path)
    assert from_object.text() == from_file.text() == capture(str(path)).text()
    assert from_object.fingerprint == from_file.fingerprint
    for program in (from_object, from_file):
        torch.testing.assert_close(program(x), small(x))


def test_a_captured_module_can_be_captured_again(residual: Program, nets: SimpleNamespace) -> None:
    again = capture(to_exported(residual).module(), nets.images())
    assert again.text() == residual.text()
    assert again.fingerprint == residual.fingerprint


def test_tuple_inputs_and_outputs() -> None:
    program = capture(TwoInputs().eval(), two_inputs(2))
    assert [s.name for s in program.inputs] == ["a", "b"]
    assert [s.name for s in program.outputs] == ["output_0", "output_1"]
    joined, positive = program(two_inputs(7))
    assert joined.shape == (7, 4)
    torch.testing.assert_close(positive, joined.relu())


def test_dict_inputs_and_outputs() -> None:
    net = DictOutput().eval()
    program = capture(net, dict(zip("ab", two_inputs(3), strict=True)))
    assert [s.name for s in program.inputs] == ["a", "b"]
    assert [s.name for s in program.outputs] == ["joined", "parts.positive"]
    batch = dict(zip("ab", two_inputs(7), strict=True))
    result, wanted = program(batch), net(**batch)
    torch.testing.assert_close(result["joined"], wanted["joined"])
    torch.testing.assert_close(result["parts"]["positive"], wanted["parts"]["positive"])


def test_in_place_operations_become_functional() -> None:
    net, x = InPlace().eval(), torch.randn(3, 3, 4, 4)
    program = capture(net, x)
    before = x.clone()
    torch.testing.assert_close(program(x), net(x))
    assert torch.equal(x, before)
    names = [str(n.target).split(".")[1] for n in program.graph.nodes if "aten." in str(n.target)]
    assert names
    assert not [name for name in names if name.endswith("_")]


def test_training_mode_warns_and_is_restored(small: nn.Module) -> None:
    small.train()
    small[1].eval()
    flags = [m.training for m in small.modules()]
    statistics = small[1].running_mean.clone()
    try:
        with pytest.warns(UserWarning, match=r"training mode.*model\.eval"):
            program = capture(small, torch.randn(2, 3, 4, 4))
        assert [m.training for m in small.modules()] == flags
    finally:
        small.eval()
    assert torch.equal(small[1].running_mean, statistics)
    x = torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(program(x), small(x))


def test_training_mode_is_restored_when_capture_fails() -> None:
    net = Branching().train()
    with pytest.warns(UserWarning), pytest.raises(CaptureError):
        capture(net, torch.randn(2, 3))
    assert net.training


def test_weights_are_copied() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), torch.randn(2, 3)
    program = capture(net, x)
    before, fingerprint = program(x), program.fingerprint
    with torch.no_grad():
        net[0].weight.add_(1)
        net[1].running_mean.add_(1)
    assert torch.equal(program(x), before)
    assert not torch.equal(net(x), before)
    assert fingerprint == program.fingerprint


def test_tied_weights_stay_tied() -> None:
    net = Tied().eval()
    program = capture(net, torch.randn(2, 4))
    assert program.parameter_count() == 16 + 4 + 4
    layers, rejects = find_layers(program)
    assert not layers
    assert {r.reason for r in rejects} == {"its weight is shared with another layer"}


def test_a_fixed_batch_is_kept_with_a_warning() -> None:
    net, x = FixedBatch().eval(), torch.randn(2, 3)
    with pytest.warns(UserWarning, match="fixes its batch size"):
        program = capture(net, x)
    assert program.inputs[0].shape == (2, 3)
    assert torch.equal(program(x), net(x))


def test_a_dynamic_batch_gives_no_warning(small: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        capture(small, torch.randn(2, 3, 4, 4))


def test_control_flow_on_data_is_refused_with_a_way_out() -> None:
    with pytest.raises(CaptureError, match=r"torch\.export cannot take the model") as caught:
        capture(Branching().eval(), torch.randn(2, 3))
    assert caught.value.hint is not None
    assert "control flow" in caught.value.hint
    assert caught.value.__cause__ is not None


def test_random_numbers_in_forward_are_refused() -> None:
    with pytest.raises(CaptureError, match="does not compute what the model computes") as caught:
        capture(Noisy().eval(), torch.ones(2, 64))
    assert "random" in str(caught.value.hint)


def test_a_model_that_writes_into_its_input_is_refused() -> None:
    with pytest.raises(CaptureError, match="when it runs: x"):
        capture(WritesInput().eval(), torch.randn(2, 3))


def test_an_export_in_training_mode_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    exported = torch.export.export(net, (torch.randn(2, 3, 4, 4),))
    with pytest.raises(CaptureError, match="changes its own state") as caught:
        capture(exported)
    assert "model.eval()" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.randn(2, 4, 4, 4), "does not run on the example"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.long), "does not run on the example"),
        ((torch.randn(2, 3, 4, 4), torch.randn(2)), "does not run on the example"),
        ({"nothing": torch.randn(2, 3, 4, 4)}, "does not run on the example"),
        (torch.randn(0, 3, 4, 4), "example batch is empty"),
        (None, "example batch is needed"),
    ],
)
def test_unfit_examples_are_refused(small: nn.Module, example: object, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(small, example)  # type: ignore[arg-type]


def test_the_cause_of_a_wrong_shape_is_quoted(small: nn.Module) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(small, torch.randn(2, 4, 4, 4))
    assert "channels" in caught.value.message
    assert caught.value.actual == "torch.float32[2, 4, 4, 4]"


def test_files_that_are_no_network_are_refused(tmp_path: Path) -> None:
    garbage, state = tmp_path / "garbage.pt2", tmp_path / "state.pt"
    garbage.write_bytes(b"not a zip file")
    torch.save(nn.Linear(2, 2).state_dict(), state)
    for path, message in [
        (tmp_path / "missing.pt2", "no such file"),
        (garbage, r"not a readable \.pt2"),
        (state, r"cannot read state\.pt as a network"),
    ]:
        with pytest.raises(CaptureError, match=message) as caught:
            capture(path)
        assert caught.value.hint


def test_a_state_dict_is_refused() -> None:
    with pytest.raises(CaptureError, match="cannot capture a OrderedDict") as caught:
        capture(nn.Linear(2, 2).state_dict())  # type: ignore[arg-type]
    assert "state_dict" in str(caught.value.hint)


def test_only_tensors_that_are_read_are_kept(residual: Program) -> None:
    constants = {str(n.target) for n in residual.graph.nodes if is_constant(n)}
    assert constants == set(residual.module.state_dict())
