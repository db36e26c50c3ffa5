"""Where ONNX Runtime computes: the execution providers foldcut uses, what each needs, and whether it is here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

from ...compiler.support.errors import BackendError, first_line
from ..measure.backend import Availability
from ..measure.cuda_driver import open_driver
from ..measure.environment import version_tuple

Provider = Literal["cpu", "cuda", "tensorrt"]

_LEAST_VERSION = (1, 20)
_CUDA_LIBRARIES = "pip install 'onnxruntime-gpu[cuda,cudnn]'"


@dataclass(frozen=True, kw_only=True)
class ProviderSetup:
    """One way to run: ORT's names of the providers, best first, and the device that inputs and outputs lie on.

    The providers behind the first take the nodes that it does not know. `package` is what to install, `libraries` what
    it loads besides.
    """

    backend: str
    providers: tuple[str, ...]
    device: Literal["cpu", "cuda"]
    package: str
    libraries: str = ""

    @property
    def provider(self) -> str:
        """The provider that is asked for, by ORT's name."""
        return self.providers[0]


SETUPS: dict[Provider, ProviderSetup] = {
    "cpu": ProviderSetup(
        backend="onnxruntime", providers=("CPUExecutionProvider",), device="cpu", package="onnxruntime"
    ),
    "cuda": ProviderSetup(
        backend="onnxruntime-cuda",
        providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
        device="cuda",
        package="onnxruntime-gpu",
        libraries=_CUDA_LIBRARIES,
    ),
    "tensorrt": ProviderSetup(
        backend="onnxruntime-tensorrt",
        providers=("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
        device="cuda",
        package="onnxruntime-gpu",
        libraries=f"{_CUDA_LIBRARIES} and the TensorRT that it was built for",
    ),
}


def setup_of(provider: str) -> ProviderSetup:
    """Look up a provider. Raises BackendError for a name that is none of `SETUPS`."""
    for name, setup in SETUPS.items():
        if name == provider:
            return setup
    raise BackendError(
        f"ONNX Runtime is not used with the provider '{provider}'",
        expected=" or ".join(SETUPS),
        actual=provider,
        hint="use one of these",
    )


def provider_availability(setup: ProviderSetup) -> Availability:
    """Say whether ONNX Runtime with this provider can build (is installed) and run (finds its device)."""
    problem = _installation_problem(setup)
    if problem:
        return Availability(can_build=False, can_run=False, reason=problem)
    if setup.device == "cuda" and not cuda_devices():
        reason = "no NVIDIA GPU was found: run where nvidia-smi lists one (in a container: start it with --gpus all)"
        return Availability(can_build=True, can_run=False, reason=reason)
    return Availability(can_build=True, can_run=True, reason="")


def _installation_problem(setup: ProviderSetup) -> str:
    try:
        import onnxruntime
    except Exception as error:  # an ImportError, or an OSError from one of its libraries
        return f"pip install {setup.package} ({first_line(error)})"
    if not hasattr(onnxruntime, "InferenceSession"):
        # Of two packages that share a folder, removing one leaves the other without its files.
        return f"onnxruntime is installed in part: pip install --force-reinstall {setup.package}"
    version = onnxruntime.__version__
    if version_tuple(version) < _LEAST_VERSION:
        least = ".".join(map(str, _LEAST_VERSION))
        return f"onnxruntime {version} is too old: pip install '{setup.package}>={least}'"
    present = onnxruntime.get_available_providers()
    if setup.provider not in present:
        return (
            f"this onnxruntime has no {setup.provider} (it has {', '.join(present)}): "
            f"pip uninstall onnxruntime, then pip install {setup.package}"
        )
    return ""


def check_used(session: Any, setup: ProviderSetup) -> None:
    """Raise BackendError unless the session runs on the provider asked for: ORT falls back to the CPU in silence."""
    used = list(session.get_providers())
    if used[:1] != [setup.provider]:
        raise BackendError(
            f"ONNX Runtime did not start {setup.provider} and fell back",
            expected=setup.provider,
            actual=", ".join(used),
            hint=f"a library that it loads is missing or of another version: {setup.libraries or setup.package}",
        )


@contextmanager
def provider_libraries(setup: ProviderSetup) -> Iterator[None]:
    """Let a session that is made inside find CUDA and cuDNN where pip puts them; silences what ORT prints then."""
    if setup.device == "cpu":
        yield
        return
    import onnxruntime

    with redirect_stdout(StringIO()):
        preload = getattr(onnxruntime, "preload_dlls", None)  # from 1.21 on
        if preload is not None:
            preload()
        yield


def cuda_devices() -> tuple[str, ...]:
    """Name the NVIDIA GPUs that the driver offers to this process; none where there is no driver."""
    driver, count = open_driver()
    name = ctypes.create_string_buffer(256)
    names = []
    for index in range(count):
        known = driver.cuDeviceGetName(name, len(name), index) == 0
        names.append(name.value.decode(errors="replace") if known else f"GPU {index}")
    return tuple(names)
