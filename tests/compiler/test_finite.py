"""Numbers that JSON has no word for."""

import json
import math
from types import MappingProxyType

import numpy as np
from foldcut.compiler.finite import finite


def test_what_is_not_finite_is_none_at_any_depth() -> None:
    data = {"a": math.inf, "b": [1.5, (-math.inf, {"c": math.nan})], "d": np.float64("nan"), "e": MappingProxyType({})}
    assert finite(data) == {"a": None, "b": [1.5, [None, {"c": None}]], "d": None, "e": {}}
    json.dumps(finite(data), allow_nan=False)


def test_everything_else_stays() -> None:
    data = {"text": "inf", "count": 3, "share": 0.25, "met": True, "none": None, "big": 10**400, "list": [[]]}
    assert finite(data) == data
    assert finite(data)["met"] is True
