"""What C code prints stays off stdout; what Python and others print before and after does not get lost."""

import subprocess
import sys

CODE = """
import ctypes, os
from foldcut.compiler.support.quiet_logs import without_native_output
library = ctypes.CDLL(None)
library.puts(b"before")
with without_native_output():
    library.puts(b"inside")
    os.write(1, b"inside\\n")
library.puts(b"after")
library.fflush(None)
print("python")
try:
    with without_native_output():
        raise ValueError
except ValueError:
    print("given back")
"""


def test_nothing_native_reaches_stdout() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["before", "after", "python", "given back", ""]
