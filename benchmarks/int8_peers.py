"""Static int8 as others make it: ONNX Runtime's quantize_static and NNCF's post-training quantisation, as their users
call them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

#: Images that entropy and percentile calibration read: all of their activations are held in memory.
MOST_HELD = 100


def onnxruntime_static(model: bytes, images: torch.Tensor, method: str, *, reduce_range: bool) -> bytes:
    """QDQ, per channel, uint8 values and int8 weights (of 7 bits with `reduce_range`), behind its own preprocessing."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnx.load_model_from_string(model).graph.input[0].name
    images = images if method == "minmax" else images[:MOST_HELD]
    with tempfile.TemporaryDirectory() as folder:
        before, prepared, after = (Path(folder) / f"{part}.onnx" for part in ("before", "prepared", "after"))
        before.write_bytes(model)
        quant_pre_process(str(before), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(after),
            _Reader(name, images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[{"minmax": "MinMax"}.get(method, method.capitalize())],
        )
        return after.read_bytes()


class _Reader:
    """One image at a time."""

    def __init__(self, name: str, images: torch.Tensor) -> None:
        self._feeds = iter([{name: images[i : i + 1].numpy()} for i in range(len(images))])

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self._feeds, None)


def nncf_static(model: bytes, images: torch.Tensor) -> bytes:
    """`nncf.quantize` with its defaults on the ONNX file."""
    import nncf

    source = onnx.load_model_from_string(model)
    name = source.graph.input[0].name
    feed: Callable[[torch.Tensor], dict[str, np.ndarray[Any, Any]]] = lambda image: {name: image[None].numpy()}  # noqa: E731
    made = nncf.quantize(source, nncf.Dataset(list(images), feed), subset_size=len(images))
    return bytes(made.SerializeToString())
