"""One compile at a time in a process: what is set for the whole process while foldcut works."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from .cpus import free_cpus

_LOCK = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Other threads wait here until this one is through, and torch is as foldcut expects it.

    torch.export is not made for threads; filters of warnings, numbers of threads and what is printed while an exporter
    runs belong to the process; and two measurements at once would disturb each other. One thread may enter again.

    Inside, new tensors are on the CPU, and neither autocast nor inference mode is on, whatever the caller has set for
    his own work: a closed form in bfloat16 would be solved wrongly without a word.

    Torch computes with no more threads than there are CPUs to run them (`free_cpus`): on a part of a machine it would
    start one for each core of the whole, which then wait for each other. What was set before comes back.
    """
    with _LOCK, ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":  # asked first: the device mode costs time with every call
            stack.enter_context(torch.device("cpu"))
        threads = torch.get_num_threads()
        if threads > free_cpus():
            torch.set_num_threads(free_cpus())
            stack.callback(torch.set_num_threads, threads)
        yield
