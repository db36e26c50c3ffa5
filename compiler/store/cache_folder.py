"""Where the results of analyses are kept while a call runs, and after it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...runtime.measure.measurement_cache import default_folder


@contextmanager
def kept_in(cache: bool | str | Path) -> Iterator[Path]:
    """The folder that a `cache` argument means; for False one that goes in the end, so that what one compile finds out
    is at hand when it plans again."""
    if cache is False:
        with tempfile.TemporaryDirectory(prefix="foldcut-") as folder:
            yield Path(folder)
    else:
        yield default_folder() if cache is True else Path(cache).expanduser()
