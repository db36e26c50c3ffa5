"""Sums that stay on the devices: where a backend of torch.distributed exchanges their tensors there, as NCCL does."""

from __future__ import annotations

import datetime
import hashlib
import socket
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..support.errors import first_line
from .team import Team, Term

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Backends that exchange through the host's memory, whatever the device.
THROUGH_HOST = frozenset({"gloo", "mpi", "ucc", "fake", "undefined"})
#: How long such a sum may take: all processes have said just before that they are there.
SUM_WITHIN = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class OnDevice:
    """A process group that adds up tensors of one type of device where they are.

    Arguments:
        kind: The type of the device, such as ``"cuda"``.
        group: A group of all processes, for nothing else.
    """

    kind: str
    group: ProcessGroup

    def device(self, terms: Sequence[Term]) -> torch.device | None:
        """Where this process would add up some terms: where the first that is on such a device lies; None where
        all are elsewhere. A process that has none takes the device that is current there."""
        there = [term.device for term in terms if term is not None]
        if not there:
            return torch.empty(0, device=self.kind).device
        return next((device for device in there if device.type == self.kind), None)


def on_device(members: Team) -> OnDevice | None:
    """What adds up tensors of the accelerator where they are: where the backend of the default group does, each process
    has a device of its own, and a first sum comes out right. None where sums go through the host.

    Arguments:
        members: The team that is formed. All of its processes call this together.
    """
    import torch.distributed as dist

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "" if accelerator is None else accelerator.type
    backend = kinds_on_device(dist.get_backend_config()).get(kind, "")
    said = members.objects((kind, backend, place(torch.empty(0, device=kind).device) if backend else 0))
    if len({other[:2] for other in said}) > 1 or not backend or len({other[2] for other in said}) < members.size:
        return None
    found = OnDevice(kind, dist.new_group(backend=backend, timeout=SUM_WITHIN))
    cause = next((words for words in members.objects(_first_sum(found, members.size)) if words), None)
    if cause is None:
        return found
    if members.first:
        warnings.warn(f"sums go through the host: {backend} cannot add up on {kind} ({cause})", stacklevel=2)
    return None


def _first_sum(group: OnDevice, size: int) -> str:
    """What is wrong with a sum of ones; nothing where it comes out right."""
    import torch.distributed as dist

    try:
        ones = torch.ones(8, dtype=torch.float64, device=group.kind)
        dist.all_reduce(ones, group=group.group, async_op=True).wait()
        total = float(ones.sum())
    except (RuntimeError, TypeError) as cause:  # TypeError: a device without float64
        return first_line(cause)
    return "" if total == 8 * size else f"{size} ones are {total / 8:g}"


def place(device: torch.device) -> int:
    """A number that tells a device from all others, also from those of other machines and of processes that see only
    some: backends like NCCL want one for each process.

    Arguments:
        device: With its number.

    Returns:
        A positive number of seven bytes at most.

    Example:
        >>> from foldcut.compiler.processes.on_device import place
        >>> place(torch.device("cuda", 0)) == place(torch.device("cuda", 1))
        False
    """
    properties: Any = torch.cuda.get_device_properties(device) if _is_cuda(device) else None
    known = f"{socket.gethostname()} {device}" if properties is None else str(properties.uuid)
    return 1 + number_of(known) // 2


def number_of(value: object) -> int:
    """A number of seven bytes that is hardly that of anything else, by what Python writes for the value."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "little")


def kinds_on_device(config: str) -> dict[str, str]:
    """The types of devices whose tensors a process group exchanges where they are, with their backends.

    Arguments:
        config: What `torch.distributed.get_backend_config` says of the group.

    Example:
        >>> from foldcut.compiler.processes.on_device import kinds_on_device
        >>> kinds_on_device("cpu:gloo,cuda:nccl"), kinds_on_device("cpu:gloo,cuda:gloo")
        ({'cuda': 'nccl'}, {})
    """
    pairs = (part.partition(":") for part in config.split(","))
    return {kind: backend for kind, _, backend in pairs if kind != "cpu" and backend not in THROUGH_HOST}


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()
