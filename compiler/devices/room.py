"""How much memory a device has left."""

from __future__ import annotations

import torch

from ..support.memory import available_bytes, device_budget


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be taken on a device.

    Arguments:
        device: The device. Of ``cuda`` what the driver has free and what torch holds without using it; of any other,
            the CPU and those that share its memory, what the process may still take. On any but the CPU at most what
            `PipelineSettings(device_memory_bytes=)` allows, while a compile runs.

    Returns:
        The number of bytes.

    Example:
        >>> from foldcut.compiler.devices.room import free_bytes
        >>> free_bytes(torch.device("cpu")) > 0
        True
    """
    budget = None if device.type == "cpu" else device_budget()
    found = _left_on(device)
    return found if budget is None else min(found, budget)


def _left_on(device: torch.device) -> int:
    """Bytes that are free, whatever was allowed."""
    if device.type != "cuda":
        return available_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
