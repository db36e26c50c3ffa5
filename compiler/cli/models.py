"""The model that a command is given."""

from __future__ import annotations

from ...passes.quantize.dequantize import dequantize
from ..frontend.capture import Model
from ..frontend.model_source import load_model
from .options import ApplyOptions, InspectOptions, RunOptions


def read_model(options: RunOptions | ApplyOptions | InspectOptions) -> Model:
    """The model of a command's options, in floating point where they ask for it."""
    model = load_model(options.model, options.weights)
    return dequantize(model) if options.dequantize else model
