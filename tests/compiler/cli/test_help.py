"""Help and completion: they name what there is, and do not wait for torch."""

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
