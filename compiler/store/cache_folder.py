"""Where the results of analyses are kept while a call runs, and after it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def default_folder() -> Path:
    """Where measurements are kept: ``$FOLDCUT_CACHE``, else ``foldcut`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Without
    a home, as some containers have none, a folder of this user's among the temporary files."""
    own, general = os.environ.get("FOLDCUT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()
        return (Path(general).expanduser() if general else Path.home() / ".cache") / "foldcut"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"foldcut-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


@contextmanager
def kept_in(cache: bool | str | Path) -> Iterator[Path]:
    """The folder that a `cache` argument means; for False one that goes in the end, so that what one compile finds out
    is there when it plans again."""
    if cache is False:
        with tempfile.TemporaryDirectory(prefix="foldcut-") as folder:
            yield Path(folder)
    else:
        yield default_folder() if cache is True else Path(cache).expanduser()
