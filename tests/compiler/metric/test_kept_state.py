# ruff: noqa: NPY002 - numpy's older random numbers are those that belong to the process
"""What a metric sets in the process ends with it, however it ends."""

import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from foldcut.compiler.metric.kept_state import state_kept
from foldcut.compiler.metric.metric import Metric
from foldcut.compiler.support.progress import StageClock


@pytest.fixture(autouse=True)
def _unharmed(tmp_path: Path) -> Iterator[None]:
    """A test that fails leaves nothing to those behind it."""
    here, threads = Path.cwd(), torch.get_num_threads()
    yield
    os.chdir(here)
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_deterministic_debug_mode("default")
    torch.set_float32_matmul_precision("highest")
    torch.autograd.set_detect_anomaly(False)
    torch.set_autocast_enabled("cpu", False)
    torch.set_grad_enabled(True)
    torch.backends.mkldnn.enabled = True


def _drawn() -> tuple[float, float, float]:
    """The next numbers, which are not taken."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    found = float(torch.rand(())), float(np.random.rand()), random.random()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    return found


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "type": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "threads": (torch.get_num_threads, lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    "deterministic": (torch.get_deterministic_debug_mode, lambda: torch.use_deterministic_algorithms(True)),
    "precision": (torch.get_float32_matmul_precision, lambda: torch.set_float32_matmul_precision("medium")),
    "anomaly": (torch.is_anomaly_enabled, lambda: torch.autograd.set_detect_anomaly(True)),
    "onednn": (lambda: torch.backends.mkldnn.enabled, lambda: setattr(torch.backends.mkldnn, "enabled", False)),
    "autocast": (lambda: torch.is_autocast_enabled("cpu"), lambda: torch.set_autocast_enabled("cpu", True)),
    "gradients": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(not torch.is_grad_enabled())),
    "draws": (_drawn, lambda: (torch.rand(()), np.random.rand(), random.random())),
    "seeds": (_drawn, lambda: (torch.manual_seed(1), np.random.seed(1), random.seed(1))),
    "numpy's errors": (np.geterr, lambda: np.seterr(all="ignore")),
    "warnings": (lambda: list(warnings.filters), lambda: warnings.simplefilter("ignore")),
    "folder": (Path.cwd, lambda: os.chdir(os.sep)),
}


def read(measure: Callable[[Any], Any]) -> tuple[Any, list[str]]:
    """What a metric says of something, and what is told."""
    network: Any = SimpleNamespace(fingerprint="one")
    metric = Metric("its", measure, network, StageClock())
    return metric.read(network), metric.told


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ends", ["returns", "raises"])
def test_what_it_sets_ends_with_it(change: str, ends: str) -> None:
    asked, changed = CHANGES[change]
    seen: list[bool] = []

    def measure(_: Any) -> float:
        inside = asked()
        changed()
        seen.append(asked() != inside)
        if ends == "raises":
            raise ValueError("no")
        return 1.0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        before = asked()
        found, _ = read(measure)
    assert seen == [True], "it is set inside"
    assert (found is None) == (ends == "raises")
    if change != "warnings":
        assert asked() == before


def test_filters_of_warnings_come_back() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        read(lambda _: warnings.simplefilter("ignore") or 1.0)  # type: ignore[func-returns-value]
        warnings.warn("of the rest of the compile", stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["of the rest of the compile"]


def test_warnings_of_the_metric_are_heard() -> None:
    with pytest.warns(UserWarning, match="few samples"):
        read(lambda _: warnings.warn("few samples", stacklevel=1) or 1.0)  # type: ignore[func-returns-value]


def test_what_was_set_before_is_set_afterwards() -> None:
    """Not what torch begins with."""
    torch.set_default_dtype(torch.float64)
    torch.set_deterministic_debug_mode("warn")
    torch.set_float32_matmul_precision("high")
    with state_kept():
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    assert torch.get_default_dtype() is torch.float64
    assert torch.get_deterministic_debug_mode() == 1
    assert torch.get_float32_matmul_precision() == "high"


def test_an_inference_mode_that_is_left_open_ends_with_it() -> None:
    left = []

    def measure(_: Any) -> float:
        left.append(torch.inference_mode())
        left[0].__enter__()
        return 1.0

    assert read(measure)[0].value == 1.0
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    left[0].__exit__(None, None, None)


@pytest.mark.parametrize(("code", "said"), [(2, "SystemExit: 2"), (None, "SystemExit"), ("no data", "no data")])
def test_one_that_ends_the_process_is_told_of_and_ends_nothing(code: Any, said: str) -> None:
    def measure(_: Any) -> float:
        raise SystemExit(code)

    with pytest.warns(UserWarning, match=f"failed: .*{said}.*; the output error decides instead"):
        found, told = read(measure)
    assert found is None and len(told) == 1


def test_ctrl_c_ends_it_and_puts_everything_back() -> None:
    def measure(_: Any) -> float:
        torch.use_deterministic_algorithms(True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(measure)
    assert torch.get_deterministic_debug_mode() == 0


def test_a_folder_that_is_gone_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert read(lambda _: 1.0)[0].value == 1.0


def test_a_precision_that_torch_has_in_its_other_way_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to say it in the older way once it was set in the newer."""

    def refuses() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr("foldcut.compiler.metric.kept_state._SETTINGS", ((refuses, lambda before: None),))
    assert read(lambda _: 1.0)[0].value == 1.0
