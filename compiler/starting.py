"""Ctrl-C while the `foldcut` command still loads: one line and exit code 130 instead of a traceback through imports.

Importing this module is all: it does nothing but in the process of the command itself.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130


def _is_command() -> bool:
    """Whether this process is `foldcut ...` or `python -m foldcut ...`, and not a program that imports foldcut."""
    given = sys.orig_argv
    if sys.argv[:1] == ["-m"]:
        return "foldcut" in given and given[given.index("foldcut") - 1] == "-m"
    return bool(sys.argv) and os.path.basename(sys.argv[0]) in ("foldcut", "foldcut.exe")  # noqa: PTH119 - no imports


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave at once while modules are imported: libraries turn the exception into errors of their own. Nothing has
    been written by then. Later it is the exception that it always is."""
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            _leave()
        caller = caller.f_back
    signal.default_int_handler(number, frame)


def started() -> None:
    """Everything is imported: Ctrl-C is from here on what the command makes of it."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave() -> NoReturn:
    os.write(2, b"interrupted; nothing was written\n")
    os._exit(INTERRUPTED)


if (
    _is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _stop)
