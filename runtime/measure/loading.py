"""Several engines loaded at once, and closed for certain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from ...compiler.onnx.model_file import OnnxModel
from .backend import Array, Backend, Runner


@contextmanager
def opened(
    backend: Backend, engines: Iterable[tuple[object, Mapping[str, Array]]], *, threads: int = 1
) -> Iterator[list[Runner]]:
    """A runner for each (engine, inputs), in order; all are closed on leaving, also when a later one fails.

    Raises BackendError when the backend cannot run one.
    """
    with ExitStack() as stack:
        runners = []
        for engine, inputs in engines:
            runner = backend.load(engine, inputs, threads=threads)
            stack.callback(runner.close)
            runners.append(runner)
        yield runners


@contextmanager
def loaded(
    backend: Backend, models: Iterable[tuple[OnnxModel, Mapping[str, Array]]], *, threads: int = 1
) -> Iterator[list[Runner]]:
    """`opened` for ONNX bytes, each built in its turn. Raises BackendError when one cannot be built or run."""
    engines = ((backend.build(model, inputs), inputs) for model, inputs in models)
    with opened(backend, engines, threads=threads) as runners:
        yield runners
