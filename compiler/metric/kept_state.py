"""The state of the process around code that is not foldcut's: afterwards it is what it was before."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch

_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def _set_device(device: torch.device) -> None:
    """No device rather than the CPU: a device mode costs time with every call."""
    torch.set_default_device(None if device.type == "cpu" else device)


def _set_anomaly(said: tuple[bool, bool]) -> None:
    torch.autograd.set_detect_anomaly(*said)


def _set_mkldnn(said: tuple[bool, bool]) -> None:
    torch.backends.mkldnn.set_flags(*said)


def _set_autocast(said: tuple[bool, torch.dtype]) -> None:
    torch.set_autocast_enabled("cpu", said[0])
    torch.set_autocast_dtype("cpu", said[1])


#: What reads a setting of the process, and what sets it: all that changes what foldcut computes, or how fast, and that
#: can be asked for.
_SETTINGS: tuple[_Setting, ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()), _set_anomaly),
    (lambda: (torch.backends.mkldnn.enabled, torch.backends.mkldnn.deterministic), _set_mkldnn),
    (lambda: (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")), _set_autocast),
    (os.getcwd, os.chdir),
)


@contextmanager
def state_kept() -> Iterator[None]:
    """No gradients inside; afterwards the settings of the process are what they were, and nothing has been drawn.

    That is: random numbers of torch (an accelerator's in use too), numpy and Python; torch's default type
    and device, threads, gradient, inference, deterministic, autocast and anomaly modes, precision of float32 products
    and oneDNN; filters of warnings, numpy's errors, the working directory. Not what nothing tells:
    `torch.set_flush_denormal`, hooks on all modules.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # a guard of its own: what is left open inside ends with it
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        used = _accelerator_in_use()
        if used is not None:
            numbers = list(range(torch.accelerator.device_count()))
            stack.enter_context(torch.random.fork_rng(devices=numbers, device_type=used.type))
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002 - what others draw from
        stack.callback(random.setstate, random.getstate())
        stack.enter_context(np.errstate())
        stack.enter_context(warnings.catch_warnings())
        for read, write in _SETTINGS:
            with suppress(RuntimeError, OSError):  # one of torch's two ways to say a precision; a folder that is gone
                stack.callback(_set_back, read, write, read())
        yield


def _accelerator_in_use() -> torch.device | None:
    """The machine's accelerator, where this process has begun to use it: to ask it for its state would begin it."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return None
    begun = getattr(torch.get_device_module(found), "is_initialized", None)
    return found if begun is None or begun() else None


def _set_back(read: Callable[[], Any], write: Callable[[Any], Any], before: Any) -> None:
    """Setting what is as it was costs time, and some settings warn."""
    with suppress(RuntimeError, OSError):
        if read() == before:
            return
    with suppress(RuntimeError, OSError):
        write(before)
