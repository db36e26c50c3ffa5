"""The CUDA driver's own library, asked before anything larger is loaded: whether a GPU can be used here."""

from __future__ import annotations

import ctypes
import sys
from typing import Any


def open_driver() -> tuple[Any, int]:
    """The driver and how many GPUs it offers to this process; (None, 0) where there is no driver or it refuses."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None, 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return None, 0
    return driver, count.value
