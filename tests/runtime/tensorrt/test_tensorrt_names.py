"""Every name that the backend takes from TensorRT: in the table, and in the bindings that are installed."""

import ast
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from foldcut.compiler.support.errors import BackendError
from foldcut.runtime.tensorrt import library as tensorrt_library
from foldcut.runtime.tensorrt.library import (
    FULL,
    OPTIONAL,
    REQUIRED,
    RTX,
    collected_messages,
    find_library,
    logger_of,
    missing_names,
)

SOURCES = sorted((Path(__file__).parents[3] / "runtime" / "tensorrt").glob("*.py"))

#: The names under which the source holds objects of TensorRT, and the classes of these.
HOLDERS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "network_tensor": "ITensor",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "config": "IBuilderConfig",
    "shapes": "IOptimizationProfile",
    "runtime": "Runtime",
    "cuda_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "runtime_config": "IRuntimeConfig",
    "inspector": "EngineInspector",
}
#: What TensorRT calls, and the source therefore defines.
CALLBACKS = {"log", "phase_start", "phase_finish", "step_complete", "report_layer_time"}


def own_name(node: ast.expr) -> str:
    """``config`` of `config`, of `self._config` and of `session.config`."""
    text = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return text.lstrip("_")


def names_used(path: Path) -> set[tuple[str, str]]:
    """(class, name) of everything that a file takes from TensorRT: `trt.Class.name`, and `name` of what it holds."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute) or node.attr == "__init__":
            continue
        owner = node.value
        if own_name(owner) == "trt":
            used.add((node.attr, ""))
        elif isinstance(owner, ast.Attribute) and own_name(owner.value) == "trt":
            used.add((owner.attr, node.attr))
        elif own_name(owner) in HOLDERS:
            used.add((HOLDERS[own_name(owner)], node.attr))
    return used


def used_anywhere() -> set[tuple[str, str]]:
    return {name for path in SOURCES for name in names_used(path)}


def table() -> set[tuple[str, str]]:
    both = {(kind, name) for part in (REQUIRED, OPTIONAL) for kind, names in part.items() for name in names}
    return both | {(kind, "") for kind, _ in both}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_name_that_is_used_is_in_the_table(path: Path) -> None:
    assert names_used(path) - table() == set()


def test_every_name_of_the_table_is_used() -> None:
    unused = {name for kind, name in table() - used_anywhere() if name}
    assert unused == CALLBACKS


def test_what_only_some_versions_have_is_asked_for_first() -> None:
    asked = {
        node.args[1].value
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and own_name(node.func) == "hasattr" and isinstance(node.args[1], ast.Constant)
    }
    # each of these comes with one that is asked for
    together = {"set_compute_capability", "num_compute_capabilities", "INVALID", "EAGER", "__members__"} | {
        *("create_runtime_config", "dynamic_shapes_kernel_specialization_strategy")
    }
    assert {name for names in OPTIONAL.values() for name in names} - together <= asked
    assert {"ComputeCapability", "DynamicShapesKernelSpecializationStrategy"} <= asked


def test_the_installed_bindings_have_every_name() -> None:
    try:
        library = find_library()
    except BackendError as error:
        pytest.skip(str(error.message))
    assert missing_names(library.trt) == ()
    if library.flavour == RTX:  # it has all the optional ones too
        lacking = [
            f"{kind}.{name}"
            for kind, names in OPTIONAL.items()
            for name in names
            if not hasattr(getattr(library.trt, kind, None), name)
        ]
        assert lacking == []


def made_up(version: str = "10.3.0", leave_out: str = "") -> Any:
    """MADE UP: a module with the names of the table and nothing behind them."""
    kinds = {
        kind: SimpleNamespace(**{name: None for name in names if f"{kind}.{name}" != leave_out})
        for kind, names in REQUIRED.items()
    }
    return SimpleNamespace(__version__=version, **kinds)


def install(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    def import_module(name: str) -> Any:
        found = modules.get(name, ImportError(f"No module named '{name}'"))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(tensorrt_library, "import_module", import_module)


def test_tensorrt_goes_before_tensorrt_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt=made_up("11.4.0"), tensorrt_rtx=made_up("1.7"))
    assert (find_library().flavour, find_library().version) == (FULL, "11.4.0")
    install(monkeypatch, tensorrt_rtx=made_up("1.7"), tensorrt_rtx_bindings=made_up("1.6"))
    assert find_library().title == "TensorRT-RTX 1.7"


def test_bindings_that_cannot_load_their_libraries_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt=OSError("libnvinfer.so.11: cannot open"), tensorrt_rtx_bindings=made_up("1.7"))
    assert find_library().flavour == RTX


def test_nothing_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt=OSError("libnvinfer.so.11: cannot open"))
    with pytest.raises(BackendError, match="not installed") as caught:
        find_library()
    assert "libnvinfer.so.11" in str(caught.value.actual)
    assert "pip install tensorrt_rtx_cu13_libs" in str(caught.value.hint)


@pytest.mark.parametrize(("module", "version"), [("tensorrt", "8.6.1"), ("tensorrt_rtx", "0.9"), ("tensorrt", "?")])
def test_a_version_that_is_too_old(monkeypatch: pytest.MonkeyPatch, module: str, version: str) -> None:
    install(monkeypatch, **{module: made_up(version)})
    with pytest.raises(BackendError, match="too old") as caught:
        find_library()
    assert caught.value.actual == version


def test_a_version_that_lacks_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt=made_up("12.0", leave_out="IBuilderConfig.progress_monitor"))
    with pytest.raises(BackendError, match=r"TensorRT 12\.0 lacks .*IBuilderConfig\.progress_monitor"):
        find_library()


def test_messages_are_those_of_the_work_inside() -> None:
    """MADE UP: a module with a logger's base class."""
    trt = ModuleType("made_up")
    trt.ILogger = type("ILogger", (), {})  # type: ignore[attr-defined]
    logger = logger_of(trt)
    assert logger_of(trt) is logger
    severity = SimpleNamespace
    logger.log(severity(name="ERROR"), "before")
    with collected_messages() as outer:
        logger.log(severity(name="WARNING"), "careful")
        with collected_messages() as inner:
            logger.log(severity(name="INTERNAL_ERROR"), " broken \n")
        logger.log(severity(name="VERBOSE"), "chatter")
    assert inner.first_error() == "broken"
    assert outer.lines == [("WARNING", "careful")]
    assert outer.first_error() == ""
