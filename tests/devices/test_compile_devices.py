"""A whole compile on another device gives what the CPU gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.devices.chosen import chosen_device
from foldcut.compiler.frontend.module_state import device_of_model
from foldcut.compiler.ir.execute import device_of
from torch import nn

pytestmark = pytest.mark.usefixtures("quick_measurement")

GOALS: dict[str, foldcut.Goal] = {
    "blocks": foldcut.Blocks(1),
    "channels": foldcut.Channels(0.5),
    "macs": foldcut.Macs(0.6),
    "ranks": foldcut.Ranks(keep=0.5),
    "latency": foldcut.Latency(0.7),
}
QUIET: dict[str, Any] = {"progress": False, "cache": False}
MIMIC = foldcut.MimicSettings(iterations=8, checks=2, batch_size=8)


def network(nets: SimpleNamespace) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = nets.ResNet(2, 16).eval()  # with 8 channels there would be none to cut
    return net


@pytest.mark.parametrize("name", GOALS)
def test_a_compile_on_another_device_is_that_of_the_cpu(
    name: str, nets: SimpleNamespace, counting_backend: Any, elsewhere: Any
) -> None:
    here, there = (
        foldcut.compile(
            network(nets),
            nets.images(60),
            goal=GOALS[name],
            backend=counting_backend,
            mimic=MIMIC,
            device=device,
            **QUIET,
        )
        for device in (None, elsewhere.device)
    )
    assert here.plan.decisions
    assert [str(d) for d in there.plan.decisions] == [str(d) for d in here.plan.decisions]
    assert device_of(there.program) == torch.device("cpu"), "the result is where files are written"
    batch = nets.images(7)
    assert torch.allclose(there.module(batch), here.module(batch), rtol=1e-4, atol=1e-4)
    assert there.report.output_error == pytest.approx(here.report.output_error, rel=1e-3, abs=1e-6)


def test_without_float64_there(nets: SimpleNamespace, counting_backend: Any, elsewhere: Any) -> None:
    options: dict[str, Any] = {"goal": foldcut.Channels(0.5), "backend": counting_backend, "mimic": None, **QUIET}
    here = foldcut.compile(network(nets), nets.images(60), **options)
    with elsewhere.without_float64():
        there = foldcut.compile(network(nets), nets.images(60), device=elsewhere.device, **options)
    assert there.plan.decisions
    batch = nets.images(7)
    assert torch.allclose(there.module(batch), here.module(batch), rtol=1e-3, atol=1e-4)


def test_the_network_and_the_samples_may_be_there(nets: SimpleNamespace, counting_backend: Any, elsewhere: Any) -> None:
    net, samples = network(nets), nets.images(60)
    options: dict[str, Any] = {"goal": foldcut.Channels(0.5), "backend": counting_backend, "mimic": None, **QUIET}
    here = foldcut.compile(net, samples, **options)
    net = net.to(elsewhere.device)
    there = foldcut.compile(net, samples.to(elsewhere.device), **options)
    assert there.plan.decisions
    assert device_of_model(net) == elsewhere.device, "the caller's network is left where it is"
    batch = nets.images(7)
    assert torch.allclose(there.module(batch), here.module(batch), rtol=1e-4, atol=1e-4)


def test_a_plan_is_applied_there(nets: SimpleNamespace, counting_backend: Any, elsewhere: Any, tmp_path: Path) -> None:
    net, samples = network(nets), nets.images(60)
    made = foldcut.compile(net, samples, goal=foldcut.Channels(0.5), backend=counting_backend, mimic=None, **QUIET)
    assert made.plan.decisions
    made.save(tmp_path)
    here, there = (
        foldcut.apply(net, tmp_path / "plan.json", calibration=samples, mimic=False, device=device, **QUIET)
        for device in ("cpu", elsewhere.device)
    )
    batch = nets.images(7)
    assert torch.allclose(there.module(batch), here.module(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "words"),
    [("cuda:99", "cannot be used"), ("meta", "no numbers"), ("nowhere", "cannot be used"), (3, "'auto', a name")],
)
def test_devices_that_cannot_be_used_are_refused(device: Any, words: str) -> None:
    with pytest.raises(foldcut.CompilerError, match=words) as refused:
        foldcut.PipelineSettings(device=device)
    assert refused.value.hint or refused.value.expected


def test_auto_is_where_the_network_is_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert chosen_device("auto", torch.device("cpu")) == torch.device("cpu")


def test_a_network_on_two_devices_is_refused(elsewhere: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2).to(elsewhere.device)).eval()
    with pytest.raises(foldcut.CompilerError, match="several devices"):
        foldcut.compile(net, torch.randn(20, 4), goal=foldcut.Channels(0.5), mimic=None, **QUIET)


def test_a_network_on_meta_has_no_weights() -> None:
    with pytest.raises(foldcut.CompilerError, match="has no weights: weight is on meta"):
        foldcut.capture(nn.Linear(4, 2, device="meta"), torch.randn(2, 4))
