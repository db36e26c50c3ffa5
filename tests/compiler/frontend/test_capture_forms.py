"""What networks take, return and do to themselves: captured or refused in one sentence, and given back as they were."""

import collections
from collections.abc import Callable

import foldcut
import pytest
import torch
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.frontend.model_inputs import needed_inputs
from foldcut.compiler.ir.compare import compare
from foldcut.compiler.support.errors import CaptureError
from torch import nn

Pair = collections.namedtuple("Pair", "first second")


def x(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(count))


class Small(nn.Module):
    """Two layers and a way to use them."""

    def __init__(self, way: Callable[..., object]) -> None:
        super().__init__()
        self.first, self.second, self.way = nn.Linear(4, 8), nn.Linear(8, 4), way

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


class Variable(Small):
    """Any number of arguments."""

    def forward(self, *xs: torch.Tensor) -> object:
        return self.way(self, *xs)


class Single(Small):
    """One argument."""

    def forward(self, x: torch.Tensor) -> object:
        return self.way(self, x)


class Mixed(Small):
    """One argument and any number of others."""

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> object:
        return self.way(self, x, *others)


@pytest.mark.parametrize(
    ("net", "count"),
    [
        (Variable(lambda net, a: net.body(a)), 1),
        (Variable(lambda net, a, b: net.body(a) + b), 2),
        (Mixed(lambda net, a, b, c: net.body(a) + b * c), 3),
    ],
)
def test_any_number_of_arguments_at_any_batch(net: nn.Module, count: int) -> None:
    net.eval()
    program = capture(net, (x(),) * count)
    assert [s.shape for s in program.inputs] == [("batch", 4)] * count
    batch = tuple(x(7) * (i + 1) for i in range(count))
    torch.testing.assert_close(program(batch), net(*batch))


class Named(Small):
    """Any number of arguments by name."""

    def forward(self, **fields: torch.Tensor) -> object:
        return self.way(self, **fields)


class Partly(Small):
    """One argument, and others by name."""

    def forward(self, a: torch.Tensor, **fields: torch.Tensor) -> object:
        return self.way(self, a, **fields)


@pytest.mark.parametrize("kind", [Named, Partly])
def test_any_number_of_keywords_at_any_batch(kind: Callable[..., nn.Module]) -> None:
    net = kind(lambda net, a, b: net.body(a) - b).eval()
    program = capture(net, {"a": x(), "b": x()})
    assert [(s.name, s.shape) for s in program.inputs] == [("a", ("batch", 4)), ("b", ("batch", 4))]
    batch = {"a": x(7), "b": x(7) * 2}
    torch.testing.assert_close(program(batch), net(**batch))
    assert "forward" not in vars(net)  # given back as it was


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_networks_are_unwrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = Single(lambda net, x: net.body(x)).eval()
    wrapped = wrap(net)
    inputs = needed_inputs(wrapped)
    assert inputs is not None and inputs.names == ("x",)
    program = capture(wrapped, x())
    assert [(s.name, s.shape) for s in program.inputs] == [("x", ("batch", 4))]
    assert set(program.module.state_dict()) == set(net.state_dict())


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (lambda net, x: net.body(x) * (2 if x.shape[0] == 1 else 1), "with 1 sample"),
        (lambda net, x: net.body(x) * (2 if x.shape[0] > 64 else 1), "another way for other numbers of samples"),
        (lambda net, x: (net.body(x), x.shape[0]), "a number that is no tensor"),
        (lambda net, x: (net.body(x), 3), "a number that is no tensor"),
        (lambda net, x: None, "returns no tensor"),
        (lambda net, x: Pair(net.body(x), x), "cannot be saved"),
    ],
)
def test_what_would_go_wrong_later_is_refused(way: Callable[..., object], message: str) -> None:
    with pytest.raises(CaptureError, match=message) as caught:
        capture(Single(way).eval(), x())
    assert caught.value.hint


def test_no_output_and_none_beside_a_tensor() -> None:
    program = capture(Single(lambda net, x: (net.body(x), None)).eval(), x())
    assert len(program.outputs) == 1
    assert program(x())[1] is None


def test_weights_that_are_not_there_and_sparse_inputs() -> None:
    net = Single(lambda net, x: net.body(x)).eval()
    with pytest.raises(CaptureError, match="not a dense tensor"):
        capture(net, torch.eye(4).to_sparse())
    with pytest.raises(CaptureError, match=r"first\.weight is on meta"):
        capture(net.to("meta"), x())


def test_weights_that_a_first_run_would_make_up() -> None:
    """Neither capture nor reading the data for a network makes them."""
    net = nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3)).eval()
    with pytest.raises(CaptureError, match=r"0\.weight is uninitialised"):
        capture(net, torch.randn(4, 5))
    with pytest.raises(CaptureError, match=r"0\.weight is uninitialised"):
        foldcut.compile(net, torch.randn(4, 5), goal=foldcut.Channels(0.5), cache=False, progress=False)
    assert isinstance(net[0], nn.LazyLinear)
    net(torch.randn(4, 5))
    assert capture(net, torch.randn(4, 5)).parameter_count() == 24


class Remembers(nn.Module):
    """Counts its calls, keeps what it saw, and draws random numbers that it does not use."""

    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        self.layer, self.calls, self.seen, self.writes = nn.Linear(4, 4), 0, None, writes
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen = self.layer(x)
        self.more = torch.rand(3)
        if self.writes:
            self.count += 1
        return self.seen


@pytest.mark.parametrize("writes", [False, True])
def test_the_network_is_given_back_as_it_was(writes: bool) -> None:
    net = Remembers(writes=writes).eval()
    before, random = set(vars(net)), torch.get_rng_state()
    if writes:
        with pytest.raises(CaptureError, match="changes its own state"):
            capture(net, x())
    else:
        capture(net, x())
    assert (net.calls, net.seen, float(net.count)) == (0, None, 0.0)
    assert set(vars(net)) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in net.parameters())


def test_imaginary_parts_count() -> None:
    real, other = torch.tensor([1 + 1j, 2 + 0j]), torch.tensor([1 - 1j, 2 + 0j])
    assert compare(real, real).relative == 0
    assert compare(real, other).relative == pytest.approx(1.0)
