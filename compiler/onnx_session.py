"""ONNX Runtime as the reference for what an ONNX model means: importing compares with it, opaque nodes run in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CaptureError, first_line

if TYPE_CHECKING:
    import onnxruntime

_FATAL_ONLY = 4  # refusals come as exceptions


def reference_session(model: bytes | str, *, optimise: bool = True) -> onnxruntime.InferenceSession:
    """A silent CPU session on one thread. Raises CaptureError when ONNX Runtime refuses the model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as cause:
        raise CaptureError(
            f"ONNX Runtime refuses the model: {first_line(cause)}",
            hint="a file that ONNX Runtime cannot run cannot be checked, so it is not imported",
        ) from cause


def run_reference(
    session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray[Any, Any]]
) -> list[np.ndarray[Any, Any]]:
    """The outputs in the model's order. Raises CaptureError when the model does not run on these inputs."""
    try:
        return [np.asarray(value) for value in session.run(None, dict(feeds))]
    except Exception as cause:
        raise CaptureError(
            f"ONNX Runtime does not run the model on the example: {first_line(cause)}",
            hint="check the shapes and types of the inputs",
        ) from cause
