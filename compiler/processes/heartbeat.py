"""A process that vanishes without closing its connections: a power cut, a cut cable, a process that was stopped.

Nobody hears of that from the connections, and an exchange waits long, since the others may compute or measure for
hours. So each process asks another every few seconds whether it is still there: the first one asks all, and all ask
the first one, which hands on what it finds. Each answers from a thread of torch's own (`TCPStore`) that needs no
Python: one that computes answers, whatever it computes, and one that is stopped does not.
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..support.errors import ProcessError, first_line
from .team import Team

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

#: Seconds between two questions, and how many in a row may stay without an answer.
BEAT_S, MISSED = 8.0, 4
#: How long a connection may take.
CONNECT_WITHIN = datetime.timedelta(seconds=30)
#: Where a process writes who is silent.
SILENT = "silent"


class Heartbeat:
    """What one process knows of whether the others are still there.

    Arguments:
        store: This process's own store, from which it answers.
        asked: The stores of the processes that it asks, by their number.
    """

    def __init__(self, store: Store, asked: Mapping[int, Store]) -> None:
        self._store, self._asked = store, asked
        #: The number of a process that no longer answers.
        self.silent: int | None = None

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Inside, the others are asked."""
        ended = threading.Event()
        answers = dict.fromkeys(self._asked, 0)
        threads = [
            threading.Thread(target=self._ask, args=(rank, answers, ended), daemon=True, name=f"foldcut asks {rank}")
            for rank in self._asked
        ]
        threads.append(threading.Thread(target=self._count, args=(answers, ended), daemon=True, name="foldcut counts"))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join(1.0)  # longer only where it waits for an answer that does not come

    def _ask(self, rank: int, answers: dict[int, int], ended: threading.Event) -> None:
        store = self._asked[rank]
        while not ended.wait(BEAT_S):
            try:
                if store.check([SILENT]):
                    self._note(int(store.get(SILENT)))
            except RuntimeError:  # it has ended: no answers from now on
                return
            answers[rank] += 1

    def _count(self, answers: dict[int, int], ended: threading.Event) -> None:
        """Note who has not answered for so many turns. Turns are counted and not seconds: where this process was
        stopped itself, or kept from running, the answers of the others have come meanwhile or come now."""
        seen, missed = dict(answers), dict.fromkeys(answers, 0)
        while self.silent is None and not ended.wait(BEAT_S):
            for rank, count in answers.items():
                missed[rank] = missed[rank] + 1 if count == seen[rank] else 0
            seen = dict(answers)
            gone = next((rank for rank, turns in missed.items() if turns >= MISSED), None)
            if gone is not None:
                self._note(gone)

    def _note(self, rank: int) -> None:
        """Remember who is silent, and say so to whoever asks."""
        if self.silent is None:
            self.silent = rank
            self._store.set(SILENT, str(rank))


def heartbeat(members: Team) -> Heartbeat | None:
    """Connect the processes of a team; None, with a warning, where some cannot be reached: then one that vanishes is
    not noticed before the group's timeout."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=CONNECT_WITHIN)
    places = members.objects((_address(members.rank), store.port))
    asked, cause = {}, ""
    try:
        for rank in range(1, members.size) if members.first else (0,):
            asked[rank] = TCPStore(*places[rank], is_master=False, timeout=CONNECT_WITHIN)
    except RuntimeError as error:
        cause = first_line(error)
    failed = next((f"process {rank}: {said}" for rank, said in enumerate(members.objects(cause)) if said), None)
    if failed is None:
        return Heartbeat(store, asked)
    if members.first:
        warnings.warn(
            f"the processes cannot ask each other whether they are still there ({failed}): should a machine vanish "
            "without closing its connections, the others wait for hours",
            stacklevel=2,
        )
    return None


def silence(rank: int, members: Team) -> ProcessError:
    """What is raised where a process no longer answers."""
    seconds = f"{BEAT_S * MISSED:g} s"
    if rank == members.rank:
        return ProcessError(
            f"process {rank} of {members.size}, this one, gave no answer for {seconds}: the others have ended",
            hint="it was stopped or cut off; what is done is kept: start all of them again, and they go on from there",
        )
    return ProcessError(
        f"process {rank} of {members.size} has given no answer for {seconds}",
        hint="it was stopped, or its machine or the network is gone; what is done is kept: start them again, as many "
        "as you like, and they go on from there",
    )


def _address(rank: int) -> str:
    """Under which the others reach this process: the first one as they have reached it before, any other by the network
    over which it reaches the first."""
    first = os.environ.get("MASTER_ADDR", "")
    if rank == 0:
        return first or socket.gethostname()
    try:
        family, _, _, _, place = socket.getaddrinfo(first or socket.gethostname(), 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
