"""What a backend multiplies without overflow is tried on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import foldcut
import numpy as np
import onnx
import onnxruntime
import pytest
from foldcut.runtime.measure.measurement_cache import MeasurementCache
from foldcut.runtime.predict.integer_kernels import CANDIDATES, IntegerKernels, probe_integers
from onnx import numpy_helper


class Runner:
    """What the standard defines, with weights cut off at a limit: a stand-in for kernels that overflow."""

    clock = "thread_cpu"

    def __init__(self, model: bytes, inputs: Mapping[str, Any], limit: int) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        proto = onnx.load_model_from_string(model)
        for tensor in proto.graph.initializer:
            if tensor.name == "w":
                values = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(np.clip(values, -limit, limit), "w"))
        content = proto.SerializeToString()
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._inputs = dict(inputs)

    def run(self) -> None:
        self._found = self._session.run(None, self._inputs)

    def outputs(self) -> tuple[Any, ...]:
        return tuple(self._found)

    def close(self) -> None:
        pass


class Backend:
    """Exact up to a limit of weights; refuses uint8 where told to."""

    name = "made up"

    def __init__(self, limit: int, *, refuses: str = "") -> None:
        self.limit, self.refuses, self.built = limit, refuses, 0

    def available(self) -> Any:
        raise NotImplementedError

    def build(self, model: bytes, inputs: Any = None) -> bytes:
        self.built += 1
        zeros = [t for t in onnx.load_model_from_string(model).graph.initializer if t.name == "z"]
        if str(numpy_helper.to_array(zeros[0]).dtype) == self.refuses:
            raise foldcut.BackendError(f"{self.refuses} is not taken")
        return model

    def load(self, engine: bytes, inputs: Any, *, threads: int = 1) -> Runner:
        return Runner(engine, inputs, self.limit)

    def environment(self) -> dict[str, str | int]:
        return {"backend": self.name, "limit": self.limit}


def test_the_finest_integers_that_are_exact() -> None:
    assert probe_integers(Backend(127)) == CANDIDATES[0]
    assert not probe_integers(Backend(127)).refused
    found = probe_integers(Backend(63))
    assert (found.values, found.weight_limit) == ("uint8", 63)
    assert "weights up to 127" in found.refused and "outputs differ" in found.refused
    signed = probe_integers(Backend(127, refuses="uint8"))
    assert (signed.values, signed.symmetric, signed.weight_limit) == ("int8", False, 127)


def test_a_backend_that_computes_something_else_is_named() -> None:
    with pytest.raises(
        foldcut.BackendError, match="made up does not compute int8 layers as ONNX defines them"
    ) as caught:
        probe_integers(Backend(20, refuses="uint8"))
    assert "uint8 is not taken" in caught.value.message and "outputs differ" in caught.value.message


def test_integers_that_there_are_none_of() -> None:
    for wrong in (
        {"values": "int4"},
        {"weight_limit": 0},
        {"weight_limit": 128},
        {"weight_limit": 63.5},
        {"symmetric": "no"},
        {"symmetric": True},
        {"bias": "int8"},
    ):
        with pytest.raises(foldcut.CompilerError) as caught:
            IntegerKernels(**wrong)  # type: ignore[arg-type]
        assert caught.value.hint


def test_outputs_that_are_not_numbers_are_wrong() -> None:
    class Empty(Runner):
        def outputs(self) -> tuple[Any, ...]:
            return (np.full_like(self._found[0], np.nan),)

    class Nothing(Backend):
        def load(self, engine: bytes, inputs: Any, *, threads: int = 1) -> Runner:
            return Empty(engine, inputs, 127)

    with pytest.raises(foldcut.BackendError, match="not numbers"):
        probe_integers(Nothing(127))


def test_it_is_tried_once() -> None:
    cache, backend = MeasurementCache(None), Backend(63)
    probe_integers(backend, cache=cache)
    built = backend.built
    probe_integers(backend, cache=cache)
    assert backend.built == built > 0


def test_this_machine_s_runtime_has_some() -> None:
    from foldcut.runtime.measure.backend import resolve_backend

    assert probe_integers(resolve_backend("onnxruntime")).weight_limit in (63, 127)
