"""Sums over many batches that lose nothing that counts, on whatever device the terms lie."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..processes.team import Term, team
from .triangle import packed, unpacked


@functools.cache
def widest(device: torch.device) -> torch.dtype:
    """The most exact dtype that a device computes in: float64, or float32 where it has none (Apple's ``mps``).

    Arguments:
        device: The device. It is asked once.

    Returns:
        `torch.float64` or `torch.float32`.

    Example:
        >>> from foldcut.compiler.devices.precision import widest
        >>> widest(torch.device("cpu"))
        torch.float64
    """
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError, NotImplementedError):
        return torch.float32
    return torch.float64


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32 meanwhile: never in TF32, whose ten bits of a number a Gram matrix cannot spare.

    The setting is the process's own and is put back in the end. Elsewhere than on ``cuda`` nothing changes.

    Arguments:
        device: The device of what is multiplied.

    Example:
        >>> from foldcut.compiler.devices.precision import exact_products
        >>> with exact_products(torch.device("cuda")):
        ...     torch.backends.cuda.matmul.fp32_precision
        'ieee'
    """
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends  # its annotations leave these out
    settings = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, old in zip(settings, before, strict=True):
            setting.fp32_precision = old


def wide_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of all values as a tensor on their device, in the most exact dtype that it has.

    Arguments:
        values: Any tensor of floating-point numbers.

    Returns:
        A tensor without dimensions. Nothing waits for it.

    Example:
        >>> from foldcut.compiler.devices.precision import wide_sum
        >>> wide_sum(torch.ones(3))
        tensor(3., dtype=torch.float64)
    """
    return values.sum(dtype=widest(values.device))


def added(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of at least one tensor, entry by entry, where they are.

    Arguments:
        terms: Tensors of one shape.

    Returns:
        A tensor of that shape. Nothing waits for it.

    Example:
        >>> from foldcut.compiler.devices.precision import added
        >>> added([torch.ones(2), torch.ones(2)])
        tensor([2., 2.])
    """
    return functools.reduce(torch.add, terms)


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64: where it is, or on the CPU where its device has no float64.

    Arguments:
        tensor: A tensor that stays, such as a weight: on a device without float64 this waits for it.

    Returns:
        The same values in float64.

    Example:
        >>> from foldcut.compiler.devices.precision import in_float64
        >>> in_float64(torch.ones(2)).dtype
        torch.float64
    """
    return tensor.double() if widest(tensor.device) == torch.float64 else tensor.cpu().double()


class WideSum:
    """A running sum that stays on the device of its terms. Nothing waits for the device before the sum is read. Of
    several processes each adds its own terms, and all read the sum over all of them.

    Terms are added in float64 where the device has it. Where it has none they are added in float32, and what each
    addition rounds away is added up beside it (compensated sums: Knuth's exact two-sum, Neumaier's way of keeping its
    errors): the sum of n terms is then off by about one rounding of the whole, as it is in float64, and not by n of
    them. The terms themselves are float32 there.

    Arguments:
        symmetric: Whether the terms are matrices (..., n, n) that are symmetric bit for bit: of several processes each
            sends one triangle of its sum.

    Example:
        >>> from foldcut.compiler.devices.precision import WideSum
        >>> total = WideSum()
        >>> for batch in (torch.tensor([0.1, 2.0]), torch.tensor([0.2, 3.0])):
        ...     total.add(batch)
        >>> total.value().tolist()[1]
        5.0
    """

    def __init__(self, *, symmetric: bool = False) -> None:
        self.symmetric = symmetric
        self._total: torch.Tensor | None = None
        self._own = False  # a first term is whoever's it was
        self._lost: torch.Tensor | None = None

    def add(self, term: torch.Tensor) -> None:
        """Add a tensor of the shape of the others."""
        term = term.to(widest(term.device))
        if self._total is None:
            self._total = term
            return
        if self._own and term.dtype == torch.float64:
            self._total += term
            return
        total, self._own = self._total + term, True
        if total.dtype != torch.float64:
            back = total - self._total
            lost = (self._total - (total - back)) + (term - back)
            self._lost = lost if self._lost is None else self._lost + lost
        self._total = total

    def value(self) -> torch.Tensor:
        """The sum over all processes in float64: where its terms are, on the CPU where their device has no float64.

        Raises:
            ValueError: If nothing was added.
        """
        (found,) = totals([self])
        if found is None:
            raise ValueError("the sum of nothing has no shape: add a tensor first")
        return found

    def own(self) -> torch.Tensor | None:
        """The sum of what this process has added, in float64; None where that is nothing."""
        if self._total is None or self._total.dtype == torch.float64:
            return self._total
        total = self._total.cpu().double()
        return total if self._lost is None else total + self._lost.cpu().double()


def totals(sums: Sequence[WideSum]) -> list[torch.Tensor | None]:
    """Several sums over all processes, in one exchange; None for those of nothing.

    Arguments:
        sums: The sums, the same ones on all processes.

    Returns:
        Their values in float64.

    Example:
        >>> from foldcut.compiler.devices.precision import WideSum, totals
        >>> totals([WideSum()])
        [None]
    """
    own = [total.own() for total in sums]
    if team().size == 1:
        return own
    terms = [_if_there(packed, term) if total.symmetric else term for total, term in zip(sums, own, strict=True)]
    found = team().sums(terms)
    return [_if_there(unpacked, term) if total.symmetric else term for total, term in zip(sums, found, strict=True)]


def _if_there(change: Callable[[torch.Tensor], torch.Tensor], term: Term) -> Term:
    return None if term is None else change(term)


class WideSums:
    """Several sums of numbers under names, read together: the CPU waits for the device once.

    Terms are kept and added up in the end without rounding (`math.fsum`): in whatever order they came, and from however
    many processes, a sum is the same, bit for bit.

    Example:
        >>> from foldcut.compiler.devices.precision import WideSums
        >>> sums = WideSums()
        >>> for batch in (torch.ones(3), torch.ones(2)):
        ...     sums.add("error", batch.sum())
        >>> sums.floats()
        {'error': 5.0}
    """

    def __init__(self) -> None:
        self._terms: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, term: torch.Tensor) -> None:
        """Add a tensor of one value to the sum called `name`."""
        self._terms.setdefault(name, []).append(term.to(widest(term.device)))

    def floats(self) -> dict[str, float]:
        """Every sum over all processes as a number."""
        terms = [term for some in self._terms.values() for term in some]
        values = iter(torch.stack(terms).tolist() if terms else [])
        own = {name: [next(values) for _ in some] for name, some in self._terms.items()}
        found: dict[str, list[float]] = {}
        for part in team().objects(own):
            for name, some in part.items():
                found.setdefault(name, []).extend(some)
        return {name: _exactly(some) for name, some in found.items()}


def _exactly(terms: Sequence[float]) -> float:
    """Their sum, rounded once; as floats add up where one of them is not finite, or the sum is too large for one."""
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):
        return sum(terms)
