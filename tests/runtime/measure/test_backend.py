"""Which backend a name or an object stands for, and what is said when it cannot be used."""

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from foldcut.compiler.support.errors import BackendError
from foldcut.runtime.measure.backend import Availability, Backend, Runner, backend_names, check_threads, resolve_backend
from foldcut.runtime.onnxruntime.backend import OnnxRuntimeBackend, OnnxRuntimeRunner


class FakeBackend:
    """A user's backend whose availability is set by the test."""

    name = "fake"

    def __init__(self, *, can_build: bool = True, can_run: bool = True, reason: str = "") -> None:
        self.availability = Availability(can_build=can_build, can_run=can_run, reason=reason)

    def available(self) -> Availability:
        return self.availability

    def build(self, model: bytes, inputs: Mapping[str, Any] | None = None) -> object:
        return model

    def load(self, engine: object, inputs: Mapping[str, Any], *, threads: int = 1) -> Runner:
        raise NotImplementedError

    def environment(self) -> dict[str, str | int]:
        return {}


def test_name_resolves_to_the_builtin_backend() -> None:
    backend = resolve_backend("onnxruntime")
    assert isinstance(backend, OnnxRuntimeBackend)
    assert backend.name == "onnxruntime"
    assert backend.name in backend_names()


def test_object_with_the_methods_passes_through() -> None:
    backend = FakeBackend()
    assert isinstance(backend, Backend)
    assert resolve_backend(backend) is backend


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BackendError) as caught:
        resolve_backend("tensorflow")
    assert caught.value.actual == "tensorflow"
    assert "onnxruntime" in str(caught.value.expected)
    assert "what to do" in str(caught.value)


def test_object_without_the_methods_names_what_it_lacks() -> None:
    with pytest.raises(BackendError, match="lacks name, available, build, load, environment"):
        resolve_backend(object())  # type: ignore[arg-type]


def test_class_is_made_into_an_instance() -> None:
    assert isinstance(resolve_backend(FakeBackend), FakeBackend)


def test_class_that_wants_arguments_says_so() -> None:
    class Remote(FakeBackend):
        def __init__(self, address: str) -> None:
            super().__init__(reason=address)

    with pytest.raises(BackendError, match="cannot be made without arguments") as caught:
        resolve_backend(Remote)
    assert "Remote(...)" in str(caught.value.hint)


def test_unavailable_backend_gives_its_reason() -> None:
    backend = FakeBackend(can_build=False, can_run=False, reason="pip install fake")
    with pytest.raises(BackendError, match="cannot build engines here") as caught:
        resolve_backend(backend)
    assert caught.value.hint == "pip install fake"


def test_backend_that_only_builds() -> None:
    backend = FakeBackend(can_run=False, reason="needs a GPU")
    assert resolve_backend(backend, to_run=False) is backend
    with pytest.raises(BackendError, match="cannot run networks here"):
        resolve_backend(backend)


def test_missing_onnxruntime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError) as caught:
        resolve_backend("onnxruntime")
    assert "pip install onnxruntime" in str(caught.value.hint)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "1"])
def test_number_of_threads_is_checked(threads: Any) -> None:
    with pytest.raises(BackendError, match="whole number"):
        check_threads(threads)


def test_runner_has_the_protocols_methods() -> None:
    assert all(hasattr(OnnxRuntimeRunner, name) for name in ("clock", "run", "outputs", "close"))


def test_importing_the_runtime_does_not_import_onnxruntime() -> None:
    code = (
        "import sys, foldcut.runtime.measure.measure, foldcut.runtime.onnxruntime.backend\n"
        "assert not {'onnxruntime', 'onnx'} & set(sys.modules)"  # torch comes with the package itself
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
