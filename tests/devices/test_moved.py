"""Programs on another device, and what reads samples there."""

from __future__ import annotations

import math
from types import SimpleNamespace

import foldcut
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.data_distance import channel_statistics, kept_by_norms
from foldcut.compiler.devices.precision import WideSum, WideSums, exact_products
from foldcut.compiler.export.edit_device import moved
from foldcut.compiler.ir.compare import compare, relative_error
from foldcut.compiler.ir.execute import device_of, placed
from foldcut.compiler.ir.program import Program
from foldcut.passes.solve.moments import Moments
from torch import nn


class Tied(nn.Module):
    """A weight read twice, once transposed, and tensors that the graph makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(12.0).reshape(2, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(6, device=x.device)
        y = self.second(torch.relu(self.first(x))) @ self.first.weight.T
        return y + self.table[places % 2].sum(1) + torch.ones(6, device=x.device) * places


@pytest.mark.parametrize("name", ["residual", "transformer", "inverted"])
def test_there_and_back(
    name: str, request: pytest.FixtureRequest, nets: SimpleNamespace, elsewhere: SimpleNamespace
) -> None:
    program: Program = request.getfixturevalue(name)
    data = nets.tokens(4) if name == "transformer" else nets.images(4)
    there = moved(program, elsewhere.device)
    assert device_of(program).type == "cpu" and device_of(there) == elsewhere.device
    assert list(there.nodes) == list(program.nodes) and moved(there, elsewhere.device) is there
    for batch in (data, data.to(elsewhere.device)):  # samples of the CPU, and of the device
        torch.testing.assert_close(there(batch).cpu(), program(data), rtol=1e-5, atol=1e-6)
    for node in there.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            assert value.device == elsewhere.device, node.name
    back = moved(there, torch.device("cpu"))
    back.check(program)
    assert back.fingerprint == program.fingerprint == there.fingerprint
    assert there.parameter_count() == program.parameter_count()


def test_shared_weights_are_shared_there(elsewhere: SimpleNamespace) -> None:
    torch.manual_seed(0)
    program = foldcut.capture(Tied().eval(), torch.randn(3, 6))
    there = moved(program, elsewhere.device)
    assert there.parameter_count() == program.parameter_count() == 6 * 6 + 12
    weights = [node for node in there.graph.nodes if node.op == "get_attr" and node.meta["val"].dim() == 2]
    assert weights and not any(there.owned(node) for node in weights)
    x = torch.randn(5, 6)
    assert torch.equal(there(x).cpu(), program(x))


def test_a_batch_that_is_there_stays(residual: Program, nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    batch = nets.images(2)
    assert placed(residual, batch) is batch
    there = moved(residual, elsewhere.device)
    with elsewhere.watched() as waits:
        onto = placed(there, (batch,))
    assert onto[0].device == elsewhere.device and waits == []
    assert placed(there, onto) is onto


def test_samples_there_are_the_samples_here(nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    here, there = CalibrationSet.of(nets.images(12)), elsewhere.samples(nets.images(12))
    assert there.fingerprint == here.fingerprint and there.digests == here.digests
    assert torch.equal(there.content_order, here.content_order)
    assert torch.equal(there.split(seed=1)[0].leaves[0].cpu(), here.split(seed=1)[0].leaves[0])


def test_statistics_of_samples(residual: Program, nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    samples, names = CalibrationSet.of(nets.images(12)), list(kept_by_norms(residual))
    there = moved(residual, elsewhere.device)
    here, found = (channel_statistics(program, names, samples) for program in (residual, there))
    assert len(found) == len(here) > 2
    for name, channels in found.items():
        torch.testing.assert_close(channels.deviation.cpu(), here[name].deviation, rtol=1e-4, atol=0)


def test_an_own_metric(residual: Program, nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    samples, labels = CalibrationSet.of(nets.images(12)), torch.arange(12) % 4
    scores = foldcut.Top1(labels).bound(residual, samples, samples)
    found = scores(moved(residual, elsewhere.device))
    assert found.device.type == "cpu" and torch.equal(found, scores(residual))


def test_differences(elsewhere: SimpleNamespace) -> None:
    a, b = torch.randn(4, 5), torch.randn(4, 5)
    there = a.to(elsewhere.device), b.to(elsewhere.device)
    assert compare(*there) == compare(a, b)
    assert relative_error(*there) == relative_error(a, b)


def test_compensated_sums(elsewhere: SimpleNamespace) -> None:
    """A thousand terms over many powers of ten: plain float32 is off by hundreds of roundings."""
    torch.manual_seed(0)
    terms = torch.randn(1000, 64) * torch.logspace(-4, 4, 1000).unsqueeze(1)
    exact = terms.double().sum(0)
    plain = terms[0].clone()
    with elsewhere.without_float64():
        total, sums = WideSum(), WideSums()
        for term in terms:
            total.add(term.to(elsewhere.device))
            sums.add("first", term[0].to(elsewhere.device))
            plain += term
        found = total.value()
        assert found.device.type == "cpu" and sums.floats() == {"first": math.fsum(terms[:, 0].tolist())}
    scale = terms.double().abs().sum(0)
    assert float(((found - exact).abs() / scale).max()) < 1e-9
    assert float(((plain.double() - exact).abs() / scale).max()) > 1e-8
    with pytest.raises(ValueError, match="add a tensor first"):
        WideSum().value()


def test_no_tf32_in_gram_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the process has set, which it has again afterwards."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [s.fp32_precision for s in settings]
    torch.set_float32_matmul_precision("high")
    try:
        fast = [s.fp32_precision for s in settings]
        assert "tf32" in fast
        seen: list[list[str]] = []
        real = Moments._of.__func__  # type: ignore[attr-defined]

        def spied(cls: type[Moments], rows: torch.Tensor, residual: torch.Tensor) -> Moments:
            seen.append([s.fp32_precision for s in settings])
            return real(cls, torch.ones(1, 2, 3), torch.ones(1, 1, 3))  # type: ignore[no-any-return]

        monkeypatch.setattr(Moments, "_of", classmethod(spied))
        Moments.of(SimpleNamespace(device=torch.device("cuda")), torch.ones(1, 1, 3))  # type: ignore[arg-type]
        assert seen == [["ieee"] * 3]
        assert [s.fp32_precision for s in settings] == fast
        with pytest.raises(KeyError), exact_products(torch.device("cuda")):
            raise KeyError
        assert [s.fp32_precision for s in settings] == fast
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [s.fp32_precision for s in settings[1:]] == before[1:]
