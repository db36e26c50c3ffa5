"""What torch does anew at each export though nothing in it changes, done once: half of what hardening.py would cost.

Nothing that a graph depends on is touched. `once()` is for a process that exports many networks and does nothing else.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch._export.utils as export_utils
import torch.export.exported_program as exported_program
from torch._ops import DispatchKey, OperatorBase

#: Networks between two collections: graphs are full of cycles, and each automatic collection walks all of torch.
COLLECT_EVERY = 10


def once() -> None:
    """The list of composite operators is kept; operators are overridden without building type hints; no automatic
    garbage collection (call `collect`)."""
    _keep_the_list()
    _register_plainly()
    gc.collect()
    gc.freeze()
    gc.disable()


def collect(number: int) -> None:
    """Free what networks left, every now and then."""
    if number % COLLECT_EVERY == 0:
        gc.collect()


def _keep_the_list() -> None:
    """Which operators are composite, asked once for each set of namespaces."""
    ask = export_utils._collect_all_valid_cia_ops
    known: dict[tuple[str, ...], Any] = {}

    def kept() -> Any:
        names = tuple(torch.ops._dir)
        if names not in known:
            known[names] = frozenset(ask())
        return known[names]

    export_utils._collect_all_valid_cia_ops = kept
    exported_program._collect_all_valid_cia_ops = kept  # type: ignore[attr-defined]


def _register_plainly() -> None:
    """`py_impl` for dispatch keys without the type hints that it makes at each of 5,000 calls an export."""
    general = OperatorBase.py_impl

    def py_impl(self: OperatorBase, key: Any) -> Callable[[Any], Any]:
        if type(key) is not DispatchKey or key == DispatchKey.Python:
            return general(self, key)

        def register(kernel: Any) -> Any:
            if key in self.py_kernels:
                raise RuntimeError(f"Trying to override a python impl for {key} on operator {self.name()}")
            self.py_kernels[key] = kernel
            self._dispatch_cache.clear()
            return kernel

        return register

    OperatorBase.py_impl = py_impl  # type: ignore[method-assign]
