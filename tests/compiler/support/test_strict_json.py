"""Numbers that JSON has no word for."""

import json
import math
from types import MappingProxyType

import numpy as np
import pytest
from foldcut.compiler.support.strict_json import finite, json_file, json_text


def test_what_is_not_finite_is_none_at_any_depth() -> None:
    data = {"a": math.inf, "b": [1.5, (-math.inf, {"c": math.nan})], "d": np.float64("nan"), "e": MappingProxyType({})}
    assert finite(data) == {"a": None, "b": [1.5, [None, {"c": None}]], "d": None, "e": {}}
    json.dumps(finite(data), allow_nan=False)


def test_everything_else_stays() -> None:
    data = {"text": "inf", "count": 3, "share": 0.25, "met": True, "none": None, "big": 10**400, "list": [[]]}
    assert finite(data) == data
    assert finite(data)["met"] is True


def test_what_is_written_is_json() -> None:
    data = {"error": math.inf, "errors": (1.0, math.nan)}
    for text in (json_text(data), json_file(data).decode()):
        assert json.loads(text, parse_constant=pytest.fail) == {"error": None, "errors": [1.0, None]}
    assert json_file({"a": 1}) == b'{\n  "a": 1\n}\n'
