"""Exchanges of several processes over a process group of torch.distributed.

Each begins with a few words from everyone (`_Words`): a process that has failed says so there, and all end with its
error; processes that have gone different ways find that out, and none waits for ever.
"""

from __future__ import annotations

import ctypes
import io
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..support.errors import ProcessError, first_line, named_first_line
from . import heartbeat
from .on_device import OnDevice, number_of, place
from .team import T, Team, Term

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

#: What an exchange is about.
SUMS, MAXIMA, OBJECTS, ONE, END = range(1, 6)
_KINDS = {SUMS: "a sum", MAXIMA: "a maximum", OBJECTS: "what each has", ONE: "a result for all", END: "the end"}


class LostError(ProcessError):
    """Another process failed or ended, or went its own way: there is nobody to tell any more."""


@dataclass(frozen=True)
class _Words:
    """What each process says in front of an exchange: what it is about, how many there were before, whether the process
    has failed, the size or a hash of what it will send, whether it has all of that, and the number of the device where
    it would send it from (0 is the host)."""

    kind: int
    number: int = 0
    failed: int = 0
    content: int = 0
    complete: int = 1
    place: int = 0


@dataclass(frozen=True)
class _Raised:
    """An exception on its way to the other processes."""

    cause: BaseException

    def packed(self) -> bytes:
        """Itself as bytes."""
        return _pickled(_Raised(sendable(self.cause)))


class Joined(Team):
    """One of several processes.

    Sums are made by the group's all-reduce in float64: in an order that depends on the number of processes alone, the
    same bits on all of them. Where no addition rounds (float32 products of like size, counts) they are those of one
    process.

    Arguments:
        rank: The number of this process.
        size: How many there are.
        group: A process group of the backend ``gloo``, of all of them and for nothing else. Tensors of other devices
            go through the host's memory, but for sums where there is an `on_device` and each process has a device of
            its own.
    """

    def __init__(self, rank: int, size: int, group: ProcessGroup) -> None:
        super().__init__(rank, size)
        self._group = group
        self._number = 0
        #: Whether the others are still there, where that can be asked.
        self.heartbeat: heartbeat.Heartbeat | None = None
        #: What adds up tensors of a device where they are.
        self.on_device: OnDevice | None = None

    def sums(self, terms: Sequence[Term]) -> list[Term]:
        return self._reduced(SUMS, terms)

    def maxima(self, values: Sequence[Term]) -> list[Term]:
        return self._reduced(MAXIMA, values)

    def objects(self, value: T) -> list[T]:
        content = _pickled(value)
        sizes = [words.content for words in self._meet(_Words(OBJECTS, content=len(content)))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(content)] = _tensor(content)
        return [_unpickled(row[:size]) for row, size in zip(self._gathered(padded), sizes, strict=True)]

    def one(self, owner: int, make: Callable[[], T]) -> T:
        if self.rank != owner:
            found = _unpickled(self._broadcast(None, self._meet(_Words(ONE))[owner].content, owner))
            if isinstance(found, _Raised):
                raise found.cause
            return found
        try:
            made = make()
        except Exception as cause:
            self._send_all(ONE, _Raised(cause).packed())
            raise
        self._send_all(ONE, _pickled(made))
        return made

    def fail(self, cause: BaseException) -> None:
        with suppress(ProcessError):  # there may be nobody left
            if not isinstance(cause, LostError):
                self._meet(_Words(END), cause)

    def end(self) -> None:
        self._meet(_Words(END))

    def _reduced(self, kind: int, terms: Sequence[Term]) -> list[Term]:
        """All terms in one exchange; they come back where they were."""
        shapes = [None if term is None else tuple(term.shape) for term in terms]
        complete = None not in shapes
        device = self.on_device.device(terms) if self.on_device is not None and kind == SUMS else None
        own = _Words(kind, content=number_of(shapes), complete=complete, place=0 if device is None else place(device))
        said = self._meet(own)
        if not all(words.complete for words in said) or len({words.content for words in said}) > 1:
            shapes = self._agreed(shapes)
        places = {words.place for words in said}
        if device is None or 0 in places or len(places) < self.size:
            device = torch.device("cpu")
        nothing = 0.0 if kind == SUMS else -torch.inf
        flat = [_flat(term, shape, nothing, device) for term, shape in zip(terms, shapes, strict=True)]
        whole = self._reduce(torch.cat(flat), kind) if flat else torch.zeros(0)
        parts = whole.split([len(part) for part in flat])
        return [
            None if shape is None else part.reshape(shape).to(torch.device("cpu") if term is None else term.device)
            for term, shape, part in zip(terms, shapes, parts, strict=True)
        ]

    def _agreed(self, shapes: list[tuple[int, ...] | None]) -> list[tuple[int, ...] | None]:
        """Of each term the shape that those say who have it."""
        columns = zip(*self.objects(shapes), strict=True)
        known = [{shape for shape in column if shape is not None} for column in columns]
        if any(len(found) > 1 for found in known):
            raise LostError(
                "the processes add up tensors of different shapes",
                actual="; ".join(str(sorted(found)) for found in known if len(found) > 1),
                hint="start all of them with the same model, samples and versions",
            )
        return [next(iter(found), None) for found in known]

    def _reduce(self, flat: torch.Tensor, kind: int) -> torch.Tensor:
        import torch.distributed as dist

        group = self._group
        if self.on_device is not None and flat.device.type == self.on_device.kind:
            group = self.on_device.group
        if kind == SUMS:
            return self._spoken(flat, lambda: dist.all_reduce(flat, dist.ReduceOp.SUM, group=group, async_op=True))
        missing = flat.isnan()  # what a maximum makes of these nobody says
        both = torch.cat([flat.masked_fill(missing, -torch.inf), missing.double()])
        self._spoken(both, lambda: dist.all_reduce(both, dist.ReduceOp.MAX, group=group, async_op=True))
        return both[: len(flat)].masked_fill(both[len(flat) :] > 0, torch.nan)

    def _meet(self, own: _Words, failure: BaseException | None = None) -> list[_Words]:
        """The words of all. Raises what a process failed with, and LostError where they want different things."""
        self._number += 1
        self.said += 1
        packed = b"" if failure is None else _Raised(failure).packed()
        own = replace(own, number=self._number, failed=failure is not None, content=len(packed) or own.content)
        said = [_Words(*row) for row in self._gathered(torch.tensor(astuple(own))).tolist()]
        failed = next((rank for rank, other in enumerate(said) if other.failed), None)
        if failed is not None:
            cause = _unpickled(self._broadcast(packed if self.rank == failed else None, said[failed].content, failed))
            if failure is None:
                raise self._lost(failed, cause.cause)
        elif len({(other.kind, other.number) for other in said}) > 1:
            raise LostError(
                "the processes went different ways",
                actual=", ".join(f"{rank}: {_KINDS[o.kind]} ({o.number})" for rank, o in enumerate(said)),
                hint="start all of them with the same arguments, samples and versions, on CPUs of one kind",
            )
        return said

    def _lost(self, owner: int, cause: BaseException) -> LostError:
        error = LostError(
            f"process {owner} of {self.size} failed: {named_first_line(cause)}",
            hint="its own messages say more; what is done is kept, and the same call goes on from there",
        )
        error.__cause__ = cause
        return error

    def _send_all(self, kind: int, content: bytes) -> None:
        self._meet(_Words(kind, content=len(content)))
        self._broadcast(content, len(content), self.rank)

    def _gathered(self, row: torch.Tensor) -> torch.Tensor:
        """The rows of all."""
        import torch.distributed as dist

        rows = [torch.empty_like(row) for _ in range(self.size)]
        self._spoken(row, lambda: dist.all_gather(rows, row, group=self._group, async_op=True))
        return torch.stack(rows)

    def _broadcast(self, content: bytes | None, size: int, owner: int) -> torch.Tensor:
        import torch.distributed as dist

        sent = torch.empty(size, dtype=torch.uint8) if content is None else _tensor(content)
        return self._spoken(sent, lambda: dist.broadcast(sent, group_src=owner, group=self._group, async_op=True))

    def _spoken(self, sent: torch.Tensor, exchange: Callable[[], Work]) -> torch.Tensor:
        """What was sent, once the others have it."""
        self.sent_bytes += sent.numel() * sent.element_size()
        try:
            self._wait(exchange())
        except RuntimeError as cause:
            self._check_silence()  # those who noticed it first may have closed their connections
            raise LostError(
                f"process {self.rank} of {self.size} has lost another: {first_line(cause)}",
                hint="one of them ended or cannot be reached; what is done is kept: start them again, as many as you "
                "like, and they go on from there",
            ) from cause
        return sent

    def _wait(self, work: Work) -> None:
        """Wait for an exchange, and meanwhile for news of somebody who is silent."""
        if self.heartbeat is not None:
            done = threading.Event()
            work.get_future().add_done_callback(lambda _: done.set())
            self._check_silence()
            while not done.wait(heartbeat.BEAT_S / 4):
                self._check_silence()
        work.wait()

    def _check_silence(self) -> None:
        """Raise LostError where a process has given no answer for too long, once the others have heard of that."""
        silent = None if self.heartbeat is None else self.heartbeat.silent
        if silent is None:
            return
        time.sleep(1.5 * heartbeat.BEAT_S)
        # its destructor would wait for the exchange under way, which never ends
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
        said = heartbeat.silence(silent, self)
        raise LostError(said.message, hint=said.hint)


