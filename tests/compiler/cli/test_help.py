"""Help and completion: they name what there is, and do not wait for torch."""

import os
import subprocess
import sys

import pytest
from foldcut.compiler.cli.option_types import rewrite_names
from foldcut.compiler.driver.builtin import BUILT_IN

SCRIPT = """
import sys
from foldcut.compiler.cli.main import app
try:
    app({arguments!r}, standalone_mode=False)
finally:
    loaded = [name for name in ("torch", "onnx", "onnxruntime", "numpy", "scipy") if name in sys.modules]
    assert not loaded, loaded
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["compile", "--help"], ["synthesise", "--help"], ["measure", "--help"]]
)
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(arguments=arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_every_rewrite_is_named() -> None:
    assert set(rewrite_names()) == {rewrite.name for rewrite in BUILT_IN}


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_wait_without_spinning_unless_told_to(given: str | None) -> None:
    """What torch's threads do while they wait is read when it is loaded, so it is said before."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    code = "import os, sys, foldcut.compiler.cli.main; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [given or "PASSIVE", "False"]
