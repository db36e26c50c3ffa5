"""Exported programs, metrics, crops and Frank-Wolfe steps on another device, also on one without float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.ir.execute import device_of
from foldcut.compiler.ir.program import Program
from foldcut.compiler.metric.kept_state import state_kept
from foldcut.passes.frank_wolfe import (
    FrankWolfe,
    GroupKSupport,
    KSparse,
    KSupport,
    LpBall,
    NuclearBall,
    SpectralKSparse,
)
from foldcut.passes.frank_wolfe.constraints import Constraint
from foldcut.passes.mimic.crops import Crop
from foldcut.passes.solve.moments import Moments
from torch import nn

pytestmark = pytest.mark.usefixtures("quick_measurement")

QUIET: dict[str, Any] = {"progress": False, "cache": False, "mimic": None}
SETS = [LpBall(p=2.0), KSparse(k=3), KSupport(k=3), GroupKSupport(k=2), NuclearBall(), SpectralKSparse(k=2)]


def exported_there(nets: SimpleNamespace, device: torch.device) -> tuple[nn.Module, torch.export.ExportedProgram]:
    net = nets.seeded(nets.ResNet)
    batch = (nets.images(2).to(device),)
    with torch.no_grad():
        there = nets.seeded(nets.ResNet).to(device)
        return net, torch.export.export(there, batch, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def test_an_exported_program_with_weights_there(nets: SimpleNamespace, elsewhere: SimpleNamespace) -> None:
    net, exported = exported_there(nets, elsewhere.device)
    program = foldcut.capture(exported)
    wanted = foldcut.capture(net, nets.images(2))
    assert device_of(program) == torch.device("cpu")
    for node in program.graph.nodes:
        leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
        assert all(leaf.device.type == "cpu" for leaf in leaves if isinstance(leaf, torch.Tensor)), node.name
    assert torch.equal(program(nets.images(5)), wanted(nets.images(5)))
    assert {tensor.device for tensor in exported.state_dict.values()} == {elsewhere.device}, "the caller's stays"


def test_it_is_compiled_where_it_is(nets: SimpleNamespace, counting_backend: Any, elsewhere: SimpleNamespace) -> None:
    net, exported = exported_there(nets, elsewhere.device)
    options: dict[str, Any] = {"goal": foldcut.Blocks(1), "backend": counting_backend, **QUIET}
    here = foldcut.compile(net, nets.images(60), **options)
    with elsewhere.watched() as waits:
        there = foldcut.compile(exported, nets.images(60), **options)
    assert waits, "nothing ran on the device"
    batch = nets.images(7)
    assert torch.allclose(there.module(batch), here.module(batch), rtol=1e-4, atol=1e-4)


def test_an_exported_program_on_two_devices_is_refused(elsewhere: SimpleNamespace) -> None:
    exported = torch.export.export(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).eval(), (torch.randn(2, 3),))
    exported.state_dict["1.weight"] = nn.Parameter(exported.state_dict["1.weight"].detach().to(elsewhere.device))
    with pytest.raises(foldcut.CompilerError, match="several devices") as refused:
        foldcut.capture(exported)
    assert "move_to_device_pass" in str(refused.value)


def test_a_graph_within_the_graph_stays_where_it_is() -> None:
    class Branched(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    program = foldcut.capture(torch.export.export(Branched().eval(), (torch.ones(2, 3),)))
    assert torch.equal(program(torch.ones(2, 3)), torch.full((2, 3), 2.0))


def test_a_metric_draws_nothing_from_the_devices_generator(
    residual: Program, elsewhere: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"there": torch.tensor([1, 2, 3], dtype=torch.uint8)}
    module = torch.get_device_module(elsewhere.device)
    monkeypatch.setattr(module, "get_rng_state", lambda device=0: state["there"].clone(), raising=False)
    monkeypatch.setattr(module, "set_rng_state", lambda new, device=0: state.update(there=new), raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: elsewhere.device)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with state_kept():
        state["there"] = torch.tensor([9, 9, 9], dtype=torch.uint8)
    assert state["there"].tolist() == [1, 2, 3]
    monkeypatch.setattr(module, "is_initialized", lambda: False)
    with state_kept():
        state["there"] = torch.tensor([9, 9, 9], dtype=torch.uint8)
    assert state["there"].tolist() == [9, 9, 9], "a device that nothing has used is not begun"


def test_crops_are_cut_there(elsewhere: SimpleNamespace) -> None:
    images, labels = torch.randn(5, 3, 12, 10), torch.arange(5)
    crop = Crop(size=(6, 4), whole=(12, 10))
    wanted = crop.cut((images, labels), torch.Generator().manual_seed(3))
    there = tuple(leaf.to(elsewhere.device) for leaf in (images, labels))
    with elsewhere.watched() as waits:
        found = crop.cut(there, torch.Generator().manual_seed(3))
    assert waits == []
    assert {leaf.device for leaf in found} == {elsewhere.device}
    assert all(torch.equal(one.cpu(), two) for one, two in zip(found, wanted, strict=True))


@pytest.mark.parametrize("constraint", SETS, ids=str)
def test_frank_wolfe_without_float64(constraint: Constraint, elsewhere: SimpleNamespace) -> None:
    """The CPU takes the steps: what comes out is the CPU's, bit for bit, warm starts and norms included."""
    torch.manual_seed(0)
    first, data = torch.randn(8, 10) / 10, torch.randn(3, 8, 10)

    def trained(device: torch.device) -> tuple[torch.Tensor, float]:
        weight = nn.Parameter(first.clone().to(device))
        optimizer = FrankWolfe([{"params": [weight], "constraint": constraint.with_radius(2.0)}], lr=0.1)
        optimizer.make_feasible()
        for direction in data:
            weight.grad = direction.to(device)
            optimizer.step()
        gap = next(iter(optimizer.oracle_gaps().values()))
        return weight.detach().cpu(), gap

    wanted = trained(torch.device("cpu"))
    with elsewhere.without_float64():
        found = trained(elsewhere.device)
    assert torch.equal(found[0], wanted[0])
    assert found[1] == wanted[1]


