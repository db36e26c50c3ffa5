"""What a model wants to be called with, before it is captured."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .capture import is_onnx
from .module_state import unwrapped
from .onnx_file import input_count


def needed_inputs(model: Any) -> int | None:
    """How many inputs the model needs, read off forward(); None when that does not say."""
    if is_onnx(model):
        return input_count(model)
    if not isinstance(model, nn.Module):
        return None
    model = unwrapped(model)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return None
    return max(1, sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters))
