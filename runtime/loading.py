"""Several models loaded at once, and closed for certain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from .backend import Array, Backend, Runner


@contextmanager
def loaded(
    backend: Backend, models: Iterable[tuple[bytes, Mapping[str, Array]]], *, threads: int = 1
) -> Iterator[list[Runner]]:
    """A runner for each (ONNX bytes, inputs), in order; all are closed on leaving, also when a later one fails.

    Raises BackendError when the backend cannot build or run one.
    """
    with ExitStack() as stack:
        runners = []
        for model, inputs in models:
            runner = backend.load(backend.build(model, inputs), inputs, threads=threads)
            stack.callback(runner.close)
            runners.append(runner)
        yield runners
