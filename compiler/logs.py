"""Keeping the exporters' own chatter off the user's terminal."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO

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
    """Exporters log and warn about their own internals; errors still come through as exceptions."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