def sendable(cause: BaseException) -> BaseException:
    """An exception that reaches another process: itself, or what it says where it does not."""
    with suppress(Exception):
        pickle.loads(pickle.dumps(cause))
        return cause
    return ProcessError(named_first_line(cause))


def _flat(term: Term, shape: tuple[int, ...] | None, nothing: float, device: torch.device) -> torch.Tensor:
    """A term as one row of float64 on a device; of nothing where no process has one."""
    if term is not None:
        return term.detach().to(device).double().reshape(-1)
    size = 0 if shape is None else torch.Size(shape).numel()
    return torch.full((size,), nothing, dtype=torch.float64, device=device)


def _tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _unpickled(content: torch.Tensor) -> Any:
    return pickle.loads(content.numpy().tobytes())  # of the user's own processes


def _pickled(value: object) -> bytes:
    written = io.BytesIO()
    _Pickler(written, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return written.getvalue()


class _Pickler(pickle.Pickler):
    """Tensors of a device arrive on the device of that type which is current where they arrive."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.device.type in ("cpu", "meta"):
            return NotImplemented
        trained = value.requires_grad if isinstance(value, torch.nn.Parameter) else None
        return _placed, (value.detach().cpu(), value.device.type, trained)


def _placed(tensor: torch.Tensor, kind: str, trained: bool | None) -> torch.Tensor:
    there = tensor.to(torch.empty(0, device=kind).device)
    return there if trained is None else torch.nn.Parameter(there, requires_grad=trained)
