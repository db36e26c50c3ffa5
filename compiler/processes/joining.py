"""Processes that were started together, by `torchrun` or by whoever made a process group, become one team."""

from __future__ import annotations

import datetime
import hashlib
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

from ..support.cpus import free_cpus, usable_cpus
from ..support.errors import ProcessError, first_line
from .exchange import Joined
from .heartbeat import heartbeat
from .on_device import on_device
from .team import Team, team, working_as

#: How long a process waits for the others to begin, and for their words once they have.
BEGIN_WITHIN, WORK_WITHIN = datetime.timedelta(minutes=10), datetime.timedelta(hours=12)

#: Characters of what is compared that are shown.
LONGEST = 100

_formed: list[tuple[object, Joined]] = []


def several() -> bool:
    """Whether this process is one of several of an initialised process group."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def joined(processes: bool | None = None) -> Iterator[Team]:
    """Inside, all processes of the default process group work together.

    Arguments:
        processes: None joins where there are several, False works alone, True asks for a process group.

    Raises:
        ProcessError: If `processes` is True and there is no group, if not all processes of the group call this within
            `BEGIN_WITHIN`, and, in all of them, if one of them fails or ends, or is silent for `MISSED` times `BEAT_S`
            (`heartbeat.py`).
    """
    if processes and not several():
        raise ProcessError(
            "there is no process group of several processes",
            expected="torch.distributed.init_process_group() before this call, or torchrun",
            hint="start with torchrun --nproc-per-node 2 ..., or leave processes out to work with one",
        )
    if processes is False or team().size > 1 or not several():
        yield team()
        return
    members = _members()
    members.sent_bytes = members.said = 0
    beating = nullcontext() if members.heartbeat is None else members.heartbeat.beating()
    with working_as(members), _own_threads(members), beating:
        try:
            yield members
            members.end()
        except BaseException as cause:
            members.fail(cause)
            _formed.clear()
            raise


@contextmanager
def _own_threads(members: Team) -> Iterator[None]:
    """Torch computes with this process's part of the CPUs: threads of several processes that share them would wait for
    each other."""
    import torch

    threads, most = torch.get_num_threads(), max(1, free_cpus() // members.beside)
    torch.set_num_threads(min(threads, most))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def agree(what: Mapping[str, object]) -> None:
    """Check that all processes have the same.

    Arguments:
        what: Things by their name, known by what `repr` says of them.

    Raises:
        ProcessError: In all processes, if they differ: says in what.
    """
    members = team()
    if members.size == 1:
        return
    found = members.objects({name: _known_by(value) for name, value in what.items()})
    for name in dict.fromkeys(name for other in found for name in other):
        values = [other.get(name, "nothing") for other in found]
        if len(set(values)) > 1:
            raise ProcessError(
                f"the processes were started with different {name}",
                actual=", ".join(f"{rank}: {value}" for rank, value in enumerate(values)),
                hint="start all of them with the same arguments, samples, seed and versions",
            )


def _known_by(value: object) -> str:
    """A text that tells a value from others; where it is long, the beginning and a hash."""
    text = value if isinstance(value, str) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}... ({hashlib.blake2b(text.encode(), digest_size=8).hexdigest()})"


def _members() -> Joined:
    """The team of the default process group, formed at its first use."""
    import torch.distributed as dist

    world = dist.group.WORLD
    if _formed and _formed[-1][0] is world:
        return _formed[-1][1]
    size = dist.get_world_size()
    try:
        dist.new_group(backend="gloo", timeout=BEGIN_WITHIN)  # until all have come
        group = dist.new_group(backend="gloo", timeout=WORK_WITHIN)
    except RuntimeError as cause:
        raise ProcessError(
            f"not all {size} processes of the group have come: {first_line(cause)}",
            hint="call foldcut in every process of the group with the same arguments, or pass processes=False "
            "(PipelineSettings) where one works alone",
        ) from cause
    assert isinstance(group, dist.ProcessGroup)
    members = Joined(dist.get_rank(), size, group)
    here = (socket.gethostname(), usable_cpus())
    places = members.objects(here)
    members.neighbours = sum(host == here[0] for host, _ in places)
    members.beside = sum(host == here[0] and not here[1].isdisjoint(cpus) for host, cpus in places)
    members.heartbeat = heartbeat(members)
    members.on_device = on_device(members)
    _formed[:] = [(world, members)]
    return members
