"""torch.onnx's table of translations, filled once a process instead of once an export."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def filled_once() -> Iterator[None]:
    """Exports inside get copies of one table: to fill it, torch parses some five hundred functions, which takes two CPU
    seconds and gives the same each time. Where this torch keeps its table elsewhere, each export fills its own."""
    registry = _registry()
    original = vars(registry).get("from_torchlib") if registry is not None else None
    if not isinstance(original, classmethod):
        yield
        return
    registry.from_torchlib = classmethod(functools.partial(_copied, original.__func__))
    try:
        yield
    finally:
        registry.from_torchlib = original


def _registry() -> Any:
    """torch's class of tables; None where there is no such class."""
    try:
        from torch.onnx._internal.exporter import _registration
    except ImportError:
        return None
    return getattr(_registration, "ONNXRegistry", None)


@functools.cache
def _filled(fill: Any, registry: type, *args: Any, **options: Any) -> Any:
    return fill(registry, *args, **options)


def _copied(fill: Any, registry: type, *args: Any, **options: Any) -> Any:
    """A table of its own for an export, which may add to it."""
    table = copy.copy(_filled(fill, registry, *args, **options))
    table.functions = {target: list(functions) for target, functions in table.functions.items()}
    return table
