"""ONNX Runtime as the reference for what an ONNX model means: importing compares with it, opaque nodes run in it.
Where a file is newer than the installed ONNX Runtime, ONNX's own evaluator stands in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ..support.errors import CaptureError, first_line

_FATAL_ONLY = 4  # refusals come as exceptions


class Session(Protocol):
    """What both can do."""

    def run(self, output_names: None, feeds: dict[str, Any], /) -> Any:
        """The outputs in the model's order."""
        ...


def reference_session(model: bytes | str, *, optimise: bool = True) -> Session:
    """A silent CPU session on one thread; for an operator set or IR version that ONNX Runtime does not know yet, ONNX's
    evaluator. Raises CaptureError when ONNX Runtime refuses the model for another reason."""
    import onnxruntime

    if isinstance(model, str) and any("\udc80" <= letter <= "\udcff" for letter in model):
        raise CaptureError(
            f"ONNX Runtime opens no path that is not UTF-8: {model!r}", hint="rename the file or its folder"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session: Session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return session
    except Exception as cause:
        if _too_new(str(cause)):
            return _evaluator(model)
        raise CaptureError(
            f"ONNX Runtime refuses the model: {first_line(cause)}",
            hint="a file that ONNX Runtime cannot run cannot be checked, so it is not imported",
        ) from cause


def _too_new(refusal: str) -> bool:
    return "opset" in refusal.lower() or "IR version" in refusal or "Unsupported model IR" in refusal


def _evaluator(model: bytes | str) -> Session:
    import onnx
    from onnx.reference import ReferenceEvaluator

    try:
        evaluator: Session = ReferenceEvaluator(onnx.load(model) if isinstance(model, str) else model)
    except Exception as cause:  # an operator that it lacks
        raise CaptureError(
            f"neither ONNX Runtime nor ONNX's evaluator runs the model: {first_line(cause)}",
            hint="install a newer onnxruntime, or convert the file with onnx.version_converter",
        ) from cause
    return evaluator


def run_reference(session: Session, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """The outputs in the model's order. Raises CaptureError when the model does not run on these inputs."""
    try:
        return [np.asarray(value) for value in session.run(None, dict(feeds))]
    except Exception as cause:
        raise CaptureError(
            f"ONNX Runtime does not run the model on the example: {first_line(cause)}",
            hint="check the shapes and types of the inputs",
        ) from cause
