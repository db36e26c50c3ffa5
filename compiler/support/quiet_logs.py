"""Keeping the exporters' own chatter off the user's terminal."""

from __future__ import annotations

import ctypes
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO

from .one_at_a_time import alone

_LOGGERS = (
    "torch.onnx",
    "torch.export",
    "torch._guards",
    "torch.fx.experimental",
    "torch._dynamo",
    "torch._subclasses.fake_tensor",
    "onnxscript",
    "onnx_ir",
)


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Exporters log and warn about their own internals; errors still come through as exceptions. One thread at a time:
    neither the exporters nor what is silenced here is made for more."""
    with alone(), warnings.catch_warnings(), redirect_stdout(StringIO()):
        loggers = [logging.getLogger(name) for name in _LOGGERS]
        levels = [logger.level for logger in loggers]
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def without_native_output() -> Iterator[None]:
    """Nothing that C code prints reaches stdout, which may be a stream of JSON: HiGHS has a debug line that no option
    turns off. What it has in its buffer goes before stdout is given back; other threads' output meanwhile is lost."""
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if library is None:
        yield
        return
    library.fflush(None)  # what was printed before is not ours to swallow
    with ExitStack() as descriptors:
        kept = os.dup(1)
        descriptors.callback(os.close, kept)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        descriptors.callback(os.close, nowhere)
        try:
            os.dup2(nowhere, 1)
            yield
        finally:
            library.fflush(None)
            os.dup2(kept, 1)
