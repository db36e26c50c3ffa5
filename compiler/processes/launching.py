"""Processes that `torchrun` has started. Nothing here imports torch before it is used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def rank_given() -> int | None:
    """The number that `torchrun` has given this process; None where it is the only one."""
    several_given = os.environ.get("WORLD_SIZE", "1") != "1" and "MASTER_ADDR" in os.environ
    return int(os.environ["RANK"]) if several_given and "RANK" in os.environ else None


@contextmanager
def launched() -> Iterator[None]:
    """Inside, the processes that `torchrun` has started are a process group; nothing is done where there is one
    already, or one process. Each takes the GPU of its number on its machine, where there are any, and sums stay on
    them (NCCL)."""
    import torch
    import torch.distributed as dist

    if rank_given() is None or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else backend
    dist.init_process_group(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()
