"""The second device of these tests: that it finds what it is for."""

from types import SimpleNamespace

import pytest
import torch


def test_it_computes_what_the_cpu_does(elsewhere: SimpleNamespace) -> None:
    here = torch.randn(5, 5)
    there = here.to(elsewhere.device)
    assert there.device == elsewhere.device
    assert torch.equal((there @ there.T + there.new_ones(5)).cpu(), here @ here.T + 1)
    weight = torch.nn.Parameter(there)
    (gradient,) = torch.autograd.grad((weight @ weight).square().sum(), [weight])
    same = torch.nn.Parameter(here)
    assert torch.equal(gradient.cpu(), torch.autograd.grad((same @ same).square().sum(), [same])[0])


def test_devices_do_not_mix(elsewhere: SimpleNamespace) -> None:
    there = torch.ones(4, 4, device=elsewhere.device)
    here = torch.ones(4, 4)
    for mixed in (lambda: there + here, lambda: there @ here, lambda: torch.cat([there, here])):
        with pytest.raises(RuntimeError, match="elsewhere"):
            mixed()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=elsewhere.device, generator=torch.Generator())
    assert (there + torch.tensor(1.0)).device == there[torch.tensor([0, 2])].device == elsewhere.device


def test_what_waits_is_seen(elsewhere: SimpleNamespace) -> None:
    there = torch.ones(4, 4, device=elsewhere.device)
    with elsewhere.watched() as waits:
        there = there * 2
        torch.linalg.cholesky_ex(there)
        assert waits == []
        float(there.sum())
        bool(there.isfinite().all())
        there.cpu()
        there[there > 1]
        assert len(waits) == 4


def test_float64_can_be_missing(elsewhere: SimpleNamespace) -> None:
    with elsewhere.without_float64(), pytest.raises(TypeError, match="float64"):
        torch.ones(3, device=elsewhere.device).double()
