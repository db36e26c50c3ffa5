"""Plain data that JSON can hold, written and read: it has no word for infinity and none for NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(data: Any, *, indent: int | None = None) -> str:
    """Data as JSON that every parser takes: what is not finite is null."""
    return json.dumps(finite(data), indent=indent, allow_nan=False)


def json_file(data: Any) -> bytes:
    """The same as a file, laid out for people."""
    return (json_text(data, indent=2) + "\n").encode()


def read_json(text: str | bytes) -> Any:
    """What a text in JSON says. Raises ValueError for anything else, one nested too deep included."""
    try:
        return json.loads(text)
    except RecursionError as cause:
        raise ValueError("it is nested too deep") from cause


def finite(data: Any) -> Any:
    """The same data with None for every number that is not finite. Mappings come back as dicts, tuples as lists."""
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