@pytest.mark.parametrize("constraint", SETS, ids=str)
def test_what_is_asked_of_a_set_without_float64(constraint: Constraint, elsewhere: SimpleNamespace) -> None:
    torch.manual_seed(0)
    w, m = torch.randn(8, 10), torch.randn(8, 10)
    with elsewhere.without_float64():
        there = w.to(elsewhere.device), m.to(elsewhere.device)
        vertex = constraint.lmo(there[1])
        assert vertex.device == elsewhere.device and torch.equal(vertex.cpu(), constraint.lmo(m))
        assert constraint.norm(there[0]) == constraint.norm(w)
        assert constraint.dual_norm(there[1]) == constraint.dual_norm(m)
        assert constraint.duality_gap(*there) == constraint.duality_gap(w, m)
        assert constraint.oracle_gap(there[1], vertex) == constraint.oracle_gap(m, vertex.cpu())
        assert constraint.initial_radius(there[0]) == constraint.initial_radius(w)
        assert torch.equal(constraint.pull_in(there[0]).cpu(), constraint.pull_in(w))


@pytest.mark.parametrize(
    "cause",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory"),
    ],
    ids=["cuda", "mps"],
)
def test_too_little_memory_there_is_one_clear_error(
    cause: Exception, nets: SimpleNamespace, counting_backend: Any, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_args: Any, **_options: Any) -> Any:
        raise cause

    monkeypatch.setattr(Moments, "_of", out_of_memory)
    options: dict[str, Any] = {"goal": foldcut.Blocks(1), "backend": counting_backend, **QUIET}
    net = nets.seeded(nets.ResNet)
    with pytest.raises(foldcut.CompilerError, match=r"the device has too little memory: .* out of memory") as refused:
        foldcut.compile(net, nets.images(60), device=elsewhere.device, **options)
    assert 'device="cpu"' in str(refused.value) and refused.value.__cause__ is cause
    monkeypatch.undo()
    assert foldcut.compile(net, nets.images(60), device="cpu", **options).report.met is not None


def test_other_errors_there_are_as_they_are(
    nets: SimpleNamespace, counting_backend: Any, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(Moments, "_of", broken)
    with pytest.raises(RuntimeError, match="device-side assert") as raised:
        foldcut.compile(
            nets.seeded(nets.ResNet),
            nets.images(60),
            goal=foldcut.Blocks(1),
            backend=counting_backend,
            device=elsewhere.device,
            **QUIET,
        )
    assert not isinstance(raised.value, foldcut.CompilerError)
